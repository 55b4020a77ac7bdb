"""Finds what a set of photos has in common that other pictures lack, and measures it.

A trait (a cell of a thumbnail, a number about texture) weighs the more, the less it varies among
the photos and the more it varies in the population of photos and other pictures: what changes
from photo to photo, such as clothes and background, drops out by itself. The weights

    w = max(0, 1 / var(photos) - 1 / var(population))

are those of a log-likelihood ratio between two normal distributions with independent traits.

Shapes: N pictures, V views of a picture (shifted, mirrored), F traits, C channels of a trait.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# The photos' variance counts the population's as this many photos. One photo alone thus gives
# weights 1 / var(population), and identical photos cannot make a weight infinite.
PRIOR_PHOTOS = 0.1
# Share of the mean population variance added to every trait, for traits that never vary.
VARIANCE_FLOOR = 0.01
# Photos are shifted and mirrored to fit their own mean this often before it is taken for good.
ALIGNMENT_ROUNDS = 2
# More photos than this are left out in groups, so that the time stays in proportion to them.
MAX_FOLDS = 24


@dataclass(frozen=True, slots=True)
class Traits:
    """What the photos have in common: `mean_FC`, and the weights `weight_F` with sum 1."""

    mean_FC: Array
    weight_F: Array

    def squared_distances(self, views_NVFC: Array) -> Array:
        """Weighted squared distance of every view to the mean: [N, V]."""
        squares_NVF = np.square(views_NVFC - self.mean_FC).sum(axis=-1)
        return squares_NVF @ self.weight_F

    def closeness(self, views_NVFC: Array) -> Array:
        """Minus the distance of each picture's nearest view: [N]; 0 is the most."""
        return -np.sqrt(self.squared_distances(views_NVFC).min(axis=1))


@dataclass(frozen=True, slots=True)
class Scale:
    """Traits, and the closeness that counts as 0 and as 1.

    photos_scores and others_scores are the scores of the pictures it was made from.
    """

    traits: Traits
    zero: float
    span: float
    photos_scores: tuple[float, ...]
    others_scores: tuple[float, ...]

    def score(self, views_NVFC: Array) -> list[float]:
        """0 = as close as the other pictures are on average, 1 = as close as the photos are."""
        return [float(x) for x in (self.traits.closeness(views_NVFC) - self.zero) / self.span]


def fit_traits(photos_NVFC: Array, others_MVFC: Array) -> Traits:
    """Mean and weights of the photos; view 0 is the picture as it is."""
    aligned_NFC = photos_NVFC[:, 0]
    population = np.concatenate([others_MVFC[:, 0], aligned_NFC]).var(axis=0).mean(axis=-1)
    population_F = population + VARIANCE_FLOOR * population.mean() + np.finfo(np.float64).tiny
    traits = _weigh(aligned_NFC, population_F)
    for _ in range(ALIGNMENT_ROUNDS):
        nearest_N = traits.squared_distances(photos_NVFC).argmin(axis=1)
        aligned_NFC = photos_NVFC[np.arange(len(photos_NVFC)), nearest_N]
        traits = _weigh(aligned_NFC, population_F)
    return traits


def fit_scale(photos_NVFC: Array, others_MVFC: Array) -> Scale:
    """Fit the traits, and the scale from the photos, each scored by traits fitted on the rest.

    A single photo has no rest and counts as 1 itself. Where the photos are hardly closer to one
    another than the other pictures are to them (few and very different photos), 1 lies one
    standard deviation of the others above their mean, and the photos' mean is below 1.

    Raises:
        ValueError: no photo, or fewer than two other pictures.
    """
    check_counts(photos_NVFC, others_MVFC)
    traits = fit_traits(photos_NVFC, others_MVFC)
    others = traits.closeness(others_MVFC)
    photos = _left_out(photos_NVFC, others_MVFC)
    zero = float(others.mean())
    span = max(float(photos.mean()) - zero, float(others.std()), 1e-9)
    return Scale(traits, zero, span, _scaled(photos, zero, span), _scaled(others, zero, span))


def check_counts(photos: Array, others: Array) -> None:
    """Refuse what no scale can be made from.

    Raises:
        ValueError: no photo, or fewer than two other pictures.
    """
    if len(photos) < 1 or len(others) < 2:
        raise ValueError(
            f"a scale needs a photo and two other pictures, got {len(photos)} and {len(others)}"
        )


def _weigh(aligned_NFC: Array, population_F: Array) -> Traits:
    count = len(aligned_NFC)
    spread_F = aligned_NFC.var(axis=0).mean(axis=-1)
    photos_F = (count * spread_F + PRIOR_PHOTOS * population_F) / (count + PRIOR_PHOTOS)
    excess_F = np.maximum(0.0, 1 / photos_F - 1 / population_F)
    # Photos that vary more than the population everywhere have nothing in common to look for.
    weight_F = excess_F if excess_F.any() else 1 / population_F
    return Traits(aligned_NFC.mean(axis=0), weight_F / weight_F.sum())


def _left_out(photos_NVFC: Array, others_MVFC: Array) -> Array:
    """The closeness of each photo to traits fitted without it: [N]."""
    count = len(photos_NVFC)
    if count == 1:
        return np.zeros(1)
    closeness_N = np.empty(count)
    folds = min(count, MAX_FOLDS)
    for fold in range(folds):
        held = np.arange(count) % folds == fold
        traits = fit_traits(photos_NVFC[~held], others_MVFC)
        closeness_N[held] = traits.closeness(photos_NVFC[held])
    return closeness_N


def _scaled(closeness: Array, zero: float, span: float) -> tuple[float, ...]:
    return tuple(float(x) for x in (closeness - zero) / span)
