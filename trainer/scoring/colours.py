"""Pictures as small arrays in a colour space where distance is about what an eye sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

# sRGB primaries to CIE XYZ, with the D65 white point divided out (IEC 61966-2-1, CIE 15).
_RGB_TO_XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
) / np.array([[0.9505], [1.0], [1.089]])


def thumbnails(images: Sequence[Image.Image], side_px: int) -> NDArray[np.float64]:
    """Centre squares reduced to `side_px`: [N, side, side, 3], sRGB from 0 to 1."""
    size = (side_px, side_px)
    squares = [ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(square, dtype=np.float64) for square in squares]) / 255


def to_lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIE L*a*b* divided by 100, from sRGB between 0 and 1; the last axis holds the channels."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _RGB_TO_XYZ.T
    x, y, z = np.moveaxis(np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116), -1, 0)
    return np.stack([1.16 * y - 0.16, 5 * (x - y), 2 * (y - z)], axis=-1)
