"""One picture file -> an upright 8-bit RGB picture, or a sentence that says why not.

Every trap of real photo folders is handled here and in `opening`, and nowhere else: EXIF
orientation, colour profiles, CMYK, palettes, 16-bit and floating-point greys, transparency,
animations, files that are cut short and files that are not pictures at all.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms
from PIL.ImageFile import ImageFile

from trainer.data.opening import (
    DECODE_ERRORS,
    MOST_MEGAPIXELS,
    PictureError,
    opened,
    shown,
)
from trainer.types import Size

__all__ = [
    "WHITE",
    "Measured",
    "PictureError",
    "decode_upright",
    "decode_with_alpha",
    "measure",
    "read_mask",
    "shown",
]

WHITE = (255, 255, 255)

_PROFILE_ERRORS: tuple[type[Exception], ...] = (
    ImageCms.PyCMSError,
    ImportError,  # a Pillow built without lcms
    *DECODE_ERRORS,
)

# EXIF 2.3, tag 0x0112: what undoes each orientation.
_ORIENTATION_TAG = 0x0112
_UNDO_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)

# ICC header, "data colour space" -> the Pillow mode that lcms takes for it.
_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_GREY_MODES = ("1", "L", "LA", "La")
_JPEG = ("JPEG", "MPO")  # MPO: a JPEG with further pictures in it, as many phones write
_REDUCIBLE = ("L", "LA", "RGB", "RGBA", "CMYK")  # modes whose pixels may be averaged

# What files of each format are called.
_FORMAT_OF_SUFFIX = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jfif": "JPEG",
    ".tif": "TIFF",
    ".heic": "HEIC",
    ".heif": "HEIC",
    ".hif": "HEIC",
}
_FORMAT_NAMES = {"MPO": "JPEG", "HEIF": "HEIC"}

# A mask or an opacity no brighter than this (of 255) is taken for black: class numbers 0 and 1.
_BLACK = 8


@dataclass(frozen=True, slots=True)
class Measured:
    """The upright size of a picture, and what was unusual in reading it, each going on from the
    file's name ("is an animation; its first picture is used")."""

    size: Size
    notices: tuple[str, ...] = ()


def decode_upright(
    path: Path, *, background: tuple[int, int, int] = WHITE, at_least: Size | None = None
) -> Image.Image:
    """Read a picture as a person would see it: upright, 8-bit sRGB; an animation's first frame.

    Args:
        path: the picture.
        background: what shows through where the picture is transparent, as (red, green, blue).
        at_least: a smaller version will do, so long as neither side of it is shorter than that
            (where the picture itself is as large). Its shape is the picture's to within a pixel.
            A JPEG is then read several times faster.

    Raises:
        PictureError: the file cannot be decoded (a `DataError` that names it).
    """
    return decode_with_alpha(path, background=background, at_least=at_least)[0]


def decode_with_alpha(
    path: Path, *, background: tuple[int, int, int] = WHITE, at_least: Size | None = None
) -> tuple[Image.Image, Image.Image | None]:
    """Read a picture and what of it can be seen. Arguments and errors as in `decode_upright`.

    Returns:
        The picture on the background (mode RGB), and how opaque it is (mode L, of the same size,
        white: wholly); None where nothing is transparent.
    """
    with opened(path) as image:
        if at_least is not None:
            sideways = image.format in _JPEG and _orientation(image) in _SIDEWAYS
            _draft(image, Size(at_least.height, at_least.width) if sideways else at_least)
        image.load()
        upright = _upright(image)
        if at_least is not None:
            upright = _reduced(upright, at_least)
        return _to_rgb(upright, background)


def measure(path: Path, *, maximum_megapixels: float) -> Measured:
    """Decode a picture from end to end to prove that it is whole.

    `Image.verify` is no proof: it accepts a JPEG that lacks its second half.

    Raises:
        PictureError: the file cannot be decoded, or its header announces more pixels than allowed
            (it is then refused before any pixel is decoded).
    """
    with opened(path, maximum_megapixels=maximum_megapixels) as image:
        width, height = image.size
        # A JPEG decoded at a fraction of its size is still read to its last byte, much sooner.
        drafted = _draft(image, Size(64, 64))
        image.load()
        if not drafted:  # a HEIC's header may be wrong about its size
            width, height = image.size
        _require_visible(path, image)
        if _orientation(image) in _SIDEWAYS:
            width, height = height, width
        # Colours are converted pixel by pixel, so a few show what would happen to all.
        small = image.resize((min(64, width), min(64, height)), Image.Resampling.NEAREST)
        _to_rgb(small, WHITE)
        notices = [
            *_format_notice(path, image.format or ""),
            *_frames_notice(image),
            *_profile_notice(small),
        ]
    return Measured(Size(width, height), tuple(notices))


def read_mask(
    path: Path, size: Size, *, maximum_megapixels: float = MOST_MEGAPIXELS
) -> Image.Image:
    """Read the picture that says which parts of a photo are trained; transparent parts are not.

    Args:
        path: the mask.
        size: of its upright photo.
        maximum_megapixels: a mask with more pixels is refused before any is decoded.

    Returns:
        Mode L, upright, resized to `size`; white: trained, black: not.

    Raises:
        PictureError: it cannot be decoded, has another shape than the photo, or is black all over.
    """
    with opened(path, maximum_megapixels=maximum_megapixels) as image:
        image.load()
        image.info.pop("icc_profile", None)  # the values are weights, not colours
        mask = _to_rgb(_upright(image), (0, 0, 0))[0].convert("L")
    if abs(mask.width * size.height - mask.height * size.width) > max(size.width, size.height):
        reason = f"is a mask of {mask.width} x {mask.height} px, another shape than its photo's "
        reason += f"{size.width} x {size.height} px"
        raise PictureError(path, reason, "Save the mask at the size of its photo.")
    if np.asarray(mask).max() < _BLACK:
        reason = "is a mask that is black all over: nothing of its photo would be trained"
        raise PictureError(path, reason, "Paint white what is to be trained, or remove the mask.")
    if mask.size == (size.width, size.height):
        return mask
    return mask.resize((size.width, size.height), Image.Resampling.BILINEAR)


def _require_visible(path: Path, image: Image.Image) -> None:
    """A picture of which nothing can be seen would be trained as the colour behind it."""
    if not image.has_transparency_data:
        return
    alpha = image if image.mode in ("RGBA", "LA") else image.convert("RGBA")
    highest = alpha.getchannel("A").getextrema()[1]
    if isinstance(highest, int) and highest < _BLACK:
        fix = "Save it anew with what it should show, or remove it."
        raise PictureError(path, "is transparent all over: nothing of it can be seen", fix)


def _format_notice(path: Path, kind: str) -> list[str]:
    suffix = path.suffix.lower()
    named = _FORMAT_OF_SUFFIX.get(suffix, suffix[1:].upper())
    kind = _FORMAT_NAMES.get(kind, kind)
    return [] if kind == named else [f"is a {kind} picture, whatever its name says"]


def _frames_notice(image: ImageFile) -> list[str]:
    try:
        several = bool(getattr(image, "is_animated", False))
    except DECODE_ERRORS:  # the second picture is damaged, which is not used
        several = False
    if not several or image.format == "MPO":  # phones write these for every photo they take
        return []
    if image.format == "TIFF":
        return ["has several pages; its first one is used"]
    if image.format == "HEIF":
        return ["holds several pictures; its main one is used"]
    return ["is an animation; its first picture is used"]


def _profile_notice(image: Image.Image) -> list[str]:
    profile = image.info.get("icc_profile")
    if image.mode == "LAB" or not profile:  # LAB means the same with and without
        return []
    if _by_profile(*_opaque(image)[:2], profile):
        return []
    return ["has a colour profile that is broken or of another kind; it is read without"]


def _draft(image: ImageFile, at_least: Size) -> bool:
    """Have a JPEG decoded at a half, quarter or eighth of its size; other formats would give up
    what is to be read (HEIC its thumbnail)."""
    if image.format not in _JPEG:
        return False
    return image.draft(None, (at_least.width, at_least.height)) is not None


def _reduced(image: Image.Image, at_least: Size) -> Image.Image:
    factor = min(image.width // at_least.width, image.height // at_least.height)
    return image.reduce(factor) if factor > 1 and image.mode in _REDUCIBLE else image


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a picture, 1 (upright) where it is missing or nonsense."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except DECODE_ERRORS:  # unreadable metadata does not make the picture unusable
        return 1
    return value if isinstance(value, int) else 1


def _upright(image: Image.Image) -> Image.Image:
    undo = _UNDO_ORIENTATION.get(_orientation(image))
    return image if undo is None else image.transpose(undo)


def _to_rgb(
    image: Image.Image, background: tuple[int, int, int]
) -> tuple[Image.Image, Image.Image | None]:
    """The picture on the background, and its opacity where it is not opaque everywhere."""
    profile = image.info.get("icc_profile")
    image, grey, alpha = _opaque(image)
    rgb = (_by_profile(image, grey, profile) if profile else None) or _plain_rgb(image)
    if alpha is None:
        return rgb, None
    canvas = Image.new("RGB", rgb.size, background)
    canvas.paste(rgb, mask=alpha)
    return canvas, alpha


def _opaque(image: Image.Image) -> tuple[Image.Image, bool, Image.Image | None]:
    """The picture with 8 bits and no transparency, whether it is grey, and its opacity."""
    image = _to_eight_bit(image)
    grey = image.mode in _GREY_MODES
    if not image.has_transparency_data:
        return image, grey, None
    image = image.convert("RGBA")  # converting straight to RGB would show the hidden pixels
    alpha = image.getchannel("A")
    return image.convert("RGB"), grey, alpha if alpha.getextrema() != (255, 255) else None


def _to_eight_bit(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and floating-point greys as 8-bit grey; Pillow's own conversion clips them."""
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    with np.errstate(all="ignore"):  # of damaged numbers, which are mended here
        values = np.asarray(image).astype(np.float64)
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        if image.mode != "F" and low >= 0 and high <= 65535:
            low, high = 0.0, 65535.0  # 65535 / 257 = 255
        values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
        scaled = (values - low) * (255.0 / ((high - low) or 1.0))
    return Image.fromarray(scaled.round().astype(np.uint8))


def _by_profile(image: Image.Image, grey: bool, profile: bytes) -> Image.Image | None:
    """The picture in sRGB by its embedded profile; None if the profile is broken or unfit."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _PROFILE_MODES.get(source.profile.xcolor_space.strip(), "")
        if not mode or (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and not grey):
            return None
        if image.mode != mode:
            image = image.convert(mode)
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
    except _PROFILE_ERRORS:
        return None


def _plain_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        if converted is not None:
            return converted
    return image.convert("RGB")
