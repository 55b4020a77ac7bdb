"""Numbers in four bits that are spread like a normal distribution: NormalFloat4 (Dettmers et al.,
"QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, section 3 and appendix E).

Weights of a trained network are spread so, so each of the 16 levels serves about as many of them.
A level is a share of the largest number of a block; zero, and the largest number on either side of
it, are levels themselves.

Shapes: L numbers of a weight in B blocks of 64 each, the last one filled up with zeros. A byte
holds two codes, the first in its upper half.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK = 64
# So many bytes of codes are looked up at once: their indices take four times as much.
_AT_ONCE = 2**20
_CPU = torch.device("cpu")
# A number of so many bytes has the room of two of half the size: both come with one look.
_PAIRS = {2: torch.int32, 4: torch.int64}


@cache
def levels() -> Tensor:
    """float32 [16], rising from -1 to 1; level 7 is 0.

    Quantiles of the normal distribution, equally far apart in probability on each side of zero:
    eight above it and seven below. Where they end is half a step from certainty, the mean of what
    that is with 15 and with 16 levels. They are rounded to bfloat16, so that every number format
    holds them: it moves them by at most 0.4 %.
    """
    end = 1 - (1 / 30 + 1 / 32) / 2
    above, below = (
        torch.special.ndtri(torch.linspace(0.5, end, count, dtype=torch.float64, device=_CPU))
        for count in (9, 8)
    )
    return (torch.cat([-below.flip(0)[:-1], above]) / above[-1]).bfloat16().float()


def blocks(weight: Tensor) -> Tensor:
    """A weight's L numbers as float32 [B, 64], a copy."""
    count = -(-weight.numel() // BLOCK)
    padded = torch.zeros(count, BLOCK, dtype=torch.float32, device=weight.device)
    padded.view(-1)[: weight.numel()].copy_(weight.flatten())
    return padded


def codes_of(shares: Tensor) -> Tensor:
    """uint8 [B, 32]: the nearest levels to numbers in -1 to 1, float32 [B, 64]."""
    values = levels().to(shares.device)
    between = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(shares, between, out_int32=True).to(torch.uint8)
    return codes[:, 0::2] * 16 + codes[:, 1::2]


def numbers_of(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The levels that codes uint8 [B, 32] stand for, [B, 64]; the caller may change them."""
    table = _table(dtype, codes.device)
    pairs = torch.empty(codes.numel(), dtype=table.dtype, device=codes.device)
    parts = codes.view(-1).split(_AT_ONCE), pairs.split(_AT_ONCE)
    for bytes_, found in zip(*parts, strict=True):
        torch.index_select(table, 0, bytes_.int(), out=found)
    return pairs.view(dtype).view(-1, BLOCK)


@cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256]: both levels of each byte side by side, as one number of twice the size."""
    byte = torch.arange(256, device=_CPU)
    pairs = levels()[torch.stack([byte // 16, byte % 16], 1)].to(dtype)
    return pairs.view(_PAIRS[dtype.itemsize]).view(-1).to(device)
