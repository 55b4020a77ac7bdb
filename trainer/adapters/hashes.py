"""The hashes by which other programs name a base model that is a single file.

Reading gigabytes takes a while; whoever asks for them should keep the answer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import ModelError

_CHUNK_BYTES = 2**20
# A1111's first hash of a model covers 64 KiB from 1 MiB on.
_PART_START, _PART_BYTES = 2**20, 2**16


@dataclass(frozen=True, slots=True)
class ModelHashes:
    """autov1: 8 hexadecimal digits, kohya's `ss_sd_model_hash`. sha256: of the whole file in
    lower-case hexadecimal, kohya's `ss_new_sd_model_hash`; its first 10 digits are AutoV2.
    """

    autov1: str
    sha256: str


def model_hashes(path: Path) -> ModelHashes:
    """The hashes of a file of any size, read once and a mebibyte at a time.

    Raises:
        ModelError: the file cannot be read.
    """
    whole, part = hashlib.sha256(), hashlib.sha256()
    position = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                whole.update(chunk)
                part.update(_overlap(chunk, position))
                position += len(chunk)
    except OSError as error:
        raise ModelError(
            f"The base model cannot be read: {error.strerror or error}",
            where=str(path),
            fix="Check the path.",
        ) from error
    return ModelHashes(autov1=part.hexdigest()[:8], sha256=whole.hexdigest())


def _overlap(chunk: bytes, position: int) -> bytes:
    """What of a chunk, which begins at a position in the file, lies in the part that is hashed."""
    start = max(_PART_START - position, 0)
    return chunk[start : max(_PART_START + _PART_BYTES - position, 0)]
