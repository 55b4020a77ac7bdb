"""Tensors on their way to the device that computes.

A plain copy to a GPU waits until the GPU has done all that was asked of it before, so that one such
copy in a training step keeps the processor from running ahead. From pinned memory it waits for
nothing; PyTorch keeps that memory until the copy is done, and uses it again for later ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, in its number format; from main memory to a GPU without waiting."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
