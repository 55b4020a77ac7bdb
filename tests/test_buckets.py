"""Bucket arithmetic: the sizes, the crops, and what always holds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import bucket_settings, captioned, photo_sizes, unhurried
from trainer.data.buckets import Placement, assign, bucket_counts, bucket_photos, make_buckets
from trainer.errors import ConfigError
from trainer.types import Size


def shapes(resolution_px: int, step_px: int, max_aspect: float = 2.0) -> list[str]:
    sizes = make_buckets(resolution_px, step_px=step_px, max_aspect=max_aspect)
    return [str(size) for size in sizes]


def test_the_buckets_of_known_resolutions() -> None:
    assert shapes(512, 64) == ["384x640", "448x576", "512x512", "576x448", "640x384"]
    assert shapes(64, 16) == ["48x80", "64x64", "80x48"]
    assert shapes(64, 16, 1.0) == ["64x64"]
    assert shapes(64, 64) == ["64x64"]
    assert shapes(100, 64) == ["64x128", "64x64", "128x64"]
    assert "704x1408" in shapes(1024, 64)


def test_a_resolution_below_one_step_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        make_buckets(48, step_px=64)
    assert str(caught.value) == (
        "A resolution of 48 px is less than one bucket step of 64 px.\n"
        "  data.resolution\n"
        "Set it to 64 or more."
    )


@unhurried
@given(bucket_settings())
def test_sizes_keep_their_bounds_and_cannot_grow(setting: tuple[int, int, float]) -> None:
    resolution, step, max_aspect = setting
    sizes = make_buckets(resolution, step_px=step, max_aspect=max_aspect)
    limit = resolution**2
    square = Size(resolution // step * step, resolution // step * step)
    assert square in sizes
    assert len(set(sizes)) == len(sizes)
    assert {Size(size.height, size.width) for size in sizes} == set(sizes)
    aspects = [size.width / size.height for size in sizes]
    assert aspects == sorted(aspects)
    for size in set(sizes):
        assert size.width % step == size.height % step == 0
        assert size.area <= limit
        assert max(size.width, size.height) <= max_aspect * min(size.width, size.height)
        if size != square:
            long, short = max(size.width, size.height), min(size.width, size.height)
            assert (long + step) * short > limit or long + step > max_aspect * short
            assert long * (short + step) > limit


@unhurried
@given(bucket_settings(), photo_sizes())
def test_the_crop_is_inside_a_resize_that_does_not_distort(
    setting: tuple[int, int, float], photo: Size
) -> None:
    resolution, step, max_aspect = setting
    buckets = make_buckets(resolution, step_px=step, max_aspect=max_aspect)
    bucket, resized, left, top = assign(photo, buckets)
    assert bucket in buckets
    # One side fits exactly; what the other has too much is shared by its two ends.
    assert bucket.width == resized.width or bucket.height == resized.height
    assert 0 <= left <= resized.width - left - bucket.width <= left + 1
    assert 0 <= top <= resized.height - top - bucket.height <= top + 1
    scale = max(bucket.width / photo.width, bucket.height / photo.height)
    assert abs(resized.width - photo.width * scale) <= 0.5 + 1e-6
    assert abs(resized.height - photo.height * scale) <= 0.5 + 1e-6


@unhurried
@given(bucket_settings(), photo_sizes())
def test_the_nearest_aspect_is_chosen_and_turning_the_photo_turns_the_bucket(
    setting: tuple[int, int, float], photo: Size
) -> None:
    resolution, step, max_aspect = setting
    buckets = make_buckets(resolution, step_px=step, max_aspect=max_aspect)

    def distance(bucket: Size) -> float:
        return abs(math.log(bucket.width * photo.height / (bucket.height * photo.width)))

    chosen = assign(photo, buckets).bucket
    assert distance(chosen) <= min(map(distance, buckets)) + 1e-9
    turned = assign(Size(photo.height, photo.width), buckets).bucket
    assert max(chosen.width, chosen.height) == max(turned.width, turned.height)


def test_worked_examples() -> None:
    buckets = make_buckets(512, step_px=64)
    square = Size(512, 512)
    assert assign(Size(512, 512), buckets) == Placement(square, square, 0, 0)
    assert assign(Size(1100, 1000), buckets) == Placement(square, Size(563, 512), 25, 0)
    assert assign(Size(4000, 6000), buckets) == Placement(Size(384, 640), Size(427, 640), 21, 0)
    assert assign(Size(100, 100), buckets) == Placement(square, square, 0, 0)


def test_of_equally_near_buckets_the_largest_is_taken() -> None:
    small, large = Size(64, 64), Size(128, 128)
    assert assign(Size(50, 50), [small, large]).bucket == large
    assert assign(Size(50, 50), [large, small]).bucket == large


@unhurried
@given(st.lists(photo_sizes(), max_size=12))
def test_every_photo_is_in_exactly_one_bucket(sizes: list[Size]) -> None:
    buckets = make_buckets(256, step_px=64)
    photos = [captioned(Path(f"{n}.jpg"), size) for n, size in enumerate(sizes)]
    placed = bucket_photos(photos, buckets)
    assert [item.captioned for item in placed] == photos
    counts = bucket_counts(placed)
    assert sum(counts.values()) == len(photos)
    assert set(counts) <= set(buckets)
    assert list(counts) == [bucket for bucket in buckets if bucket in counts]
