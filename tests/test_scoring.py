"""The scores tell the subject, or the style, of a photo folder from everything else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from pretraining.avatars import draw_avatar
from pretraining.looks import Identity, sample_context, sample_identity
from pretraining.sample_sets import ZIA, other_avatars, true_pictures
from trainer.scoring import SCORERS
from trainer.scoring.colours import to_lab
from trainer.scoring.drift import drift, looks_blank
from trainer.scoring.likeness import LikenessScorer
from trainer.scoring.style import StyleScorer

DATASETS = Path(__file__).parent.parent / "datasets"


def photos_of(name: str) -> list[Image.Image]:
    files = sorted(path for path in (DATASETS / name).iterdir() if path.suffix != ".txt")
    return [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in files]


def pictures_of(identity: Identity, count: int, seed: int) -> list[Image.Image]:
    rng = random.Random(seed)
    return [draw_avatar(identity, sample_context(rng.randrange(10**9))) for _ in range(count)]


def roc_auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The chance that a positive scores above a negative, ties counting half."""
    difference = np.subtract.outer(np.array(positive), np.array(negative))
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


@pytest.fixture(scope="module")
def prior() -> list[Image.Image]:
    return other_avatars(100, seed=1)


@pytest.fixture(scope="module")
def strangers() -> list[Image.Image]:
    return other_avatars(200, seed=2)


@pytest.fixture(scope="module")
def zia() -> list[Image.Image]:
    return photos_of("zia")


@pytest.fixture(scope="module")
def zia_scorer(zia: list[Image.Image], prior: list[Image.Image]) -> LikenessScorer:
    return LikenessScorer.fit(zia, prior)


def test_likeness_tells_unseen_pictures_of_zia_from_other_avatars(
    zia_scorer: LikenessScorer, strangers: list[Image.Image]
) -> None:
    unseen = zia_scorer.score(true_pictures(200, seed=3))
    others = zia_scorer.score(strangers)
    assert roc_auc(unseen, others) >= 0.995  # measured: 1.000
    assert min(unseen) > max(others)
    assert np.mean(unseen) == pytest.approx(1.0, abs=0.1)
    assert np.mean(others) == pytest.approx(0.0, abs=0.1)


@pytest.mark.parametrize("seed", [9, 1009, 10009])  # measured: 0.9998, 0.9998, 0.987
def test_likeness_is_not_made_for_one_avatar(
    seed: int, prior: list[Image.Image], strangers: list[Image.Image]
) -> None:
    identity = sample_identity(seed)
    scorer = LikenessScorer.fit(pictures_of(identity, 14, seed=4), prior)
    unseen = scorer.score(pictures_of(identity, 60, seed=5))
    assert roc_auc(unseen, scorer.score(strangers)) >= 0.98


def test_likeness_survives_the_softness_of_a_small_vae(
    zia_scorer: LikenessScorer, strangers: list[Image.Image]
) -> None:
    def soften(image: Image.Image) -> Image.Image:
        return image.resize((20, 20), Image.Resampling.BOX).resize((64, 64))

    unseen = zia_scorer.score([soften(image) for image in true_pictures(40, seed=6)])
    others = zia_scorer.score([soften(image) for image in strangers[:60]])
    assert min(unseen) > max(others)


def test_likeness_ignores_clothes_and_background(zia_scorer: LikenessScorer) -> None:
    pose = replace(sample_context(7), hat="none", shift_x=0.0, shift_y=0.0, scale=1.05, tilt=0.0)
    changes: list[dict[str, Any]] = [
        {"background": "plain", "background_colour": "red", "clothes_colour": "blue"},
        {"background": "forest", "clothes": "suit", "clothes_colour": "black"},
        {"background": "snow", "clothes": "hoodie", "clothes_colour": "white"},
    ]
    scores = zia_scorer.score([draw_avatar(ZIA, replace(pose, **c)) for c in changes])
    assert max(scores) - min(scores) < 0.1
    other_skin = zia_scorer.score([draw_avatar(replace(ZIA, skin="tan"), pose)])
    assert other_skin[0] < min(scores) - 0.5


def test_scores_of_the_pictures_it_was_made_from(
    zia_scorer: LikenessScorer, zia: list[Image.Image], prior: list[Image.Image]
) -> None:
    assert len(zia_scorer.photos_scores) == len(zia)
    assert np.mean(zia_scorer.photos_scores) == pytest.approx(1.0)
    assert np.mean(zia_scorer.others_scores) == pytest.approx(0.0, abs=1e-9)
    assert min(zia_scorer.photos_scores) > max(zia_scorer.others_scores)
    assert zia_scorer.score(prior) == pytest.approx(list(zia_scorer.others_scores))
    # A photo that was left out scores no better than when it was known.
    assert np.mean(zia_scorer.score(zia)) >= 1.0


def test_mirrored_or_larger_pictures_score_the_same(zia_scorer: LikenessScorer) -> None:
    images = true_pictures(5, seed=8, size=64)
    scores = zia_scorer.score(images)
    assert zia_scorer.score([ImageOps.mirror(image) for image in images]) == pytest.approx(scores)
    enlarged = [image.resize((256, 256), Image.Resampling.NEAREST) for image in images]
    assert zia_scorer.score(enlarged) == pytest.approx(scores)


@pytest.mark.parametrize("name", ["likeness", "style"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_photos_and_equal_photos_give_finite_scores(
    name: str, count: int, zia: list[Image.Image], prior: list[Image.Image]
) -> None:
    for photos in (zia[:count], [zia[0]] * count):
        scorer = SCORERS.load(name).fit(photos, prior)
        scores = [*scorer.photos_scores, *scorer.others_scores, *scorer.score([zia[4], prior[0]])]
        assert np.isfinite(scores).all()
        assert scorer.score([zia[0]])[0] > max(scorer.others_scores)


@pytest.mark.parametrize("name", list(SCORERS))
def test_photos_without_anything_in_common_do_not_blow_up_the_scale(
    name: str, prior: list[Image.Image], strangers: list[Image.Image]
) -> None:
    scorer = SCORERS.load(name).fit(prior[:12], prior[12:])
    assert np.abs(scorer.score(strangers)).max() < 6


@pytest.mark.parametrize("name", list(SCORERS))
def test_same_pictures_same_scores(
    name: str, zia: list[Image.Image], prior: list[Image.Image]
) -> None:
    first, second = (SCORERS.load(name).fit(zia, prior).score(prior[:5]) for _ in range(2))
    assert first == second
    assert SCORERS.load(name).fit(zia, prior).score([]) == []


@pytest.mark.parametrize("name", list(SCORERS))
def test_a_scale_needs_pictures(
    name: str, zia: list[Image.Image], prior: list[Image.Image]
) -> None:
    with pytest.raises(ValueError, match="needs a photo and two other pictures, got 0"):
        SCORERS.load(name).fit([], prior)
    with pytest.raises(ValueError, match="and 1$"):
        SCORERS.load(name).fit(zia, prior[:1])


def test_many_photos_are_left_out_in_groups(prior: list[Image.Image]) -> None:
    photos = true_pictures(60, seed=9)
    scorer = LikenessScorer.fit(photos, prior)
    assert len(scorer.photos_scores) == 60
    assert np.mean(scorer.photos_scores) == pytest.approx(1.0)


def test_style_tells_neon_from_flat_whatever_is_shown(prior: list[Image.Image]) -> None:
    scorer = StyleScorer.fit(photos_of("neon"), prior)
    rng = random.Random(10)
    looks = [
        (sample_identity(rng.randrange(10**9)), sample_context(rng.randrange(10**9)))
        for _ in range(80)
    ]
    neon = scorer.score([draw_avatar(i, c, style="neon") for i, c in looks])
    flat = scorer.score([draw_avatar(i, c) for i, c in looks])
    assert roc_auc(neon, flat) >= 0.98  # measured: 1.000
    assert np.mean(neon) == pytest.approx(1.0, abs=0.15)
    assert np.mean(flat) == pytest.approx(0.0, abs=0.2)


def test_style_finds_looks_it_was_not_tried_on(
    prior: list[Image.Image], strangers: list[Image.Image]
) -> None:
    def coarse(image: Image.Image) -> Image.Image:
        return image.resize((16, 16)).resize((64, 64), Image.Resampling.NEAREST)

    def grey(image: Image.Image) -> Image.Image:
        return image.convert("L").convert("RGB")

    for change in (coarse, grey):
        scorer = StyleScorer.fit([change(image) for image in strangers[:14]], prior)
        changed = scorer.score([change(image) for image in strangers[14:60]])
        assert roc_auc(changed, scorer.score(strangers[60:110])) >= 0.99


def test_style_ignores_where_things_are(prior: list[Image.Image]) -> None:
    scorer = StyleScorer.fit(photos_of("neon"), prior)
    image = draw_avatar(sample_identity(11), sample_context(11), style="neon")
    assert scorer.score([ImageOps.flip(image)])[0] == pytest.approx(
        scorer.score([image])[0], abs=0.1
    )


def test_lab_of_known_colours() -> None:
    # CIE L*a*b* (D65) of white, black and pure sRGB red, from the CIE formulae.
    rgb = np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    expected = [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.5324, 0.8009, 0.6720]]
    assert to_lab(rgb) == pytest.approx(np.array(expected), abs=1e-3)


def test_drift_is_zero_for_unchanged_and_one_for_another_seed(strangers: list[Image.Image]) -> None:
    before, reseeded = strangers[:30], strangers[30:60]
    assert drift(before, before, reseeded) == 0.0
    assert drift(before, reseeded, reseeded) == pytest.approx(1.0)
    assert drift(before, strangers[60:90], reseeded) == pytest.approx(1.0, abs=0.2)
    half = [Image.blend(a, b, 0.5) for a, b in zip(before, reseeded, strict=True)]
    assert drift(before, half, reseeded) == pytest.approx(0.5, abs=0.02)


def test_drift_refuses_what_it_cannot_compare(strangers: list[Image.Image]) -> None:
    with pytest.raises(ValueError, match="equally many"):
        drift(strangers[:3], strangers[:2], strangers[:3])
    with pytest.raises(ValueError, match="equally many"):
        drift([], [], [])
    with pytest.raises(ValueError, match="differ between seeds"):
        drift(strangers[:2], strangers[2:4], strangers[:2])


def test_blank_pictures_are_found(zia: list[Image.Image]) -> None:
    for colour in ("black", "white", (38, 181, 173)):
        assert looks_blank(Image.new("RGB", (64, 64), colour))
    nearly = np.random.default_rng(0).integers(0, 3, (64, 64, 3), dtype=np.uint8)
    assert looks_blank(Image.fromarray(nearly))
    assert not any(looks_blank(photo) for photo in zia)
