"""A LoRA layer beside that of peft: time of a forward and backward pass, and what is kept for it.

`OMP_NUM_THREADS=1 python -m benchmarks.lora_layer` takes linear layers of SD 1.5's sizes at 256 px
with adapters of rank 16, ours on frozen layers and peft's on PyTorch's under autocast as the usual
scripts have it, and lets them take turns in one process. Both start from the same factors, and what
they give is compared first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraConfig
from torch import Tensor, nn

from benchmarks.saved_bytes import counting
from trainer.adapters.frozen import quicken
from trainer.adapters.lora import LoRALayer

RANK = 16
# Rows, input and output width: a level's own projections, and those of the prompt's 77 tokens.
SIZES = ((1024, 320, 320), (256, 640, 640), (64, 1280, 1280), (77, 768, 320), (77, 768, 1280))
ROUNDS, WARM_UP = 30, 5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Layer = Callable[[Tensor], Tensor]


def pair(inputs: int, outputs: int, dtype: torch.dtype) -> tuple[LoRALayer, nn.Module]:
    """Our layer and peft's, of the same weights and factors."""
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, dtype=dtype).requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=RANK)
    theirs = PeftLinear(plain, "default", config, r=RANK, lora_alpha=RANK)
    model = nn.Sequential(nn.Linear(inputs, outputs, dtype=dtype)).requires_grad_(False)
    model[0].load_state_dict(plain.state_dict())
    quicken(model, pack=True)
    draw = torch.Generator().manual_seed(1)
    ours = LoRALayer(model[0], rank=RANK, alpha=RANK, generator=draw)
    with torch.no_grad():
        ours.up.normal_(std=0.02, generator=draw)
        theirs.lora_A["default"].weight.data = ours.down.detach().clone()
        theirs.lora_B["default"].weight.data = ours.up.detach().clone()
    return ours, theirs


def under_autocast(layer: nn.Module, dtype: torch.dtype) -> Layer:
    """A layer as the usual scripts call it."""

    def call(x: Tensor) -> Tensor:
        mixed = dtype != torch.float32
        with torch.autocast("cpu", dtype) if mixed else nullcontext():
            result: Tensor = layer(x)
        return result

    return call


def passes(layer: Layer, x: Tensor) -> float:
    """CPU seconds of a forward and backward pass."""
    started = time.process_time()
    layer(x).sum().backward()
    return time.process_time() - started


def kept(layer: Layer, weights: list[Tensor], x: Tensor) -> int:
    """Bytes that are kept for the backward pass, but for the weights as they are."""
    with counting([weight.untyped_storage() for weight in weights]) as found:
        layer(x)
    return sum(found)


def compare(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> str:
    """A line of the table."""
    ours, theirs = pair(inputs, outputs, dtype)
    calls = {"ours": ours, "peft": under_autocast(theirs, dtype)}
    x = torch.randn(rows, inputs).to(dtype).requires_grad_(True)
    mine, other = (call(x) for call in calls.values())
    torch.testing.assert_close(mine, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(WARM_UP + ROUNDS):
        for name, call in calls.items():
            seconds[name].append(passes(call, x))
    times = {name: 1000 * statistics.median(of[WARM_UP:]) for name, of in seconds.items()}
    frozen = {"ours": [*ours.parameters()], "peft": [*theirs.parameters()]}
    bytes_kept = {name: kept(call, frozen[name], x) / 2**10 for name, call in calls.items()}
    return (
        f"{str(dtype).removeprefix('torch.')} {rows} x {inputs} -> {outputs}: "
        f"{times['ours']:.2f} and {times['peft']:.2f} ms ({times['peft'] / times['ours']:.2f}); "
        f"{bytes_kept['ours']:.0f} and {bytes_kept['peft']:.0f} KiB kept"
    )


def main() -> None:
    torch.set_num_threads(1)
    print(f"CPU milliseconds, ours and peft's, median of {ROUNDS}")
    for dtype in TOLERANCE:
        for size in SIZES:
            print(compare(*size, dtype))


if __name__ == "__main__":
    main()
