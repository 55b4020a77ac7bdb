"""Tensors that are costly to make, kept on disk under the fingerprint of all that made them.

The key is a hash of every input (the photo's bytes, the model's weights, the size, the version of
the code), so an entry is never out of date: whatever changes, the key changes. Each file carries
a checksum, and whatever does not match it is made again. Several runs may share a folder: entries
are written under another name and then put in place at once, and whichever run writes a key, it
writes the same tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from trainer import __version__
from trainer.data.cache_folder import CHECKSUM, delete, entry_path, left_overs
from trainer.data.cache_folder import cache_root as cache_root
from trainer.untrusted import read_bounded

# The date of an entry says when it was last used; it is not renewed more often than this.
_TOUCH_SECONDS = 24 * 60 * 60
# More than any entry: latents and embeddings are a few megabytes.
_MOST_BYTES = 500_000_000
# As much of a photo's name or of a text as an entry names as what it was made of.
_SOURCE_LETTERS = 200

# What comes of a file that is not there, or is not as it was written.
_NOT_OURS = (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError)

# Names and shapes of the tensors of an entry; -1 is any length.
Shapes = Mapping[str, Sequence[int]]


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
        self._swept = False

    def get(self, key: str, shapes: Shapes | None = None) -> dict[str, Tensor] | None:
        """The tensors of an entry, on the CPU.

        Args:
            key: a fingerprint.
            shapes: what it must hold, and nothing else.

        Returns:
            None if there is no whole, unaltered entry of ours, if its shapes are others, or if a
            number in it is not finite: it is then to be made again.

        Raises:
            ValueError: the key is not a fingerprint.
        """
        path = self._path(key)
        tensors = self._memory.get(key) or (_read(path) if path else None)
        if tensors is None or not _is_sound(tensors, shapes):
            self.misses += 1
            return None
        self.hits += 1
        if path and key not in self._memory:
            _mark_used(path)
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def put(
        self, key: str, tensors: Mapping[str, Tensor], *, kind: str = "", source: str = ""
    ) -> None:
        """Keep an entry; a reader sees all of it or nothing, even if the power fails.

        Args:
            key: a fingerprint.
            tensors: any shapes and number types.
            kind, source: what the entry is and what it was made of, for whoever looks at the cache.

        Raises:
            ValueError: the key is not a fingerprint.
        """
        path = self._path(key)
        kept = _on_cpu(tensors)
        if path and not self.notice:
            try:
                self._sweep()
                _write(path, kept, _metadata(kept, kind, source))
                self._memory.pop(key, None)
                return
            except OSError as error:
                self.notice = (
                    f"The cache folder {self.folder} cannot be written "
                    f"({error.strerror or error}): what it would hold is kept in memory for this "
                    "run. LIKENESS_CACHE can name another folder."
                )
        self._memory[key] = kept

    def get_or_make(
        self,
        key: str,
        make: Callable[[], Mapping[str, Tensor]],
        *,
        shapes: Shapes | None = None,
        kind: str = "",
        source: str = "",
    ) -> dict[str, Tensor]:
        """The entry, made and kept first if there is none; see `get` and `put`."""
        found = self.get(key, shapes)
        if found is None:
            made = make()
            self.put(key, made, kind=kind, source=source)
            found = _on_cpu(made)
        return found

    def _path(self, key: str) -> Path | None:
        path = entry_path(self.folder or Path(), key)
        return path if self.folder else None

    def _sweep(self) -> None:
        """Remove, once, what runs that died have left half written."""
        if self.folder and not self._swept:
            delete(left_overs(self.folder))
        self._swept = True


def _is_sound(tensors: Mapping[str, Tensor], shapes: Shapes | None) -> bool:
    if shapes is not None and not _has_shapes(tensors, shapes):
        return False
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def _has_shapes(tensors: Mapping[str, Tensor], shapes: Shapes) -> bool:
    return tensors.keys() == shapes.keys() and all(
        len(tensors[name].shape) == len(shape)
        and all(
            wanted in (-1, side) for side, wanted in zip(tensors[name].shape, shape, strict=True)
        )
        for name, shape in shapes.items()
    )


def _mark_used(path: Path) -> None:
    """Renew the date of an entry, by which those that no run reads any more are told."""
    try:
        if time.time() - path.stat().st_mtime > _TOUCH_SECONDS:
            os.utime(path)
    except OSError:  # a folder that may only be read, or an entry that was deleted just now
        return


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that own their memory, which safetensors demands."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }


def _metadata(tensors: Mapping[str, Tensor], kind: str, source: str) -> dict[str, str]:
    return {
        CHECKSUM: _checksum(tensors),
        "kind": kind,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        # Names of files may hold bytes that are no text.
        "source": source[:_SOURCE_LETTERS].encode("utf-8", "replace").decode("utf-8"),
    }


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    data = safetensors.torch.save(tensors, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The number of the process is not enough where several computers share a folder.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            temporary.replace(path)
        except PermissionError:
            # Windows refuses while another run reads the file: then it has written it, too.
            if _read(path) is None:
                raise
    finally:
        delete([temporary])


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        data = read_bounded(path, _MOST_BYTES)
        tensors = safetensors.torch.load(data)
        header_end = 8 + int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8:header_end]).get("__metadata__") or {}
    except _NOT_OURS:  # ends in making it again
        return None
    return tensors if metadata.get(CHECKSUM) == _checksum(tensors) else None


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
