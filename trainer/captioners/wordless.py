"""Captions without a model: from a file of templates, or from the photo's own name."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from trainer.captioners import CaptionerOptions
from trainer.errors import DataError
from trainer.types import Photo

MAXIMUM_FILE_BYTES = 1_000_000

# What cameras, phones, scanners and programs call their pictures: says nothing about a photo.
_NAMES = (
    "at bild burst cimg copy cover dcim dsc dscf dscn edited export facebook foto fotor gopr hdr "
    "hpim image images img imgp insta instagram kopie mvimg of original p photo photos pic pict "
    "picture pxl received resized sam scan screen screenshot shot signal snapchat telegram "
    "thumbnail tmp unknown untitled vid von wa whatsapp win"
)
_NO_WORDS = frozenset(_NAMES.split())
# What programs put after a name.
_ADDED = ("copy", "kopie", "edited")
# Runs of digits and letters that are no words: dates, counters, P1010001, an upload's key.
_CODE = re.compile(r"(?=.*\d)[0-9a-f]{8,}|\w*\d\w*\d\w*\d\w*", re.IGNORECASE)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_DATE = re.compile(r"(?<!\d)\d{2,4}([-._:]\d{2,3}){2,}(?!\d)")


@dataclass(frozen=True, slots=True)
class Template:
    """Lines, of which each photo always gets the same one."""

    lines: tuple[str, ...]

    def caption(self, photo: Photo, image: Callable[[], Image.Image], kind: str) -> str:
        """The line of a photo by its content, so that neither name nor order matters."""
        number = int.from_bytes(hashlib.sha256(photo.digest.encode()).digest()[:8], "big")
        return self.lines[number % len(self.lines)]


@dataclass(frozen=True, slots=True)
class FileName:
    """The words of a photo's name."""

    def caption(self, photo: Photo, image: Callable[[], Image.Image], kind: str) -> str:
        """The words, see `words_of`."""
        return words_of(photo.path.stem)


def load_template(options: CaptionerOptions) -> Template:
    """Read the file of templates that `options.model` names: one a line, `#` before remarks.

    `{trigger}` and `{class}` stay: they are filled in when the captions are trained on.

    Raises:
        DataError: it cannot be read, or there is no line in it.
    """
    path = Path(options.model).expanduser()
    try:
        if path.stat().st_size > MAXIMUM_FILE_BYTES:
            raise ValueError(f"it is larger than {MAXIMUM_FILE_BYTES // 1000} kB")
        lines = [" ".join(line.split()) for line in path.read_text("utf-8-sig").splitlines()]
        kept = tuple(line for line in lines if line and not line.startswith("#"))
        if not kept:
            raise ValueError("it has no lines")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"The file of caption templates cannot be used: {reason}",
            where=str(path),
            fix="Give a UTF-8 text file with one caption a line, such as: {trigger} {class}",
        ) from error
    return Template(kept)


def load_filename(options: CaptionerOptions) -> FileName:
    """The captioner of file names, which needs nothing."""
    return FileName()


def words_of(stem: str) -> str:
    """The words of a file's name: "anna_smiling-in_the snow 02" is "anna smiling in the snow".

    Numbers at the end, numbers in front that only sort, and what cameras write are left out;
    a name of nothing else, such as "IMG_1234", has no words.
    """
    text = unicodedata.normalize("NFC", stem.encode("utf-8", "ignore").decode("utf-8"))
    text = _DATE.sub(" ", _UUID.sub(" ", text))
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Pc", "Pd") else c for c in text)
    text = re.sub(r"\(\s*\d*\s*\)|[.,;~+\[\]#@]+(?=\s|$|\d)|(?<!\w)[.]", " ", text)
    words = [word for word in text.split() if not _CODE.fullmatch(word)]
    words = [re.sub(r"(?<=[^\W\d]{3})\d+$", "", word) for word in words]
    while words and (words[-1].isdecimal() or words[-1].casefold() in _ADDED):
        words.pop()
    while words and words[0].isdecimal() and (words[0][0] == "0" or len(words) == 1):
        words.pop(0)
    if all(word.casefold() in _NO_WORDS or not re.search(r"[^\W\d]", word) for word in words):
        return ""
    return " ".join(words)
