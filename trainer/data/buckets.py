"""Aspect-ratio buckets: which shape each photo is trained at, and which part of it.

Pure arithmetic, no pictures. Photos of one bucket have the same size and can share a batch, and
hardly anything is cropped. The idea is known from the training of NovelAI's models (2022), and from
sd-scripts, which made it usual for LoRA training; the rule here is ours: only sizes that no other
size within the same area contains, nothing enlarged unasked, and heads kept whole.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trainer.errors import ConfigError
from trainer.types import Bucketed, Captioned, Face, Size

# A detector's box ends at the brow and the cheeks; of the face's height and sides, so much more
# belongs to the head.
HEAD_ROOM_ABOVE = 0.4
HEAD_ROOM_BESIDE = 0.25


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """How photos become training sizes.

    resolutions: each photo is trained once at each of them, in pixels of a square's side.
    step_px: sides are multiples of this. max_aspect: the longer side over the shorter at most.
    enlarge: enlarge photos that are too small; else they are trained at the size they have.
    face_crop: place the crop so that faces stay whole; else in the middle.
    """

    resolutions: tuple[int, ...]
    step_px: int
    max_aspect: float = 2.0
    enlarge: bool = False
    face_crop: bool = True


class Placement(NamedTuple):
    """Resize to `resized`, then crop `bucket` out of it at (`left`, `top`); pixels."""

    bucket: Size
    resized: Size
    left: int
    top: int


class Room(NamedTuple):
    """Where a crop may begin along one side of a picture: from `first` to `last`, in pixels."""

    first: int
    last: int

    def nearest(self, start: int) -> int:
        return min(max(start, self.first), self.last)


def make_buckets(resolution_px: int, *, step_px: int, max_aspect: float = 2.0) -> tuple[Size, ...]:
    """All training sizes of about `resolution_px` squared pixels, narrowest first.

    Sides are multiples of `step_px`, areas at most `resolution_px` squared, the longer side at
    most `max_aspect` times the shorter. The square is always there; every other size is as large
    as these bounds let it be: neither side could be a step longer. With a size its transpose is
    there too.

    Raises:
        ConfigError: the resolution is less than one step.
    """
    if resolution_px < step_px:
        raise ConfigError(
            f"A resolution of {resolution_px} px is less than one bucket step of {step_px} px.",
            where="data.resolution",
            fix=f"Set it to {step_px} or more.",
        )
    limit = resolution_px * resolution_px // (step_px * step_px)  # areas in squares of one step
    square = resolution_px // step_px
    found = {(square, square)}
    for height in range(1, square + 1):
        width = min(limit // height, math.floor(max_aspect * height))
        if width >= height == limit // width:
            found |= {(width, height), (height, width)}
    sizes = (Size(width * step_px, height * step_px) for width, height in found)
    return tuple(sorted(sizes, key=lambda size: (_log_aspect(size), size)))


def assign(photo_size: Size, buckets: Sequence[Size]) -> Placement:
    """The bucket nearest in aspect (by its logarithm), and the centre crop that fills it.

    The photo is resized to cover the bucket, which changes its aspect by rounding only (less
    than a pixel); among buckets equally near, the largest is taken.
    """
    aspect = _log_aspect(photo_size)
    bucket = min(buckets, key=lambda b: (abs(_log_aspect(b) - aspect), -b.area, b))
    if bucket.width * photo_size.height >= bucket.height * photo_size.width:
        height = _rounded(photo_size.height * bucket.width, photo_size.width)
        resized = Size(bucket.width, max(height, bucket.height))
    else:
        width = _rounded(photo_size.width * bucket.height, photo_size.height)
        resized = Size(max(width, bucket.width), bucket.height)
    left = (resized.width - bucket.width) // 2
    top = (resized.height - bucket.height) // 2
    return Placement(bucket, resized, left, top)


def sizes_inside(photo_size: Size, resolution_px: int, plan: BucketPlan) -> tuple[Size, ...]:
    """The sizes of whole steps that a photo can be cut to without enlarging it.

    They keep the area and the aspect of the plan, and none could be a step longer. Of a photo
    with a side below one step: the sizes inside it when it is enlarged to one step.
    """
    step = plan.step_px
    short = min(photo_size.width, photo_size.height)
    if short < step:
        width, height = photo_size.width * step // short, photo_size.height * step // short
        photo_size = Size(width, height)
    limit = resolution_px * resolution_px // (step * step)
    columns, rows = photo_size.width // step, photo_size.height // step
    found: list[Size] = []
    widest = 0
    for height in range(rows, 0, -1):
        width = min(columns, limit // height, math.floor(plan.max_aspect * height))
        if width > widest and height <= plan.max_aspect * width:
            found.append(Size(width * step, height * step))
            widest = width
    return tuple(found)


def place(photo_size: Size, resolution_px: int, plan: BucketPlan) -> Placement:
    """The bucket of a photo at one resolution, and its centre crop.

    Unless `plan.enlarge`, a photo that is too small for its bucket goes to the size inside it
    that is nearest in aspect.

    Raises:
        ConfigError: the resolution is less than one step.
    """
    buckets = make_buckets(resolution_px, step_px=plan.step_px, max_aspect=plan.max_aspect)
    placement = assign(photo_size, buckets)
    bucket = placement.bucket
    fits = bucket.width <= photo_size.width and bucket.height <= photo_size.height
    if fits or plan.enlarge:
        return placement
    return assign(photo_size, sizes_inside(photo_size, resolution_px, plan))


def place_photos(
    captioned: Sequence[Captioned],
    plan: BucketPlan,
    faces: Mapping[str, tuple[Face, ...]],
    *,
    repeats: int = 1,
    weight: float = 1.0,
    set_key: str = "",
) -> tuple[Bucketed, ...]:
    """Place the photos of one set: each in exactly one bucket at each resolution.

    Args:
        captioned: the photos; their order is kept, with the resolutions of each beside each other.
        plan: the sizes.
        faces: by the photo's digest, in pixels of the upright photo, the largest first.
        repeats, weight: of the set.
        set_key: tells the groups of this set from those of others, which may hold the same
            picture; "" for the main set.

    Returns:
        The plain training pictures: one for each resolution, but for a photo that is too small
        for several of them, which is trained once at the size that it gets in all. A group is
        named by the photo's digest, with its number among equal files from the second on, and with
        the resolution where there are several.

    Raises:
        ConfigError: a resolution is less than one step.
    """
    seen: Counter[str] = Counter()
    placed = []
    for item in captioned:
        digest, size = item.photo.digest, item.photo.size
        seen[digest] += 1
        copy = f"#{seen[digest]}" if seen[digest] > 1 else ""
        found = faces.get(digest, ())
        taken: set[Placement] = set()
        for resolution in plan.resolutions:
            placement = place(size, resolution, plan)
            if plan.face_crop and found:
                placement = around_faces(placement, size, found)
            if placement in taken:
                continue  # a photo too small for both would count twice
            taken.add(placement)
            at = f"@{resolution}" if len(plan.resolutions) > 1 else ""
            of_set = f"/{set_key}" if set_key else ""
            placed.append(
                Bucketed(
                    item,
                    *placement,
                    repeats=repeats,
                    weight=weight,
                    faces=found,
                    group=f"{digest}{copy}{at}{of_set}",
                )
            )
    return tuple(placed)


def bucket_counts(bucketed: Iterable[Bucketed]) -> dict[Size, int]:
    """How many photos each bucket holds, narrowest bucket first."""
    counts = Counter(item.bucket for item in bucketed)
    return dict(sorted(counts.items(), key=lambda item: (_log_aspect(item[0]), item[0])))


def around_faces(placement: Placement, photo_size: Size, faces: Sequence[Face]) -> Placement:
    """The same crop, slid no further than the faces need."""
    across, down = crop_room(placement.bucket, placement.resized, photo_size, faces)
    return placement._replace(left=across.nearest(placement.left), top=down.nearest(placement.top))


def crop_room(
    bucket: Size, resized: Size, photo_size: Size, faces: Sequence[Face]
) -> tuple[Room, Room]:
    """Where the crop may begin, across and down, so that the faces are inside it.

    Faces are considered in their order (the largest first), each with the room that its head needs
    where that is to be had. A face that does not fit beside those before it is given up; one that
    is too large for the crop leaves a single place, where it is as centred as can be.

    Args:
        bucket, resized: of the crop.
        photo_size: of the upright photo, in whose pixels the faces' boxes are.
        faces: the largest first; none leave all the room there is.
    """
    boxes = [face.box for face in faces]
    across = _room(
        bucket.width,
        resized.width,
        photo_size.width,
        [(b.left, b.right, HEAD_ROOM_BESIDE * b.width, HEAD_ROOM_BESIDE * b.width) for b in boxes],
    )
    down = _room(
        bucket.height,
        resized.height,
        photo_size.height,
        [(b.top, b.bottom, HEAD_ROOM_ABOVE * b.height, HEAD_ROOM_BESIDE * b.height) for b in boxes],
    )
    return across, down


def _room(
    window: int, length: int, full: int, spans: Sequence[tuple[int, int, float, float]]
) -> Room:
    """Where a `window` may begin on `length` pixels, which are `full` pixels of the photo.

    spans: of the faces in pixels of the photo: start, end, and the head's room before and after.
    """
    room = Room(0, length - window)
    for number, (start, end, before, after) in enumerate(spans):
        for low, high in ((start, end), (start - before, end + after)):
            first = min(max(math.floor(low * length / full), 0), length)
            last = min(max(math.ceil(high * length / full), 0), length)
            kept = Room(max(room.first, last - window), min(room.last, first))
            if kept.first <= kept.last:
                room = kept
            elif number == 0:
                centred = room.nearest((first + last - window) // 2)
                room = Room(centred, centred)
    return room


def _log_aspect(size: Size) -> float:
    # The difference is antisymmetric to the last bit: a photo and its transpose go to a bucket
    # and its transpose.
    return math.log(size.width) - math.log(size.height)


def _rounded(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)
