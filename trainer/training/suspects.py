"""Which photo at which timestep made a step's numbers not finite: computed again, one by one.

Only done after such a step, so a run without one pays nothing for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.diffusion.noise import draw_for_step
from trainer.training.learner import Learner
from trainer.types import Batch


@dataclass(frozen=True, slots=True)
class Suspect:
    """key: of the sample. timestep: at which it was trained. what: of it is not finite."""

    key: str
    timestep: int
    what: str


def keys_of(learner: Learner, indices: Sequence[int]) -> list[str]:
    """The samples of some batches, those of the class behind the photos."""
    keys: list[str] = []
    for index in indices:
        for plan in (learner.batches, learner.prior):
            keys += [] if plan is None else plan.batch(index).keys
    return list(dict.fromkeys(keys))


def find_suspects(learner: Learner, indices: Sequence[int]) -> list[Suspect]:
    """The samples whose latents, prompt, loss or gradient are not finite, with the weights as they
    are now; none where computing again gives finite numbers.

    Gradients that wait in the parameters are lost.
    """
    found: list[Suspect] = []
    for index in indices:
        for batch, losses_B in learner.sample_losses(index):
            timesteps = _timesteps(learner, batch, index)
            for number, what in _not_finite(learner, batch, losses_B):
                found.append(Suspect(batch.keys[number], timesteps[number], what))
    learner.optimizer.zero_grad(set_to_none=True)
    return found


def _not_finite(learner: Learner, batch: Batch, losses_B: Tensor) -> Iterator[tuple[int, str]]:
    """Numbers of the samples that are not finite, and what of them is not."""
    finite = torch.isfinite(losses_B.detach()).tolist()
    for number, loss_is_finite in enumerate(finite):
        if not torch.isfinite(batch.latents_BChw[number]).all():
            yield number, "latents"
        elif batch.prompt_BTD is not None and not torch.isfinite(batch.prompt_BTD[number]).all():
            yield number, "caption's embedding"
        elif not loss_is_finite:
            yield number, "loss"
        elif all(finite) and not _gradient_is_finite(learner, losses_B[number]):
            yield number, "gradient"


def _gradient_is_finite(learner: Learner, loss: Tensor) -> bool:
    learner.optimizer.zero_grad(set_to_none=True)
    loss.backward(retain_graph=True)
    gradients = [parameter.grad for parameter in learner.parameters]
    return all(bool(torch.isfinite(g).all()) for g in gradients if g is not None)


def _timesteps(learner: Learner, batch: Batch, index: int) -> list[int]:
    """At which timestep each sample was trained: the draw of the step is a function of it."""
    objective = learner.objective
    _, channels, height, width = batch.latents_BChw.shape
    draws = draw_for_step(
        objective.seed,
        index,
        batch.keys,
        (channels, height, width),
        timesteps=objective.schedule.timesteps,
    )
    return [int(timestep) for timestep in draws.timesteps_B]
