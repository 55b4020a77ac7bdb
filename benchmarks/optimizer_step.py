"""What a step of an optimizer takes, at the sizes of a LoRA of rank 16 on SD 1.5's attention.

`OMP_NUM_THREADS=1 python -m benchmarks.optimizer_step` prints CPU seconds per step, the variants
taking turns in one process, and the size of what each remembers. One of them is AdamW over a single
flat parameter of as many numbers: what could be gained by keeping all factors in one buffer.
"""

from __future__ import annotations

import statistics
import time

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.random_bases import config_of
from trainer.adapters.targets import select_layers
from trainer.optim import build_optimizer

RANK = 16
ROUNDS, WARM_UP = 25, 3


def factor_shapes() -> list[tuple[int, int]]:
    """Of `down` and `up` of every layer."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config_of("sd15", "unet"))
    layers = [unet.get_submodule(path) for path in select_layers(unet, "unet", "attention")]
    return [
        shape
        for layer in layers
        for shape in ((RANK, layer.in_features), (layer.out_features, RANK))
    ]


def optimizer_of(name: str, shapes: list[tuple[int, ...]]) -> torch.optim.Optimizer:
    """Over random parameters with random gradients."""
    draw = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=draw) / 100) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    groups = [("unet", parameters, 1e-4)]
    return build_optimizer(name, groups, weight_decay=0.01, betas=(0.9, 0.999))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    fields = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in fields if isinstance(value, Tensor))


def main() -> None:
    torch.set_num_threads(1)
    shapes = [tuple(shape) for shape in factor_shapes()]
    count = sum(rows * columns for rows, columns in factor_shapes())
    optimizers = {
        f"adamw, {len(shapes)} parameters": optimizer_of("adamw", shapes),
        "adamw, one flat parameter": optimizer_of("adamw", [(count,)]),
        f"adamw8bit, {len(shapes)} parameters": optimizer_of("adamw8bit", shapes),
    }
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(WARM_UP + ROUNDS):
        for name, optimizer in optimizers.items():
            started = time.process_time()
            optimizer.step()
            seconds[name].append(time.process_time() - started)
    print(f"{count:,} numbers; CPU milliseconds per step, median of {ROUNDS} (least to most)")
    for name, optimizer in optimizers.items():
        times = sorted(1000 * second for second in seconds[name][WARM_UP:])
        print(
            f"{name}: {statistics.median(times):.1f} ({times[0]:.1f} to {times[-1]:.1f}); "
            f"remembers {state_bytes(optimizer) / 2**20:.1f} MiB"
        )


if __name__ == "__main__":
    main()
