"""The training loop: a plain generator of one report per step.

Saving, previews, progress and stopping are done by whoever consumes it, in the order in which they
stand there; a consumer ends the training by leaving its loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.optim.schedules import rate_multiplier, set_rate
from trainer.training.guards import Guard
from trainer.training.heap import keep_blocks_for_reuse
from trainer.training.learner import Learner
from trainer.training.numbers import StepNumbers
from trainer.training.team import ALONE, Team


@dataclass(frozen=True, slots=True)
class LoopPlan:
    """How long, and how the weights move. All steps are optimizer steps.

    read_steps: the numbers of so many steps are read from the device at once.
    """

    total_steps: int
    last_step: int
    schedule: str
    warmup_steps: int
    accumulate_steps: int
    max_grad_norm: float
    read_steps: int = 1


@dataclass(frozen=True, slots=True)
class StepDone:
    """One finished optimizer step; `step` counts from 1.

    read: the numbers that were read at it, of the steps since the last reading; on the CPU those of
    the step itself. said: sentences for the user about what went wrong.
    """

    step: int
    read: tuple[StepNumbers, ...] = ()
    said: tuple[str, ...] = ()

    @property
    def loss(self) -> float:
        """Of the newest step that was read; not a number where none was."""
        return self.read[-1].loss if self.read else math.nan

    @property
    def seconds(self) -> float:
        """Of the newest step that was read; not a number where none was."""
        return self.read[-1].seconds if self.read else math.nan


def train(
    learner: Learner,
    plan: LoopPlan,
    start_step: int,
    guard: Guard | None = None,
    team: Team = ALONE,
) -> Iterator[StepDone]:
    """Train from `start_step` finished steps to `plan.last_step`.

    A step whose loss or gradient is not finite changes neither weights nor optimizer; `guard` says
    who caused it and what follows.

    Raises:
        TrainerError: the guard sees no way to go on; the weights are those of the last good step.
    """
    guard = guard or Guard()
    guard.begin(learner, start_step)
    count = plan.accumulate_steps * team.size
    for step in range(start_step, plan.last_step):
        started = time.perf_counter()
        multiplier = rate_multiplier(
            step,
            schedule=plan.schedule,
            warmup_steps=plan.warmup_steps,
            total_steps=plan.total_steps,
        )
        set_rate(learner.optimizer, multiplier * guard.rate_factor)
        rate = learner.optimizer.param_groups[0]["lr"]
        values = one_step(learner, range(step * count, (step + 1) * count), plan, guard, team)
        guard.step = step + 1
        guard.numbers.add(step + 1, rate, time.perf_counter() - started, values)
        read: list[StepNumbers] = []
        said: list[str] = []
        # Not at `last_step`: where a run is stopped must not change what is decided.
        if (step + 1) % plan.read_steps == 0 or step + 1 == plan.total_steps:
            read = guard.numbers.take()
            said = guard.judge(read, learner, count)
        if step == start_step:  # now all weights lie where they are going to stay
            keep_blocks_for_reuse()
        yield StepDone(step + 1, tuple(read), tuple(said))
        if guard.error:
            raise guard.error


def one_step(
    learner: Learner,
    indices: Sequence[int],
    plan: LoopPlan,
    guard: Guard,
    team: Team = ALONE,
) -> Tensor:
    """An optimizer step over the batches of these numbers, those of all processes.

    Returns the loss of each batch of this process, summed over the processes, and the length of the
    gradient before clipping; on the device.
    """
    losses = []
    for micro in team.mine(len(indices)):
        loss = learner.loss(indices[micro]) / len(indices)
        learner.accelerator.backward(loss)
        losses.append(loss.detach())
    team.sum_gradients(learner.parameters)
    limit = plan.max_grad_norm or math.inf
    norm = learner.accelerator.clip_grad_norm_(learner.parameters, limit)
    values = torch.cat([team.sum(torch.stack(losses)), norm.detach().reshape(1)])
    with guard.moving():
        _move(learner, torch.isfinite(values).all(), wait=plan.read_steps == 1)
    learner.optimizer.zero_grad(set_to_none=True)
    return values


def _move(learner: Learner, finite: Tensor, *, wait: bool) -> None:
    """The optimizer's step, if the numbers are `finite` (one truth value, on the device).

    fp16's loss scaler sees to it by itself. Fused optimizers take the answer as the scaler gives
    it, on the device (`found_inf`); for others, and with `wait`, the processor waits for it.
    """
    optimizer: Any = getattr(learner.optimizer, "optimizer", learner.optimizer)
    if learner.accelerator.scaler is not None:
        learner.optimizer.step()
    elif wait or not getattr(optimizer, "_step_supports_amp_scaling", False):
        if finite:
            learner.optimizer.step()
    else:
        optimizer.found_inf = (~finite).float()
        learner.optimizer.step()
        del optimizer.found_inf
