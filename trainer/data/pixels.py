"""A photo in its bucket -> the tensor the VAE sees and what of it counts; and back to a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from trainer.data.decode import (
    WHITE,
    PictureError,
    decode_upright,
    decode_with_alpha,
    read_mask,
    shown,
)
from trainer.data.masks import face_weights, is_black, mask_weights
from trainer.types import Bucketed, Size

Transparency = Literal["background", "mask"]


@dataclass(frozen=True, slots=True)
class TrainingPicture:
    """What is trained of a photo.

    pixels_CHW: float32 [3, height, width] of the bucket, in [-1, 1]. weights_HW: float32 [height,
    width], what each pixel counts beside the others; None: all alike.
    """

    pixels_CHW: Tensor
    weights_HW: Tensor | None = None


def load_picture(
    bucketed: Bucketed,
    *,
    background: tuple[int, int, int] = WHITE,
    transparency: Transparency = "background",
    face_weight: float = 1.0,
) -> TrainingPicture:
    """Decode, resize and crop a photo, change it as its variant says, and weigh its parts.

    The weights are the product of those that are asked for: the photo's mask, its transparency
    and its faces.

    Args:
        bucketed: the photo, its place and its variant.
        background: what shows through where the photo is transparent.
        transparency: "mask" leaves transparent parts out of the loss as well.
        face_weight: of the faces beside the rest; 1 is alike.

    Raises:
        PictureError: the photo or its mask cannot be decoded any more, the photo's size is no
            longer that found, or nothing of the crop is left to be trained.
    """
    photo = bucketed.captioned.photo
    alpha = None
    if transparency == "mask":
        image, alpha = decode_with_alpha(photo.path, background=background)
    else:
        image = decode_upright(photo.path, background=background)
    _require_size(bucketed, image)
    weights = _masks(bucketed, alpha)
    if face_weight != 1.0 and bucketed.faces:
        faces_HW = face_weights(bucketed, face_weight)
        weights.append(faces_HW.flip(-1) if bucketed.variant.flip else faces_HW)
    pixels_CHW = _to_pixels(crop_image(bucketed, image))
    weights_HW = torch.stack(weights).prod(dim=0) if weights else None
    return TrainingPicture(pixels_CHW, weights_HW)


def crop_image(bucketed: Bucketed, image: Image.Image) -> Image.Image:
    """The very picture that is trained, from the upright RGB photo at its full size.

    The resize is Pillow's Lanczos, whose support grows with the reduction, so fine patterns are
    averaged and do not alias; the crop is exact.
    """
    variant = bucketed.variant
    image = _cropped(bucketed, image, Image.Resampling.LANCZOS)
    if variant.brightness != 1.0:
        image = ImageEnhance.Brightness(image).enhance(variant.brightness)
    if variant.contrast != 1.0:
        image = ImageEnhance.Contrast(image).enhance(variant.contrast)
    if variant.saturation != 1.0:
        image = ImageEnhance.Color(image).enhance(variant.saturation)
    return image


def to_pil(pixels_CHW: Tensor) -> Image.Image:
    """The picture of float values [3, height, width] in [-1, 1]; values beyond are clipped."""
    values = pixels_CHW.detach().to("cpu", torch.float32).add(1.0).mul(127.5)
    values_HWC = values.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(values_HWC.contiguous().numpy())


def _cropped(bucketed: Bucketed, image: Image.Image, resampling: Image.Resampling) -> Image.Image:
    """Resized, cropped and mirrored as the variant has it; a photo, its mask or its alpha."""
    resized, bucket = bucketed.resized, bucketed.bucket
    if image.size != (resized.width, resized.height):
        image = image.resize((resized.width, resized.height), resampling)
    left, top = bucketed.left, bucketed.top
    image = image.crop((left, top, left + bucket.width, top + bucket.height))
    if bucketed.variant.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def _to_pixels(image: Image.Image) -> Tensor:
    values_HWC = torch.from_numpy(np.array(image))
    return values_HWC.permute(2, 0, 1).to(torch.float32).div(127.5).sub(1.0).contiguous()


def _require_size(bucketed: Bucketed, image: Image.Image) -> None:
    photo, found = bucketed.captioned.photo, Size(*image.size)
    if found != photo.size:
        reason = f"changed while it was in use: {photo.size} px became {found}"
        raise PictureError(photo.path, reason, "Leave the photos as they are and start again.")


def require_visible(bucketed: Bucketed, transparency: Transparency) -> None:
    """See that something of a training picture counts, without reading more than its masks.

    Raises:
        PictureError: nothing does, or the photo or its mask cannot be read any more.
    """
    photo = bucketed.captioned.photo
    alpha = decode_with_alpha(photo.path)[1] if transparency == "mask" else None
    if photo.mask is not None or alpha is not None:
        _masks(bucketed, alpha)


def _masks(bucketed: Bucketed, alpha: Image.Image | None) -> list[Tensor]:
    """The weights [height, width] that the photo's mask and its transparency give, if any.

    One that is black would give a picture without a loss.
    """
    photo = bucketed.captioned.photo
    named = []
    if photo.mask is not None:
        reason = f"has a mask, {shown(photo.mask.name)}, that is black in all that is trained of it"
        named.append((read_mask(photo.mask, photo.size), reason))
    if alpha is not None:
        named.append((alpha, "is transparent in all that is trained of it"))
    weights = []
    left_HW = torch.ones(bucketed.bucket.height, bucketed.bucket.width)
    for picture, reason in named:
        weights.append(mask_weights(_cropped(bucketed, picture, Image.Resampling.BOX)))
        left_HW = left_HW * weights[-1]
        if is_black(left_HW):
            fix = "Make visible what is to be learned (white in a mask), or remove the photo."
            raise PictureError(photo.path, f"{reason}, so nothing could be learned", fix)
    return weights
