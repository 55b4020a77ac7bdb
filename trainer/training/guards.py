"""What watches over a training: numbers that are not finite, a loss that runs away, no effect.

A step whose loss or gradients are not finite changes nothing: neither the weights nor the
optimizer's state. Since the step counter goes on, the order of the data stays a function of the
step. Everything here is a function of the steps so far and is kept in the checkpoints, so a resumed
run decides what an uninterrupted one does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch import Tensor

from trainer.errors import FileFormatError, TrainerError
from trainer.training.learner import Learner
from trainer.training.numbers import Readings, StepNumbers
from trainer.training.snapshot import Snapshot, go_back, take_snapshot
from trainer.training.suspects import find_suspects, keys_of
from trainer.training.tally import WINDOW, Tally, runs_away

# Going back more often than this means that it does not help.
MOST_TIMES_BACK = 3
# After so many steps an adapter that still changes nothing will never change anything.
STILL_STEPS = 10
# What fp16's loss scaler has to sink below to be no longer at its normal work.
LEAST_SCALE = 1.0
# Sentences about single steps; what comes after them is only counted.
MOST_SENTENCES = 20


@dataclass(frozen=True, slots=True)
class GuardPlan:
    """How a run is watched over.

    tolerated_steps: bad ones in a row before training goes back. snapshot_steps: how often the
    state to go back to is kept. names: of photos, by the keys of their samples. precision: of the
    base.
    """

    tolerated_steps: int = 5
    snapshot_steps: int = 250
    names: Mapping[str, str] = field(default_factory=dict)
    precision: str = "fp32"


class Guard:
    """Watches one run; `train` asks it after the steps whose numbers are read.

    Attributes:
        numbers: of the steps, until they are read.
        tally: what was counted.
        error: why the training cannot go on, or None.
        step: the last one that was made.
        whole: whether weights and optimizer are those of a whole step, also after an error.
    """

    def __init__(self, plan: GuardPlan = GuardPlan()) -> None:  # noqa: B008
        self.plan = plan
        self.numbers = Readings()
        self.tally = Tally()
        self.error: TrainerError | None = None
        self.step = 0
        self.whole = True
        self._snapshot: Snapshot | None = None

    @property
    def rate_factor(self) -> float:
        """What learning rates are multiplied with: halved each time that training goes back."""
        return self.tally.rate_factor

    @property
    def uneasy(self) -> bool:
        """Whether the last steps were bad, so that older checkpoints should stay for now."""
        return self.tally.streak > 0

    def begin(self, learner: Learner, step: int) -> None:
        """Keep the state that training starts from, if none is kept yet."""
        self.tally.snapshot_steps = self.tally.snapshot_steps or self.plan.snapshot_steps
        if self._snapshot is None:
            self._snapshot = take_snapshot(learner, step)

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Inside the `with` block the optimizer is at work: an error leaves them half moved."""
        self.whole = False
        yield
        self.whole = True

    def judge(
        self, numbers: Sequence[StepNumbers], learner: Learner, batches_per_step: int
    ) -> list[str]:
        """Look at steps in their order; sentences for the user come back.

        Args:
            numbers: of the steps since the last look, the last of them just done.
            learner: whose weights may be put back.
            batches_per_step: in all processes together.
        """
        said: list[str] = []
        for row in numbers:
            if row.skipped:
                said += self._bad(row, learner, batches_per_step)
            else:
                self._good(row)
        said += self._ran_away() + self._still(learner)
        if self.tally.streak >= self.plan.tolerated_steps:
            said += self._go_back(learner, numbers[-1].step)
        elif numbers and numbers[-1].step % self.tally.snapshot_steps == 0 and self._calm:
            self._snapshot = take_snapshot(learner, numbers[-1].step)
        self.tally.notes += said
        return said

    @property
    def _calm(self) -> bool:
        return self.tally.streak == 0 and not self.tally.ran_away

    def _good(self, row: StepNumbers) -> None:
        tally = self.tally
        tally.streak = 0
        tally.applied += 1
        if len(tally.first) < WINDOW:
            tally.first.append(row.loss)
        tally.last = [*tally.last, row.loss][-WINDOW:]

    def _bad(self, row: StepNumbers, learner: Learner, batches_per_step: int) -> list[str]:
        tally, scaler = self.tally, learner.accelerator.scaler
        overflow = scaler is not None and math.isfinite(row.loss)
        if overflow and scaler.get_scale() >= LEAST_SCALE:
            tally.overflows += 1
            return []
        tally.skipped += 1
        tally.streak += 1
        first = (row.step - 1) * batches_per_step
        indices = range(first, first + batches_per_step)
        in_it = [self._name(key) for key in keys_of(learner, indices)]
        if known := [name for name in in_it if name in tally.culprits]:
            tally.culprits |= {name: tally.culprits[name] + 1 for name in known}
            return []
        return self._accuse(row.step, in_it, learner, indices)

    def _accuse(
        self, step: int, in_it: Sequence[str], learner: Learner, indices: Sequence[int]
    ) -> list[str]:
        """Who it was, in words."""
        words = []
        for suspect in find_suspects(learner, indices):
            name = self._name(suspect.key)
            self.tally.culprits.setdefault(name, 1)
            words.append(f"the {suspect.what} of {name} at timestep {suspect.timestep}")
        why = (
            f"{_listed(words)} is not a finite number"
            if words
            else f"a number was not finite, which did not happen again when it was computed once "
            f"more ({_listed(in_it)})"
        )
        if self.tally.skipped > MOST_SENTENCES:
            return []
        return [f"Step {step} was left out: {why}. Training goes on."]

    def _go_back(self, learner: Learner, step: int) -> list[str]:
        tally, snapshot = self.tally, self._snapshot
        if snapshot is None or not tally.applied or tally.times_back >= MOST_TIMES_BACK:
            self.error = self._hopeless(step)
            return []
        go_back(learner, snapshot)
        tally.rate_factor /= 2
        tally.times_back += 1
        count, tally.streak, tally.last = tally.streak, 0, []
        return [
            f"{count} steps in a row gave numbers that are not finite: at step {step} the weights "
            f"went back to those of step {snapshot.step}, and the learning rate was halved."
        ]

    def _hopeless(self, step: int) -> TrainerError:
        tally = self.tally
        advice = []
        if named := self._culprit_words():
            advice.append(f"Look at these photos and their captions, or take them out: {named}.")
        if self.plan.precision != "fp32":
            advice.append(
                f"Set model.precision=fp32, since {self.plan.precision} holds numbers less well."
            )
        advice.append("Lower optimizer.learning_rate, to a fifth as a first try.")
        if not tally.applied:
            advice.append(
                "Since no step has worked at all, the base may be damaged: copy or download it "
                "again."
            )
        last = "the last step" if tally.streak == 1 else f"the last {tally.streak} steps"
        again = f" It went back {tally.times_back} times before." if tally.times_back else ""
        return TrainerError(
            f"Training cannot go on: {last} until step {step} gave numbers that are not "
            f"finite.{again}",
            where="What was saved before is as it was.",
            fix="\n".join(advice),
        )

    def _ran_away(self) -> list[str]:
        tally = self.tally
        if tally.ran_away or not runs_away(tally.first, tally.last):
            return []
        tally.ran_away = True
        return [
            f"The loss runs away: it is {median(tally.last):.3g} where it was "
            f"{median(tally.first):.3g} in the beginning. Files saved before this are better; a "
            "lower optimizer.learning_rate will help."
        ]

    def _still(self, learner: Learner) -> list[str]:
        tally = self.tally
        if tally.still or tally.applied < STILL_STEPS:
            return []
        tally.still = True
        return [
            f"After {tally.applied} steps the LoRA of the {component.replace('_', ' ')} still "
            "changes nothing: no gradient arrives, or its learning rate is far too small."
            for component in unmoved(learner)
        ]

    def _name(self, key: str) -> str:
        return self.plan.names.get(key, key)

    def _culprit_words(self) -> str:
        ranked = Counter(self.tally.culprits).most_common(5)
        return ", ".join(f"{name} ({count} steps)" for name, count in ranked)

    def words(self) -> list[str]:
        """What was out of the ordinary in the whole run, for its end; nothing in a normal one."""
        tally = self.tally
        lines = []
        if tally.skipped:
            named = self._culprit_words()
            lines.append(
                f"{tally.skipped} of {tally.applied + tally.skipped + tally.overflows} steps were "
                "left out, because their numbers were not finite"
                + (f"; most often with {named}." if named else ".")
            )
        return lines + [note for note in tally.notes if not note.startswith("Step ")]

    def state(self) -> dict[str, Any]:
        """Everything but the snapshot's tensors, in JSON's types."""
        kept = {name: getattr(self.tally, name) for name in Tally.__dataclass_fields__}
        snapshot = self._snapshot
        return {
            "tally": kept,
            "unread": self.numbers.state(),
            "snapshot": None if snapshot is None else [snapshot.step, dict(snapshot.numbers)],
        }

    def tensors(self, step: int) -> dict[str, Tensor]:
        """The snapshot, for the checkpoint of a step; nothing where it is that step's own state."""
        snapshot = self._snapshot
        if snapshot is None or snapshot.step == step:
            return {}
        kept = {f"adapter/{name}": tensor for name, tensor in snapshot.adapter.items()}
        return kept | {f"optimizer/{name}": tensor for name, tensor in snapshot.optimizer.items()}

    def load_state(
        self, state: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take over what `state` and `tensors` returned; {} changes nothing.

        Raises:
            FileFormatError: they returned something else.
        """
        if not state:
            return
        try:
            known = Tally.__dataclass_fields__.keys() & state["tally"].keys()
            self.tally = Tally(**{name: state["tally"][name] for name in known})
            self.numbers.load_state(state["unread"])
            self._snapshot = None
            if tensors and state["snapshot"]:
                step, numbers = state["snapshot"]
                self._snapshot = Snapshot(
                    step, _below(tensors, "adapter/"), _below(tensors, "optimizer/"), numbers
                )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileFormatError(
                f"What the checkpoint says of the steps before is not complete: {error}",
                fix="Go on from an older checkpoint: --resume and its folder.",
            ) from error


def unmoved(learner: Learner) -> list[str]:
    """The components whose adapters change nothing: in LoRA, `up` starts at zero."""
    return [
        component
        for component, attached in learner.adapters.items()
        if not any(
            bool(tensor.any()) for name, tensor in attached.state().items() if name.endswith(".up")
        )
    ]


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _listed(words: Sequence[str]) -> str:
    """At most three of them."""
    more = len(words) - 3
    return ", ".join(words[:3]) + (f" and {more} more" if more > 0 else "")
