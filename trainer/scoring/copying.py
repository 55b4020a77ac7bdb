"""Whether a picture repeats a training photo instead of showing its subject anew.

Pictures are compared as thumbnails of 32 x 32 cells in L*a*b*, mirrored or not, at the best of
nine small shifts; their distance is the root of the mean squared difference. How near is too near
depends on the photos: portraits before one wall are all alike, and a new one before that wall is no
copy. A picture counts as one where it is nearer to a photo than 0.4 times what photos of different
moments are apart (the median over the photos, each from the nearest other moment). Photos of the
same moment, as a camera takes them in a row, are put together first, so that they do not make the
measure small.

On drawn avatars, with 14 photos of each of five, of 300 true pictures of the subject in new dress
and places none counts as a copy, and every photo does: as it is, mirrored, moved by 3 % of its
side, noisy, compressed, or with the softness of a small VAE (tests/test_copying.py).

Shapes: N pictures, V views (shifted, mirrored), F cells times colour channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.scoring.colours import thumbnails, to_lab

Array = NDArray[np.float64]

SIDE_CELLS = 32
SHIFT_CELLS = 1
# Nearer than this share of the usual distance between photos is a copy.
NEAR = 0.4
# Photos nearer to each other than this share of the median of all pairs show the same moment.
SAME_MOMENT = 0.4
# Pictures this near are the same to the eye, however alike the photos are: as far as noise of 12
# grey levels moves a picture of 64 px.
SAME_PICTURE = 0.06
# More photos than this are thinned out evenly where each is compared with each.
MAX_PAIRED = 64


class CopyFinder:
    """Finds pictures that repeat one of some photos.

    Args:
        photos_NF: cells of the photos.
        limit: the distance below which a picture is a copy.
    """

    def __init__(self, photos_NF: Array, limit: float) -> None:
        self._photos_NF = photos_NF
        self.limit = limit

    @classmethod
    def fit(cls, photos: Sequence[Image.Image], others: Sequence[Image.Image]) -> Self:
        """Learn how near is too near from upright RGB pictures of any size.

        Args:
            photos: the photos trained on, as the samples would show them (through the VAE).
            others: pictures that can be no copies; they give the measure where the photos cannot,
                as a single photo.

        Raises:
            ValueError: no photo, or no other picture.
        """
        if not photos or not others:
            raise ValueError(f"copies need photos and others, got {len(photos)} and {len(others)}")
        step = -(-len(photos) // MAX_PAIRED)
        apart = _distance_between_moments(distances(photos[::step], photos[::step]))
        if apart is None:
            apart = float(np.median(distances(others, photos).min(axis=1)))
        return cls(_views(photos)[:, 0], max(SAME_PICTURE, NEAR * apart))

    def copies(self, images: Sequence[Image.Image]) -> list[bool]:
        """Whether each picture is a copy of a photo."""
        if not images:
            return []
        nearest = _distances(_views(images), self._photos_NF).min(axis=1)
        return [bool(distance < self.limit) for distance in nearest]


def distances(images: Sequence[Image.Image], photos: Sequence[Image.Image]) -> Array:
    """Distance of each picture to each photo: [pictures, photos]; 0 for the same picture."""
    return _distances(_views(images), _views(photos)[:, 0])


def _distances(views_NVF: Array, photos_NF: Array) -> Array:
    # Summed over the three channels, and the mean over the cells.
    columns = [
        3 * np.square(views_NVF - photo_F).mean(axis=-1).min(axis=1) for photo_F in photos_NF
    ]
    return np.asarray(np.sqrt(np.stack(columns, axis=1)))


def _distance_between_moments(pairs_NN: Array) -> float | None:
    """The median distance from a photo to the nearest of another moment; None for one moment."""
    count = len(pairs_NN)
    if count < 2:
        return None
    pairs_NN = np.minimum(pairs_NN, pairs_NN.T)
    limit = SAME_MOMENT * float(np.median(pairs_NN[np.triu_indices(count, 1)]))
    moment = np.arange(count)
    for first, second in np.argwhere(pairs_NN < max(limit, SAME_PICTURE)):
        moment[moment == moment[second]] = moment[first]
    others_NN = moment[:, None] != moment
    if not others_NN.any():
        return None
    return float(np.median(np.where(others_NN, pairs_NN, np.inf).min(axis=1)))


def _views(images: Sequence[Image.Image]) -> Array:
    """Each picture as it is, shifted by a cell, and mirrored: [N, 19, 3072], as it is first."""
    cells = to_lab(thumbnails(images, SIDE_CELLS))
    margin = (SHIFT_CELLS, SHIFT_CELLS)
    places = range(2 * SHIFT_CELLS + 1)
    views = [cells]
    for picture in (cells, cells[:, :, ::-1]):
        padded = np.pad(picture, ((0, 0), margin, margin, (0, 0)), mode="edge")
        views += [padded[:, y : y + SIDE_CELLS, x : x + SIDE_CELLS] for y in places for x in places]
    return np.stack(views, axis=1).reshape(len(images), len(views), -1)
