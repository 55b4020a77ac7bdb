"""Model files in PyTorch's pickle format (`.ckpt`, `.pt`, `.bin`), read without running them.

A pickle is a small program: reading it in the ordinary way runs whatever its author put in.
PyTorch's weights-only reader knows tensors and plain containers alone and stops at everything else.
This is the one place of the trainer where `torch.load` stands.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import ModelError
from trainer.families.header import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

# The part of a checkpoint that lists its tensors; those of full-size models are under 1 MB.
_MAXIMUM_LISTING_BYTES = 64 * 2**20

# Tables within tables that are searched for tensors; a pickled table may even hold itself.
_MAXIMUM_DEPTH = 3
_MAXIMUM_NAME = 1000

# What the reader raises on files that are damaged or not what they seem.
_READ_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
    EOFError,
    OSError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    struct.error,
)

# PyTorch's names of number formats in safetensors' words.
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "int8": "I8",
    "bool": "BOOL",
}


class _Bystander(dict[str, Any]):
    """Stands in for what the training program of the first released models left in their files."""


_BYSTANDERS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Bystander, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
]


def checkpoint_tensors(path: Path) -> dict[str, TensorInfo]:
    """Names, shapes and number formats of a checkpoint's tensors, without their data.

    Raises:
        ModelError: the file carries code, is damaged, or is no checkpoint.
    """
    return {
        name: TensorInfo(
            tuple(tensor.shape),
            _DTYPES.get(str(tensor.dtype).removeprefix("torch."), str(tensor.dtype)),
        )
        for name, tensor in _read(path, "meta").items()
    }


def open_checkpoint(path: Path) -> Mapping[str, Tensor]:
    """A checkpoint's tensors on the CPU.

    Their data stays in the file until it is used, but for files in PyTorch's old format (before
    version 1.6), which are read as a whole.

    Raises:
        ModelError: as `checkpoint_tensors`.
    """
    return _read(path, "cpu")


def _read(path: Path, device: str) -> dict[str, Tensor]:
    import torch

    zipped = _is_checkpoint_archive(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_BYSTANDERS):
            # PyTorch says that it may not know every pickle protocol; if so, it refuses below.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location=device, weights_only=True, mmap=zipped)
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        found: dict[str, Tensor] = {}
        _collect(content, "", found, set())
    except _READ_ERRORS as error:
        raise _refused(path, error) from error
    return found


def _collect(
    value: Any, name: str, found: dict[str, Tensor], seen: set[int], depth: int = 0
) -> None:
    """All tensors of nested tables, their keys joined by dots; each table once, as one that is
    named a thousand times in a thousand tables would never come to an end.

    Raises:
        ValueError: a name is too long to be one.
    """
    import torch

    if len(name) > _MAXIMUM_NAME:
        raise ValueError("a name is too long")
    if isinstance(value, torch.Tensor):
        found[name] = value.detach()
    elif isinstance(value, dict) and depth < _MAXIMUM_DEPTH and id(value) not in seen:
        seen.add(id(value))
        for key, inner in value.items():
            if isinstance(key, str | int):
                own = f"{name}.{key}" if name else str(key)
                _collect(inner, own, found, seen, depth + 1)


def _is_checkpoint_archive(path: Path) -> bool:
    """Whether the file is in PyTorch's zip format; the older one is a bare pickle.

    Raises:
        ModelError: it is a zip file of something else, or damaged.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise ModelError(
            "The checkpoint is cut off or damaged.",
            where=str(path),
            fix="The download was interrupted, or the disk was full; download it again.",
        ) from error
    listings = [part for part in parts if part.filename.endswith("/data.pkl")]
    # Tensors are stored as they are. What is packed, or no tensor, is small in a checkpoint and
    # large in a bomb: it would be unpacked into memory as a whole.
    others = [p for p in parts if p.compress_type or not re.search(r"/data/\d+$", p.filename)]
    if len(listings) != 1 or sum(p.file_size for p in others) > _MAXIMUM_LISTING_BYTES:
        raise ModelError(
            "This is a zip archive, no model file.",
            where=str(path),
            fix="If it holds a model, unpack it and give the model itself.",
        )
    return True


def _refused(path: Path, error: Exception) -> ModelError:
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named:
        return ModelError(
            f"The checkpoint carries program code ({named[1]}) beside its weights. Reading it in "
            "full would run that code, so it was not read.",
            where=str(path),
            fix="Download the .safetensors file of this model, which cannot carry code; or, if you "
            "trust its author, convert it to .safetensors elsewhere (a sandbox) and give that.",
        )
    return ModelError(
        "The checkpoint cannot be read: it is damaged, or holds more than weights.",
        where=str(path),
        fix="Download it again, or better the .safetensors file of this model.",
    )
