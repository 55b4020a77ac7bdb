"""How sharp, how bright and how like another a picture is, as plain numbers.

Everything is measured on a small grey copy (NumPy and Pillow alone), is a pure function of the
pixels, and judges nothing by itself: the thresholds at the top are what the doctor goes by.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.types import Box, Size

Grey = NDArray[np.float32]
Floats = NDArray[np.float64]

# Sharpness is measured at this long side, so that it does not depend on the camera's megapixels.
SHARPNESS_SIDE_PX = 512
# Blurred if both agree: either alone is fooled, the first by bare walls and noise, the second by
# soft light.
BLURRED_TILES_BELOW = 50.0
BLURRED_REBLUR_ABOVE = 0.45

# Grey values, 0..255, that count as nearly black and nearly white.
DARK_UP_TO = 16
BRIGHT_FROM = 239

# Bits of 64 in which the perceptual hashes of two pictures may differ.
DUPLICATE_BITS = 4
NEAR_DUPLICATE_BITS = 10
SIMILAR_BITS = 16
# The hash sees coarse light and shade only: different drawings of one character before one
# background may have nearly the same. So thumbnails must correlate as much, too. (7,140 pairs of
# such drawings: at most 0.957. Copies of photos and drawings, 30 % brighter: at least 0.966.)
ALIKE_CORRELATION = 0.96
SIMILAR_CORRELATION = 0.90
# Below this spread a thumbnail is flat, and its hash is made of rounding errors: flat pictures are
# alike if their mean colours are within as much.
FLAT_SPREAD = 2.0

THUMBNAIL_SIDE = 16
_TILES = 8
_HASH_SIDE = 8
_DCT_SIDE = 32
_REBLUR_TAPS = 9  # the paper's filter
# Of each picture, so many that are nearest by hash are looked at more closely.
_CANDIDATES = 16
_BLOCK = 256  # pictures compared with all others at once: a block of 10,000 takes 10 MB


class Sharpness(NamedTuple):
    """tiles: higher is sharper. reblur: 0 sharp .. 1 blurred."""

    tiles: float
    reblur: float

    @property
    def blurred(self) -> bool:
        return self.tiles < BLURRED_TILES_BELOW and self.reblur > BLURRED_REBLUR_ABOVE


class Exposure(NamedTuple):
    """Shares of nearly black and nearly white pixels, and the mean grey value 0..255."""

    dark: float
    bright: float
    mean: float


class Match(NamedTuple):
    """Picture number `picture` looks like the earlier one `other`, or like its mirror image.

    bits: in which their hashes differ, 0..64.
    """

    picture: int
    other: int
    bits: int
    mirrored: bool


def sharpness(image: Image.Image, box: Box | None = None) -> Sharpness:
    """Two measures of sharpness of a picture, or of the part of it in `box`.

    tiles: the variance of the Laplacian in each of 8x8 tiles, and of these the 90th percentile: a
    sharp face before a soft background is sharp. reblur: the blur effect of Crete, Dolmiere,
    Ladret and Nicolas ("The blur effect: perception and estimation with a new no-reference
    perceptual blur metric", SPIE 2007): how little a picture changes when it is blurred again.

    The whole picture is reduced to a long side of 512 px, since what is soft in the camera's pixels
    may be sharp in those that are trained. Smaller ones are measured as they are: enlarging would
    make the sharpest drawing soft.

    Args:
        image: the picture.
        box: the part, in its pixels.
    """
    size = Size(*image.size)
    small = reduced(size, SHARPNESS_SIDE_PX)
    grey_image = image.convert("L")
    if small != size:
        grey_image = grey_image.resize((small.width, small.height), Image.Resampling.BICUBIC)
    part = _part(grey_image, box and scaled(box, size, small))
    grey = np.asarray(part, dtype=np.float32)
    return Sharpness(_tile_variance(grey), _blur_effect(grey))


def exposure(image: Image.Image, box: Box | None = None) -> Exposure:
    """How much of a picture, or of the part of it in `box`, is nearly black or white."""
    counts = np.array(_part(image, box).convert("L").histogram(), dtype=np.float64)
    shares = counts / counts.sum()
    dark, bright = shares[: DARK_UP_TO + 1].sum(), shares[BRIGHT_FROM:].sum()
    return Exposure(float(dark), float(bright), float(shares @ np.arange(256)))


def border_colour(image: Image.Image) -> tuple[float, float, float]:
    """The mean (red, green, blue) of the outer sixteenth at the left, top and right, where the
    background mostly is; 0..255."""
    pixels = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BOX), np.float64)
    rim = np.ones((32, 32), dtype=bool)
    rim[2:, 2:-2] = False
    red, green, blue = pixels[rim].mean(axis=0)
    return float(red), float(green), float(blue)


def perceptual_hashes(image: Image.Image) -> tuple[int, int]:
    """64 bits that hardly change when a picture is stored anew, resized or brightened; the same
    of its mirror image.

    The lowest 8x8 frequencies of the cosine transform of a 32x32 grey copy, each above the median
    of all or not, row by row (the "pHash" of Zauner, 2010, as the package imagehash has it).
    """
    small = image.convert("L").resize((_DCT_SIDE, _DCT_SIDE), Image.Resampling.LANCZOS)
    grey = np.asarray(small, dtype=np.float64)
    return _hash(grey), _hash(grey[:, ::-1])


def hash_distance(first: int, second: int) -> int:
    """In how many bits two hashes differ."""
    return (first ^ second).bit_count()


def thumbnail(image: Image.Image) -> bytes:
    """The picture at 16x16 px, RGB, row by row: 768 bytes."""
    side = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    return image.convert("RGB").resize(side, Image.Resampling.BOX).tobytes()


def reduced(size: Size, long_side_px: int) -> Size:
    """The size with its longer side at most `long_side_px`."""
    scale = min(1.0, long_side_px / max(size.width, size.height))
    return Size(max(1, round(size.width * scale)), max(1, round(size.height * scale)))


def scaled(box: Box, size: Size, to: Size) -> Box:
    """A box of a picture of one size in the pixels of the same picture at another size."""
    across, down = to.width / size.width, to.height / size.height
    return Box(
        round(box.left * across),
        round(box.top * down),
        round(box.right * across),
        round(box.bottom * down),
    )


def find_alike(
    hashes: Sequence[int], mirrored: Sequence[int], thumbnails: Sequence[bytes]
) -> tuple[Match, ...]:
    """Of each picture that looks like an earlier one, the earlier one it is nearest to.

    Alike are hashes within `SIMILAR_BITS` and thumbnails that correlate (over their pixels, each
    colour about its own mean, which takes no notice of brightness, contrast and tint).

    Args:
        hashes, mirrored: of `perceptual_hashes`, one each for a picture.
        thumbnails: of `thumbnail`.
    """
    if len(hashes) < 2:
        return ()
    plain_NB, mirrored_NB = _signs(hashes), _signs(mirrored)
    matches: list[Match] = []
    for start in range(0, len(hashes), _BLOCK):
        end = min(start + _BLOCK, len(hashes))
        # Of signs +1 and -1 the product is 64 less twice the number of bits that differ.
        plain = (_HASH_SIDE**2 - plain_NB[start:end] @ plain_NB[:end].T) / 2
        mirror = (_HASH_SIDE**2 - plain_NB[start:end] @ mirrored_NB[:end].T) / 2
        later = np.arange(end)[None, :] >= np.arange(start, end)[:, None]
        nearest = np.where(later, _HASH_SIDE**2, np.minimum(plain, mirror))
        for row in np.flatnonzero(nearest.min(axis=1) <= SIMILAR_BITS):
            candidates = (
                Match(
                    start + int(row),
                    int(i),
                    int(nearest[row, i]),
                    bool(mirror[row, i] < plain[row, i]),
                )
                for i in np.argsort(nearest[row], kind="stable")[:_CANDIDATES]
            )
            matches += islice((match for match in candidates if _is_alike(match, thumbnails)), 1)
    return tuple(matches)


def _is_alike(match: Match, thumbnails: Sequence[bytes]) -> bool:
    if match.bits > SIMILAR_BITS:
        return False
    first, second = (_thumbnail_pixels(thumbnails[i]) for i in (match.picture, match.other))
    if match.mirrored:
        second = second[:, ::-1]
    means = first.mean(axis=(0, 1)), second.mean(axis=(0, 1))
    first, second = first - means[0], second - means[1]
    spreads = float(first.std()), float(second.std())
    if min(spreads) < FLAT_SPREAD:
        same_colour = float(np.abs(means[0] - means[1]).max()) <= FLAT_SPREAD
        return max(spreads) < FLAT_SPREAD and same_colour
    correlation = float((first * second).mean()) / (spreads[0] * spreads[1])
    near = match.bits <= NEAR_DUPLICATE_BITS
    return correlation >= (ALIKE_CORRELATION if near else SIMILAR_CORRELATION)


def _thumbnail_pixels(thumb: bytes) -> Floats:
    pixels = np.frombuffer(thumb, dtype=np.uint8).reshape(THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3)
    return pixels.astype(np.float64)


def _signs(hashes: Sequence[int]) -> Grey:
    """[N, 64]: +1 for each bit that is set, -1 for each that is not."""
    raw = b"".join(value.to_bytes(_HASH_SIDE, "big") for value in hashes)
    bits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8)).reshape(len(hashes), -1)
    return bits.astype(np.float32) * 2 - 1


def _part(image: Image.Image, box: Box | None) -> Image.Image:
    """What is in the box, as far as it is in the picture; all of it where that is nothing."""
    if box is None:
        return image
    edges = (
        max(0, box.left),
        max(0, box.top),
        min(image.width, box.right),
        min(image.height, box.bottom),
    )
    return image.crop(edges) if edges[0] < edges[2] and edges[1] < edges[3] else image


def _tile_variance(grey: Grey) -> float:
    if min(grey.shape) < 3:
        return 0.0
    neighbours = grey[1:-1, :-2] + grey[1:-1, 2:] + grey[:-2, 1:-1] + grey[2:, 1:-1]
    laplacian = neighbours - 4 * grey[1:-1, 1:-1]
    variances = [
        float(tile.var())
        for row in np.array_split(laplacian, min(_TILES, laplacian.shape[0]), axis=0)
        for tile in np.array_split(row, min(_TILES, laplacian.shape[1]), axis=1)
    ]
    return float(np.percentile(variances, 90))


def _blur_effect(grey: Grey) -> float:
    """The paper's equations 1 to 8: the worse of the two directions."""
    return max(_left_of_blurring(grey), _left_of_blurring(np.ascontiguousarray(grey.T)))


def _left_of_blurring(grey: Grey) -> float:
    """Of the differences between neighbours along the rows, the share that is left of them when
    the rows are blurred (0: none, the picture was sharp; a picture without any is blurred)."""
    taps, margin = _REBLUR_TAPS, _REBLUR_TAPS // 2
    if grey.shape[1] < 2 * taps:
        return 0.0
    # Neighbouring means of `taps` pixels differ by what comes in less what goes out.
    after = np.abs(grey[:, taps:] - grey[:, :-taps]) / taps
    before = np.abs(np.diff(grey[:, margin : grey.shape[1] - margin], axis=1))
    lost = np.maximum(before - after, 0).sum(dtype=np.float64)
    total = before.sum(dtype=np.float64)
    return float((total - lost) / total) if total else 1.0


def _hash(grey: Floats) -> int:
    low = (_COSINES @ grey @ _COSINES.T).ravel()
    bits = low > np.median(low)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _cosines() -> Floats:
    """The first 8 rows of the discrete cosine transform (type II) of 32 values."""
    row, column = np.arange(_HASH_SIDE)[:, None], np.arange(_DCT_SIDE)[None, :]
    return np.cos(np.pi * row * (2 * column + 1) / (2 * _DCT_SIDE))


_COSINES = _cosines()
