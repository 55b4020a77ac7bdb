"""Rank, alpha and learning rate of each layer: one for all, and rules for some blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trainer.adapters.targets import matching


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """How one layer is adapted; `rate` is a factor of the component's learning rate."""

    path: str
    rank: int
    alpha: float
    rate: float = 1.0


@dataclass(frozen=True, slots=True)
class BlockRule:
    """What differs for the layers that a glob pattern fits (`down_blocks.1.*`); None: nothing.

    Alpha stays as it is when only the rank is changed: alpha / rank is there so that the learning
    rate need not be changed with the rank (LoRA, arXiv 2106.09685, section 4.1).

    Raises:
        ValueError: the rank is below 1, or alpha or rate not above 0.
    """

    pattern: str
    rank: int | None = None
    alpha: float | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be >= 1, not {self.rank}")
        for name, value in (("alpha", self.alpha), ("rate", self.rate)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be > 0, not {value}")


def plan_layers(
    paths: Sequence[str], *, rank: int, alpha: float, rules: Sequence[BlockRule] = ()
) -> tuple[LayerPlan, ...]:
    """One plan for each path, in their order; of several rules for a layer, later ones win.

    Raises:
        ConfigError: a rule's pattern fits no path.
    """
    plans = {path: LayerPlan(path, rank, alpha) for path in paths}
    for rule in rules:
        given = {"rank": rule.rank, "alpha": rule.alpha, "rate": rule.rate}
        changes = {name: value for name, value in given.items() if value is not None}
        for path in matching(rule.pattern, paths):
            plans[path] = replace(plans[path], **changes)  # type: ignore[arg-type]
    return tuple(plans.values())
