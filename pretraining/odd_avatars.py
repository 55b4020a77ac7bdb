"""Avatars with features of chance, so that the identity embedding looks at what it never saw.

Real avatars come with hair and marks that no list has. Here some heads get a smooth crest of any
shape and colour, some cheeks a patch; near twins differ in just these. None of them is a mohawk or
a star: those stay held out.
"""

import math
import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from pretraining.avatars import draw_avatar
from pretraining.hair import HEADS
from pretraining.looks import Context, Identity, sample_context, sample_identity
from pretraining.palette import Rgb
from pretraining.pen import Pen, Point, Pose

_NECK = (50.0, 80.0)
_FACTOR = 3


@dataclass(frozen=True, slots=True)
class OddAvatar:
    """An avatar, the outline of a crest relative to the crown of the head, and a cheek's patch.

    Outlines are in hundredths of the picture's side; an empty one is not there.
    """

    identity: Identity
    crest: tuple[Point, ...] = ()
    crest_colour: Rgb = (0, 0, 0)
    patch: tuple[Point, ...] = ()
    patch_colour: Rgb = (0, 0, 0)


def odd_avatar(number: int) -> OddAvatar:
    """Avatar `number`; an odd one is the near twin of the one before."""
    rng = random.Random(f"odd {number - number % 2}")
    identity = sample_identity(rng.randrange(10**9))
    crested = rng.random() < 0.8
    first = OddAvatar(
        replace(identity, hair_style="bald") if crested else identity,
        _crest(rng) if crested else (),
        _colour(rng),
        _patch(rng) if rng.random() < 0.5 else (),
        _colour(rng),
    )
    return _twin(first, random.Random(f"odd twin {number}")) if number % 2 else first


def _twin(avatar: OddAvatar, rng: random.Random) -> OddAvatar:
    change = rng.choice(("crest", "colour", "hair", "patch", "face", "skin"))
    other = sample_identity(rng.randrange(10**9))
    if avatar.crest and change == "crest":
        return replace(avatar, crest=_crest(rng))
    if avatar.crest and change == "colour":
        return replace(avatar, crest_colour=_colour(rng))
    if avatar.crest and change == "hair":
        hair = replace(avatar.identity, hair_style=other.hair_style)
        return replace(avatar, identity=hair, crest=())
    if change == "face":
        faces = [face for face in HEADS if face != avatar.identity.face]
        return replace(avatar, identity=replace(avatar.identity, face=rng.choice(faces)))
    if change == "skin" and other.skin != avatar.identity.skin:
        return replace(avatar, identity=replace(avatar.identity, skin=other.skin))
    return replace(avatar, patch=() if avatar.patch else _patch(rng))


def draw_odd(avatar: OddAvatar, seed: int) -> Image.Image:
    """The avatar at 64 px in the context of a seed, mostly without a hat."""
    context = sample_context(seed)
    if seed % 2:
        context = replace(context, hat="none")
    image = draw_avatar(avatar.identity, context, 64 * _FACTOR, oversampling=1)
    pen = Pen(ImageDraw.Draw(image), unit_px=image.width / 100).posed(_pose(context))
    head = HEADS[avatar.identity.face]
    if avatar.crest and context.hat == "none":
        pen.blob([(50 + x, head.top + y) for x, y in avatar.crest], avatar.crest_colour)
    if avatar.patch and avatar.identity.glasses != "sunglasses":
        cheek = 50 + head.half_width * 0.62
        pen.polygon([(cheek + x, 64 + y) for x, y in avatar.patch], avatar.patch_colour)
    return image.resize((64, 64), Image.Resampling.BOX)


def _pose(context: Context) -> Pose:
    return Pose(_NECK, context.tilt, context.scale, (context.shift_x, context.shift_y))


def _colour(rng: random.Random) -> Rgb:
    return (rng.randrange(256), rng.randrange(256), rng.randrange(256))


def _crest(rng: random.Random) -> tuple[Point, ...]:
    """A smooth lobed shape that sits on the crown."""
    count, half = rng.randint(3, 7), rng.uniform(8, 24)
    height = rng.uniform(4, 20)
    over = [
        (half * (2 * k / (count - 1) - 1), -height * rng.uniform(0.3, 1.1)) for k in range(count)
    ]
    return ((-half * 0.8, 10.0), *over, (half * 0.8, 10.0), (0.0, 12.0))


def _patch(rng: random.Random) -> tuple[Point, ...]:
    """An upright box or a round patch."""
    rx, ry = rng.uniform(3, 6.5), rng.uniform(3, 6.5)
    if rng.random() < 0.4:
        return ((-rx, -ry), (rx, -ry), (rx, ry), (-rx, ry))
    angles = [2 * math.pi * k / 12 for k in range(12)]
    return tuple((rx * math.cos(angle), ry * math.sin(angle)) for angle in angles)
