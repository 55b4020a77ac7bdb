"""What several data tests draw from, and photos that need no file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from PIL import Image

from trainer.types import Captioned, Photo, Size

# A busy machine is no reason to fail.
unhurried = settings(deadline=None)


def photo_sizes() -> st.SearchStrategy[Size]:
    """Sizes a scan lets through: from thumbnails to large cameras, up to 1:10."""
    sides = st.integers(32, 9000)
    return st.builds(Size, sides, sides).filter(
        lambda size: max(size.width, size.height) <= 10 * min(size.width, size.height)
    )


def bucket_settings() -> st.SearchStrategy[tuple[int, int, float]]:
    """(resolution_px, step_px, max_aspect) that `make_buckets` accepts."""
    return st.tuples(st.integers(64, 1536), st.sampled_from([8, 16, 32, 64]), st.floats(1.0, 4.0))


def captioned(path: Path, size: Size, *, digest: str = "0" * 64, text: str = "x") -> Captioned:
    return Captioned(Photo(path, size, digest), (text,), "template")


def gradient(width: int = 48, height: int = 40) -> Image.Image:
    """A picture whose four corners differ and whose neighbouring pixels are alike."""
    x, y = np.meshgrid(np.linspace(20, 235, width), np.linspace(20, 235, height))
    pixels = np.stack([x, y, (x + 2 * y) / 3], axis=-1)
    return Image.fromarray(pixels.round().astype(np.uint8))
