"""Attention for processors, in blocks that stay in the cache: quicker there than PyTorch's own in
bfloat16, and like it keeps no matrix of scores.

The scores of a block (some heads, or some rows of one) are computed, used and overwritten by those
of the next; the backward pass computes them again (FlashAttention, Dao et al., arXiv 2205.14135,
without its running maximum: a block holds whole rows).

Shapes: B pictures, H heads, T tokens, S tokens of the context, C = H * E width; N = B * H.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.errors import ModelError

# Scores in a block: two megabytes of them in bfloat16. Half or twice as many take as long.
_MOST_SCORES = 1 << 20


def attend_blockwise(q_BTC: Tensor, k_BSC: Tensor, v_BSC: Tensor, heads: int) -> Tensor:
    """softmax(q k / sqrt(E)) v of each head, [B, T, C]."""
    mixed: Tensor = _Blockwise.apply(q_BTC, k_BSC, v_BSC, heads)
    return mixed


class BlockwiseProcessor:
    """What diffusers' attention layers of Stable Diffusion's UNet call."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None or hidden_states.ndim != 3:
            raise ModelError(
                "This UNet's attention is not computed in blocks: it has masks or pictures.",
                fix="Set model.attention=sdpa.",
            )
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        # What follows in `to_out`, a dropout, is off in all published models.
        mixed: Tensor = attn.to_out[0](attend_blockwise(q, k, v, attn.heads))
        return mixed


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTC: Tensor, k_BSC: Tensor, v_BSC: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(q_BTC, k_BSC, v_BSC)
        ctx.heads = heads
        q_NTE, k_NSE, v_NSE = _prepared(q_BTC, k_BSC, v_BSC, heads)
        k_NES = k_NSE.transpose(1, 2)
        (scratch,) = _scratch(q_NTE, k_NSE, 1)
        mixed_NTE = torch.empty_like(q_NTE)
        for heads_, rows in _blocks(q_NTE, k_NSE):
            shares = _shares(q_NTE[heads_, rows], k_NES[heads_], scratch)
            mixed_NTE[heads_, rows] = torch.bmm(shares, v_NSE[heads_])
        return _joined(mixed_NTE, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        heads = ctx.heads
        q_BTC, k_BSC, v_BSC = ctx.saved_tensors
        q_NTE, k_NSE, v_NSE = _prepared(q_BTC, k_BSC, v_BSC, heads)
        grad_NTE = _split(grad_BTC, heads)
        k_NES, v_NES = k_NSE.transpose(1, 2), v_NSE.transpose(1, 2)
        # Sums over blocks of rows, in float32 at least.
        wide = torch.promote_types(k_NSE.dtype, torch.float32)
        grad_q = torch.empty_like(q_NTE)
        grad_k, grad_v = (torch.zeros_like(k_NES, dtype=wide) for _ in range(2))
        kept, changed = _scratch(q_NTE, k_NSE, 2)
        for heads_, rows in _blocks(q_NTE, k_NSE):
            q, grad = q_NTE[heads_, rows], grad_NTE[heads_, rows]
            shares = _shares(q, k_NES[heads_], kept)
            grad_v[heads_] += torch.bmm(grad.transpose(1, 2), shares)
            slopes = _view(changed, q, k_NSE)
            torch.bmm(grad, v_NES[heads_], out=slopes)
            torch._softmax_backward_data(slopes, shares, -1, shares.dtype, grad_input=slopes)
            grad_q[heads_, rows] = torch.bmm(slopes, k_NSE[heads_])
            grad_k[heads_] += torch.bmm(q.transpose(1, 2), slopes)
        grad_q *= _scale(q_NTE)
        grad_k, grad_v = (x.transpose(1, 2).to(q_NTE.dtype) for x in (grad_k, grad_v))
        return _joined(grad_q, heads), _joined(grad_k, heads), _joined(grad_v, heads), None


def _prepared(
    q_BTC: Tensor, k_BSC: Tensor, v_BSC: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, T or S, E], queries scaled and keys without their mean. What all keys have in common adds
    the same to all scores of a row, which softmax does not see; without it they are smaller, so
    that less is lost in bfloat16 (SageAttention, Zhang et al., arXiv 2410.02367, section 4.2). Its
    gradient is zero for the same reason."""
    q_NTE, k_NSE, v_NSE = (_split(x, heads) for x in (q_BTC, k_BSC, v_BSC))
    return q_NTE * _scale(q_NTE), k_NSE - k_NSE.mean(1, keepdim=True), v_NSE


def _scale(q_NTE: Tensor) -> float:
    return float(q_NTE.shape[-1] ** -0.5)


def _split(x_BTC: Tensor, heads: int) -> Tensor:
    """[B, T, C] -> [N, T, E], contiguous: products of scattered rows are far slower."""
    return x_BTC.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1).contiguous()


def _joined(x_NTE: Tensor, heads: int) -> Tensor:
    return x_NTE.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)


def _blocks(q_NTE: Tensor, k_NSE: Tensor) -> Iterator[tuple[slice, slice]]:
    """Which heads and which rows of them are computed at once."""
    (count, tokens, _), context = q_NTE.shape, k_NSE.shape[1]
    heads = max(1, _MOST_SCORES // (tokens * context))
    rows = max(1, _MOST_SCORES // context)
    for first in range(0, count, heads):
        for row in range(0, tokens, rows):
            yield slice(first, first + heads), slice(row, row + rows)


def _scratch(q_NTE: Tensor, k_NSE: Tensor, count: int) -> list[Tensor]:
    """Room for the scores of a block: new memory for each would cost as much as computing them."""
    (heads, tokens, _), context = q_NTE.shape, k_NSE.shape[1]
    size = min(heads * tokens * context, max(_MOST_SCORES, context))
    return [q_NTE.new_empty(size) for _ in range(count)]


def _view(scratch: Tensor, q_NTE: Tensor, k_NSE: Tensor) -> Tensor:
    shape = (*q_NTE.shape[:2], k_NSE.shape[1])
    return scratch[: shape[0] * shape[1] * shape[2]].view(shape)


def _shares(q_NTE: Tensor, k_NES: Tensor, scratch: Tensor) -> Tensor:
    """How much each query takes of each key, [N, T, S], in the scratch room."""
    shares = _view(scratch, q_NTE, k_NES.transpose(1, 2))
    torch.bmm(q_NTE, k_NES, out=shares)
    return torch.softmax(shares, -1, out=shares)
