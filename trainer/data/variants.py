"""Changed versions of each training picture: closer, moved, brighter or paler, mirrored.

With few photos the same pixels come hundreds of times, and the model learns them by heart; versions
that differ in what does not matter make it learn the subject instead. They are fixed before the
training (each follows from the run's seed and the picture), so they are encoded once and cached.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trainer.data.buckets import HEAD_ROOM_ABOVE, HEAD_ROOM_BESIDE, Room, crop_room
from trainer.types import Bucketed, Size, Variant

# Rounding to whole pixels may make a face this much longer than its exact size.
_ROUNDING_PX = 2


@dataclass(frozen=True, slots=True)
class VariantPlan:
    """Which versions are made of each photo.

    count: how many changed versions beside the plain one.
    zoom: a version shows between 1 - zoom and 1 of the plain crop's width and height.
    shift: its crop moves by up to this share of the room it has.
    colour: its brightness, contrast and saturation are multiplied by between 1 - colour and
    1 + colour.
    flip: of each version, the plain one too, a mirrored one as well.
    """

    count: int = 0
    zoom: float = 0.0
    shift: float = 0.0
    colour: float = 0.0
    flip: bool = False
    seed: int = 0


def add_variants(bucketed: Sequence[Bucketed], plan: VariantPlan) -> tuple[Bucketed, ...]:
    """Each plain training picture, followed by its changed versions.

    All share the plain picture's group, of which each epoch takes one. Every number is a pure
    function of the seed, the group and the version's number. A version that came out equal to one
    before it (a photo without room to move, a plan that changes nothing) is left out.

    Args:
        bucketed: plain training pictures, as `place_photos` makes them.
        plan: what is made of each.
    """
    made: list[Bucketed] = []
    for plain in bucketed:
        versions = {_look(plain): plain}
        for number in range(1, plan.count + 1):
            version = _changed(plain, number, plan)
            versions.setdefault(_look(version), version)
        for version in versions.values():
            made.append(version)
            if plan.flip:
                made.append(replace(version, variant=replace(version.variant, flip=True)))
    return tuple(made)


def sample_key(bucketed: Bucketed) -> str:
    """The name of a training picture in every random draw, unique for each.

    It is the photo's digest, with `+flip` when mirrored; further parts name what only some runs
    have: equal files, several resolutions, further sets, changed versions.
    """
    return f"{bucketed.group or bucketed.captioned.photo.digest}{_version(bucketed)}"


def picture_key(bucketed: Bucketed) -> str:
    """The name of what is seen in a training picture, whichever set or resolution it is for."""
    return f"{bucketed.captioned.photo.digest}{_version(bucketed)}"


def _version(bucketed: Bucketed) -> str:
    number = f"+{bucketed.variant.number}" if bucketed.variant.number else ""
    return f"{number}{'+flip' if bucketed.variant.flip else ''}"


def _changed(plain: Bucketed, number: int, plan: VariantPlan) -> Bucketed:
    def factor(what: str) -> float:
        return 1.0 + plan.colour * (2.0 * _uniform(plan.seed, plain, number, what) - 1.0)

    shown = 1.0 - plan.zoom * _uniform(plan.seed, plain, number, "zoom")
    resized = _zoomed(plain, min(1.0 / shown, _largest_zoom(plain)))
    across, down = crop_room(plain.bucket, resized, plain.captioned.photo.size, plain.faces)
    left = _middle_kept(plain.left, plain.bucket.width, plain.resized.width, resized.width)
    top = _middle_kept(plain.top, plain.bucket.height, plain.resized.height, resized.height)
    if resized != plain.resized:
        left, top = across.nearest(left), down.nearest(top)
    return replace(
        plain,
        resized=resized,
        left=_moved(left, across, plan.shift, _uniform(plan.seed, plain, number, "across")),
        top=_moved(top, down, plan.shift, _uniform(plan.seed, plain, number, "down")),
        variant=Variant(
            number=number,
            brightness=factor("brightness"),
            contrast=factor("contrast"),
            saturation=factor("saturation"),
        ),
    )


def _largest_zoom(plain: Bucketed) -> float:
    """How much larger the picture may be made: not beyond the photo's own pixels (unless the plain
    crop is beyond them already), nor so that the largest face's head no longer fits the crop."""
    photo, bucket, resized = plain.captioned.photo.size, plain.bucket, plain.resized
    limit = float("inf")
    if resized.width <= photo.width and resized.height <= photo.height:
        limit = min(photo.width / resized.width, photo.height / resized.height)
    if plain.faces:
        box = plain.faces[0].box
        wide = (1.0 + 2.0 * HEAD_ROOM_BESIDE, 1.0)
        high = (1.0 + HEAD_ROOM_ABOVE + HEAD_ROOM_BESIDE, 1.0)
        across = _room_for(box.width * resized.width / photo.width, bucket.width, wide)
        down = _room_for(box.height * resized.height / photo.height, bucket.height, high)
        limit = min(limit, across, down)
    return max(limit, 1.0)


def _room_for(face: float, window: int, parts: tuple[float, ...]) -> float:
    """By how much a face may grow until the first of `parts` that fits now, its head or it alone,
    just fits the window; 1 if none does."""
    limits = ((window - _ROUNDING_PX) / (face * part) for part in parts)
    return next((limit for limit in limits if limit >= 1.0), 1.0)


def _zoomed(plain: Bucketed, factor: float) -> Size:
    """The size that the whole photo is resized to, `factor` times the plain one, rounded down."""
    return Size(int(plain.resized.width * factor), int(plain.resized.height * factor))


def _middle_kept(start: int, window: int, before: int, after: int) -> int:
    """Where a crop begins after a resize for its middle to stay where it was in the photo."""
    return (2 * start + window) * after // (2 * before) - window // 2


def _moved(start: int, room: Room, shift: float, draw: float) -> int:
    """`start` moved by up to a share of the room on either side; `draw`: 0..1, 0.5 not at all."""
    step = 2.0 * draw - 1.0
    end = max(room.last, start) if step > 0 else min(room.first, start)
    return start + round(abs(step) * shift * (end - start))


def _look(item: Bucketed) -> tuple[Size, int, int, Variant]:
    """Equal for versions of a photo that are the same picture."""
    return item.resized, item.left, item.top, replace(item.variant, number=0)


def _uniform(seed: int, plain: Bucketed, number: int, what: str) -> float:
    """A number in [0, 1) that is the same for ever, whatever the version of Python."""
    text = f"{seed}/{sample_key(plain)}/{number}/{what}".encode()
    # 53 bits are what a float can tell apart.
    return (int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 11) / 2**53
