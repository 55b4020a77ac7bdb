"""Attention in blocks for processors: what plain attention gives, in however many blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.learners import load_backbone
from tests.tiny import save_tiny
from trainer.errors import ModelError
from trainer.families import blockwise
from trainer.families.blockwise import BlockwiseProcessor, attend_blockwise


def inputs(tokens: int, context: int, heads: int, pictures: int = 2) -> list[Tensor]:
    """Queries, keys and values, and a gradient of the result."""
    draw = torch.Generator().manual_seed(tokens + 100 * context)
    sizes = (tokens, context, context, tokens)
    return [torch.randn(pictures, size, 6 * heads, generator=draw).double() for size in sizes]


def plain(heads: int, q_BTC: Tensor, k_BSC: Tensor, v_BSC: Tensor) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q_BTC, k_BSC, v_BSC))
    scores = torch.einsum("bthe,bshe->bhts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhts,bshe->bthe", scores.softmax(-1), v).flatten(2)


@given(
    tokens=st.integers(1, 9),
    context=st.integers(1, 9),
    heads=st.integers(1, 3),
    block=st.integers(1, 200),
)
def test_results_and_gradients_are_those_of_plain_attention(
    tokens: int, context: int, heads: int, block: int
) -> None:
    *qkv, grad = inputs(tokens, context, heads)
    found = [x.clone().requires_grad_(True) for x in qkv]
    wanted = [x.clone().requires_grad_(True) for x in qkv]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "_MOST_SCORES", block)
        mixed = attend_blockwise(found[0], found[1], found[2], heads)
        mixed.backward(grad)
    expected = plain(heads, *wanted)
    expected.backward(grad)
    torch.testing.assert_close(mixed, expected)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_keys_far_from_zero_lose_nothing_in_bfloat16() -> None:
    """What all keys have in common is no reason for rough scores."""
    *qkv, _ = inputs(16, 16, 2)
    far = [qkv[0], qkv[1] + 8.0, qkv[2]]
    exact = plain(2, *(x.bfloat16().double() for x in far))
    q, k, v = (x.bfloat16() for x in far)
    ours = attend_blockwise(q, k, v, heads=2)
    assert (ours.double() - exact).norm() <= 0.01 * exact.norm()


def test_nothing_but_queries_keys_and_values_is_kept() -> None:
    *qkv, _ = inputs(32, 32, 2)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        q, k, v = (x.requires_grad_(True) for x in qkv)
        mixed = attend_blockwise(q, k, v, heads=2)
    assert mixed.requires_grad
    assert sum(x.numel() for x in kept) == sum(x.numel() for x in qkv)


def test_what_it_does_not_know_is_refused(tmp_path: Path) -> None:
    unet = load_backbone(save_tiny(tmp_path / "base", "sd1")).components["unet"]
    layer: Any = next(module for name, module in unet.named_modules() if name.endswith("attn1"))
    layer.set_processor(BlockwiseProcessor())
    hidden = torch.zeros(1, 4, layer.to_q.in_features)
    assert layer(hidden).shape == hidden.shape
    with pytest.raises(ModelError, match="masks or pictures"):
        layer(hidden, attention_mask=torch.zeros(1, 1, 4))
