"""Low-rank adaptation (LoRA, Hu et al., arXiv 2106.09685) of one linear or convolution layer.

Shapes: R rank; I, O input and output width (channels) of the base layer; kh, kw its kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.adapters.frozen import FrozenConv2d, FrozenLinear, Points
from trainer.adapters.products import matmul
from trainer.errors import ModelError

# Gives what a layer is computed of, and what a gradient of that is by what was given.
Make = Callable[[Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]


class LoRALayer(nn.Module):
    """A frozen layer with a trained update of rank R: y = base(x) + (alpha / R) up(down(x)).

    `down` is A of the paper (section 4.1), `up` is B: W' = W + (alpha / R) B A.

    The factors are float32 whatever the base is: they are cast to the input's dtype when used,
    so a bfloat16 base runs in bfloat16 and the gradients still arrive in float32. A convolution
    is adapted as a convolution with its own kernel to R channels, then a 1x1 one to O channels.

    Args:
        base: an `nn.Linear`, or an `nn.Conv2d` without groups and with zero padding.
        rank: R, at least 1.
        alpha: strength of the update; above 0.
        generator: a CPU generator; `down` is a pure function of it. `up` starts at zero, so a
            fresh layer changes nothing.

    Attributes:
        down: float32 [R, I] or [R, I, kh, kw].
        up: float32 [O, R] or [O, R, 1, 1].
        multiplier: strength when sampling; 0 leaves the update out altogether.

    Raises:
        ModelError: the base layer is of a kind that cannot be adapted.
    """

    def __init__(
        self,
        base: nn.Linear | nn.Conv2d,
        *,
        rank: int,
        alpha: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if rank < 1 or not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"rank must be >= 1 and alpha > 0, not {rank} and {alpha}")
        self.base = base
        self.rank = rank
        self.alpha = alpha
        self.multiplier = 1.0
        down_shape, up_shape = _factor_shapes(base, rank)
        down = torch.empty(down_shape)
        # As nn.Linear starts its own weight, and as the published trainers start `down`.
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        device = base.weight.device
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(up_shape, device=device))
        self.train(base.training)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] or [B, I, h, w] -> what the base gives, plus the update."""
        strength = self.scale * self.multiplier
        if strength != 0 and not torch.compiler.is_compiling():
            updated: Tensor
            if isinstance(self.base, FrozenLinear):
                updated = _Update.apply(x, self.down, self.up, self.base, strength, None)
                return updated
            if isinstance(self.base, FrozenConv2d):
                if not self.base.is_of_points(x):
                    updated = _ConvUpdate.apply(x, self.down, self.up, self.base, strength)
                    return updated
                rows = x.permute(0, 2, 3, 1)
                points = Points(self.base)
                updated = _Update.apply(rows, self.down, self.up, points, strength, None)
                return updated.permute(0, 3, 1, 2)
        y: Tensor = self.base(x)
        if strength == 0:
            return y
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        # The strength is applied between the factors, where the tensor is smallest.
        if isinstance(self.base, nn.Conv2d):
            base = self.base
            hidden = F.conv2d(x, down, None, base.stride, base.padding, base.dilation, base.groups)
            return y + F.conv2d(hidden * strength, up)
        return y + F.linear(F.linear(x, down) * strength, up)

    def forward_of(self, make: Make, given: Tensor, plainly: Callable[[Tensor], Tensor]) -> Tensor:
        """The layer for x = plainly(given) = make(given)[0]. Where it can, it keeps `given` alone
        for the backward pass, and makes x again in it."""
        strength = self.scale * self.multiplier
        if strength != 0 and isinstance(self.base, FrozenLinear):
            updated: Tensor = _Update.apply(given, self.down, self.up, self.base, strength, make)
            return updated
        y: Tensor = self(plainly(given))
        return y

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The update of the base weight at multiplier 1: float32, with that weight's shape."""
        product = self.up.flatten(1) @ self.down.flatten(1)
        if isinstance(self.base, nn.Conv2d):
            product = product.unflatten(1, self.down.shape[1:])
        return self.scale * product

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}"


class _Update(torch.autograd.Function):
    """x W^T + b + (x down^T) (strength up)^T of a frozen linear layer, as one function.

    Kept for the backward pass are the input, as it is, or what it is made of where `make` says how,
    and the middle of width R; the frozen weight's product and the update's are added up where they
    are computed. T rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        given: Tensor,
        down: Tensor,
        up: Tensor,
        base: FrozenLinear | Points,
        strength: float,
        make: Make | None,
    ) -> Tensor:
        x = given if make is None else make(given)[0]
        x_TI = x.flatten(0, -2)
        down_RI = down.to(x.dtype).flatten(1)
        up_OR = _scaled(up, strength).to(x.dtype).flatten(1)
        hidden_TR = matmul(x_TI, down_RI, onednn=base.onednn)
        y_TO = base.compute(x_TI).addmm_(hidden_TR, up_OR.t())
        ctx.save_for_backward(given, hidden_TR, down_RI, up_OR)
        ctx.base, ctx.strength, ctx.dtype, ctx.make = base, strength, up.dtype, make
        ctx.shapes = down.shape, up.shape
        return y_TO.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        given, hidden_TR, down_RI, up_OR = ctx.saved_tensors
        x, gradient = (given, None) if ctx.make is None else ctx.make(given)
        grad_TO, x_TI = grad.flatten(0, -2), x.flatten(0, -2)
        base: FrozenLinear | Points = ctx.base
        grad_TR = matmul(grad_TO, up_OR.t(), onednn=base.onednn)
        grad_up = _scaled((hidden_TR.t() @ grad_TO).t().to(ctx.dtype), ctx.strength)
        grad_down = (grad_TR.t() @ x_TI).to(ctx.dtype)
        grad_given = None
        if ctx.needs_input_grad[0]:
            grad_x_TI = base.input_gradient(grad_TO).addmm_(grad_TR, down_RI)
            grad_given = grad_x_TI.unflatten(0, x.shape[:-1])
            if gradient is not None:
                grad_given = gradient(grad_given)
        of_down, of_up = ctx.shapes
        return grad_given, grad_down.view(of_down), grad_up.reshape(of_up), None, None, None


class _ConvUpdate(torch.autograd.Function):
    """A frozen convolution and its update, as one function.

    Kept for the backward pass are the input and the middle of R channels.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, base: FrozenConv2d, strength: float
    ) -> Tensor:
        down_RIkk, up_OR11 = down.to(x.dtype), _scaled(up, strength).to(x.dtype)
        hidden = F.conv2d(x, down_RIkk, None, base.stride, base.padding)
        ctx.save_for_backward(x, hidden, down_RIkk, up_OR11)
        ctx.base, ctx.strength, ctx.dtype = base, strength, up.dtype
        return base.compute(x).add_(F.conv2d(hidden, up_OR11))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, hidden, down_RIkk, up_OR11 = ctx.saved_tensors
        base: FrozenConv2d = ctx.base
        backward = torch.ops.aten.convolution_backward
        at_once = ((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
        grad_hidden, grad_up, _ = backward(
            grad, hidden, up_OR11, None, *at_once, (True, True, False)
        )
        needs_x = ctx.needs_input_grad[0]
        steps = (base.stride, base.padding, (1, 1), False, (0, 0), 1)
        grad_x, grad_down, _ = backward(
            grad_hidden, x, down_RIkk, None, *steps, (needs_x, True, False)
        )
        if needs_x:
            grad_x = base.input_gradient(grad, x.shape).add_(grad_x)
        grad_up = _scaled(grad_up.to(ctx.dtype), ctx.strength)
        return grad_x, grad_down.to(ctx.dtype), grad_up, None, None


def _scaled(factor: Tensor, strength: float) -> Tensor:
    """Of the usual strength, which is 1, without a pass over the numbers."""
    return factor if strength == 1 else factor * strength


def _factor_shapes(base: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of `down` and `up` for a base layer."""
    if isinstance(base, nn.Linear):
        return (rank, base.in_features), (base.out_features, rank)
    if not isinstance(base, nn.Conv2d):
        raise ModelError(
            f"A {type(base).__name__} cannot be adapted.",
            fix="Only Linear and Conv2d layers can.",
        )
    if base.groups != 1 or base.padding_mode != "zeros":
        raise ModelError(
            "A convolution with groups or without zero padding cannot be adapted.",
            where=str(base),
            fix="Leave this layer out.",
        )
    return (rank, base.in_channels, *base.kernel_size), (base.out_channels, rank, 1, 1)
