"""Sharpness, exposure and likeness as numbers: on photographs, drawings and their copies."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from pretraining.avatars import draw_avatar
from pretraining.looks import sample_context
from pretraining.sample_sets import ZIA
from trainer.data.decode import decode_upright
from trainer.data.quality import (
    DUPLICATE_BITS,
    NEAR_DUPLICATE_BITS,
    Match,
    border_colour,
    exposure,
    find_alike,
    hash_distance,
    perceptual_hashes,
    reduced,
    scaled,
    sharpness,
    thumbnail,
)
from trainer.types import Box, Size

ROOT = Path(__file__).resolve().parent.parent
DRAWINGS = sorted(
    path for name in ("zia", "neon") for path in (ROOT / "datasets" / name).glob("*.[pj]*g")
)
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins")
ASTRONAUT_FACE = Box(170, 60, 280, 190)


def photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


def blurred(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def stored_as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def alike(*images: Image.Image) -> tuple[Match, ...]:
    hashes = [perceptual_hashes(image) for image in images]
    return find_alike(
        [plain for plain, _ in hashes],
        [mirrored for _, mirrored in hashes],
        [thumbnail(image) for image in images],
    )


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_are_sharp_until_they_are_blurred(name: str) -> None:
    image = photograph(name)
    assert not sharpness(image).blurred
    assert sharpness(blurred(image, 3)).blurred
    assert sharpness(stored_as_jpeg(blurred(image, 4), 30)).blurred


def test_a_face_is_measured_apart_from_what_is_around_it() -> None:
    image = photograph("astronaut")
    soft_face = image.copy()
    box = (ASTRONAUT_FACE.left, ASTRONAUT_FACE.top, ASTRONAUT_FACE.right, ASTRONAUT_FACE.bottom)
    soft_face.paste(blurred(image, 4).crop(box), box)
    assert not sharpness(image, ASTRONAUT_FACE).blurred
    assert not sharpness(soft_face).blurred
    assert sharpness(soft_face, ASTRONAUT_FACE).blurred


def test_sharpness_does_not_depend_on_the_cameras_pixels() -> None:
    image = photograph("astronaut")
    large = image.resize((1600, 1600), Image.Resampling.BICUBIC)
    face = scaled(ASTRONAUT_FACE, Size(512, 512), Size(1600, 1600))
    assert sharpness(large, face).tiles == pytest.approx(
        sharpness(image, ASTRONAUT_FACE).tiles, rel=0.5
    )
    assert not sharpness(large, face).blurred
    enlarged = image.resize((96, 96)).resize((1024, 1024), Image.Resampling.BICUBIC)
    assert sharpness(enlarged).blurred


@pytest.mark.parametrize("path", DRAWINGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_drawing_is_called_blurred(path: Path) -> None:
    drawing = decode_upright(path)
    middle = Box(*(side * n // 4 for n in (1, 3) for side in drawing.size))
    pixels = drawing.resize((64, 64), Image.Resampling.BOX)
    for image, box in ((drawing, None), (drawing, middle), (pixels, None)):
        assert not sharpness(image, box).blurred
    assert sharpness(blurred(drawing, 4)).blurred


@pytest.mark.parametrize("size", [(1, 1), (2, 40), (40, 2), (17, 17), (3, 3)])
def test_tiny_pictures_have_numbers_too(size: tuple[int, int]) -> None:
    image = Image.effect_noise(size, 90).convert("RGB")
    for number in (*sharpness(image), *exposure(image), *border_colour(image)):
        assert np.isfinite(number)
    assert not sharpness(image).blurred


def test_a_box_outside_the_picture_is_taken_as_far_as_it_is_inside() -> None:
    image = Image.new("RGB", (40, 40), "black")
    image.paste("white", (0, 0, 10, 40))
    assert exposure(image, Box(-30, -5, 10, 90)).bright == 1
    assert exposure(image, Box(50, 50, 90, 90)) == exposure(image)


def test_exposure_counts_dark_and_bright_pixels() -> None:
    image = Image.new("RGB", (10, 10), "black")
    image.paste("white", (0, 0, 10, 3))
    assert exposure(image) == pytest.approx((0.7, 0.3, 76.5))


def test_the_border_is_the_background() -> None:
    image = Image.new("RGB", (320, 320), (10, 200, 30))
    image.paste("red", (60, 60, 260, 320))
    assert border_colour(image) == pytest.approx((10, 200, 30))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "stored anew": lambda image: stored_as_jpeg(image, 30),
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.7),
    "more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.3),
    "softer": lambda image: blurred(image, 2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mirrored", [False, True])
def test_copies_are_found(change: str, mirrored: bool) -> None:
    originals = [photograph(name) for name in PHOTOGRAPHS]
    originals += [decode_upright(path) for path in DRAWINGS[::5]]
    copies = [CHANGES[change](image) for image in originals]
    if mirrored:
        copies = [ImageOps.mirror(image) for image in copies]
    matches = alike(*originals, *copies)
    count = len(originals)
    assert [(m.picture, m.other) for m in matches] == [(count + i, i) for i in range(count)]
    assert all(match.bits <= NEAR_DUPLICATE_BITS for match in matches)
    assert all(match.mirrored == mirrored for match in matches)


def test_different_drawings_are_not_copies() -> None:
    """Also where they are of one character, in one pose, before one background."""
    drawings = [decode_upright(path) for path in DRAWINGS]
    for seed in range(60):
        context = replace(sample_context(seed), background="plain", background_colour="blue")
        drawings.append(draw_avatar(ZIA, context, 128, "flat"))
    hashes = [perceptual_hashes(drawing)[0] for drawing in drawings]
    by_hash = [
        pair
        for pair in itertools.combinations(hashes, 2)
        if hash_distance(*pair) <= NEAR_DUPLICATE_BITS
    ]
    assert len(by_hash) > 10, "the hash alone would not do"
    assert [match for match in alike(*drawings) if match.bits <= NEAR_DUPLICATE_BITS] == []


def test_flat_pictures_are_copies_only_of_their_own_colour() -> None:
    colours = [(200, 30, 30), (30, 30, 200), (201, 30, 30), (128, 128, 128), (255, 255, 255)]
    matches = alike(*(Image.new("RGB", (64, 64), colour) for colour in colours))
    assert [(match.picture, match.other) for match in matches] == [(2, 0)]


def test_the_nearest_and_then_the_earliest_is_named() -> None:
    image = photograph("chelsea")
    other = photograph("coffee")
    matches = alike(image, other, stored_as_jpeg(image, 90), image.copy(), other)
    assert [(m.picture, m.other, m.bits) for m in matches] == [
        (2, 0, matches[0].bits),
        (3, 0, 0),
        (4, 1, 0),
    ]
    assert matches[0].bits <= DUPLICATE_BITS


def test_hashes_agree_with_a_transform_written_out() -> None:
    """The definition: X[k] = sum of x[n] cos(pi k (2n + 1) / 2N), both ways, lowest 8 of 32."""
    image = photograph("rocket")
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
    waves = [[np.cos(np.pi * k * (2 * n + 1) / 64) for n in range(32)] for k in range(8)]
    low = np.array([[(np.outer(a, b) * grey).sum() for b in waves] for a in waves]).ravel()
    bits = "".join("1" if value > np.median(low) else "0" for value in low)
    assert perceptual_hashes(image)[0] == int(bits, 2)
    assert perceptual_hashes(image)[1] == perceptual_hashes(ImageOps.mirror(image))[0]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_hash_distance_counts_bits(first: int, second: int) -> None:
    assert hash_distance(first, second) == bin(first ^ second).count("1")
    assert hash_distance(first, first) == 0


def test_many_pictures_are_compared_by_blocks() -> None:
    """A match over the border of blocks; everything else is random and matches nothing."""
    random = np.random.default_rng(0)
    hashes = [int(value) for value in random.integers(0, 2**63, 700)]
    mirrored = [int(value) for value in random.integers(0, 2**63, 700)]
    thumbs = [random.integers(0, 256, 768, dtype=np.uint8).tobytes() for _ in range(700)]
    hashes[650], thumbs[650] = hashes[3] ^ 0b101, thumbs[3]
    pixels = np.frombuffer(thumbs[5], np.uint8).reshape(16, 16, 3)
    hashes[600], thumbs[600] = mirrored[5], pixels[:, ::-1].tobytes()
    assert find_alike(hashes, mirrored, thumbs) == (
        Match(600, 5, 0, mirrored=True),
        Match(650, 3, 2, mirrored=False),
    )


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(1, 2_000))
def test_a_reduced_size_is_within_the_limit(width: int, height: int, limit: int) -> None:
    size = reduced(Size(width, height), limit)
    assert max(size.width, size.height) <= max(limit, 1)
    assert size == Size(width, height) or max(size.width, size.height) == limit
