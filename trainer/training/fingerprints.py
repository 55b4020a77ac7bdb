"""What names a base's weights in the keys of caches: the content of the files that matter.

Each fingerprint covers just what its results depend on, so that another UNet does not make the
photos be encoded anew. Files of gigabytes are read once: their hashes are remembered by path, size
and dates, as `git` and `make` tell whether a file has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.cache import fingerprint
from trainer.data.cache_folder import HASHES_NAME, cache_root, delete
from trainer.families import BaseFacts
from trainer.training.device import Device
from trainer.untrusted import read_json

# Larger files are remembered; smaller ones take less time to read than a person notices.
REMEMBERED_BYTES = 64 * 2**20

# What weights, settings and vocabularies are kept in.
_SUFFIXES = {".safetensors", ".bin", ".json", ".txt", ".model"}
_VAE = ("vae",)
_TEXT = ("text_encoder*", "tokenizer*")
# Parts of a base in diffusers format that are never loaded here.
_UNUSED = {"safety_checker", "feature_extractor", "image_encoder"}
# A file written so shortly before it is read could be written again within the same tick of the
# file system's clock (2 seconds on FAT), so it is not remembered.
_SETTLED_SECONDS = 3.0
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class _Seen:
    """Tells a file from what it was when its content was hashed."""

    path: str
    size: int
    modified_ns: int
    changed_ns: int


def vae_fingerprint(facts: BaseFacts, device: Device) -> str:
    """Names what latents depend on: the VAE, the number format and the kind of device."""
    contents = _tree(facts.vae) if facts.vae else _parts(facts.folder, _VAE)
    return _fingerprint("vae", contents, device, device.precision)


def text_fingerprint(facts: BaseFacts, device: Device, *reading: int) -> str:
    """Names what prompt embeddings depend on: text encoders, tokenizers, number format, device.

    reading: how prompts are read: clip skip and chunks.
    """
    contents = _parts(facts.folder, _TEXT)
    if facts.tokenizer:
        contents += _tree(facts.tokenizer)
    return fingerprint(_fingerprint("text", contents, device, device.numbers), *reading)


def base_fingerprint(facts: BaseFacts, device: Device) -> str:
    """Names all of a base that is loaded, and the number format.

    The kind of device is left out: a run may go on on another.
    """
    if facts.folder.is_dir():
        parts = [
            path.name
            for path in facts.folder.iterdir()
            if path.is_dir() and path.name not in _UNUSED and not path.name.startswith(".")
        ]
        contents = _parts(facts.folder, parts)
        index = facts.folder / "model_index.json"
        if index.is_file():
            contents.append([index.name, content_hash(index)])
    else:
        contents = _parts(facts.folder, [])
    for own in (facts.vae, facts.tokenizer):
        contents += _tree(own) if own else []
    return fingerprint("base", device.numbers, contents)


def _fingerprint(name: str, contents: list[list[str]], device: Device, numbers: str) -> str:
    return fingerprint(name, numbers, device.device.type, contents)


def _parts(base: Path, parts: Sequence[str]) -> list[list[str]]:
    """Name and content of every file of the sub-folders that the patterns name; of a single file,
    where everything is in one, its own."""
    if base.is_file():
        return [["", content_hash(base)]]
    folders = {path for part in parts for path in base.glob(part) if path.is_dir()}
    return _contents(base, (path for part in folders for path in part.rglob("*")))


def _tree(place: Path) -> list[list[str]]:
    """Name and content of every file of a folder, or of a file."""
    if place.is_file():
        return [["", content_hash(place)]]
    return _contents(place, place.rglob("*"))


def _contents(folder: Path, paths: Iterable[Path]) -> list[list[str]]:
    found = [path for path in paths if path.suffix in _SUFFIXES and path.is_file()]
    # By their text: the order of paths themselves is another on Windows.
    found.sort(key=lambda path: path.as_posix())
    return [[path.relative_to(folder).as_posix(), content_hash(path)] for path in found]


def content_hash(path: Path, memory: Path | None = None) -> str:
    """SHA-256 of a file, in hex; of a large file that has not changed it is remembered.

    Args:
        path: of the file.
        memory: where hashes are remembered; default: in the cache folder.

    Raises:
        OSError: the file cannot be read.
    """
    before = _look_at(path)
    if before.size < REMEMBERED_BYTES:
        return _hash(path)
    memory = memory or cache_root() / HASHES_NAME
    known = _recall(memory).get(before)
    if known:
        return known
    started = time.time()
    digest = _hash(path)
    settled = started - max(before.modified_ns, before.changed_ns) / 1e9 > _SETTLED_SECONDS
    if settled and _look_at(path) == before:
        # Read again: another run may have remembered other files meanwhile.
        _remember(memory, _recall(memory) | {before: digest})
    return digest


def _look_at(path: Path) -> _Seen:
    real = path.resolve()
    stat = real.stat()
    return _Seen(str(real), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _recall(memory: Path) -> dict[_Seen, str]:
    """The hashes that are remembered; what is damaged counts as forgotten."""
    try:
        kept = read_json(memory)
        if kept["format"] != _FORMAT or kept["check"] != fingerprint(kept["files"]):
            return {}
        return {_Seen(*row[:4]): row[4] for row in kept["files"] if _is_row(row)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _is_row(row: object) -> bool:
    if not isinstance(row, list) or len(row) != 5:
        return False
    path, *numbers, digest = row
    named = isinstance(path, str) and isinstance(digest, str)
    return (
        named
        and all(type(number) is int for number in numbers)
        and bool(re.fullmatch(r"[0-9a-f]{64}", digest))
    )


def _remember(memory: Path, known: dict[_Seen, str]) -> None:
    """Write the hashes at once or not at all; without files that are gone or have changed.

    A folder that cannot be written only costs time: the file is then read again by the next run.
    """
    rows = [
        [seen.path, seen.size, seen.modified_ns, seen.changed_ns, digest]
        for seen, digest in known.items()
        if _is_still(seen)
    ]
    text = json.dumps({"format": _FORMAT, "check": fingerprint(rows), "files": rows})
    temporary = memory.with_name(f".{memory.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(memory)
    except OSError:
        return
    finally:
        delete([temporary])


def _is_still(seen: _Seen) -> bool:
    try:
        return _look_at(Path(seen.path)) == seen
    except OSError:
        return False
