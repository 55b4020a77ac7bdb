"""The caption files of a folder as a person wrote them, before anything is added or replaced."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.captions import find_sidecars, read_sidecar
from trainer.data.decode import shown
from trainer.errors import DataError
from trainer.types import Photo

_LOOKED_AT_BYTES = 4096
_WIDE_ENCODINGS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A caption file. text: what is in it. problem, fix: why it cannot be used, and what to do;
    "" where all is well."""

    path: Path
    text: str
    problem: str = ""
    fix: str = ""


def read_sidecars(photos: Sequence[Photo]) -> dict[Path, Sidecar]:
    """The caption file of each photo that has one, by the photo's path; nothing is raised."""
    return {photo: _read(path) for photo, path in find_sidecars(photos).items()}


def _read(path: Path) -> Sidecar:
    try:
        text = read_sidecar(path)
        if _is_binary(path):
            what = f"{shown(path.name)} is not plain text"
            return Sidecar(path, "", what, "Save the caption as plain text (UTF-8).")
    except DataError as error:
        return Sidecar(path, "", error.what, error.fix)
    except OSError as error:  # it was there a moment ago
        what = f"{shown(path.name)} cannot be read ({error.strerror})"
        return Sidecar(path, "", what, "Look whether it is still there.")
    return Sidecar(path, text)


def _is_binary(path: Path) -> bool:
    """Whether there are zero bytes in a file that is in no encoding that has them."""
    with path.open("rb") as file:
        start = file.read(_LOOKED_AT_BYTES)
    return b"\0" in start and not start.startswith(_WIDE_ENCODINGS)
