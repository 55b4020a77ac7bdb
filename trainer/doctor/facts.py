"""What is measured on each photo, and the files that keep it.

Measuring a photo means decoding it and looking for faces, which takes most of the doctor's time.
Neither changes until the photo does, so the numbers are kept by its content.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.data.cache import fingerprint
from trainer.data.quality import (
    THUMBNAIL_SIDE,
    border_colour,
    exposure,
    perceptual_hashes,
    scaled,
    sharpness,
    thumbnail,
)
from trainer.doctor.findings import PhotoFacts
from trainer.types import Box, Face, Size
from trainer.untrusted import read_json

# Raise it when the same photo would be measured differently: what was kept is then measured anew.
VERSION = 2

# What comes of a file that is not there, or is not as it was written.
_NOT_OURS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
)
_NUMBERS = ("sharpness", "reblur", "dark", "bright", "mean")
_HASHES = ("hash", "mirrored_hash")


def measure_photo(
    image: Image.Image,
    digest: str,
    faces: tuple[Face, ...] | None,
    size: Size | None = None,
) -> PhotoFacts:
    """Measure a photo.

    Args:
        image: the photo, upright, RGB; it may be reduced.
        digest: SHA-256 of its file.
        faces: those found in it, the largest first, in pixels of the full size; None where
            nothing could look for them.
        size: its full size, where `image` is reduced.
    """
    here = Size(*image.size)
    box = scaled(faces[0].box, size or here, here) if faces else None
    tiles, reblur = sharpness(image, box)
    dark, bright, mean = exposure(image, box)
    plain, mirrored = perceptual_hashes(image)
    return PhotoFacts(
        digest=digest,
        sharpness=tiles,
        reblur=reblur,
        dark=dark,
        bright=bright,
        mean=mean,
        hash=plain,
        mirrored_hash=mirrored,
        background=border_colour(image),
        faces=faces,
        thumbnail=thumbnail(image),
    )


class FactStore:
    """Facts by content, one JSON file for each photo; in memory alone if the folder is None.

    If the folder cannot be written, facts are kept in memory for this run and `notice` says so.
    What cannot be read, or was altered, counts as not there.

    Attributes:
        notice: "" while all is well, else a sentence for the user.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.notice = ""
        self._memory: dict[str, PhotoFacts] = {}

    def get(self, digest: str, seen_by: str) -> PhotoFacts | None:
        """The facts of a photo as measured with the detector and decoding that `seen_by` names."""
        key = _key(digest, seen_by)
        if key in self._memory or self.folder is None:
            return self._memory.get(key)
        facts = _read(self._path(self.folder, key))
        return facts if facts and facts.digest == digest else None

    def put(self, facts: PhotoFacts, seen_by: str) -> None:
        """Keep the facts of a photo; a reader sees all of them or nothing."""
        key = _key(facts.digest, seen_by)
        if self.folder and not self.notice:
            try:
                _write(self._path(self.folder, key), facts)
                return
            except OSError as error:
                self.notice = (
                    f"The folder {self.folder} cannot be written ({error.strerror or error}): "
                    "the next run will measure the photos again."
                )
        self._memory[key] = facts

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / key[:2] / f"{key}.json"


def _key(digest: str, seen_by: str) -> str:
    return hashlib.sha256(json.dumps([VERSION, digest, seen_by]).encode()).hexdigest()


def _write(path: Path, facts: PhotoFacts) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp")
    try:
        kept = _as_json(facts)
        kept["check"] = fingerprint(kept)
        temporary.write_text(json.dumps(kept), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _as_json(facts: PhotoFacts) -> dict[str, Any]:
    kept: dict[str, Any] = {name: getattr(facts, name) for name in (*_NUMBERS, *_HASHES)}
    faces = facts.faces
    return kept | {
        "digest": facts.digest,
        "background": facts.background,
        "faces": None if faces is None else [_face_as_json(face) for face in faces],
        "thumbnail": facts.thumbnail.hex(),
    }


def _face_as_json(face: Face) -> dict[str, Any]:
    box = (face.box.left, face.box.top, face.box.right, face.box.bottom)
    return {"box": box, "score": face.score, "landmarks": face.landmarks}


def _read(path: Path) -> PhotoFacts | None:
    try:
        return _from_json(read_json(path))
    except _NOT_OURS:  # not there or damaged: it is measured again
        return None


def _from_json(kept: dict[str, Any]) -> PhotoFacts:
    """Raises ValueError, KeyError, TypeError, AttributeError or OverflowError: this is not what
    was written."""
    if kept.pop("check") != fingerprint(kept):
        raise ValueError("not as it was written")
    red, green, blue = (_number(value) for value in kept["background"])
    thumb = bytes.fromhex(kept["thumbnail"])
    plain, mirrored = (_whole(kept[name]) for name in _HASHES)
    lengths = (len(thumb) == THUMBNAIL_SIDE**2 * 3, 0 <= plain < 2**64, 0 <= mirrored < 2**64)
    if not all(lengths):
        raise ValueError("a thumbnail or a hash of the wrong length")
    return PhotoFacts(
        digest=kept["digest"],
        **{name: _number(kept[name]) for name in _NUMBERS},
        hash=plain,
        mirrored_hash=mirrored,
        background=(red, green, blue),
        faces=None if kept["faces"] is None else tuple(map(_face_from_json, kept["faces"])),
        thumbnail=thumb,
    )


def _face_from_json(kept: dict[str, Any]) -> Face:
    points = tuple((_number(x), _number(y)) for x, y in kept["landmarks"])
    left, top, right, bottom = (_whole(edge) for edge in kept["box"])
    return Face(Box(left, top, right, bottom), _number(kept["score"]), points)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("not a finite number")
    return float(value)


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("not a whole number")
    return value
