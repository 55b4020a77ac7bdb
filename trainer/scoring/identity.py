"""How much a picture shows the subject of some photos, whatever it wears and wherever it is.

A net turns pictures into unit vectors (`embedders.py`); a picture is as close to the photos as its
vector is to the middle of theirs (cosine). With the embedded base that net is our own and knows its
drawings; for photographs, a folder with CLIP, DINOv2 or a face model takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Self

import numpy as np
from PIL import Image

from trainer.scoring.calibration import Array, CalibratedScorer, Measure, fit_scale
from trainer.scoring.embedders import AvatarEmbedder, Embedder


class IdentityScorer(CalibratedScorer):
    """Scores pictures from 0 (other subjects of the class) to 1 (the photos' own subject)."""

    @classmethod
    def fit(
        cls,
        photos: Sequence[Image.Image],
        others: Sequence[Image.Image],
        embedder: Embedder | None = None,
    ) -> Self:
        """Learn the subject from upright RGB pictures of any size.

        Args:
            photos: the photos trained on, at least one.
            others: pictures of other subjects that the base drew, at least two.
            embedder: who is who; None takes the net for the embedded base's avatars.

        Raises:
            ValueError: no photo, or fewer than two other pictures.
            ModelError: the weights are missing or damaged.
        """
        embed = (embedder or _avatar_embedder()).embed
        return cls(fit_scale(fit_centre, embed(photos), embed(others)), embed)


def fit_centre(photos_ND: Array, others_ND: Array) -> Measure:
    """Cosine to the mean of the photos' unit vectors; the other pictures do not enter."""
    centre_D = photos_ND.mean(axis=0)
    length = float(np.linalg.norm(centre_D))
    # Vectors that cancel out have no common direction: every picture is equally far.
    direction_D = centre_D / length if length > 0 else centre_D
    return lambda vectors_ND: vectors_ND @ direction_D


@cache
def _avatar_embedder() -> AvatarEmbedder:
    return AvatarEmbedder.load()
