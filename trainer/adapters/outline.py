"""A LoRA file without its numbers: names, shapes and metadata from the header, values one tensor
at a time.

A large file is told about in a second, and no more of it is in memory than its largest tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.adapters.container import damaged, metadata_of, read_header, unreadable
from trainer.adapters.file import LoraFile, require_adapter

_FORMATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Floating-point numbers as integers: the bits without the sign, and the least that is not finite.
_BITS = {
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
}


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """A file whose tensors of more than one number are on the meta device.

    header_bytes: of the header with its length.
    """

    file: LoraFile
    header_bytes: int


@dataclass(frozen=True, slots=True)
class Values:
    """What is conspicuous in the numbers: tensors that are not finite, tensors that are all 0."""

    not_finite: frozenset[str]
    zero: frozenset[str]


def read_outline(path: Path) -> Outline:
    """Read a file's header and its single numbers (alphas).

    Raises:
        FileFormatError: there is no such file, or it is damaged or no LoRA.
    """
    try:
        with path.open("rb") as file:
            header, data_start = read_header(path, file)
    except OSError as error:
        raise unreadable(path, error) from error
    require_adapter(path, header)
    metadata = metadata_of(path, header)
    tensors: dict[str, Tensor] = {}
    with _opened(path) as opened:
        for name in (name for name in header if name != "__metadata__"):
            shape, dtype = header[name]["shape"], _FORMATS[header[name]["dtype"]]
            empty = torch.empty(shape, dtype=dtype, device="meta")
            tensors[name] = opened.get_tensor(name) if empty.numel() == 1 else empty
    return Outline(LoraFile(path, tensors, metadata), data_start)


def check_values(outline: Outline) -> Values:
    """Look at every number of a file.

    Raises:
        FileFormatError: it cannot be read any more.
    """
    bad, zero = set(), set()
    with _opened(outline.file.path) as opened:
        for name in outline.file.tensors:
            tensor = opened.get_tensor(name)
            is_finite, is_zero = _looked_at(tensor)
            if not is_finite:
                bad.add(name)
            elif is_zero:
                zero.add(name)
    return Values(frozenset(bad), frozenset(zero))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file as the safetensors library sees it, which checks that all is in its place."""
    try:
        with safe_open(str(path), framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise damaged(path, str(error)) from error
    except OSError as error:
        raise unreadable(path, error) from error


def _looked_at(tensor: Tensor) -> tuple[bool, bool]:
    """(all numbers are finite, all are 0)."""
    if tensor.numel() == 0:
        return True, False
    if tensor.dtype in _BITS:
        # Ordered as the magnitudes are, and much faster to go through.
        integer, magnitude, infinite = _BITS[tensor.dtype]
        largest = int((tensor.view(integer) & magnitude).max())
        return largest < infinite, largest == 0
    values = tensor.float()
    return bool(torch.isfinite(values).all()), not bool(values.any())
