"""Changed versions of training pictures: inside their bounds, the same for ever, told apart."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import captioned, unhurried
from tests.test_buckets import photos_with_faces
from trainer.data.buckets import BucketPlan, place_photos
from trainer.data.variants import VariantPlan, add_variants, sample_key
from trainer.types import Box, Bucketed, Face, Size, Variant

LIVELY = VariantPlan(count=8, zoom=0.4, shift=1.0, colour=0.2, seed=3)


def placed(
    photo: Size,
    *faces: Face,
    digest: str = "ab",
    plan: BucketPlan = BucketPlan((256,), 64),  # noqa: B008
) -> Bucketed:
    (item,) = place_photos(
        [captioned(Path("a.jpg"), photo, digest=digest)], plan, {digest: tuple(faces)}
    )
    return item


def versions(plain: Bucketed, plan: VariantPlan) -> tuple[Bucketed, ...]:
    made = add_variants([plain], plan)
    assert made[0] == plain
    return made[1:]


@st.composite
def variant_plans(draw: st.DrawFn) -> VariantPlan:
    return VariantPlan(
        count=draw(st.integers(1, 4)),
        zoom=draw(st.floats(0, 0.5)),
        shift=draw(st.floats(0, 1)),
        colour=draw(st.floats(0, 0.5)),
        flip=draw(st.booleans()),
        seed=draw(st.integers(0, 2**63)),
    )


@unhurried
@given(
    photos_with_faces(),
    variant_plans(),
    st.sampled_from([BucketPlan((256,), 64), BucketPlan((512,), 64, 1.5, enlarge=True)]),
)
def test_versions_keep_their_bounds(
    drawn: tuple[Size, tuple[Face, ...]], plan: VariantPlan, buckets: BucketPlan
) -> None:
    photo, faces = drawn
    plain = placed(photo, *faces, plan=buckets)
    enlarged = plain.resized.width > photo.width or plain.resized.height > photo.height
    made = add_variants([plain], plan)
    assert len({sample_key(item) for item in made}) == len(made)
    for item in made:
        assert (item.bucket, item.group, item.faces) == (plain.bucket, plain.group, plain.faces)
        assert (item.captioned, item.repeats) == (plain.captioned, plain.repeats)
        assert 0 <= item.left <= item.resized.width - item.bucket.width
        assert 0 <= item.top <= item.resized.height - item.bucket.height
        # Rounded down to whole pixels: at most one less than the exact factor gives.
        assert item.resized.width >= plain.resized.width
        shown = plain.resized.width / item.resized.width
        assert shown >= 1 - plan.zoom - 1e-9
        expected = plain.resized.height / shown
        assert abs(item.resized.height - expected) <= 1 + expected / plain.resized.width
        if not enlarged:
            assert item.resized.width <= photo.width
            assert item.resized.height <= photo.height
        for factor in (
            item.variant.brightness,
            item.variant.contrast,
            item.variant.saturation,
        ):
            assert abs(factor - 1) <= plan.colour + 1e-9


@unhurried
@given(photos_with_faces(), variant_plans())
def test_a_face_that_the_plain_crop_shows_is_whole_in_every_version(
    drawn: tuple[Size, tuple[Face, ...]], plan: VariantPlan
) -> None:
    photo, faces = drawn
    plain = placed(photo, *faces)
    box = faces[0].box

    def cut(item: Bucketed) -> list[bool]:
        across, down = item.resized.width / photo.width, item.resized.height / photo.height
        return [
            math.floor(box.left * across) < item.left,
            math.ceil(box.right * across) > item.left + item.bucket.width,
            math.floor(box.top * down) < item.top,
            math.ceil(box.bottom * down) > item.top + item.bucket.height,
        ]

    if not any(cut(plain)):
        for item in add_variants([plain], plan):
            assert not any(cut(item))


def test_zoom_goes_up_to_the_share_asked_for() -> None:
    plain = placed(Size(2560, 2560))
    plan = replace(LIVELY, count=16, zoom=0.5, shift=0, colour=0)
    sides = [item.resized.width for item in versions(plain, plan)]
    assert min(sides) < 300
    assert 450 < max(sides) <= 512
    # Without faces or shift the middle stays the middle.
    for item in versions(plain, plan):
        assert abs(2 * item.left + 256 - item.resized.width) <= 2
        assert item.left == item.top
        assert item.variant == Variant(number=item.variant.number)


def test_zoom_ends_where_the_photo_has_no_more_pixels() -> None:
    plan = replace(LIVELY, count=16, zoom=0.5, shift=0)
    assert {item.resized for item in versions(placed(Size(256, 256)), plan)} == {Size(256, 256)}
    sides = {item.resized.width for item in versions(placed(Size(300, 300)), plan)}
    assert max(sides) == 300
    # A photo that is enlarged anyway has no such bound.
    small = placed(Size(100, 100), plan=BucketPlan((256,), 64, enlarge=True))
    assert max(item.resized.width for item in versions(small, plan)) > 400


def test_zoom_ends_where_the_head_fills_the_crop() -> None:
    plan = replace(LIVELY, count=16, zoom=0.5, shift=1)
    face = Face(Box(1200, 1200, 1300, 1300), 1.0)
    assert max(i.resized.width for i in versions(placed(Size(2560, 2560), face), plan)) > 450
    large = Face(Box(1000, 1000, 2000, 2000), 1.0)  # its head: 1650 px high
    sides = [item.resized.width for item in versions(placed(Size(2560, 2560), large), plan)]
    assert max(sides) == int(256 * 254 / 165)


def test_shift_moves_the_crop_within_its_room() -> None:
    plain = placed(Size(300, 256))
    plan = VariantPlan(count=16, shift=1.0, seed=1)
    lefts = [item.left for item in versions(plain, plan)]
    assert min(lefts) < 8
    assert max(lefts) > 36
    less = [item.left for item in versions(plain, replace(plan, shift=0.25))]
    assert 17 <= min(less) < 22 < max(less) <= 27  # 22 is the middle
    assert {item.top for item in versions(plain, plan)} == {0}


def test_shift_keeps_the_crop_of_the_user_who_wants_no_face_crop() -> None:
    face = Face(Box(0, 0, 60, 60), 1.0)
    plain = placed(Size(320, 256), face, plan=BucketPlan((256,), 64, 1.0, face_crop=False))
    assert plain.left == 32
    (version,) = versions(plain, VariantPlan(count=1, colour=0.1))
    assert (version.left, version.top) == (plain.left, plain.top)


def test_versions_that_would_be_equal_are_made_once() -> None:
    square = placed(Size(256, 256))
    assert versions(square, VariantPlan(count=5)) == ()
    assert versions(square, VariantPlan(count=5, shift=1.0, zoom=0.5)) == ()
    narrow = versions(placed(Size(258, 256)), VariantPlan(count=16, shift=1.0))
    assert sorted(item.left for item in narrow) == [0, 2]
    assert len(versions(square, VariantPlan(count=5, colour=0.1))) == 5


def test_flip_doubles_each_version() -> None:
    made = add_variants([placed(Size(256, 256))], VariantPlan(count=1, colour=0.1, flip=True))
    assert [(item.variant.number, item.variant.flip) for item in made] == [
        (0, False),
        (0, True),
        (1, False),
        (1, True),
    ]
    assert replace(made[3].variant, flip=False) == made[2].variant
    assert [sample_key(item) for item in made] == ["ab", "ab+flip", "ab+1", "ab+1+flip"]


def test_the_plain_key_is_the_digest() -> None:
    plain = placed(Size(256, 256))
    assert sample_key(plain) == sample_key(replace(plain, group="")) == "ab"
    flipped = replace(plain, variant=Variant(flip=True))
    assert sample_key(flipped) == sample_key(replace(flipped, group="")) == "ab+flip"


def test_keys_are_unique_over_copies_resolutions_and_sets() -> None:
    photos = [captioned(Path(name), Size(700, 600), digest="ab") for name in "xyz"]
    plan = BucketPlan((256, 512), 64)
    everything = [
        item
        for set_key in ("", "two", "three")
        for item in add_variants(
            place_photos(photos, plan, {}, set_key=set_key), replace(LIVELY, flip=True)
        )
    ]
    assert len(everything) == 3 * 3 * 2 * 9 * 2
    assert len({sample_key(item) for item in everything}) == len(everything)
    assert len({item.group for item in everything}) == 3 * 3 * 2


def test_versions_follow_from_seed_and_group_alone() -> None:
    one, two = placed(Size(700, 600)), placed(Size(700, 600), digest="cd")
    together = add_variants([two, one], LIVELY)
    assert together[9:] == add_variants([one], LIVELY)
    assert versions(one, replace(LIVELY, count=3)) == versions(one, LIVELY)[:3]
    assert versions(one, replace(LIVELY, seed=4)) != versions(one, LIVELY)
    assert [v.left for v in versions(one, LIVELY)] != [v.left for v in versions(two, LIVELY)]


def test_versions_are_the_same_for_ever() -> None:
    """A change here would change every run with variants that is resumed after it."""
    (version,) = versions(placed(Size(700, 600)), replace(LIVELY, count=1))
    assert (version.resized, version.left, version.top) == (Size(312, 267), 37, 3)
    assert round(version.variant.brightness, 6) == 0.897992
