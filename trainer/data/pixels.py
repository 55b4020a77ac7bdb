"""A photo in its bucket -> the tensor the VAE sees; and back to a picture."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.data.decode import WHITE, PictureError, decode_upright
from trainer.types import Bucketed


def load_pixels(
    bucketed: Bucketed, *, background: tuple[int, int, int] = WHITE, flip: bool = False
) -> Tensor:
    """Decode, resize and crop a photo.

    The resize is Pillow's Lanczos, whose support grows with the reduction, so fine patterns are
    averaged and do not alias; the crop is exact.

    Args:
        bucketed: the photo and its place.
        background: what shows through where the photo is transparent.
        flip: mirror left and right, after the crop.

    Returns:
        float32 [3, height, width] of the bucket, in [-1, 1].

    Raises:
        PictureError: the file cannot be decoded any more, or its size is no longer that found.
    """
    photo = bucketed.captioned.photo
    image = decode_upright(photo.path, background=background)
    if image.size != (photo.size.width, photo.size.height):
        reason = f"changed while it was in use: {photo.size} px became {image.width}x{image.height}"
        raise PictureError(photo.path, reason, "Leave the photos as they are and start again.")
    resized = (bucketed.resized.width, bucketed.resized.height)
    if image.size != resized:
        image = image.resize(resized, Image.Resampling.LANCZOS)
    right, bottom = bucketed.left + bucketed.bucket.width, bucketed.top + bucketed.bucket.height
    image = image.crop((bucketed.left, bucketed.top, right, bottom))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    values_HWC = torch.from_numpy(np.array(image))
    return values_HWC.permute(2, 0, 1).to(torch.float32).div(127.5).sub(1.0).contiguous()


def to_pil(pixels_CHW: Tensor) -> Image.Image:
    """The picture of float values [3, height, width] in [-1, 1]; values beyond are clipped."""
    values = pixels_CHW.detach().to("cpu", torch.float32).add(1.0).mul(127.5)
    values_HWC = values.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(values_HWC.contiguous().numpy())
