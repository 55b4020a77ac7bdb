"""Tensors that are costly to make, kept on disk under the fingerprint of all that made them.

The key is a hash of every input (the photo's bytes, the model's weights, the size, the version of
the code), so an entry is never out of date: whatever changes, the key changes. Each file carries
a checksum, and whatever does not match it is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

_CHECKSUM = "sha256"


def cache_root() -> Path:
    """The folder for all caches: `LIKENESS_CACHE`, else the platform's place for a user's caches.

    Nothing is created.
    """
    chosen = os.environ.get("LIKENESS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home folder, as in some containers
        return Path(tempfile.gettempdir()) / "likeness-cache"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else home / "AppData" / "Local") / "likeness" / "cache"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "likeness"
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG base directory specification: relative paths there are to be ignored.
    return (base if base.is_absolute() else home / ".cache") / "likeness"


def fingerprint(*parts: object) -> str:
    """SHA-256, in hex, of plain values: None, bool, int, float, str, and lists, tuples and
    str-keyed dicts of them. Equal values of different types (1, 1.0, True, "1") differ; a tuple
    equals a list; the order of a dict does not matter.

    Raises:
        TypeError: a value of any other type, whose text form might not tell all of it.
    """
    for part in parts:
        _require_plain(part)
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _require_plain(value: object) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"a fingerprint takes dicts with text keys, not {key!r}")
            _require_plain(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _require_plain(item)
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise TypeError(f"a fingerprint takes plain values, not {type(value).__name__}")


class TensorCache:
    """Named tensors by key, as safetensors files in a folder; in memory alone if it is None.

    If the folder cannot be written, entries are kept in memory for this run and `notice` says so.

    Attributes:
        hits, misses: how many times `get` found an entry, and did not.
        notice: "" while all is well, else a sentence for the user.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.hits = 0
        self.misses = 0
        self.notice = ""
        self._memory: dict[str, dict[str, Tensor]] = {}

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of an entry, on the CPU; None if there is no whole, unaltered one.

        Raises:
            ValueError: the key is not a fingerprint.
        """
        path = self._path(key)
        tensors = self._memory.get(key) or (_read(path) if path else None)
        if tensors is None:
            self.misses += 1
            return None
        self.hits += 1
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep an entry; a reader sees all of it or nothing, even if the power fails.

        Raises:
            ValueError: the key is not a fingerprint.
        """
        path = self._path(key)
        kept = _on_cpu(tensors)
        if path and not self.notice:
            try:
                _write(path, kept)
                return
            except OSError as error:
                self.notice = (
                    f"The cache folder {self.folder} cannot be written "
                    f"({error.strerror or error}): what it would hold is kept in memory for this "
                    "run. LIKENESS_CACHE can name another folder."
                )
        self._memory[key] = kept

    def get_or_make(self, key: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The entry, made and kept first if there is none."""
        found = self.get(key)
        if found is None:
            made = make()
            self.put(key, made)
            found = _on_cpu(made)
        return found

    def _path(self, key: str) -> Path | None:
        if not re.fullmatch(r"[0-9a-f]{64}", key):
            raise ValueError(f"a cache key is a fingerprint, not {key!r}")
        return self.folder / f"{key}.safetensors" if self.folder else None


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that own their memory, which safetensors demands."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    data = safetensors.torch.save(tensors, {_CHECKSUM: _checksum(tensors)})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        data = path.read_bytes()
        tensors = safetensors.torch.load(data)
        header_end = 8 + int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8:header_end]).get("__metadata__", {})
    except (OSError, SafetensorError, ValueError, KeyError):  # ends in making it again
        return None
    return tensors if metadata.get(_CHECKSUM) == _checksum(tensors) else None


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
