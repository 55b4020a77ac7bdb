"""Who is drawn (Identity) and how they appear today (Context), and how both are sampled.

The two are kept apart so that one avatar can be drawn in many contexts, and so that what a
caption says about either can be checked.
"""

import random
from dataclasses import dataclass

from pretraining import palette

FACES = ("round", "long", "square")
HAIR_STYLES = ("bald", "short", "long", "bob", "curly", "spiky", "bun", "pigtails", "mohawk")
EYES = ("big", "small", "sleepy")
BROWS = ("thin", "thick")
BEARDS = ("none", "beard", "moustache")
GLASSES = ("none", "round", "square", "sunglasses")
MARKS = ("none", "freckles", "rosy", "star")

HATS = ("none", "cap", "beanie", "top hat", "crown")
CLOTHES = ("t-shirt", "hoodie", "suit", "striped shirt")
MOUTHS = ("smiling", "laughing", "serious", "sad", "surprised")
PATTERNS = ("plain", "stripes", "dots")
SCENES = ("beach", "forest", "night sky", "city", "snow")
COLOURS = tuple(palette.BOLD)

STYLES = ("flat", "comic", "pastel", "pixel", "neon")

# Never drawn in pretraining, so that a LoRA has something new to learn.
HELD_OUT_SKIN = "teal"
HELD_OUT_HAIR_STYLE = "mohawk"
HELD_OUT_MARK = "star"
HELD_OUT_STYLE = "neon"


@dataclass(frozen=True, slots=True)
class Identity:
    """What stays with an avatar in every picture."""

    skin: str
    face: str
    hair_style: str
    hair_colour: str
    eyes: str
    brows: str
    beard: str
    glasses: str
    mark: str


@dataclass(frozen=True, slots=True)
class Context:
    """What changes from picture to picture.

    `background` is one of PATTERNS or SCENES. Shifts are in hundredths of the picture's side,
    the tilt of the head is in degrees.
    """

    hat: str
    hat_colour: str
    clothes: str
    clothes_colour: str
    mouth: str
    background: str
    background_colour: str
    shift_x: float = 0.0
    shift_y: float = 0.0
    scale: float = 1.0
    tilt: float = 0.0
    scatter: int = 0

    @property
    def is_scene(self) -> bool:
        """Whether the background is a place rather than a coloured pattern."""
        return self.background in SCENES


def sample_identity(seed: int) -> Identity:
    """Draw an avatar at random; the held-out looks never come up."""
    rng = random.Random(f"identity {seed}")
    hair_style = rng.choice([style for style in HAIR_STYLES if style != HELD_OUT_HAIR_STYLE])
    return Identity(
        skin=rng.choice([skin for skin in palette.SKIN if skin != HELD_OUT_SKIN]),
        face=rng.choice(FACES),
        hair_style=hair_style,
        hair_colour=rng.choice(tuple(palette.HAIR)),
        eyes=rng.choice(EYES),
        brows=rng.choice(BROWS),
        beard=rng.choices(BEARDS, weights=(6, 2, 2))[0],
        glasses=rng.choices(GLASSES, weights=(6, 2, 1, 1))[0],
        mark=rng.choices(("none", "freckles", "rosy"), weights=(2, 1, 1))[0],
    )


def sample_context(seed: int) -> Context:
    """Draw clothes, expression, surroundings and pose at random."""
    rng = random.Random(f"context {seed}")
    scene = rng.random() < 0.4
    return Context(
        hat=rng.choices(HATS, weights=(6, 1, 1, 1, 1))[0],
        hat_colour=rng.choice(COLOURS),
        clothes=rng.choice(CLOTHES),
        clothes_colour=rng.choice(COLOURS),
        mouth=rng.choice(MOUTHS),
        background=rng.choice(SCENES) if scene else rng.choices(PATTERNS, weights=(5, 2, 2))[0],
        background_colour=rng.choice(COLOURS),
        shift_x=rng.uniform(-5, 5),
        shift_y=rng.uniform(-2.5, 2.5),
        scale=rng.uniform(0.97, 1.14),
        tilt=rng.uniform(-10, 10),
        scatter=rng.randrange(1000),
    )


def sample_style(seed: int) -> str:
    """Draw a drawing style at random; the held-out one never comes up."""
    styles = [style for style in STYLES if style != HELD_OUT_STYLE]
    return random.Random(f"style {seed}").choices(styles, weights=(7, 1, 1, 1))[0]
