"""The safetensors container: eight bytes with the header's length, JSON, then tensor data.

Published at https://huggingface.co/docs/safetensors. Headers are read and written here rather than
by the safetensors library in order to explain damage in plain words and to fix the order of the
metadata, which the library shuffles every time; tensors go through the library.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from trainer.errors import FileFormatError
from trainer.untrusted import HEADER_BYTES, parse_json, tensor_shape

# The number formats that LoRA files are written in, by the names that the format gives them.
FORMATS = frozenset(
    {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL"}
)

# How files begin that people take for LoRA files.
_FOREIGN = (
    (b"PK\x03\x04", "a pickle file (.pt, .ckpt or .bin) or a zip archive"),
    (b"\x80", "a pickle file (.pt, .ckpt or .bin)"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"<", "a web page, not the file itself"),
)


def header_bytes(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a file, with the metadata in alphabetical order.

    Not pretty-printed, because A1111 and Forge look for `{"` at its start.

    Args:
        entries: the header's tensor entries, as the safetensors library writes them.
        metadata: all values are text.
    """
    table = {"__metadata__": dict(sorted(metadata.items())), **entries}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    # The format wants the data aligned to 8 bytes; spaces may follow the JSON.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header as a table, and where in the file the tensor data begins.

    Args:
        path: for messages.
        file: the open file, at its start.

    Raises:
        FileFormatError: the file is empty, damaged or something else.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(32)
    if size == 0:
        raise FileFormatError("The file is empty.", where=str(path), fix="Download it again.")
    length = int.from_bytes(start[:8], "little")
    if length > min(size - 8, HEADER_BYTES) or start[8:9] != b"{":
        for magic, what in _FOREIGN:
            if start.startswith(magic):
                raise FileFormatError(
                    f"This is {what}, no safetensors file.",
                    where=str(path),
                    fix="Use a .safetensors file.",
                )
        raise damaged(path, "its header is cut off or is none")
    file.seek(8)
    try:
        header = parse_json(file.read(length))
    except ValueError as error:
        raise damaged(path, "its header is not valid JSON") from error
    if not isinstance(header, dict):
        raise damaged(path, "its header is not a table")
    for name, entry in header.items():
        if name != "__metadata__":
            _check_entry(path, name, entry)
    return header, 8 + length


def _check_entry(path: Path, name: str, entry: Any) -> None:
    """Refuse a tensor before there is memory for it."""
    try:
        tensor_shape(entry["shape"])
        known = entry["dtype"] in FORMATS
    except (LookupError, TypeError, ValueError) as error:
        raise damaged(path, f"its header does not describe the tensor '{name[:80]}'") from error
    if not known:
        raise damaged(path, f"a number format that is not known in '{name[:80]}'")


def metadata_of(path: Path, header: Mapping[str, Any]) -> dict[str, str]:
    """The metadata in a header; empty where there is none."""
    metadata = header.get("__metadata__") or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(path, "its metadata is not a table of texts")
    return metadata


def damaged(path: Path, why: str) -> FileFormatError:
    """The error for a file whose content is wrong."""
    return FileFormatError(
        f"The file is damaged or no safetensors file: {why}.",
        where=str(path),
        fix="Download or write it again.",
    )


def unreadable(path: Path, error: OSError) -> FileFormatError:
    """The error for a file that the system does not let us read."""
    return FileFormatError(
        f"The file cannot be read: {error.strerror or error}.",
        where=str(path),
        fix="Check the path.",
    )
