"""How far training moved pictures that it should leave alone, and whether a picture is blank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from trainer.scoring.colours import thumbnails

SIDE_CELLS = 16
BLANK_SPREAD = 0.01  # standard deviation of sRGB values between 0 and 1


def drift(
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    reseeded: Sequence[Image.Image],
) -> float:
    """How different the same prompts and seeds look after training.

    Args:
        before: samples drawn before training.
        after: the same prompts and seeds after training.
        reseeded: the same prompts before training, each with another seed.

    Returns:
        0 for unchanged, 1 for as different as another seed makes them: the mean absolute
        difference of 16 x 16 thumbnails, over that between two seeds.

    Raises:
        ValueError: the numbers of pictures differ or are 0, or the seed changes nothing.
    """
    if not len(before) == len(after) == len(reseeded) > 0:
        raise ValueError(
            f"drift compares equally many pictures, got {len(before)}, {len(after)} "
            f"and {len(reseeded)}"
        )
    start = thumbnails(before, SIDE_CELLS)
    changed = np.abs(thumbnails(after, SIDE_CELLS) - start).mean()
    unit = np.abs(thumbnails(reseeded, SIDE_CELLS) - start).mean()
    if unit == 0:
        raise ValueError("drift needs pictures that differ between seeds")
    return float(changed / unit)


def looks_blank(image: Image.Image) -> bool:
    """Whether a picture is one colour all over, as black pictures from a failed decoder are."""
    return bool(thumbnails([image], SIDE_CELLS)[0].std(axis=(0, 1)).max() < BLANK_SPREAD)
