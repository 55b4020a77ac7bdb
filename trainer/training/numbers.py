"""The numbers of a step: left on the device while training goes on, and read a few at a time.

Reading a number from a GPU makes the processor wait for it, so it is not done at every step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """Of one optimizer step; `step` counts from 1.

    loss: mean over the step's batches. rate: of the first group. grad_norm: before clipping.
    seconds: of the step, or its share of those that were read with it. skipped: the weights were
    left as they were, because loss or gradients were not finite.
    """

    step: int
    loss: float
    rate: float
    grad_norm: float
    seconds: float
    skipped: bool = False


@dataclass(frozen=True, slots=True)
class _Waiting:
    step: int
    rate: float
    seconds: float
    values: Tensor


class Readings:
    """Numbers of steps that nobody has looked at yet."""

    def __init__(self) -> None:
        self._read: list[StepNumbers] = []
        self._waiting: list[_Waiting] = []

    def add(self, step: int, rate: float, seconds: float, values: Tensor) -> None:
        """Note a step. values: the losses of its batches, which add up to its own, then the length
        of its gradient; on any device, and not looked at."""
        self._waiting.append(_Waiting(step, rate, seconds, values))

    def take(self) -> list[StepNumbers]:
        """All that were noted since the last time, read from the device at once."""
        self._fetch()
        taken, self._read = self._read, []
        return taken

    def state(self) -> list[list[float | None]]:
        """Those not taken yet, in JSON's types; what is not finite is None."""
        self._fetch()
        rows = [[n.step, n.loss, n.rate, n.grad_norm, n.seconds] for n in self._read]
        return [[value if math.isfinite(value) else None for value in row] for row in rows]

    def load_state(self, rows: Sequence[Sequence[float | None]]) -> None:
        """Take over what `state` returned."""
        self._waiting = []
        self._read = []
        for row in rows:
            step, *rest = row
            loss, rate, norm, seconds = (math.nan if value is None else value for value in rest)
            self._read.append(_numbers(int(step or 0), loss, rate, norm, seconds))

    def _fetch(self) -> None:
        if not self._waiting:
            return
        started = time.perf_counter()
        rows = torch.stack([waiting.values for waiting in self._waiting]).tolist()
        # A GPU's work shows when it is waited for: the steps share all of their time.
        seconds = sum(waiting.seconds for waiting in self._waiting) + time.perf_counter() - started
        share = seconds / len(self._waiting)
        for waiting, (*losses, norm) in zip(self._waiting, rows, strict=True):
            self._read.append(_numbers(waiting.step, sum(losses), waiting.rate, norm, share))
        self._waiting = []


def as_row(numbers: StepNumbers) -> Mapping[str, Any]:
    """A step in JSON's types: what is not finite is None."""
    return {
        "step": numbers.step,
        "loss": numbers.loss if math.isfinite(numbers.loss) else None,
        "rate": numbers.rate,
        "grad_norm": numbers.grad_norm if math.isfinite(numbers.grad_norm) else None,
        "seconds": numbers.seconds,
        "skipped": numbers.skipped,
    }


def _numbers(step: int, loss: float, rate: float, norm: float, seconds: float) -> StepNumbers:
    skipped = not (math.isfinite(loss) and math.isfinite(norm))
    return StepNumbers(step, loss, rate, norm, seconds, skipped)
