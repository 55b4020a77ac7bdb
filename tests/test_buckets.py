"""Bucket arithmetic: the sizes, the crops, and what always holds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import bucket_settings, captioned, photo_sizes, unhurried
from trainer.data.buckets import (
    BucketPlan,
    Placement,
    assign,
    bucket_counts,
    make_buckets,
    place,
    place_photos,
)
from trainer.errors import ConfigError
from trainer.types import Box, Face, Size


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
@given(bucket_settings(), photo_sizes())
def test_nothing_is_enlarged_unless_it_cannot_be_helped(
    setting: tuple[int, int, float], photo: Size
) -> None:
    resolution, step, max_aspect = setting
    plan = BucketPlan((resolution,), step, max_aspect)
    bucket, resized, left, top = place(photo, resolution, plan)
    assert bucket.width % step == bucket.height % step == 0
    assert bucket.area <= resolution**2
    assert max(bucket.width, bucket.height) <= max_aspect * min(bucket.width, bucket.height)
    assert 0 <= left <= resized.width - bucket.width
    assert 0 <= top <= resized.height - bucket.height
    assert bucket.width == resized.width or bucket.height == resized.height
    if min(photo.width, photo.height) >= step:
        assert resized.width <= photo.width
        assert resized.height <= photo.height
    elif resized.width > photo.width or resized.height > photo.height:
        assert min(resized.width, resized.height) == step
    buckets = make_buckets(resolution, step_px=step, max_aspect=max_aspect)
    usual = assign(photo, buckets)
    if usual.bucket.width <= photo.width and usual.bucket.height <= photo.height:
        assert (bucket, resized, left, top) == usual
    enlarging = BucketPlan((resolution,), step, max_aspect, enlarge=True)
    assert place(photo, resolution, enlarging) == usual


@unhurried
@given(bucket_settings(), st.builds(Size, st.integers(32, 900), st.integers(32, 900)))
def test_a_small_photo_goes_to_the_largest_size_inside_it(
    setting: tuple[int, int, float], photo: Size
) -> None:
    resolution, step, max_aspect = setting
    plan = BucketPlan((resolution,), step, max_aspect)
    bucket = place(photo, resolution, plan).bucket
    turned = place(Size(photo.height, photo.width), resolution, plan).bucket
    assert max(bucket.width, bucket.height) == max(turned.width, turned.height)
    usual = make_buckets(resolution, step_px=step, max_aspect=max_aspect)
    if bucket in usual or min(photo.width, photo.height) < step:
        return
    for wider, higher in ((step, 0), (0, step)):
        grown = Size(bucket.width + wider, bucket.height + higher)
        long, short = max(grown.width, grown.height), min(grown.width, grown.height)
        inside = grown.width <= photo.width and grown.height <= photo.height
        assert not inside or grown.area > resolution**2 or long > max_aspect * short


def test_photos_too_small_for_their_bucket() -> None:
    plan = BucketPlan((512,), step_px=64)

    def placed(width: int, height: int, resolution: int = 512) -> tuple[str, str]:
        placement = place(Size(width, height), resolution, plan)
        return str(placement.bucket), str(placement.resized)

    assert placed(300, 300) == ("256x256", "256x256")
    assert placed(600, 430) == ("576x384", "576x413")
    assert placed(2000, 200) == ("384x192", "1920x192")  # at most twice as wide as high
    assert placed(511, 700) == ("448x576", "448x614")
    assert placed(40, 100) == ("64x128", "64x160")  # below one step: enlarged to it, not further
    assert placed(40, 300) == ("64x128", "64x480")
    assert placed(40, 100, 64) == ("64x64", "64x160")


@st.composite
def photos_with_faces(draw: st.DrawFn) -> tuple[Size, tuple[Face, ...]]:
    photo = draw(photo_sizes())
    faces = []
    for _ in range(draw(st.integers(1, 3))):
        side = draw(st.integers(1, min(photo.width, photo.height)))
        left = draw(st.integers(0, photo.width - side))
        top = draw(st.integers(0, photo.height - side))
        faces.append(Face(Box(left, top, left + side, top + side), 1.0))
    faces.sort(key=lambda face: -face.box.height)
    return photo, tuple(faces)


@unhurried
@given(bucket_settings(), photos_with_faces())
def test_the_largest_face_is_inside_the_crop_wherever_it_fits(
    setting: tuple[int, int, float], drawn: tuple[Size, tuple[Face, ...]]
) -> None:
    photo, faces = drawn
    resolution, step, max_aspect = setting
    plan = BucketPlan((resolution,), step, max_aspect)
    item = captioned(Path("a.jpg"), photo)
    (crop,) = place_photos([item], plan, {item.photo.digest: faces})
    (plain,) = place_photos([item], plan, {})
    assert (crop.bucket, crop.resized) == (plain.bucket, plain.resized)
    assert (crop.faces, plain.faces) == (faces, ())
    box = faces[0].box
    for start, window, length, full, low, high in (
        (crop.left, crop.bucket.width, crop.resized.width, photo.width, box.left, box.right),
        (crop.top, crop.bucket.height, crop.resized.height, photo.height, box.top, box.bottom),
    ):
        assert 0 <= start <= length - window
        first, last = math.floor(low * length / full), math.ceil(high * length / full)
        if last - first <= window:
            assert start <= first
            assert last <= start + window
        else:
            assert first <= start  # all of the crop shows the face
            assert start + window <= last


def crop_of(photo: Size, *boxes: tuple[int, int, int, int], face_crop: bool = True) -> Placement:
    plan = BucketPlan((512,), 64, max_aspect=1.0, face_crop=face_crop)
    item = captioned(Path("a.jpg"), photo)
    faces = tuple(Face(Box(*box), 1.0) for box in boxes)
    (crop,) = place_photos([item], plan, {item.photo.digest: faces})
    assert crop.faces == faces
    return Placement(crop.bucket, crop.resized, crop.left, crop.top)


def test_the_crop_slides_no_further_than_the_head_needs() -> None:
    high, wide = Size(512, 1024), Size(1024, 512)
    assert crop_of(high).top == 256
    assert crop_of(high, (200, 400, 300, 500)).top == 256  # whole already
    assert crop_of(high, (200, 200, 300, 300)).top == 160  # 0.4 of its height above
    assert crop_of(high, (200, 20, 300, 120)).top == 0
    assert crop_of(high, (200, 800, 300, 900)).top == 413  # 0.25 below
    assert crop_of(high, (200, 200, 300, 300), face_crop=False).top == 256
    assert crop_of(wide, (100, 200, 200, 300)).left == 75  # 0.25 beside
    assert crop_of(wide, (100, 200, 200, 300)).top == 0


def test_further_faces_are_kept_beside_the_largest_where_they_fit() -> None:
    high = Size(512, 1024)
    largest = (200, 600, 400, 800)  # its head: 520 to 850; the crop may begin from 338 on
    assert crop_of(high, largest).top == 338
    assert crop_of(high, largest, (0, 500, 50, 550)).top == 338
    assert crop_of(high, largest, (0, 900, 50, 960)).top == 463  # its head ends at 975
    assert crop_of(high, (0, 900, 50, 960), largest).top == 463
    # The face fits beside the largest, the top of its head does not matter.
    assert crop_of(high, largest, (0, 340, 50, 390)).top == 338
    # There is no room for this one beside the largest head.
    assert crop_of(high, largest, (0, 330, 50, 380)).top == 338
    assert crop_of(high, (0, 330, 50, 380), largest).top == 288  # whole; of the other, the face


def test_a_face_larger_than_the_crop_is_centred() -> None:
    assert crop_of(Size(512, 1024), (0, 300, 512, 900)).top == 344
    assert crop_of(Size(512, 1024), (0, 0, 512, 600)).top == 44
    # The face fits, its head (100 to 925) does not: the head is centred as far as the face allows.
    assert crop_of(Size(512, 1024), (0, 300, 500, 800)).top == 288


@unhurried
@given(st.lists(photo_sizes(), max_size=12), st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_every_photo_is_in_exactly_one_bucket_at_each_resolution(
    sizes: list[Size], contents: list[int]
) -> None:
    plan = BucketPlan((256, 512), step_px=64)
    photos = [
        captioned(Path(f"{n}.jpg"), size, digest=f"{content:064}")
        for n, (size, content) in enumerate(zip(sizes, contents, strict=False))
    ]
    placed = place_photos(photos, plan, {}, repeats=3, weight=0.5)
    for photo in photos:
        own = [item for item in placed if item.captioned == photo]
        places = [place(photo.photo.size, resolution, plan) for resolution in plan.resolutions]
        # One too small for both sizes is not trained twice at the same.
        assert [(item.bucket, item.resized) for item in own] == [
            (found.bucket, found.resized) for found in dict.fromkeys(places)
        ]
        for found, resolution in zip(places, plan.resolutions, strict=True):
            assert found.bucket.area <= resolution**2
    assert {(item.repeats, item.weight) for item in placed} <= {(3, 0.5)}
    assert len({item.group for item in placed}) == len(placed)
    counts = bucket_counts(placed)
    assert sum(counts.values()) == len(placed)
    aspects = [bucket.width / bucket.height for bucket in counts]
    assert aspects == sorted(aspects)


def test_a_photo_too_small_for_two_resolutions_is_trained_once() -> None:
    small, large = (captioned(Path(f"{n}"), Size(n, n), digest=f"{n}") for n in (200, 600))
    placed = place_photos([small, large], BucketPlan((256, 512), 64), {})
    assert [(item.captioned, item.bucket.width) for item in placed] == [
        (small, 192),
        (large, 256),
        (large, 512),
    ]


def test_a_group_is_named_by_the_content_and_what_else_is_needed_to_tell_it() -> None:
    first, second = (captioned(Path(name), Size(600, 600), digest="ab") for name in ("1", "2"))
    one, two = BucketPlan((512,), 64), BucketPlan((512, 768), 64)

    def groups(plan: BucketPlan, set_key: str = "") -> list[str]:
        placed = place_photos([first, second], plan, {}, set_key=set_key)
        return [item.group for item in placed]

    assert groups(one) == ["ab", "ab#2"]
    assert groups(two) == ["ab@512", "ab@768", "ab#2@512", "ab#2@768"]
    assert groups(one, "summer") == ["ab/summer", "ab#2/summer"]


def test_a_resolution_below_a_step_is_refused_for_photos_too() -> None:
    with pytest.raises(ConfigError, match="less than one bucket step"):
        place_photos([captioned(Path("a"), Size(99, 99))], BucketPlan((512, 48), 64), {})
