"""Blocks of a UNet without what Stable Diffusion has no use for.

diffusers' blocks serve many models: an attention layer looks up which arguments its processor takes
whenever it is called, and a residual block divides by a factor that is 1. In a small model, or on a
fast GPU, such things are a good part of a step. These here compute the same numbers, each block bit
for bit; a whole UNet but for rounding, since on a processor its pictures lie in memory as its
convolutions leave them, each point's channels side by side, and sums are taken in another order.

Shapes: B pictures, C and O channels, T tokens, S tokens of the context, D its width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.families.wide import attend_in_float32

# Of the quick GELU.
_STEEPNESS = 1.702


class DirectAttention(Attention):
    """An attention layer that calls its processor at once; see `go_direct`."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """[B, T, C] and, for attention to a context, [B, S, D] -> [B, T, C]."""
        if others:
            whole: Tensor = super().forward(
                hidden_states, encoder_hidden_states, attention_mask, **others
            )
            return whole
        mixed: Tensor = self.processor(self, hidden_states, encoder_hidden_states, attention_mask)
        return mixed


class SdpaProcessor(AttnProcessor2_0):
    """PyTorch's attention as `DirectAttention` calls it; for layers with more than Stable
    Diffusion's have, what diffusers makes of it.

    in_float32: compute in float32 whatever the number format is.
    """

    def __init__(self, *, in_float32: bool = False) -> None:
        super().__init__()
        self.in_float32 = in_float32
        self.attend = attend_in_float32 if in_float32 else F.scaled_dot_product_attention

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **others: Any,
    ) -> Tensor:
        plain = attention_mask is None and hidden_states.ndim == 3 and not (args or others)
        # What diffusers makes of a plain layer is in the number format that it is given.
        direct = isinstance(attn, DirectAttention) or (self.in_float32 and _is_simple(attn))
        if not plain or not direct:
            whole: Tensor = super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, *args, **others
            )
            return whole
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        count, heads = len(q), attn.heads
        q, k, v = (x.view(count, x.shape[1], heads, -1).transpose(1, 2) for x in (q, k, v))
        mixed = self.attend(q, k, v).transpose(1, 2).flatten(2)
        # What follows in `to_out`, a dropout, is off.
        result: Tensor = attn.to_out[0](mixed)
        return result


class DirectTransformer(Transformer2DModel):
    """A UNet's transformer, whose result on a processor lies as its tokens do, and as the
    processor's convolutions leave theirs; see `go_direct`."""

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> Tensor:
        """[B, T, C] and what went in, [B, O, h, w] -> [B, O, h, w]."""
        if hidden_states.device.type != "cpu":
            whole: Tensor = super()._get_output_for_continuous_inputs(
                hidden_states, residual, batch_size, height, width, inner_dim
            )
            return whole
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        image = hidden_states.reshape(batch_size, height, width, -1).permute(0, 3, 1, 2)
        if not self.use_linear_projection:
            image = self.proj_out(image)
        return image + residual


class DirectResnet(ResnetBlock2D):
    """A residual block of Stable Diffusion's kind; see `go_direct`."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        """[B, C, h, w] and the embedded timestep -> [B, O, h, w]."""
        hidden = self.conv1(self.activated(input_tensor, self.norm1))
        if temb is not None and self.time_emb_proj is not None:
            hidden = hidden + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        hidden = self.conv2(self.dropout(self.activated(hidden, self.norm2)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        # The factor, which is 1 in all published models, would be two passes over the pictures.
        result: Tensor = input_tensor + hidden
        return result if self.output_scale_factor == 1 else result / self.output_scale_factor

    def activated(self, x_BChw: Tensor, norm: nn.GroupNorm) -> Tensor:
        """silu(norm(x))."""
        return F.silu(norm(x_BChw))


class DirectGEGLU(GEGLU):
    """The first half of a feed-forward layer, whose gradient is written where it belongs; see
    `go_direct`. A compiler is given the plain one."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, G]."""
        if torch.compiler.is_compiling():
            plain: Tensor = super().forward(hidden_states)
            return plain
        gated: Tensor = _Gated.apply(self.proj(hidden_states))
        return gated


class DirectQuickGELU(nn.Module):
    """x sigmoid(1.702 x) (Hendrycks and Gimpel, arXiv 1606.08415) as silu(1.702 x) / 1.702, whose
    gradient is one operation; see `go_direct_in_text`. In float16 1.702 x may be too large."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == torch.float16:
            return input * torch.sigmoid(_STEEPNESS * input)
        y: Tensor = _QuickGELU.apply(input)
        return y


def go_direct(model: nn.Module) -> None:
    """Let the blocks of a frozen model do no more than they have to.

    The modules, their names and their weights stay what they are. Blocks with more than Stable
    Diffusion's have are left alone.
    """
    for block in model.modules():
        if type(block) is ResnetBlock2D and is_usual(block):
            block.__class__ = DirectResnet
        elif type(block) is Attention and _is_simple(block):
            block.__class__ = DirectAttention
        elif type(block) is Transformer2DModel and block.is_input_continuous:
            block.__class__ = DirectTransformer
        elif type(block) is GEGLU:
            block.__class__ = DirectGEGLU


def go_direct_in_text(encoder: nn.Module) -> None:
    """`go_direct` for a text encoder; its numbers are the same but for rounding."""
    from transformers.activations import QuickGELUActivation

    for module in encoder.modules():
        if type(module) is QuickGELUActivation:
            module.__class__ = DirectQuickGELU


def gate_gradient(projected: Tensor, opened: Tensor, room: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a gate's input; opened: gelu of its second half; room: as large, and
    overwritten. It may be `opened`."""
    value, switch = projected.chunk(2, dim=-1)
    result = torch.empty_like(projected)
    of_value, of_switch = result.chunk(2, dim=-1)
    # Both halves are written where they belong.
    torch.mul(grad, opened, out=of_value)
    torch.mul(grad, value, out=room)
    torch.ops.aten.gelu_backward.grad_input(room, switch, grad_input=of_switch)
    return result


class _Gated(torch.autograd.Function):
    """value * gelu(switch) of the two halves (GEGLU, Shazeer, arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        value, switch = projected.chunk(2, dim=-1)
        opened = F.gelu(switch)
        ctx.save_for_backward(projected, opened)
        return value * opened

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        projected, opened = ctx.saved_tensors
        # Kept for another pass, so not to be overwritten.
        return gate_gradient(projected, opened, torch.empty_like(opened), grad)


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        steeper = x * _STEEPNESS
        ctx.save_for_backward(steeper)
        return F.silu(steeper).mul_(1 / _STEEPNESS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (steeper,) = ctx.saved_tensors
        gradient: Tensor = torch.ops.aten.silu_backward(grad, steeper)
        return gradient


def is_usual(block: Any) -> bool:
    """Whether a residual block is as Stable Diffusion has them."""
    return (
        block.upsample is None
        and block.downsample is None
        and block.time_embedding_norm == "default"
        and not block.skip_time_act
        and type(block.nonlinearity) is nn.SiLU
        and type(block.norm1) is type(block.norm2) is nn.GroupNorm
    )


def _is_simple(attn: Any) -> bool:
    extras = (attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.norm_cross)
    return (
        not any(extras)
        and attn.added_kv_proj_dim is None
        and not attn.residual_connection
        and attn.rescale_output_factor == 1
        and not attn.to_out[1].training
    )
