"""The learning rate as a pure function of the step, so that a resume needs no state for it."""

from __future__ import annotations

import math

import torch


def rate_multiplier(step: int, *, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """What the learning rate is multiplied with in the step after `step` finished ones.

    Linear from 0 over `warmup_steps`, then 1 (`constant`) or half a cosine down to 0 at
    `total_steps` (`cosine`; arXiv 1608.03983 without restarts).
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_rate(optimizer: torch.optim.Optimizer, multiplier: float) -> None:
    """Set each group's rate to `multiplier` times the one it started with."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
