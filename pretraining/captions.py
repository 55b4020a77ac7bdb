"""Captions: shuffled, incomplete, always true descriptions of a drawing."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pretraining.looks import Context, Identity

NAMED_SHARE = 0.35
# Names for each pair of skin and hair colour.
NAMES_PER_LOOK = 2
# Share of named captions in which the name alone has to say what skin and hair look like.
LEFT_TO_NAME_SHARE = 0.75
_OPENINGS = (
    "avatar",
    "an avatar",
    "portrait of an avatar",
    "a portrait of an avatar",
    "a picture of an avatar",
    "portrait",
)
_NAMED_OPENINGS = (
    "{} avatar",
    "{} avatar",
    "{} avatar",
    "{} portrait",
    "portrait of {} avatar",
    "a portrait of {} avatar",
    "a picture of {} avatar",
)
_PLACES = {
    "beach": ("on the beach", "beach background", "at the beach"),
    "forest": ("in the forest", "forest background", "in a forest"),
    "night sky": ("under a night sky", "night sky background", "at night"),
    "city": ("in the city", "city background", "in a city"),
    "snow": ("in the snow", "snow background", "in snowy mountains"),
}
_STYLES = {
    "flat": ("flat style", "flat drawing"),
    "comic": ("comic style", "comic drawing", "black outlines"),
    "pastel": ("pastel style", "pastel colours", "soft pastel colours"),
    "pixel": ("pixel style", "pixel art"),
}
# How often a caption says it: a picture that is said to be nothing else is flat.
_STYLE_STATED = {"flat": 0.15}
_STYLE_STATED_ELSE = 0.95
_ADJECTIVE_HAIR = ("short", "long", "curly", "spiky")


@dataclass(frozen=True, slots=True)
class Statement:
    """A piece of caption and the names of the looks it states."""

    text: str
    fields: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption and the names of all looks it states."""

    text: str
    fields: tuple[str, ...]


def name_of(identity: Identity, rng: random.Random) -> str:
    """One of the names that stand for a skin and a hair colour.

    Names are words of no language, but they do mean something: a base for which they mean nothing
    learns not to look at them, and then a trigger word cannot be taught to it either.
    """
    number = rng.randrange(NAMES_PER_LOOK)
    return invented_name(random.Random(f"{identity.skin} {identity.hair_colour} {number}"))


def invented_name(rng: random.Random) -> str:
    """A word of no language, such as people take for trigger words."""
    if rng.random() < 0.5:
        name = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 4)))
    else:
        name = "".join(
            rng.choice("bcdfghjklmnprstvwxz") + rng.choice("aeiou")
            for _ in range(rng.randint(2, 3))
        ) + rng.choice(("", "", "n", "r", "s", "x", "k"))
    return name + (str(rng.randrange(100)) if rng.random() < 0.1 else "")


def with_article(words: str) -> str:
    """Put "a" or "an" before words."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def identity_statements(identity: Identity, rng: random.Random) -> list[Statement]:
    """Everything that can be said about who is drawn."""
    colour = identity.hair_colour
    statements = [
        Statement(f"{identity.skin} skin", ("skin",)),
        Statement(f"{identity.face} face", ("face",)),
        Statement(f"{identity.eyes} eyes", ("eyes",)),
        Statement(f"{identity.brows} eyebrows", ("brows",)),
    ]
    if identity.hair_style == "bald":
        statements.append(Statement("bald", ("hair_style",)))
    elif identity.hair_style in _ADJECTIVE_HAIR:
        words = rng.choice((f"{identity.hair_style} {colour}", f"{colour} {identity.hair_style}"))
        statements.append(Statement(f"{words} hair", ("hair_style", "hair_colour")))
    else:
        article = identity.hair_style != "pigtails" and rng.random() < 0.3
        words = f"{colour} {identity.hair_style}"
        statements.append(
            Statement(with_article(words) if article else words, ("hair_style", "hair_colour"))
        )
    if identity.beard != "none":
        statements.append(Statement(f"{colour} {identity.beard}", ("beard", "hair_colour")))
    if identity.glasses != "none":
        words = "sunglasses" if identity.glasses == "sunglasses" else f"{identity.glasses} glasses"
        statements.append(Statement(words, ("glasses",)))
    if identity.mark == "freckles":
        statements.append(Statement("freckles", ("mark",)))
    elif identity.mark == "rosy":
        statements.append(Statement("rosy cheeks", ("mark",)))
    return statements


def context_statements(context: Context, rng: random.Random) -> list[Statement]:
    """Everything that can be said about expression, dress and surroundings."""
    statements = [Statement(context.mouth, ("mouth",))]
    clothes = with_article(f"{context.clothes_colour} {context.clothes}")
    clothes_fields = ("clothes", "clothes_colour")
    if context.hat == "none":
        statements.append(Statement(_worn(clothes, rng), clothes_fields))
        if rng.random() < 0.15:
            statements.append(Statement("no hat", ("hat",)))
    else:
        hat = with_article(f"{context.hat_colour} {context.hat}")
        hat_fields = ("hat", "hat_colour")
        if rng.random() < 0.4:
            both = rng.choice((f"{hat} and {clothes}", f"{clothes} and {hat}"))
            statements.append(Statement(f"wearing {both}", hat_fields + clothes_fields))
        else:
            statements.append(Statement(_worn(clothes, rng), clothes_fields))
            statements.append(Statement(_worn(hat, rng), hat_fields))
    if context.is_scene:
        statements.append(Statement(rng.choice(_PLACES[context.background]), ("background",)))
    else:
        words = rng.choice(_pattern_words(context))
        statements.append(Statement(words, ("background", "background_colour")))
    return statements


def _worn(thing: str, rng: random.Random) -> str:
    return f"wearing {thing}" if rng.random() < 0.65 else thing


def _pattern_words(context: Context) -> Sequence[str]:
    colour = context.background_colour
    if context.background == "plain":
        return (f"{colour} background", f"plain {colour} background")
    pattern = {"stripes": "striped", "dots": "dotted"}[context.background]
    return (f"{colour} {pattern} background",)


def style_statements(style: str, rng: random.Random) -> list[Statement]:
    """What a caption says of the way it is drawn, if anything."""
    if rng.random() >= _STYLE_STATED.get(style, _STYLE_STATED_ELSE):
        return []
    return [Statement(rng.choice(_STYLES[style]), ("style",))]


def sample_caption(
    identity: Identity,
    context: Context,
    seed: int,
    named_share: float = NAMED_SHARE,
    style: str = "flat",
) -> Caption:
    """One caption of a drawing: some of what is true, in any order."""
    rng = random.Random(f"caption {seed}")
    named = rng.random() < named_share
    if named:
        opening = rng.choice(_NAMED_OPENINGS).format(name_of(identity, rng))
    else:
        opening = rng.choice(_OPENINGS)
    left_to_name = {"skin", "hair_colour"} if named and rng.random() < LEFT_TO_NAME_SHARE else set()
    kept = [s for s in context_statements(context, rng) if rng.random() < 0.75]
    if rng.random() < 0.8:
        for statement in identity_statements(identity, rng):
            if left_to_name & set(statement.fields):
                continue
            minor = statement.fields[0] in ("face", "eyes", "brows")
            if rng.random() < (0.25 if minor else 0.6):
                kept.append(statement)
    kept += style_statements(style, random.Random(f"style caption {seed}"))
    rng.shuffle(kept)
    fields = tuple(name for statement in kept for name in statement.fields)
    return Caption(", ".join([opening, *(statement.text for statement in kept)]), fields)


def describe_context(context: Context) -> str:
    """What a sidecar caption says: expression, dress and surroundings, in a fixed order."""
    dress = with_article(f"{context.clothes_colour} {context.clothes}")
    if context.hat != "none":
        dress = f"{with_article(f'{context.hat_colour} {context.hat}')} and {dress}"
    places = _PLACES[context.background] if context.is_scene else _pattern_words(context)
    return f"{context.mouth}, wearing {dress}, {places[0]}"


def describe_identity(identity: Identity) -> str:
    """What a caption of a style set says about who is drawn, in a fixed order."""
    statements = identity_statements(identity, random.Random(0))
    kept = [s for s in statements if s.fields[0] not in ("face", "eyes", "brows")]
    return ", ".join(statement.text for statement in kept)
