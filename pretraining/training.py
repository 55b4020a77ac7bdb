"""What the training stages share: seeds, rates, averages and resumable states."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def generator(*key: object) -> torch.Generator:
    """A random stream that depends on the key alone, so that a resumed run repeats it."""
    seed = 0
    for character in repr(key):
        seed = (seed * 1_000_003 + ord(character)) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)


def rate_share(
    step: int, total_steps: int, warmup_steps: int, decay_share: float, final_share: float
) -> float:
    """Learning rate as a share of its peak: rise, stay, fall along a cosine at the end.

    The long flat part keeps the running average usable at any time.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    decay_start = total_steps * (1 - decay_share)
    if step <= decay_start:
        return 1.0
    done = min(1.0, (step - decay_start) / (total_steps - decay_start))
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * done))


class Average:
    """Exponential moving average of a module's parameters and buffers."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module; early steps count for more than `decay` says."""
        decay = min(self.decay, (1 + step) / (10 + step))
        state = module.state_dict()
        floating = [name for name, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.values[name] for name in floating], [state[name] for name in floating], 1 - decay
        )


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state so that a stop halfway leaves the previous one."""
    temporary = path.with_suffix(".part")
    torch.save(dict(state), temporary)
    temporary.replace(path)


def load_state(path: Path) -> dict[str, Any] | None:
    """Read a state, or None where there is none."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def pixels(pictures: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in -1 to 1."""
    return pictures.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
