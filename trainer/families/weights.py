"""Tensors of a model file, one at a time, whatever its format.

They are read one after the other into the same piece of memory. A file that is mapped into memory
instead counts as the process's until it is closed, as large as what was read of it: with the module
that is made of it, twice the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from math import prod
from typing import TYPE_CHECKING

from trainer.errors import ModelError
from trainer.families.header import ITEM_BYTES, Header, damaged

if TYPE_CHECKING:
    from torch import Tensor

# Number formats of weights, by the names that safetensors and PyTorch give them.
_FORMATS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


@contextmanager
def open_weights(header: Header) -> Iterator[Callable[[str], Tensor]]:
    """Open a model file; gives a function from a tensor's name to the tensor, on the CPU.

    A tensor is read when it is asked for, so the file is never in memory as a whole. It is there
    until the next one is asked for or the file is closed: it must be copied to outlast that.

    Raises:
        ModelError: the file cannot be read, or a tensor in it is of no format of weights.
    """
    if header.container == "pickle":
        from trainer.families.checkpoints import open_checkpoint

        yield open_checkpoint(header.path).__getitem__
        return
    import torch

    sizes = [prod(i.shape) * ITEM_BYTES.get(i.dtype, 0) for i in header.tensors.values()]
    memory = torch.empty(max(sizes, default=0), dtype=torch.uint8)
    try:
        with header.path.open("rb") as file:
            yield lambda name: _read(file, header, name, memory)
    except OSError as error:
        raise damaged(header.path, error.strerror or str(error)) from error


def _read(file: BufferedReader, header: Header, name: str, memory: Tensor) -> Tensor:
    """A tensor of a safetensors file, in that memory (uint8)."""
    import torch

    info = header.tensors[name]
    if info.dtype not in _FORMATS:
        raise ModelError(
            f"The tensor {name} is in a number format that is not known here: {info.dtype}.",
            where=str(header.path),
            fix="Use the model in half or full precision (fp16, bf16 or fp32).",
        )
    content = memory[: prod(info.shape) * ITEM_BYTES[info.dtype]]
    file.seek(info.start)
    if file.readinto(content.numpy().data) != content.numel():
        raise damaged(header.path, f"the tensor '{name[:80]}' is cut off")
    return content.view(getattr(torch, _FORMATS[info.dtype])).view(info.shape)
