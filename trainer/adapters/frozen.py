"""Frozen layers computed with what is known of them: their weights never change.

A layer of PyTorch keeps its input for a gradient of the weight that nobody asks for, and on a
processor it brings its weight into oneDNN's order anew in every call, which for the deep layers of
a UNet takes longer than the convolution itself. `quicken` lets the layers of a frozen model keep
nothing, and puts their weights into that order once.

The results are those of the plain layers but for rounding. T rows; I, O input and output width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from trainer.adapters.products import (
    convolution,
    matmul,
    onednn_computes,
    reordered,
    transposed,
    transposed_order,
)

# From so many rows on, computing takes longer than reading the weight: those of a linear layer,
# whose weight serves both directions, and of a convolution, which needs it twice. The convolutions
# that see fewer, deep in a UNet, hold most of its weights.
_MANY_ROWS, _MANY_POINTS = 64, 256


class FrozenLinear(nn.Linear):
    """A linear layer that is not trained; see `quicken`. A compiler finds by itself what need not
    be kept, and is given the plain layer.

    onednn: as for `matmul`, of its products and of those of an adapter on it. widens: as for
    `quicken`; the weight is then kept in float32 alone from the first use on, and whoever asks for
    it gets it as it was.
    """

    onednn: bool = True
    widens: bool = False
    _wide: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self._wide is not None:
            return self._wide.to(torch.bfloat16)
        return super().__getattr__(name)

    def forward(self, input: Tensor) -> Tensor:
        if (self._wide is None and _is_trained(self)) or torch.compiler.is_compiling():
            return super().forward(input)
        y: Tensor = _Linear.apply(input, self)
        return y

    def compute(self, x_TI: Tensor) -> Tensor:
        """What the layer gives, [T, O]; not differentiable."""
        return _product(self, x_TI)

    def input_gradient(self, grad_TO: Tensor) -> Tensor:
        """The gradient of an input, [T, I]."""
        return _product(self, grad_TO, backward=True)


class FrozenConv2d(nn.Conv2d):
    """A convolution that is not trained; see `quicken`.

    packs: whether its weight is kept in oneDNN's order, once for each direction. The plain one is
    then given up at the first use; whoever asks for it gets it put together again. onednn: as for
    `matmul`, where it is computed as a linear layer (`is_of_points`). widens: as for `quicken`.
    """

    packs: bool = False
    onednn: bool = True
    widens: bool = False
    _wide: Tensor | None = None
    # The same in float32; in a tuple, where it is none of the model's modules.
    _twin: tuple[FrozenConv2d, ...] = ()
    _forward_pack: Tensor | None = None
    _backward_pack: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self._forward_pack is not None:
            return self._forward_pack.to_dense()
        return super().__getattr__(name)

    def forward(self, input: Tensor) -> Tensor:
        if self._forward_pack is None and _is_trained(self):
            return super().forward(input)
        y: Tensor = _Conv2d.apply(input, self)
        return y

    def compute(self, x_BIhw: Tensor) -> Tensor:
        """What the layer gives; not differentiable."""
        if self.is_of_points(x_BIhw):
            points = Points(self)
            return as_image(points.compute(as_rows(x_BIhw)), x_BIhw)
        if self.widens and _is_narrow(x_BIhw) and x_BIhw[:, 0].numel() >= _MANY_POINTS:
            return self._in_float32().compute(x_BIhw.float()).to(x_BIhw.dtype)
        if self._forward_pack is None:
            if not self._packable(x_BIhw):
                return super().forward(x_BIhw)
            self._forward_pack = reordered(self.weight, x_BIhw.shape, self.padding, self.stride)
            del self.weight
        return convolution(x_BIhw, self._forward_pack, self.bias, self.padding, self.stride)

    def input_gradient(self, grad_BOhw: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of an input of that shape."""
        if self.is_of_points(grad_BOhw):
            points = Points(self)
            return as_image(points.input_gradient(as_rows(grad_BOhw)), grad_BOhw)
        points_in = shape[0] * shape[2] * shape[3]
        if self.widens and _is_narrow(grad_BOhw) and points_in >= _MANY_POINTS:
            twin = self._in_float32()
            return twin.input_gradient(grad_BOhw.float(), shape).to(grad_BOhw.dtype)
        if self._forward_pack is None:
            return conv2d_input(shape, self.weight, grad_BOhw, self.stride, self.padding)
        return self._transposed(grad_BOhw, shape)

    def _transposed(self, grad_BOhw: Tensor, shape: torch.Size) -> Tensor:
        """The gradient as a transposed convolution. What the kernel's steps did not reach at the
        lower and right edge is its output padding."""
        padding = cast("tuple[int, int]", self.padding)  # `quicken` takes none by name
        how = zip(
            shape[2:], grad_BOhw.shape[2:], self.stride, padding, self.kernel_size, strict=True
        )
        rest = [size - ((n - 1) * step - 2 * p + k) for size, n, step, p, k in how]
        steps = padding, rest, self.stride
        if self._backward_pack is None:
            self._backward_pack = transposed_order(self.weight, grad_BOhw.shape, *steps)
        return transposed(grad_BOhw, self._backward_pack, *steps)

    def is_of_points(self, x: Tensor) -> bool:
        """Whether to compute it as a linear layer of the points of x: a 1x1 convolution on a
        processor, whose convolutions leave each point's channels side by side."""
        pointwise = (self.kernel_size, self.stride, self.padding) == ((1, 1), (1, 1), (0, 0))
        return pointwise and x.device.type == "cpu"

    def _in_float32(self) -> FrozenConv2d:
        if not self._twin:
            # `quicken` takes kernels of two sides alone, and none whose padding has a name.
            kernel, stride, padding = (
                cast("tuple[int, int]", how)
                for how in (self.kernel_size, self.stride, self.padding)
            )
            sizes = (self.in_channels, self.out_channels, kernel)
            twin = FrozenConv2d(*sizes, stride, padding, bias=False, device="meta")
            twin.weight = nn.Parameter(self.weight.detach().float(), requires_grad=False)
            if self.bias is not None:
                twin.bias = nn.Parameter(self.bias.detach().float(), requires_grad=False)
            twin.packs = self.packs
            self._twin = (twin,)
        return self._twin[0]

    def _packable(self, x: Tensor) -> bool:
        return (
            self.packs
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype
            and onednn_computes(x.dtype)
        )


class Points:
    """A 1x1 convolution as a linear layer, whose rows are the points of all pictures."""

    def __init__(self, layer: FrozenConv2d) -> None:
        self.layer = layer
        self.onednn = layer.onednn

    def compute(self, x_TI: Tensor) -> Tensor:
        """What the layer gives, [T, O]; not differentiable."""
        return _product(self.layer, x_TI)

    def input_gradient(self, grad_TO: Tensor) -> Tensor:
        """The gradient of an input, [T, I]."""
        return _product(self.layer, grad_TO, backward=True)


def as_rows(x_BChw: Tensor) -> Tensor:
    """[B h w, C]; no copy where each point's channels lie side by side (channels-last)."""
    return x_BChw.permute(0, 2, 3, 1).flatten(0, 2)


def as_image(x_TC: Tensor, like_Bhw: Tensor) -> Tensor:
    """What `as_rows` made rows of, [B, C, h, w], with batch, height and width of another image."""
    batch, _, height, width = like_Bhw.shape
    return x_TC.view(batch, height, width, x_TC.shape[1]).permute(0, 3, 1, 2)


def quicken(root: nn.Module, *, pack: bool, onednn: bool = True, widen: bool = False) -> None:
    """Let the linear and convolution layers of a frozen model be computed as frozen ones.

    The modules, their names and their weights stay what they are; only how they compute changes.
    Layers of other kinds, and weights in another form (quantized ones), are left alone.

    Args:
        root: a model in its number format already.
        pack: keep the convolutions' weights in oneDNN's order where there is oneDNN, for as much
            memory as they take.
        onednn: as for `matmul`, of the products of linear layers and 1x1 convolutions.
        widen: let layers in bfloat16 compute in float32 on a processor where they have much to
            compute; the weights of these linear layers then take twice the memory, and those of
            convolutions in oneDNN's order two and a half times.
    """
    for layer in root.modules():
        if type(layer) is nn.Linear and _is_dense(layer.weight):
            layer.__class__ = FrozenLinear
            linear = cast("FrozenLinear", layer)
            linear.onednn, linear.widens = onednn, widen
        elif type(layer) is nn.Conv2d and _is_dense(layer.weight) and _is_simple(layer):
            layer.__class__ = FrozenConv2d
            frozen = cast("FrozenConv2d", layer)
            frozen.packs, frozen.onednn, frozen.widens = pack, onednn, widen


def _product(layer: FrozenLinear | FrozenConv2d, rows: Tensor, *, backward: bool = False) -> Tensor:
    """What a linear layer, or a 1x1 convolution, makes of rows of inputs, [T, O]; or, backward, the
    inputs' gradients of rows of gradients, [T, I]."""
    if layer.widens and _is_narrow(rows) and len(rows) >= _MANY_ROWS:
        if layer._wide is None:
            wide = layer.weight.detach().flatten(1).float()
            if isinstance(layer, FrozenLinear):
                del layer.weight
            layer._wide = wide
        weight_OI = layer._wide
    else:
        weight_OI = layer.weight.flatten(1)
    dtype, rows = rows.dtype, rows.to(weight_OI.dtype)
    if backward:
        return matmul(rows, weight_OI.t(), onednn=layer.onednn).to(dtype)
    bias = None if layer.bias is None else layer.bias.to(weight_OI.dtype)
    return matmul(rows, weight_OI, bias, onednn=layer.onednn).to(dtype)


def _is_narrow(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


def _is_dense(weight: Tensor) -> bool:
    plain = type(weight) in (Tensor, nn.Parameter) and weight.layout == torch.strided
    return plain and weight.dtype.is_floating_point


def _is_simple(layer: nn.Conv2d) -> bool:
    if layer.groups != 1 or layer.padding_mode != "zeros" or layer.dilation != (1, 1):
        return False
    return not isinstance(layer.padding, str) and all(
        p < k for p, k in zip(layer.padding, layer.kernel_size, strict=True)
    )


def _is_trained(layer: nn.Linear | nn.Conv2d) -> bool:
    return layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return layer.compute(x.flatten(0, -2)).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layer: FrozenLinear = ctx.layer
        return layer.input_gradient(grad.flatten(0, -2)).unflatten(0, grad.shape[:-1]), None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenConv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.compute(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.input_gradient(grad, ctx.shape), None
