"""Numbers that say what a training run learned, computed from pictures alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

from PIL import Image

from trainer.registry import Entry, Registry

SCORERS = Registry(
    "score",
    {
        "likeness": Entry(
            "trainer.scoring.likeness:LikenessScorer",
            "how much a picture looks like the subject of the photos",
        ),
        "identity": Entry(
            "trainer.scoring.identity:IdentityScorer",
            "whether a picture shows the subject of the photos, told by a trained net",
        ),
        "style": Entry(
            "trainer.scoring.style:StyleScorer",
            "how much a picture has the look of the photos, whatever it shows",
        ),
    },
)


class Scorer(Protocol):
    """Scores pictures on a scale where 0 is the mean of other pictures and 1 that of the photos."""

    @classmethod
    def fit(cls, photos: Sequence[Image.Image], others: Sequence[Image.Image]) -> Self:
        """Learn the scale from upright RGB pictures of any size.

        Args:
            photos: the photos trained on, at least one.
            others: pictures of other subjects that the base drew, at least two.
        """
        ...

    @property
    def photos_scores(self) -> tuple[float, ...]:
        """The photos' own scores, each found without that photo; their mean is 1
        (below 1 where the photos have less in common than the other pictures differ)."""
        ...

    @property
    def others_scores(self) -> tuple[float, ...]:
        """The scores of the other pictures; their mean is 0."""
        ...

    def score(self, images: Sequence[Image.Image]) -> list[float]:
        """One score for each picture."""
        ...
