"""Blocks of a frozen UNet that keep less for the backward pass than diffusers' own.

What a GroupNorm with its SiLU gives, and what the gate of a feed-forward layer gives, follows from
what goes into them with a few operations for each number. So only that is kept, and the rest is
computed again in the backward pass (as Chen et al., arXiv 1604.06174, do with whole blocks). The
same operators compute the same numbers: losses are those of the blocks as they were, and gradients
but for rounding.

Shapes: B pictures, C channels, T tokens, G width of the gate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.families.direct import DirectResnet, gate_gradient, is_usual


class LeanResnet(DirectResnet):
    """A residual block that keeps the inputs of its two norms; see `keep_less`."""

    def activated(self, x_BChw: Tensor, norm: nn.GroupNorm) -> Tensor:
        """silu(norm(x)), of which x alone is kept."""
        return norm_silu(x_BChw, norm)


class LeanGEGLU(GEGLU):
    """The first half of a feed-forward layer, keeping its projection only; see `keep_less`."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, G]."""
        return gated(self.proj(hidden_states))


class LeanFeedForward(FeedForward):
    """A feed-forward layer whose adapter keeps the projection too, instead of what the gate gives;
    see `keep_less`."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        first, dropout, last = self.net
        if hasattr(last, "forward_of") and not dropout.training:
            result: Tensor = last.forward_of(gate, first.proj(hidden_states), gated)
        else:
            result = last(dropout(first(hidden_states)))
        return result


class LeanNorm(nn.GroupNorm):
    """The UNet's last norm, with the SiLU that follows it; see `keep_less`."""

    def forward(self, input: Tensor) -> Tensor:
        return norm_silu(input, self)


def keep_less(model: nn.Module) -> None:
    """Let the blocks of a frozen model keep less for the backward pass.

    The modules, their names and their weights stay what they are. Adapters may come onto their
    layers afterwards; blocks of other shapes than Stable Diffusion's are left alone, and so is all
    of a text encoder.
    """
    keep_less_of_norms(model)
    keep_less_of_gates(model)


def keep_less_of_norms(model: nn.Module) -> None:
    """`keep_less` for the norms of the residual blocks, and for the UNet's last one."""
    for block in model.modules():
        if type(block) is ResnetBlock2D and is_usual(block):
            block.__class__ = LeanResnet
    last = getattr(model, "conv_norm_out", None)
    if type(last) is nn.GroupNorm and type(getattr(model, "conv_act", None)) is nn.SiLU:
        last.__class__ = LeanNorm
        model.conv_act = nn.Identity()


def keep_less_of_gates(model: nn.Module) -> None:
    """`keep_less` for the gates of the feed-forward layers."""
    for block in model.modules():
        if type(block) is GEGLU:
            block.__class__ = LeanGEGLU
        elif type(block) is FeedForward and _is_gated(block):
            block.__class__ = LeanFeedForward


def norm_silu(x_BChw: Tensor, norm: nn.GroupNorm) -> Tensor:
    """silu(norm(x)), keeping x alone, unless the norm is trained."""
    if any(parameter.requires_grad for parameter in norm.parameters()):
        normed = F.group_norm(x_BChw, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return F.silu(normed)
    y_BChw: Tensor = _NormSiLU.apply(x_BChw, norm)
    return y_BChw


def gated(projected_BTGG: Tensor) -> Tensor:
    """a * gelu(b) of the halves a and b along the last dimension (GEGLU, Shazeer, arXiv
    2002.05202), keeping what it is given and nothing else."""
    y_BTG: Tensor = _Gated.apply(projected_BTGG)
    return y_BTG


def gate(projected_BTGG: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What `gated` gives, and the gradient of what it is given by that of what it gives; itself
    not differentiable."""
    value, switch = projected_BTGG.chunk(2, dim=-1)
    opened = F.gelu(switch)
    return value * opened, partial(gate_gradient, projected_BTGG, opened, opened)


def _is_gated(block: Any) -> bool:
    return len(block.net) == 3 and type(block.net[0]) in (GEGLU, LeanGEGLU)


def _order(x_BChw: Tensor) -> torch.memory_format:
    """The order of memory that a norm's own operators want, as PyTorch's layer has it."""
    last = x_BChw.is_contiguous(memory_format=torch.channels_last)
    if x_BChw.device.type == "cpu" and last and not x_BChw.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


class _NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        ctx.save_for_backward(x)
        ctx.norm = norm
        y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return F.silu(y, inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        norm: nn.GroupNorm = ctx.norm
        (x,) = ctx.saved_tensors
        order = _order(x)
        x = x.contiguous(memory_format=order)
        sizes = (len(x), x.shape[1], x[0, 0].numel(), norm.num_groups)
        y, mean, rstd = torch.native_group_norm(x, norm.weight, norm.bias, *sizes, norm.eps)
        grad_y = torch.ops.aten.silu_backward(grad, y).contiguous(memory_format=order)
        grad_x: Tensor = torch.ops.aten.native_group_norm_backward(
            grad_y, x, mean, rstd, norm.weight, *sizes, [True, False, False]
        )[0]
        return grad_x, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        value, switch = projected.chunk(2, dim=-1)
        return F.gelu(switch).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (projected,) = ctx.saved_tensors
        opened = F.gelu(projected.chunk(2, dim=-1)[1])
        return gate_gradient(projected, opened, opened, grad)
