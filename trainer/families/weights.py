"""Tensors of a model file, one at a time, whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from trainer.families.header import Header, damaged

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def open_weights(header: Header) -> Iterator[Callable[[str], Tensor]]:
    """Open a model file; gives a function from a tensor's name to the tensor, on the CPU.

    A tensor is read when it is asked for, so the file is never in memory as a whole. Tensors of
    a checkpoint still lie in the file: they must be copied to outlast it.

    Raises:
        ModelError: the file cannot be read.
    """
    if header.container == "pickle":
        from trainer.families.checkpoints import open_checkpoint

        yield open_checkpoint(header.path).__getitem__
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(header.path, framework="pt") as file:
            yield file.get_tensor
    except SafetensorError as error:
        raise damaged(header.path, str(error)) from error
