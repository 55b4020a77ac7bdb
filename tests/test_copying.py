"""A repeated photo is found out; the same subject anew is not taken for one."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps

from pretraining.avatars import draw_avatar
from pretraining.looks import Context, Identity, sample_context, sample_identity
from pretraining.sample_sets import ZIA, face_set, other_avatars, render
from trainer.scoring.copying import SAME_PICTURE, CopyFinder, distances


def jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def noisy(image: Image.Image) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 12, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def moved(image: Image.Image) -> Image.Image:
    """Two pixels of 64 to the right and up."""
    pixels = np.pad(np.asarray(image), ((0, 2), (2, 0), (0, 0)), mode="edge")
    return Image.fromarray(pixels[2:, : image.width])


def soft(image: Image.Image) -> Image.Image:
    """What a small VAE leaves of fine detail."""
    return image.resize((32, 32), Image.Resampling.BOX).resize((64, 64), Image.Resampling.BICUBIC)


CHANGES: list[Callable[[Image.Image], Image.Image]] = [
    Image.Image.copy,
    jpeg,
    noisy,
    moved,
    soft,
    ImageOps.mirror,
]


def contexts(count: int, seed: int) -> list[Context]:
    rng = random.Random(f"copying {seed}")
    return [sample_context(rng.randrange(10**9)) for _ in range(count)]


@pytest.fixture(scope="module")
def others() -> list[Image.Image]:
    return other_avatars(48, seed=1)


@pytest.fixture(scope="module")
def finder(
    others: list[Image.Image],
) -> Callable[[int], tuple[Identity, list[Context], CopyFinder]]:
    """By seed: an avatar, the contexts of its 14 photos, and the finder made from them."""
    made: dict[int, tuple[Identity, list[Context], CopyFinder]] = {}

    def make(seed: int) -> tuple[Identity, list[Context], CopyFinder]:
        if seed not in made:
            identity, photos = sample_identity(seed), contexts(14, seed)
            pictures = [draw_avatar(identity, context) for context in photos]
            made[seed] = identity, photos, CopyFinder.fit(pictures, others)
        return made[seed]

    return make


Finder = Callable[[int], tuple[Identity, list[Context], CopyFinder]]
SEEDS = (9, 1009, 10009, 77)


@pytest.mark.parametrize("seed", SEEDS)
def test_true_pictures_in_new_contexts_are_no_copies(seed: int, finder: Finder) -> None:
    identity, _, found = finder(seed)
    fresh = [draw_avatar(identity, context) for context in contexts(60, seed + 1)]
    assert sum(found.copies(fresh)) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_another_dress_in_a_photos_place_is_no_copy(seed: int, finder: Finder) -> None:
    identity, photos, found = finder(seed)
    moved_on = [
        replace(new, background=old.background, background_colour=old.background_colour)
        for old, new in zip(photos, contexts(14, seed + 2), strict=True)
    ]
    assert sum(found.copies([draw_avatar(identity, context) for context in moved_on])) == 0


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_photo_is_a_copy_however_it_was_handled(
    change: Callable[[Image.Image], Image.Image], seed: int, finder: Finder
) -> None:
    identity, photos, found = finder(seed)
    pictures = [change(draw_avatar(identity, context)) for context in photos]
    assert all(found.copies(pictures))


def test_the_bundled_face_set(others: list[Image.Image]) -> None:
    """Its photos have several sizes and shapes, and are compared as centre squares."""
    photos = [render(sample) for sample in face_set()]
    found = CopyFinder.fit(photos, others)
    assert all(
        found.copies([photo.resize((64, 64 * photo.height // photo.width)) for photo in photos])
    )
    fresh = [draw_avatar(ZIA, context) for context in contexts(60, 5)]
    assert sum(found.copies(fresh)) == 0


def test_photos_taken_in_a_row_do_not_hide_copies(others: list[Image.Image]) -> None:
    """Seven moments, each three times with a slightly other pose: as strict as with one of each."""
    identity, moments = sample_identity(9), contexts(7, 20)
    rows = [
        draw_avatar(identity, replace(context, shift_x=context.shift_x + step))
        for context in moments
        for step in (0, 0.5, 1)
    ]
    once = CopyFinder.fit(rows[::3], others)
    in_rows = CopyFinder.fit(rows, others)
    assert in_rows.limit == pytest.approx(once.limit, rel=0.15)
    assert all(in_rows.copies([noisy(photo) for photo in rows]))


def test_photos_before_one_wall_leave_room_for_new_ones(others: list[Image.Image]) -> None:
    """Only pose and expression differ; a new pose and expression is no copy, a photo is."""
    wall = replace(contexts(1, 1)[0], background="plain", hat="none")

    def before_wall(seed: int) -> list[Image.Image]:
        return [
            draw_avatar(
                ZIA,
                replace(
                    wall,
                    mouth=context.mouth,
                    tilt=context.tilt,
                    scale=context.scale,
                    shift_x=context.shift_x,
                    shift_y=context.shift_y,
                ),
            )
            for context in contexts(14, seed)
        ]

    photos = before_wall(30)
    found = CopyFinder.fit(photos, others)
    assert all(found.copies(photos))
    assert sum(found.copies(before_wall(31))) <= 2


def test_a_single_photo_is_measured_by_the_other_pictures(others: list[Image.Image]) -> None:
    photo = draw_avatar(ZIA, contexts(1, 3)[0])
    found = CopyFinder.fit([photo], others)
    assert found.copies([noisy(photo), ImageOps.mirror(photo)]) == [True, True]
    fresh = [draw_avatar(ZIA, context) for context in contexts(20, 4)]
    assert sum(found.copies(fresh)) == 0
    assert CopyFinder.fit([photo, photo], others).limit == found.limit


def test_distances_are_those_of_the_nearest_view() -> None:
    photo, other = (draw_avatar(ZIA, context) for context in contexts(2, 6))
    measured = distances([photo, ImageOps.mirror(photo), other], [photo])
    assert measured.shape == (3, 1)
    assert measured[:2, 0] == pytest.approx([0, 0])
    assert measured[2, 0] > 2 * SAME_PICTURE
    # By hand: white and black are 1 apart in lightness and not at all in colour.
    white, black = (Image.new("RGB", (64, 64), name) for name in ("white", "black"))
    assert distances([white], [black]) == pytest.approx(np.ones((1, 1)), abs=1e-3)


def test_nothing_to_compare(others: list[Image.Image]) -> None:
    with pytest.raises(ValueError, match="0 and 48"):
        CopyFinder.fit([], others)
    with pytest.raises(ValueError, match="1 and 0"):
        CopyFinder.fit(others[:1], [])
    assert CopyFinder.fit(others[:1], others[1:]).copies([]) == []


def test_many_photos_are_all_looked_at() -> None:
    """Thinning out is for the measure alone."""
    pictures = other_avatars(150, seed=8)
    found = CopyFinder.fit(pictures[:130], pictures[130:])
    assert all(found.copies(pictures[:130]))
