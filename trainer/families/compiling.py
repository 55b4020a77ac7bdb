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
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from trainer.errors import ModelError
from trainer.families.backbone import set_attention

# Nothing is chosen by measuring what would change the last digits.
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"deterministic": True}
# Of the same function: widths of blocks times sizes of batches, and far from endless.
_MOST_CODES = 1000
# How far a gradient may be off, as a share of it: many times what rounding makes.
_TOLERATED = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
# PyTorch's own words for what fails in compiling are all RuntimeErrors.
_FAILURES = (ImportError, ModelError, OSError, RuntimeError)


class CompiledBlock(BasicTransformerBlock):
    """A transformer block that is compiled in training; see `compile_blocks`."""

    def forward(self, hidden_states: Tensor, *given: Any, **named: Any) -> Tensor:
        """[B, T, C], and of the prompt [B, S, D] -> [B, T, C]: B pictures, T tokens of width C."""
        if torch.is_grad_enabled():
            # Of one picture whose tokens lie as a convolution left them, inductor's code computes
            # gradients that are several percent wrong (PyTorch 2.13).
            try:
                return _compiled()(self, hidden_states.contiguous(), *given, **named)
            except TorchDynamoException as error:
                raise ModelError(
                    "The UNet's blocks could not be compiled for pictures of this size: "
                    f"{_reason(error)}",
                    where="model.compile = true",
                    fix="Start a new run with model.compile=false.",
                ) from error
        plain: Tensor = super().forward(hidden_states, *given, **named)
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


def why_not(
    attention: str, device: torch.device, dtype: torch.dtype, adapt: Callable[[nn.Module], object]
) -> str:
    """Why blocks with an attention cannot be compiled here, or nothing: only a forward and backward
    pass tells, and whether its gradients are those of the block as it is.

    adapt: puts adapters onto a frozen block, in float32.
    """
    generator = torch.Generator().manual_seed(0)
    block = _Trial(64, 2, 32, cross_attention_dim=64).eval().requires_grad_(False)
    for parameter in block.parameters():
        parameter.normal_(0, 0.2, generator=generator)
    adapt(block.to(device, dtype))
    # Of one picture, as a convolution leaves it.
    x_BTC = torch.randn(1, 64, 128, generator=generator).transpose(1, 2).to(device, dtype)
    try:
        set_attention(block, attention)
        compiled = _gradients(block.forward, block, x_BTC)
        plain = _gradients(partial(BasicTransformerBlock.forward, block), block, x_BTC)
    except _FAILURES as error:
        return _reason(error)
    off = max(_distance(*both) for both in zip(compiled, plain, strict=True))
    if not off <= _TOLERATED[dtype]:
        return f"what the compiled code computes is wrong: its gradients are {off:.1%} off"
    return ""


def _gradients(compute: Callable[..., Tensor], block: nn.Module, x_BTC: Tensor) -> list[Tensor]:
    """Of a block's input and of all that is trained in it."""
    x_BTC = x_BTC.detach().requires_grad_()
    y_BTC = compute(x_BTC, encoder_hidden_states=x_BTC.detach())
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(y_BTC.float().square().sum(), [x_BTC, *trained]))


def _distance(one: Tensor, other: Tensor) -> float:
    """As a share of the other; of a gradient that is 0 there is none."""
    norm = float(other.float().norm())
    return float((one.float() - other.float()).norm()) / norm if norm else 0.0


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


def _reason(error: BaseException) -> str:
    """The first line of the words of what failed first."""
    error = error.__cause__ if isinstance(error, ModelError) and error.__cause__ else error
    return (str(error).strip() or type(error).__name__).splitlines()[0]
