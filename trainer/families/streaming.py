"""UNet blocks whose frozen weights lie in main memory and come to the GPU when they compute.

For the smallest cards. A block's weights come just before its forward pass and once more before its
backward pass; what a block is followed by is known from the time before, and is copied meanwhile.
There are two places on the GPU, each as large as the largest block. Everything else is on the GPU
all the time: adapters, biases, norms, what is not in a block. The results are those of the UNet as
it was, bit for bit.

Nothing may keep a weight from the forward to the backward pass, since another block lies in its
place by then. PyTorch's own layers do, so only layers of other kinds are streamed: those that read
their weight anew in the backward pass, as the frozen and the packed ones do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

# Where a weight begins in a block's memory: what GPUs like, and a whole number of any format.
_ALIGNMENT = 256
_MAIN = torch.device("cpu")
# Main memory is taken in pieces of so many bytes.
_PIECE = 2**29

# PyTorch's own, which keep their weights for the backward pass.
_KEEPING = (nn.Linear, nn.Conv2d)

Way = Literal["forward", "backward"]


@dataclass(frozen=True)
class _Block:
    """A block's weights, one after the other in a piece of main memory.

    home: uint8. starts: where each of the `weights` begins in it.
    """

    weights: tuple[Tensor, ...]
    home: Tensor
    starts: tuple[int, ...]

    def lie_in(self, memory: Tensor) -> None:
        """From now on the weights are what is in that memory."""
        for weight, start in zip(self.weights, self.starts, strict=True):
            part = memory[start : start + weight.nbytes].view(weight.dtype)
            weight.data = part.as_strided(weight.shape, weight.stride())


@dataclass
class _Place:
    """Room for a block on the device. block: its number. ready: when its weights are there."""

    memory: Tensor
    block: int | None = None
    ready: Any = None


class Streamer:
    """Brings the blocks of a UNet to the device, made by `stream`.

    Attributes:
        blocks: modules whose weights come and go, as they stand in the UNet.
        largest: bytes of the largest of them; the device has room for two.
    """

    def __init__(self, unet: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.blocks = tuple(blocks)
        self._unet, self._device = unet, device
        weights = [_weights(block) for block in blocks]
        homes = _homes([_ends(each)[-1] for each in weights], pinned=device.type == "cuda")
        self._blocks = [_moved_together(*pair) for pair in zip(weights, homes, strict=True)]
        self.largest = max(block.home.numel() for block in self._blocks)
        self._places = [_Place(_bytes(self.largest, device)) for _ in range(2)]
        self._copying: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        # (way, number) -> number of the block that came next, the last time.
        self._after: dict[tuple[Way, int], int] = {}
        self._now: tuple[Way, int] | None = None
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._before_forward, number))
            block.register_forward_hook(partial(self._after_forward, number))
        self.settle()

    def settle(self) -> None:
        """Bring all that is not streamed to the device: what is new there, such as adapters."""
        streamed = {id(weight) for block in self._blocks for weight in block.weights}
        for tensor in chain(self._unet.parameters(), self._unet.buffers()):
            if id(tensor) not in streamed and tensor.device != self._device:
                tensor.data = tensor.data.to(self._device)

    def _before_forward(self, number: int, *_: Any) -> None:
        # A checkpointed block computes again within its backward pass: it goes on backwards.
        if self._now is None or self._now[1] != number:
            self._bring(number, "forward")

    def _after_forward(self, number: int, _module: nn.Module, _given: Any, output: Tensor) -> None:
        # A gradient of the output is there before anything of the block's backward pass.
        if output.requires_grad:
            output.register_hook(partial(self._before_backward, number))

    def _before_backward(self, number: int, _grad: Tensor) -> None:
        self._bring(number, "backward")

    def _bring(self, number: int, way: Way) -> None:
        """Have a block's weights on the device, and begin to copy those of the next."""
        here = self._place_of(number)
        if here is None:
            # Not where the block before lies: at the turn to the backward pass it is the next.
            before = self._now[1] if self._now else None
            here = next(place for place in self._places if before is None or place.block != before)
            self._copy(number, here)
        if here.ready is not None:
            torch.cuda.current_stream(self._device).wait_event(here.ready)
        if self._now is not None and self._now[1] != number:
            self._after[self._now] = number
        self._now = (way, number)
        following = self._after.get(self._now)
        if following is not None and self._place_of(following) is None:
            self._copy(following, next(place for place in self._places if place is not here))

    def _place_of(self, number: int) -> _Place | None:
        return next((place for place in self._places if place.block == number), None)

    def _copy(self, number: int, place: _Place) -> None:
        """Copy a block to a place on the device; the block that lay there is at home again."""
        if place.block is not None:
            left = self._blocks[place.block]
            left.lie_in(left.home)
        block = self._blocks[number]
        size = block.home.numel()
        if self._copying is None:
            place.memory[:size].copy_(block.home)
        else:
            # What computes with the weights that lie there now has been told to the GPU already.
            self._copying.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._copying):
                place.memory[:size].copy_(block.home, non_blocking=True)
                place.ready = self._copying.record_event()
        block.lie_in(place.memory)
        place.block = number


def stream(unet: nn.Module, device: torch.device) -> Streamer:
    """Let the weights of a frozen UNet's blocks come to a device when they are needed.

    All of the UNet is in main memory; what is not streamed goes to the device at once. The UNet's
    layers must be those that it will compute with, frozen or packed ones (see above).

    Raises:
        ValueError: there is nothing that may be streamed.
    """
    blocks = [block for block in blocks_of(unet) if _weights(block)]
    if not blocks:
        raise ValueError("no block has layers that read their weights in the backward pass")
    return Streamer(unet, blocks, device)


def blocks_of(unet: nn.Module) -> list[nn.Module]:
    """The parts of a UNet that come and go as one, none of them inside another."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D

    kinds = (BasicTransformerBlock, ResnetBlock2D, Downsample2D, Upsample2D)
    return [part for part in unet.modules() if isinstance(part, kinds)]


def _weights(block: nn.Module) -> list[Tensor]:
    """The frozen weights of the layers that may be streamed, with the scales of packed ones."""
    layers = [part for part in block.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    own: list[Any] = [layer for layer in layers if type(layer) not in _KEEPING]
    return [
        tensor
        for layer in own
        if not layer.weight.requires_grad
        for tensor in (layer.weight, *layer.buffers(recurse=False))
    ]


def _ends(weights: Sequence[Tensor]) -> list[int]:
    """Where each of a block's weights ends, with what is left free before the next."""
    sizes = (-(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT for weight in weights)
    return list(accumulate(sizes))


def _homes(sizes: Sequence[int], *, pinned: bool) -> Iterator[Tensor]:
    """Main memory of each of these sizes in bytes, where a GPU can fetch it by itself if `pinned`.

    It is cut from large pieces: PyTorch rounds each piece of such memory up to a power of two.
    """
    left = sum(sizes)
    piece = _bytes(0, _MAIN)
    for size in sizes:
        if piece.numel() < size:
            piece = _bytes(max(size, min(_PIECE, left)), _MAIN, pinned=pinned)
        yield piece[:size]
        piece, left = piece[size:], left - size


def _moved_together(weights: Sequence[Tensor], home: Tensor) -> _Block:
    """A block's weights in one piece of main memory."""
    moved = _Block(tuple(weights), home, (0, *_ends(weights)[:-1]))
    before = [weight.data for weight in weights]
    moved.lie_in(home)
    for weight, data in zip(weights, before, strict=True):
        weight.data.copy_(data)
    return moved


def _bytes(size: int, device: torch.device, *, pinned: bool = False) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pinned)
