"""The transformer blocks of a UNet compiled for this machine (torch.compile).

Only these: a UNet has many of them in few widths, so that little code serves all. Only where
gradients are wanted: samples and scores are computed as without, so nothing has to be compiled for
their sizes and strengths.

Compiled code is made for one shape. Code for all shapes would be made when the second one comes, so
what a step computes would depend on the steps before it, and a run that goes on elsewhere would not
compute the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from trainer.families.backbone import set_attention

# Nothing is chosen by measuring what would change the last digits.
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"deterministic": True}
# Of the same function: widths of blocks times sizes of batches, and far from endless.
_MOST_CODES = 1000
# PyTorch's own words for what fails in compiling are all RuntimeErrors.
_FAILURES = (ImportError, OSError, RuntimeError)


class CompiledBlock(BasicTransformerBlock):
    """A transformer block that is compiled in training; see `compile_blocks`."""

    def forward(self, *given: Any, **named: Any) -> Tensor:
        """[B, T, C], and of the prompt [B, S, D] -> [B, T, C]: B pictures, T tokens of width C."""
        if torch.is_grad_enabled():
            return _compiled()(self, *given, **named)
        plain: Tensor = super().forward(*given, **named)
        return plain


def compile_blocks(unet: nn.Module) -> int:
    """Let a UNet's transformer blocks be compiled when they first compute; returns how many.

    The modules, their names and their weights stay what they are, and adapters may come onto their
    layers before or after. That it works here must have been tried before.
    """
    blocks = [block for block in unet.modules() if type(block) is BasicTransformerBlock]
    for block in blocks:
        block.__class__ = CompiledBlock
    return len(blocks)


def why_not(attention: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why blocks with an attention cannot be compiled here, or nothing: only a forward and backward
    pass tells."""
    block = _Trial(64, 1, 64, cross_attention_dim=64).to(device, dtype).eval()
    block.requires_grad_(False)
    try:
        set_attention(block, attention)
        x_BTC = torch.zeros(1, 8, 64, device=device, dtype=dtype, requires_grad=True)
        block(x_BTC, encoder_hidden_states=x_BTC.detach()).sum().backward()
    except _FAILURES as error:
        return _reason(error)
    return ""


class _Trial(CompiledBlock):
    """One block that takes an attention as a UNet does."""

    def set_attn_processor(self, processor: Any) -> None:
        self.attn1.set_processor(processor)
        self.attn2.set_processor(processor)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """The one function that all blocks share, so that equal blocks share its code."""
    limits = torch._dynamo.config
    limits.recompile_limit = limits.accumulated_recompile_limit = _MOST_CODES
    compute: Callable[..., Tensor] = torch.compile(
        BasicTransformerBlock.forward,
        fullgraph=True,
        dynamic=False,
        options=_OPTIONS,
    )
    return compute


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
