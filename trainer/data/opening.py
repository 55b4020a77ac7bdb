"""A file of the user's -> an open picture whose pixels may be decoded, or a sentence why not.

Nothing is decoded here. What a file is, is decided by how it begins and never by its name; a
header that announces more pixels than allowed is refused before any memory is asked for.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from PIL.ImageFile import ImageFile

from trainer.errors import DataError
from trainer.untrusted import on_one_line

# Only these decoders are let near a user's file: Pillow's full list holds some that start other
# programs (EPS) and many that no camera writes.
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")

# The highest limit that the settings allow; it guards pictures that no scan has let through.
MOST_MEGAPIXELS = 1000.0

# What decoders raise on damaged files (found by cutting and altering files), and the MemoryError
# of a header that asks for more than there is.
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

# How the files of PICTURE_FORMATS begin; one of these that is not recognised is a broken one.
_BEGINNINGS = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"GIF8")
# ISO/IEC 23008-12: the brands of HEIC files. "mif1" and "msf1" are those of AVIF files too, which
# then name "avif" among the brands that they are compatible with.
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_AVIF_BRANDS = {b"avif", b"avis"}
# These decoders read the file as a whole; all of them compress.
_READ_AS_A_WHOLE = ("WEBP", "AVIF", "HEIC")
_MOST_BYTES_PER_PIXEL = 4

_DECODERS = r"(PIL|pillow_heif)\b"  # the modules whose warnings are muted

HEIC_REASON = "is a HEIC picture, which cannot be read yet"
HEIC_FIX = 'Install the reader with: pip install "likeness[heic]" (or convert it to JPEG or PNG).'
_BROKEN = "is damaged or incomplete"
_COPY_AGAIN = "Copy it again from where it came from, or remove it."


class PictureError(DataError):
    """A file that cannot be used as a photo; `reason` goes on from the file's name."""

    def __init__(self, path: Path, reason: str, fix: str) -> None:
        super().__init__(f"{shown(path.name)} {reason}.", where=shown(path), fix=fix)
        self.reason = reason


def shown(path: Path | str) -> str:
    """A file name fit for a message: on one line, and encodable whatever bytes it is made of."""
    return on_one_line(str(path))


@contextmanager
def opened(path: Path, *, maximum_megapixels: float = MOST_MEGAPIXELS) -> Iterator[ImageFile]:
    """Open a picture; whatever goes wrong until it is closed becomes a `PictureError`.

    Args:
        path: the picture.
        maximum_megapixels: a picture with more pixels is refused before any is decoded.
    """
    _mute_decoders()
    with _explaining(path):
        _require_regular(path)
        with path.open("rb") as file, _open(path, file, maximum_megapixels) as image:
            width, height = image.size
            if width * height > maximum_megapixels * 1e6:
                limit = f"the limit is {maximum_megapixels:g} megapixels"
                fix = "Save it at a smaller size, or raise data.maximum_megapixels."
                raise PictureError(path, f"has {width} x {height} px; {limit}", fix)
            yield image


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Raises:
        PictureError: the file cannot be read.
    """
    with _explaining(path):
        _require_regular(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _mute_decoders() -> None:
    """Keep Pillow's warnings of odd metadata and large sizes to itself: both are dealt with here.

    `warnings.catch_warnings` would do it for one file, but not for several threads at a time.
    """
    first = warnings.filters[0][3] if warnings.filters else None
    if getattr(first, "pattern", None) != _DECODERS:
        warnings.filterwarnings("ignore", module=_DECODERS)


def _require_regular(path: Path) -> None:
    if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for ever
        raise PictureError(path, "is not a regular file", "Remove it from the folder.")


def _open(path: Path, file: BinaryIO, maximum_megapixels: float) -> ImageFile:
    """The picture by its own decoder. `Image.open` is not used: its pixel limit is for the whole
    process, and lower than what a user may allow."""
    start = file.read(64)
    kind = "HEIC" if _is_heic(start) else _kind_of(path, start)
    megabytes = file.seek(0, os.SEEK_END) / 1e6
    if kind in _READ_AS_A_WHOLE and megabytes > _MOST_BYTES_PER_PIXEL * maximum_megapixels:
        reason = f"is {megabytes:.0f} MB, far more than a picture of "
        reason += f"{maximum_megapixels:g} megapixels can need"
        raise PictureError(path, reason, _COPY_AGAIN)
    file.seek(0)
    if kind == "HEIC":
        return _open_heic(path, file)
    return Image.OPEN[kind][0](file, "")


def _open_heic(path: Path, file: BinaryIO) -> ImageFile:
    try:
        from pillow_heif import HeifImageFile  # an extra; most folders do without it

        return HeifImageFile(file, "")
    except ImportError as error:
        raise PictureError(path, HEIC_REASON, HEIC_FIX) from error


def _kind_of(path: Path, start: bytes) -> str:
    """Which of PICTURE_FORMATS a file is by its first bytes."""
    Image.init()
    for kind in PICTURE_FORMATS:
        accepts = Image.OPEN[kind][1] if kind in Image.OPEN else None
        answer = accepts(start[:16]) if accepts else False
        if isinstance(answer, str):  # the format is known, but this Pillow was built without it
            reason = f"is a picture of the kind {kind}, which this installation cannot read"
            raise PictureError(path, reason, "Update Pillow, or convert it to JPEG or PNG.")
        if answer:
            return kind
    if not start:
        raise PictureError(path, "is empty (0 bytes)", _COPY_AGAIN)
    if start.startswith(_BEGINNINGS):
        raise PictureError(path, _BROKEN, _COPY_AGAIN)
    fix = "Remove it, or save the picture again as JPEG or PNG."
    raise PictureError(path, "is not a picture, whatever its name says", fix)


def _is_heic(start: bytes) -> bool:
    if start[4:8] != b"ftyp":
        return False
    end = min(len(start), int.from_bytes(start[:4], "big"))
    brands = {start[8:12]} | {start[i : i + 4] for i in range(16, end - 3, 4)}
    return bool(brands & _HEIC_BRANDS) and not brands & _AVIF_BRANDS


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    try:
        yield
    except DECODE_ERRORS as error:
        raise _explained(path, error) from error


def _explained(path: Path, error: Exception) -> PictureError:
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
