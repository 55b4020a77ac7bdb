"""Which parts of a training picture count in the loss, and how much.

Weights are at the picture's own size until `latent_weights` brings them to that of its latents,
where the loss is taken.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from trainer.types import Bucketed

# The ellipse inside a face's box has the full weight; at this many times its radii, where the
# corners of the box are, it has faded to the weight of the rest.
_FADED = 2**0.5
# A mask that is darker than this everywhere is meant to be black: compression leaves traces in it.
_BLACK = 4.5 / 255.0


def mask_weights(mask: Image.Image) -> Tensor:
    """A grey picture as weights [height, width], float32: white is 1, black 0."""
    return torch.from_numpy(np.array(mask.convert("L"), dtype=np.float32)).div(255.0)


def is_black(weights_HW: Tensor) -> bool:
    """Whether a mask leaves nothing at all to be trained."""
    return bool(weights_HW.max() < _BLACK)


def face_weights(bucketed: Bucketed, face_weight: float) -> Tensor:
    """`face_weight` on the photo's faces, 1 elsewhere, with a soft edge between; before mirroring.

    Where faces overlap, the weight counts once.

    Returns:
        float32 [height, width] of the bucket.
    """
    bucket, photo, resized = bucketed.bucket, bucketed.captioned.photo.size, bucketed.resized
    inside_HW = torch.zeros(bucket.height, bucket.width)
    for box in (face.box for face in bucketed.faces):
        columns_W = torch.arange(bucket.width) + (bucketed.left + 0.5)
        rows_H = torch.arange(bucket.height) + (bucketed.top + 0.5)
        x_W = _in_radii(columns_W * (photo.width / resized.width), box.left, box.right)
        y_H = _in_radii(rows_H * (photo.height / resized.height), box.top, box.bottom)
        faded_HW = (_FADED - torch.hypot(x_W[None, :], y_H[:, None])) / (_FADED - 1.0)
        faded_HW = faded_HW.clamp(0.0, 1.0)
        # Smoothstep, which begins and ends without an edge.
        inside_HW = torch.maximum(inside_HW, faded_HW**2 * (3.0 - 2.0 * faded_HW))
    return 1.0 + (face_weight - 1.0) * inside_HW


def latent_weights(weights_HW: Tensor, height: int, width: int) -> Tensor:
    """Weights of a picture as weights of its latents: averaged over the area of each, mean 1.

    With a mean of 1 a picture weighs in the batch what it weighs without a mask.

    Args:
        weights_HW: none negative, not all of them 0.
        height, width: of the latents.

    Returns:
        float32 [height, width].

    Raises:
        ValueError: all weights are 0.
    """
    weights_hw = adaptive_avg_pool2d(weights_HW[None].float(), (height, width))[0]
    mean = weights_hw.mean()
    if mean <= 0:
        raise ValueError("weights that are 0 everywhere leave nothing to be trained")
    return weights_hw / mean


def _in_radii(places: Tensor, start: int, end: int) -> Tensor:
    """How far places are from the middle of `start` and `end`, in halves of their distance."""
    return (places - (start + end) / 2.0) / ((end - start) / 2.0)
