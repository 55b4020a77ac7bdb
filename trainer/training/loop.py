"""The training loop: a plain generator of one report per step.

Saving, previews, progress and stopping are done by whoever consumes it, in the order in which they
stand there; a consumer ends the training by leaving its loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.errors import TrainerError
from trainer.optim.schedules import rate_multiplier, set_rate
from trainer.training.learner import Learner


@dataclass(frozen=True, slots=True)
class LoopPlan:
    """How long, and how the weights move. All steps are optimizer steps."""

    total_steps: int
    last_step: int
    schedule: str
    warmup_steps: int
    accumulate_steps: int
    max_grad_norm: float


@dataclass(frozen=True, slots=True)
class StepDone:
    """One finished optimizer step; `step` counts from 1."""

    step: int
    loss: float
    rate: float
    grad_norm: float
    seconds: float


def train(learner: Learner, plan: LoopPlan, start_step: int) -> Iterator[StepDone]:
    """Train from `start_step` finished steps to `plan.last_step`.

    Raises:
        TrainerError: the loss or the gradients are not finite; the weights of the step before
            are still in place.
    """
    parameters = learner.parameters
    limit = plan.max_grad_norm or math.inf
    for step in range(start_step, plan.last_step):
        started = time.perf_counter()
        multiplier = rate_multiplier(
            step,
            schedule=plan.schedule,
            warmup_steps=plan.warmup_steps,
            total_steps=plan.total_steps,
        )
        set_rate(learner.optimizer, multiplier)
        total = 0.0
        for micro in range(plan.accumulate_steps):
            loss = learner.loss(step * plan.accumulate_steps + micro) / plan.accumulate_steps
            learner.accelerator.backward(loss)
            total += loss.item()
        norm = float(learner.accelerator.clip_grad_norm_(parameters, limit))
        # fp16's loss scaler meets overflows as a matter of course and skips the step by itself.
        if not math.isfinite(total) or (
            learner.accelerator.scaler is None and not math.isfinite(norm)
        ):
            learner.optimizer.zero_grad(set_to_none=True)
            raise TrainerError(
                f"Training went wrong in step {step + 1}: the loss is not a finite number.",
                fix="Lower optimizer.learning_rate (half of it is a good try), or use "
                "model.precision=fp32. The last checkpoint is still good: go on with --resume.",
            )
        learner.optimizer.step()
        learner.optimizer.zero_grad(set_to_none=True)
        yield StepDone(
            step=step + 1,
            loss=total,
            rate=learner.optimizer.param_groups[0]["lr"],
            grad_norm=norm,
            seconds=time.perf_counter() - started,
        )
