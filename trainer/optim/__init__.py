"""Optimizers by name, and the parameter groups they get."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from trainer.registry import Entry, Registry

OPTIMIZERS = Registry(
    "optimizer",
    {
        "adamw": Entry("torch.optim:AdamW", "the default; safe everywhere"),
        "adamw8bit": Entry(
            "trainer.optim.adamw8bit:AdamW8bit", "the same with a quarter of its memory"
        ),
    },
)


def build_optimizer(
    name: str,
    groups: Sequence[tuple[str, Sequence[nn.Parameter], float]],
    *,
    weight_decay: float,
    betas: tuple[float, float],
) -> torch.optim.Optimizer:
    """Make an optimizer with one group per component.

    Args:
        name: a key of `OPTIMIZERS`.
        groups: (component, parameters, learning rate); `initial_lr` of a group keeps the rate.
        weight_decay: decoupled weight decay (arXiv 1711.05101).
        betas: memories of the gradient's mean and of its square.
    """
    constructor = OPTIMIZERS.load(name)
    wanted: Mapping[str, Any] = {"weight_decay": weight_decay, "betas": betas, "fused": True}
    known = inspect.signature(constructor).parameters
    parameter_groups = [
        {"params": list(parameters), "lr": rate, "initial_lr": rate, "name": component}
        for component, parameters, rate in groups
        if parameters
    ]
    return constructor(
        parameter_groups, **{key: value for key, value in wanted.items() if key in known}
    )
