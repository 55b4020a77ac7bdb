"""The UNet's attention by name: how each is computed, and whether it works on this machine.

All of them compute softmax(q k / sqrt(E)) v; they differ in speed and in the memory they take.

Shapes: B pictures, H heads, T tokens, E width of a head.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer.families import BaseFacts
from trainer.families.blockwise import attend_blockwise
from trainer.families.wide import attend_in_float32
from trainer.machine import PROCESS_CLOCK
from trainer.types import Size

# PyTorch's kernels by the names that settings have for them. Plain "sdpa" lets it choose.
KERNELS: Mapping[str, SDPBackend] = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
NAMES = ("xformers", "sdpa", *KERNELS, "sdpa-fp32", "blockwise", "eager")
# What a machine may lack raises one of these, a kernel that does not take the numbers too.
_FAILURES = (ImportError, OSError, NotImplementedError, RuntimeError, ValueError)
_ROUNDS = 10
_WARM_UP = 3


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes of one attention of a picture to itself."""

    pictures: int = 1
    heads: int = 8
    tokens: int = 64
    head_width: int = 64

    def __str__(self) -> str:
        return f"{self.tokens} tokens in {self.heads} heads of {self.head_width}"


def widest(facts: BaseFacts, buckets: Iterable[Size], pictures: int) -> AttentionShape:
    """The attention over the most tokens in training on batches of pictures of these sizes."""
    attention = facts.attention
    side = attention.latents_per_token * facts.pixels_per_latent
    tokens = max(-(-size.width // side) * -(-size.height // side) for size in buckets)
    return AttentionShape(pictures, attention.heads, tokens, attention.head_width)


class WithKernel:
    """An attention processor of diffusers that always takes one of PyTorch's kernels.

    The choice is made at each call, so that it also holds where activations are computed again in
    the backward pass.
    """

    def __init__(self, processor: Any, kernel: SDPBackend) -> None:
        self.processor = processor
        self.kernel = kernel

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        with sdpa_kernel(self.kernel):
            hidden: Tensor = self.processor(*args, **kwargs)
        return hidden


def attend(attention: str, q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor) -> Tensor:
    """[B, H, T, E]: one attention, computed as the UNet would."""
    if attention == "xformers":
        from xformers.ops import memory_efficient_attention

        # Heads as pictures: so diffusers calls it.
        heads = [x.flatten(0, 1) for x in (q_BHTE, k_BHTE, v_BHTE)]
        mixed: Tensor = memory_efficient_attention(*heads).view_as(q_BHTE)
        return mixed
    if attention == "eager":
        scores = q_BHTE @ k_BHTE.transpose(-1, -2) / math.sqrt(q_BHTE.shape[-1])
        return scores.softmax(-1) @ v_BHTE
    if attention == "blockwise":
        # As layers give them: the heads beside each other.
        q, k, v = (x.transpose(1, 2).flatten(2) for x in (q_BHTE, k_BHTE, v_BHTE))
        blocks = attend_blockwise(q, k, v, q_BHTE.shape[1])
        return blocks.unflatten(-1, (q_BHTE.shape[1], -1)).transpose(1, 2)
    if attention == "sdpa-fp32":
        return attend_in_float32(q_BHTE, k_BHTE, v_BHTE)
    if attention == "sdpa":
        return F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE)
    with sdpa_kernel(KERNELS[attention]):
        return F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE)


def why_not(attention: str, shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> str:
    """Why an attention does not work here, or nothing: only a forward and backward pass tells.

    Raises:
        torch.OutOfMemoryError: the device is full, which says nothing about the attention.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            _pass(attention, _inputs(shape, device, dtype))
        except torch.OutOfMemoryError:
            raise
        except _FAILURES as error:
            return _reason(error, [str(warning.message) for warning in said])
    return ""


def milliseconds(
    attention: str, shape: AttentionShape, device: torch.device, dtype: torch.dtype
) -> float:
    """How long a forward and backward pass takes: the median of some, after a warm-up. On a
    processor the time that it works, which other programs change less."""
    inputs = _inputs(shape, device, dtype)
    clock = PROCESS_CLOCK if device.type == "cpu" else time.perf_counter
    times = []
    for number in range(_WARM_UP + _ROUNDS):
        started = clock()
        _pass(attention, inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= _WARM_UP:
            times.append(1000 * (clock() - started))
    return statistics.median(times)


def _inputs(
    shape: AttentionShape, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values that gradients are wanted of. Zeros: speed does not depend on it."""
    sizes = (shape.pictures, shape.heads, shape.tokens, shape.head_width)
    q, k, v = (torch.zeros(sizes, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    return q, k, v


def _pass(attention: str, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    mixed = attend(attention, *inputs)
    torch.autograd.grad(mixed, inputs, torch.zeros_like(mixed))


def _reason(error: Exception, warned: list[str]) -> str:
    """One line. Of its kernels PyTorch only warns why they were not taken: "... not used because:",
    then the reasons."""
    lines = [text.split(" (Triggered internally")[0].strip() for text in warned]
    for before, line in zip(lines, lines[1:], strict=False):
        if before.endswith("not used because:"):
            return line
    return (str(error).strip() or type(error).__name__).splitlines()[0]
