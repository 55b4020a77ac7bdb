"""Pictures as a detector wants them, and what it found in the pixels of the whole picture."""

from __future__ import annotations

import math
from collections.abc import Iterable

from PIL import Image

from trainer.types import Box, Face


def resized(image: Image.Image, side_px: int) -> Image.Image:
    """The picture with a longest side of `side_px`, in its own shape."""
    scale = side_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def box_within(left: float, top: float, right: float, bottom: float, image: Image.Image) -> Box:
    """The whole pixels of a box that lie inside a picture; empty (no width or height) outside."""
    return Box(
        max(0, math.floor(left)),
        max(0, math.floor(top)),
        min(image.width, math.ceil(right)),
        min(image.height, math.ceil(bottom)),
    )


def largest_first(faces: Iterable[Face]) -> tuple[Face, ...]:
    """The faces by their area, without those that lie outside the picture."""
    inside = [face for face in faces if face.box.width > 0 and face.box.height > 0]
    return tuple(sorted(inside, key=lambda face: -face.box.width * face.box.height))
