"""Puts any measure of closeness to the photos on one scale: 0 = other pictures, 1 = photos.

Features are arrays whose first axis counts the pictures; the rest is the measure's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float64]
Measure = Callable[[Array], Array]  # features of N pictures to their closeness [N]
Describe = Callable[[Sequence[Image.Image]], Array]  # N pictures to their features
Fit = Callable[[Array, Array], Measure]  # features of the photos and of the others to a measure

# More photos than this are left out in groups, so that the time stays in proportion to them.
MAX_FOLDS = 24


@dataclass(frozen=True, slots=True)
class Scale:
    """A measure, and the closeness that counts as 0 and as 1 (`zero + span`).

    photos_scores and others_scores are the scores of the pictures it was made from.
    """

    measure: Measure
    zero: float
    span: float
    photos_scores: tuple[float, ...]
    others_scores: tuple[float, ...]

    def score(self, features: Array) -> list[float]:
        """0 = as close as the other pictures are on average, 1 = as close as the photos are."""
        return _scaled(self.measure(features), self.zero, self.span)


class CalibratedScorer:
    """Scores pictures on a fitted scale.

    Args:
        scale: fitted to features.
        describe: RGB pictures of any size to their features.
    """

    def __init__(self, scale: Scale, describe: Describe) -> None:
        self._scale = scale
        self._describe = describe

    @property
    def photos_scores(self) -> tuple[float, ...]:
        """The photos' own scores, each found without that photo; as a rule their mean is 1."""
        return self._scale.photos_scores

    @property
    def others_scores(self) -> tuple[float, ...]:
        """The scores of the other pictures; their mean is 0."""
        return self._scale.others_scores

    def score(self, images: Sequence[Image.Image]) -> list[float]:
        """One score for each picture."""
        return self._scale.score(self._describe(images))


def fit_scale(fit: Fit, photos: Array, others: Array) -> Scale:
    """Fit the measure, and the scale from the photos, each measured by a fit to all the others.

    A single photo cannot be left out and counts as 1 itself. Where the photos are hardly closer
    to one another than the other pictures are to them (few and very different photos), 1 lies one
    standard deviation of the others above their mean, and the photos' mean is below 1.

    Raises:
        ValueError: no photo, or fewer than two other pictures.
    """
    if len(photos) < 1 or len(others) < 2:
        raise ValueError(
            f"a scale needs a photo and two other pictures, got {len(photos)} and {len(others)}"
        )
    measure = fit(photos, others)
    closeness = measure(others)
    left_out = _left_out(fit, photos, others) if len(photos) > 1 else measure(photos)
    zero = float(closeness.mean())
    span = max(float(left_out.mean()) - zero, float(closeness.std()), 1e-9)
    return Scale(
        measure,
        zero,
        span,
        photos_scores=tuple(_scaled(left_out, zero, span)),
        others_scores=tuple(_scaled(closeness, zero, span)),
    )


def _left_out(fit: Fit, photos: Array, others: Array) -> Array:
    """The closeness of each photo by a measure fitted without it: [N]."""
    count = len(photos)
    folds = min(count, MAX_FOLDS)
    closeness = np.empty(count)
    for fold in range(folds):
        held = np.arange(count) % folds == fold
        closeness[held] = fit(photos[~held], others)(photos[held])
    return closeness


def _scaled(closeness: Array, zero: float, span: float) -> list[float]:
    return [float(value) for value in (closeness - zero) / span]
