"""How much a picture has the look of some photos, whatever it shows, without a network.

A picture is described by its tones, colourfulness and edges: which lightness and chroma it holds,
how strong and how directed its edges are at three sizes, and whether its lines are lighter or more
colourful than what lies between them. Where in the picture things are does not enter. The score is
the position along the direction that best separates the photos from other pictures: Fisher's
linear discriminant, with a ridge because there are few photos.

Shapes: N pictures, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
from PIL import Image

from trainer.scoring.calibration import Array, CalibratedScorer, Measure, fit_scale
from trainer.scoring.colours import thumbnails, to_lab

SIDE_PX = 64
SIZES = 3  # the full size, a half, a quarter
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
DIRECTIONS = 4
# Added to the covariance of features whose variance in the population is 1.
RIDGE = 0.3
FEATURES = 2 * (2 + len(QUANTILES)) + SIZES * (9 + DIRECTIONS)


class StyleScorer(CalibratedScorer):
    """Scores pictures from 0 (the base's own look) to 1 (the photos' look)."""

    @classmethod
    def fit(cls, photos: Sequence[Image.Image], others: Sequence[Image.Image]) -> Self:
        """Learn the look from upright RGB pictures of any size.

        Raises:
            ValueError: no photo, or fewer than two other pictures.
        """
        return cls(fit_scale(fit_look, describe(photos), describe(others)), describe)


def describe(images: Sequence[Image.Image]) -> Array:
    """The low-level look of each picture: [N, F]."""
    features = [_describe(thumbnails([image], SIDE_PX)[0]) for image in images]
    return np.array(features).reshape(len(images), FEATURES)


def fit_look(photos_NF: Array, others_NF: Array) -> Measure:
    """Position along the linear discriminant between the photos and the other pictures."""
    spread_F = np.concatenate([photos_NF, others_NF]).std(axis=0) + 1e-6
    photos, others = photos_NF / spread_F, others_NF / spread_F
    step_F = photos.mean(axis=0) - others.mean(axis=0)
    within = np.concatenate([photos - photos.mean(axis=0), others - others.mean(axis=0)])
    covariance_FF = within.T @ within / len(within) + RIDGE * np.eye(FEATURES)
    direction_F = np.linalg.solve(covariance_FF, step_F) / spread_F
    return lambda features_NF: features_NF @ direction_F


def _describe(rgb: Array) -> Array:
    lab = to_lab(rgb)
    lightness, chroma = lab[..., 0], np.hypot(lab[..., 1], lab[..., 2])
    parts = [_tones(lightness), _tones(chroma)]
    for _ in range(SIZES):
        parts.append(_edges(lightness, chroma))
        lightness, chroma = _halve(lightness), _halve(chroma)
    return np.concatenate(parts)


def _tones(values: Array) -> Array:
    return np.concatenate([[values.mean(), values.std()], np.quantile(values, QUANTILES)])


def _halve(values: Array) -> Array:
    half = len(values) // 2
    return values.reshape(half, 2, half, 2).mean(axis=(1, 3))


def _edges(lightness: Array, chroma: Array) -> Array:
    """Strength, direction and line character of the edges at one size."""
    down, across = np.gradient(lightness)
    strength = np.hypot(down, across)
    total = strength.sum() + 1e-6
    angle = np.mod(np.arctan2(down, across), np.pi) * (DIRECTIONS / np.pi)
    which = np.floor(angle + 0.5).astype(int) % DIRECTIONS
    directed = np.bincount(which.ravel(), strength.ravel(), DIRECTIONS) / total
    line = _above_surroundings(lightness)
    return np.concatenate(
        [
            [strength.mean(), strength.std(), np.quantile(strength, 0.95)],
            directed,
            [(strength * lightness).sum() / total - lightness.mean()],
            [(strength * chroma).sum() / total - chroma.mean()],
            [np.maximum(line, 0).mean(), np.maximum(-line, 0).mean(), _skewness(line)],
            [np.abs(_above_surroundings(chroma)).mean()],
        ]
    )


def _above_surroundings(values: Array) -> Array:
    """How far each pixel lies above the mean of its four neighbours."""
    padded = np.pad(values, 1, mode="edge")
    around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    return values - around / 4


def _skewness(values: Array) -> float:
    """Positive for light lines on dark ground; squashed, as it has no bounds."""
    deviations = values - values.mean()
    return float(np.tanh((deviations**3).mean() / (values.std() ** 3 + 1e-6) / 4))
