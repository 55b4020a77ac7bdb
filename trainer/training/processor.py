"""What a processor is the quickest with, by trying: number formats, products, attention."""

from __future__ import annotations

import torch

from trainer.adapters.products import matmul, onednn_computes
from trainer.families.attention import AttentionShape, milliseconds
from trainer.machine import THREAD_CLOCK
from trainer.training.trials import answer

# Before a library's name in `Device.products`: layers in bfloat16 take its products of float32.
WIDE = "wide-"
# A number format is taken where a product is so many times as quick in it.
_WORTH_ITS_DIGITS = 1.3
# And oneDNN's products of float32 where one is so many times as quick as PyTorch's own library's.
_WORTH_ITS_CALLS = 1.2
_TRIES = 10
# In bfloat16 attention in blocks is taken unless it takes so many times as long as another.
_WORTH_NO_BLOCKS = 1.2
_BLOCKS, _OTHERS = "blockwise", ("sdpa", "sdpa-fp32")
# Measured on so little, for the larger the quicker blocks are in comparison.
_SMALL = AttentionShape(tokens=256)
_HERE = torch.device("cpu")


def quicker_format() -> str:
    """The number format that this processor computes in so much faster that it is worth the digits,
    or the memory: "bf16", "fp32" or "either"; by trying."""
    if not _has_bf16():
        return "either"

    def trial() -> str:
        single = min(product_seconds(torch.float32, 1280, onednn) for onednn in (True, False))
        half = product_seconds(torch.bfloat16, 1280, True)
        if single >= _WORTH_ITS_DIGITS * half:
            return "bf16"
        return "fp32" if half >= _WORTH_ITS_DIGITS * single else "either"

    return answer("number format of three", _HERE, ("bf16", "fp32", "either"), trial)


def quicker_products() -> str:
    """Whose products of float32 to take: oneDNN's if they are worth the dearer calls."""
    if not onednn_computes(torch.float32):
        return "pytorch"

    def trial() -> str:
        by_onednn, own = (product_seconds(torch.float32, 320, onednn) for onednn in (True, False))
        return "onednn" if own >= _WORTH_ITS_CALLS * by_onednn else "pytorch"

    return answer("products of float32", _HERE, ("onednn", "pytorch"), trial)


def product_seconds(dtype: torch.dtype, width: int, onednn: bool) -> float:
    """CPU seconds of a product as Stable Diffusion's UNets make them, with layers of a width: the
    least of some, which other programs change least. In one thread: two would wait for each other
    in it."""
    x_TI, weight_OI = torch.ones(1024, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    for _ in range(_TRIES):
        started = THREAD_CLOCK()
        matmul(x_TI, weight_OI, onednn=onednn)
        times.append(THREAD_CLOCK() - started)
    torch.set_num_threads(threads)
    return min(times)


def quicker_attention(dtype: torch.dtype) -> str:
    """In bfloat16 the quickest of some, where the processor has it; else "sdpa"."""
    if dtype != torch.bfloat16 or not _has_bf16():
        return "sdpa"

    def trial() -> str:
        times = {name: milliseconds(name, _SMALL, _HERE, dtype) for name in (_BLOCKS, *_OTHERS)}
        other = min(_OTHERS, key=times.__getitem__)
        return other if times[_BLOCKS] >= _WORTH_NO_BLOCKS * times[other] else _BLOCKS

    return answer(f"attention of three, {dtype}", _HERE, (_BLOCKS, *_OTHERS), trial)


def _has_bf16() -> bool:
    """Whether it computes in bfloat16 itself: else trying alone would take many seconds."""
    return bool(
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
