"""Aspect-ratio buckets: which shape each photo is trained at. Pure arithmetic, no pictures.

Photos of one bucket have the same size and can share a batch, and hardly anything is cropped.
The idea is known from the training of NovelAI's models (2022), and from sd-scripts, which made it
usual for LoRA training; the rule here is ours: only sizes that no other size within the same
area contains.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from trainer.errors import ConfigError
from trainer.types import Bucketed, Captioned, Size


class Placement(NamedTuple):
    """Resize to `resized`, then crop `bucket` out of it at (`left`, `top`); pixels."""

    bucket: Size
    resized: Size
    left: int
    top: int


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


def bucket_photos(captioned: Sequence[Captioned], buckets: Sequence[Size]) -> tuple[Bucketed, ...]:
    """Place every photo in exactly one bucket; the order is kept."""
    return tuple(Bucketed(item, *assign(item.photo.size, buckets)) for item in captioned)


def bucket_counts(bucketed: Iterable[Bucketed]) -> dict[Size, int]:
    """How many photos each bucket holds, narrowest bucket first."""
    counts = Counter(item.bucket for item in bucketed)
    return dict(sorted(counts.items(), key=lambda item: (_log_aspect(item[0]), item[0])))


def _log_aspect(size: Size) -> float:
    # The difference is antisymmetric to the last bit: a photo and its transpose go to a bucket
    # and its transpose.
    return math.log(size.width) - math.log(size.height)


def _rounded(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)
