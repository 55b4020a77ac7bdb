"""One picture file -> an upright 8-bit RGB picture, or a sentence that says why not.

Every trap of real photo folders is handled here and nowhere else: EXIF orientation, colour
profiles, CMYK, palettes, 16-bit and floating-point greys, transparency, animations, files that
are cut short and files that are not pictures at all.
"""

from __future__ import annotations

import io
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unicodedata import category

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from trainer.errors import DataError
from trainer.types import Size

WHITE = (255, 255, 255)

# Only these decoders are let near a user's file: Pillow's full list holds some that start other
# programs (EPS) and many that no camera writes.
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")

# What Pillow's decoders raise on damaged files (found by cutting and altering files), and the
# MemoryError of a header that asks for more than there is.
DECODE_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    SyntaxError,
    LookupError,
    TypeError,
    ArithmeticError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

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

# How the files of PICTURE_FORMATS begin; one of these that is not recognised is a broken one.
_BEGINNINGS = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"GIF8")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
HEIC_REASON = "is a HEIC picture, which cannot be read"
HEIC_FIX = "Convert it to JPEG or PNG."
_BROKEN = "is damaged or incomplete"
_COPY_AGAIN = "Copy it again from where it came from, or remove it."


class PictureError(DataError):
    """A file that cannot be used as a photo; `reason` goes on from the file's name."""

    def __init__(self, path: Path, reason: str, fix: str) -> None:
        super().__init__(f"{shown(path.name)} {reason}.", where=shown(path), fix=fix)
        self.reason = reason


def shown(path: Path | str) -> str:
    """A file name fit for a message: on one line, and encodable whatever bytes it is made of."""
    text = str(path).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(
        c.encode("unicode_escape").decode() if category(c) in ("Cc", "Zl", "Zp") else c
        for c in text
    )


def decode_upright(path: Path, *, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Read a picture as a person would see it: upright, 8-bit sRGB; an animation's first frame.

    Args:
        path: the picture.
        background: what shows through where the picture is transparent, as (red, green, blue).

    Raises:
        PictureError: the file cannot be decoded (a `DataError` that names it).
    """
    with _opened(path) as image:
        image.load()
        return _to_rgb(_upright(image), background)


def measure(path: Path, *, maximum_megapixels: float) -> Size:
    """Decode a picture from end to end to prove that it is whole.

    `Image.verify` is no proof: it accepts a JPEG that lacks its second half.

    Returns:
        The upright size.

    Raises:
        PictureError: the file cannot be decoded, or its header announces more pixels than allowed
            (it is then refused before any pixel is decoded).
    """
    with _opened(path) as image:
        width, height = image.size
        if width * height > maximum_megapixels * 1e6:
            raise PictureError(
                path,
                f"has {width} x {height} px; the limit is {maximum_megapixels:g} megapixels",
                "Save it at a smaller size.",
            )
        # A JPEG decoded at a fraction of its size is still read to its last byte, much sooner.
        image.draft(None, (64, 64))
        image.load()
        sideways = _orientation(image) in _SIDEWAYS
        _to_rgb(image, WHITE)
    return Size(height, width) if sideways else Size(width, height)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture; whatever goes wrong until it is closed becomes a `PictureError`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for ever
            raise PictureError(path, "is not a regular file", "Remove it from the folder.")
        Image.init()
        formats = [name for name in PICTURE_FORMATS if name in Image.OPEN]
        with warnings.catch_warnings():
            # Pillow warns of odd metadata and large sizes; both are dealt with here.
            warnings.simplefilter("ignore")
            with path.open("rb") as file, Image.open(file, formats=formats) as image:
                yield image
    except DECODE_ERRORS as error:
        raise _explained(path, error) from error


def _explained(path: Path, error: Exception) -> PictureError:
    if isinstance(error, UnidentifiedImageError):
        return _unidentified(path)
    if isinstance(error, Image.DecompressionBombError):
        return PictureError(path, "has far too many pixels", "Save it at a smaller size.")
    if isinstance(error, FileNotFoundError):
        reason = "is a link to a file that is not there" if path.is_symlink() else "is gone"
        return PictureError(path, reason, _COPY_AGAIN)
    if isinstance(error, PermissionError):
        fix = "Give yourself the permission to read it, or remove it."
        return PictureError(path, "may not be read (permission denied)", fix)
    if isinstance(error, OSError) and error.errno is not None:
        return PictureError(path, f"cannot be read ({error.strerror})", _COPY_AGAIN)
    return PictureError(path, _BROKEN, _COPY_AGAIN)


def _unidentified(path: Path) -> PictureError:
    with path.open("rb") as file:
        start = file.read(12)
    if not start:
        return PictureError(path, "is empty (0 bytes)", _COPY_AGAIN)
    if start[4:8] == b"ftyp" and start[8:12] in _HEIC_BRANDS:
        return PictureError(path, HEIC_REASON, HEIC_FIX)
    if start.startswith(_BEGINNINGS) or start[4:12] == b"ftypavif":
        return PictureError(path, _BROKEN, _COPY_AGAIN)
    fix = "Remove it, or save the picture again as JPEG or PNG."
    return PictureError(path, "is not a picture, whatever its name says", fix)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a loaded picture, 1 (upright) where it is missing or nonsense."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except DECODE_ERRORS:  # unreadable metadata does not make the picture unusable
        return 1
    return value if isinstance(value, int) else 1


def _upright(image: Image.Image) -> Image.Image:
    undo = _UNDO_ORIENTATION.get(_orientation(image))
    return image if undo is None else image.transpose(undo)


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    profile = image.info.get("icc_profile")
    image = _to_eight_bit(image)
    grey = image.mode in _GREY_MODES
    alpha = None
    if image.has_transparency_data:  # converting straight to RGB would show the hidden pixels
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    rgb = (_by_profile(image, profile, grey) if profile else None) or _plain_rgb(image)
    if alpha is None:
        return rgb
    canvas = Image.new("RGB", rgb.size, background)
    canvas.paste(rgb, mask=alpha)
    return canvas


def _to_eight_bit(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and floating-point greys as 8-bit grey; Pillow's own conversion clips them."""
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    values = np.asarray(image).astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if image.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0  # 65535 / 257 = 255
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    scaled = (values - low) * (255.0 / ((high - low) or 1.0))
    return Image.fromarray(scaled.round().astype(np.uint8))


def _by_profile(image: Image.Image, profile: bytes, grey: bool) -> Image.Image | None:
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
