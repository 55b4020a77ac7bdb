"""Frozen weights in eight or four bits: of each number a code, of each row or block a scale.

Only what stands still is packed: the layers in the blocks of a UNet or text encoder, whatever is
trained on top of them. Computing stays in the number format of the base: a layer unpacks its
weight, uses it and forgets it. PyTorch would keep the unpacked weight of every layer until the
backward pass, which takes more memory than was saved, so that pass unpacks it again.

Shapes: O rows (output width or channels); B blocks of 64 numbers, the rows one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from trainer.families import nf4

# Number format of the codes by the name in the settings, and the largest number they stand for.
# uint8 holds two codes of `nf4`, which has a scale for each block; the others have one for a row.
FORMATS: Mapping[str, tuple[torch.dtype, float]] = {
    "int8": (torch.int8, 127.0),
    "fp8": (torch.float8_e4m3fn, 448.0),
    "nf4": (torch.uint8, 1.0),
}
# Layers elsewhere are small, and first or last: what they lose, all others lose.
_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.", "encoder.layers.")


def pack(weight: Tensor, weights: str) -> tuple[Tensor, Tensor]:
    """Codes of a weight's shape and the scale of each row, [O, 1, ...]; nf4: codes [B, 32] and the
    scale of each block, [B, 1].

    A number is about code * scale; the largest of a row or block has the largest code. Scales are
    float32, or bfloat16 like the weight, which is quicker to unpack on a processor; float16 has no
    room for them. Codes go by the scale as it is kept, so its rounding is no error.
    """
    dtype, largest = FORMATS[weights]
    in_blocks = dtype == torch.uint8
    # The only copy: all else is done in it.
    numbers = nf4.blocks(weight) if in_blocks else weight.to(torch.float32, copy=True)
    scales = torch.linalg.vector_norm(numbers.flatten(1), ord=torch.inf, dim=1) / largest
    # A row of zeros has codes of zero, whatever its scale.
    scales = scales.clamp_min(torch.finfo(torch.float32).tiny)
    scales = scales.reshape(-1, *[1] * (numbers.ndim - 1))
    if weight.dtype == torch.bfloat16:
        scales = scales.bfloat16()
    numbers.div_(scales).clamp_(-largest, largest)
    if in_blocks:
        return nf4.codes_of(numbers), scales
    return (numbers.round_() if dtype == torch.int8 else numbers).to(dtype), scales


def unpack(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight of that shape in a number format, rounded once: bfloat16 and float16 hold what
    every code stands for."""
    if codes.dtype == torch.uint8:
        numbers = nf4.numbers_of(codes, dtype).mul_(scales)
        return numbers.view(-1)[: shape.numel()].view(shape)
    return codes.to(dtype).mul_(scales)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.unpacked(x.dtype), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.unpacked(grad.dtype), None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedConv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return F.conv2d(x, layer.unpacked(x.dtype), layer.bias, *layer.place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight = ctx.layer.unpacked(grad.dtype)
        return conv2d_input(ctx.shape, weight, grad, *ctx.layer.place), None


class PackedLinear(nn.Linear):
    """An `nn.Linear` whose `weight` holds codes, with the scales beside it.

    shape: of the weight that they stand for.
    """

    scales: Tensor
    shape: torch.Size

    def __init__(self, layer: nn.Linear, codes: Tensor, scales: Tensor) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        _fill(self, layer, codes, scales)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        return unpack(self.weight, self.scales, self.shape, dtype)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Linear.apply(x, self)
        return result


class PackedConv2d(nn.Conv2d):
    """An `nn.Conv2d` with zero padding whose `weight` holds codes, with the scales beside it.

    shape: of the weight that they stand for.
    """

    scales: Tensor
    shape: torch.Size

    def __init__(self, layer: nn.Conv2d, codes: Tensor, scales: Tensor) -> None:
        super().__init__(
            layer.in_channels,
            layer.out_channels,
            (layer.kernel_size[0], layer.kernel_size[1]),
            groups=layer.groups,
            bias=False,
            device="meta",
        )
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        _fill(self, layer, codes, scales)

    @property
    def place(self) -> tuple[Any, ...]:
        """Where its kernel lies: stride, padding, dilation and groups."""
        return self.stride, self.padding, self.dilation, self.groups

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        return unpack(self.weight, self.scales, self.shape, dtype)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Conv2d.apply(x, self)
        return result


def _fill(
    packed: PackedLinear | PackedConv2d,
    layer: nn.Linear | nn.Conv2d,
    codes: Tensor,
    scales: Tensor,
) -> None:
    packed.shape = layer.weight.shape
    packed.weight = nn.Parameter(codes, requires_grad=False)
    packed.bias = layer.bias
    packed.register_buffer("scales", scales)
    packed.train(layer.training)


def pack_weights(model: nn.Module, weights: str, device: torch.device) -> None:
    """Pack the weights of a model's blocks, one layer after the other, so that no second copy of
    them is ever there.

    Args:
        model: frozen; neither trained layers on top nor a cast of the whole may come before this.
        weights: a name of `FORMATS`.
        device: where it is computed, which a GPU does in no time; the codes are where the weight
            was.
    """
    # Their paths alone: a list of layers would hold on to all of them.
    paths = [
        path
        for path, layer in model.named_modules()
        if any(block in path for block in _BLOCKS) and isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    for path in paths:
        layer: Any = model.get_submodule(path)
        home = layer.weight.device
        codes, scales = (part.to(home) for part in pack(layer.weight.detach().to(device), weights))
        if isinstance(layer, nn.Linear):
            model.set_submodule(path, PackedLinear(layer, codes, scales))
        else:
            model.set_submodule(path, PackedConv2d(layer, codes, scales))


def why_not(weights: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why weights cannot be packed so here, or nothing: only a forward and backward pass tells."""
    try:
        for layer, shape in ((nn.Linear(16, 16), (2, 16)), (nn.Conv2d(16, 16, 1), (1, 16, 2, 2))):
            parent = nn.ModuleDict({"mid_block": nn.Sequential(layer)})
            parent.to(device, dtype).requires_grad_(False)
            pack_weights(parent, weights, device)
            x = torch.ones(shape, device=device, dtype=dtype, requires_grad=True)
            parent["mid_block"](x).sum().backward()
    except (NotImplementedError, RuntimeError, TypeError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""
