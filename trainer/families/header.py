"""Names, shapes and metadata of the tensors in a model file, read without its weights.

A `.safetensors` file begins with eight bytes that give the length of a JSON header, which lists
every tensor (published at https://huggingface.co/docs/safetensors). A `.ckpt` or `.pt` file is a
pickle, which `checkpoints.py` reads without running anything. Which of the two a file is, its
first bytes say and not its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

from trainer.errors import ModelError
from trainer.untrusted import HEADER_BYTES, parse_json, tensor_shape

# Bytes of one number, by the names that the format gives its number formats.
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}

# How files begin that people take for models.
_FOREIGN = (
    (b"GGUF", "a GGUF file: its weights are quantised, for drawing only"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"<", "a web page, not the file itself (a download that asked for a login, for example)"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"Rar!", "an archive: unpack it first"),
    (b"7z\xbc\xaf", "an archive: unpack it first"),
    (b"\x1f\x8b", "an archive: unpack it first"),
    (b"{", "a text file (JSON)"),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape of a tensor and its number format, in safetensors' words ("F16").

    start: where its bytes begin in a safetensors file.
    """

    shape: tuple[int, ...]
    dtype: str
    start: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Header:
    """What is in a model file.

    container: how it is stored. tensors: by name. metadata: texts; empty for pickles.
    """

    path: Path
    container: Literal["safetensors", "pickle"]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; () where there is none of that name."""
        info = self.tensors.get(name)
        return info.shape if info else ()


def read_header(path: Path) -> Header:
    """Read what is in a model file, without its weights.

    Raises:
        ModelError: the file cannot be read, is no model, is damaged or cut off, or carries code.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(32)
            length = int.from_bytes(start[:8], "little")
            if start[8:9] == b"{" and length <= HEADER_BYTES:
                if length > size - 8:
                    raise cut_off(path, size, 8 + length)
                file.seek(8)
                return _safetensors_header(path, file.read(length), size - 8 - length)
    except OSError as error:
        raise ModelError(
            f"The base model cannot be read: {error.strerror or error}.", where=str(path)
        ) from error
    if size == 0:
        raise ModelError("The file is empty.", where=str(path), fix="Download it again.")
    if start.startswith((b"PK\x03\x04", b"\x80")):
        from trainer.families.checkpoints import checkpoint_tensors

        return Header(path, "pickle", checkpoint_tensors(path))
    raise _no_model(path, start)


def cut_off(path: Path, size: int, wanted: int) -> ModelError:
    """The error for a file of `size` bytes that should have `wanted`."""
    return ModelError(
        f"The file is cut off: {size:,} bytes are there of {wanted:,}.",
        where=str(path),
        fix="The download was interrupted, or the disk was full; download it again.",
    )


def damaged(path: Path, why: str) -> ModelError:
    """The error for a file whose content is wrong."""
    return ModelError(
        f"The file is damaged: {why}.", where=str(path), fix="Download it or save it again."
    )


def _no_model(path: Path, start: bytes) -> ModelError:
    what = next((words for magic, words in _FOREIGN if start.startswith(magic)), "")
    return ModelError(
        f"This is no model but {what}." if what else "This is no model file.",
        where=str(path),
        fix="A base is a folder in diffusers format or a single file: .safetensors (or .ckpt).",
    )


def _safetensors_header(path: Path, text: bytes, data_bytes: int) -> Header:
    try:
        table = parse_json(text)
    except ValueError as error:
        raise damaged(path, "its header is not valid JSON") from error
    metadata = table.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(path, "its metadata is not a table of texts")
    tensors, end = {}, 0
    for name, entry in table.items():
        info, last = _entry(path, name, entry, 8 + len(text))
        tensors[name], end = info, max(end, last)
    if end > data_bytes:
        size = path.stat().st_size
        raise cut_off(path, size, size - data_bytes + end)
    return Header(path, "safetensors", tensors, metadata)


def _entry(path: Path, name: str, entry: Any, data: int) -> tuple[TensorInfo, int]:
    """A tensor, and where in the data, which begin at byte `data`, it ends."""
    try:
        shape = tensor_shape(entry["shape"])
        first, last = (_count(offset) for offset in entry["data_offsets"])
        dtype = str(entry["dtype"])
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"its header does not describe the tensor '{name[:80]}'") from error
    item_bytes = ITEM_BYTES.get(dtype)
    if item_bytes and last - first != prod(shape) * item_bytes:
        raise damaged(path, f"the size of the tensor '{name[:80]}' does not fit its shape")
    return TensorInfo(shape, dtype, data + first), last


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value
