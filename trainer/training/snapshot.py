"""All that a step changes, weights and optimizer, taken out of a learner and put back into it.

Checkpoints are made of it, and the guards keep one in main memory to go back to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainer.errors import FileFormatError
from trainer.training.learner import Learner


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Weights and optimizer after `step` finished steps.

    adapter: by "<component>/<layer>.<factor>". optimizer, numbers: the optimizer's tensors and its
    other values, by "<number of the parameter>/<field>". All of them copies on the CPU.
    """

    step: int
    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    numbers: Mapping[str, Any]


def take_snapshot(learner: Learner, step: int) -> Snapshot:
    """A copy of all that a step changes."""
    adapter = {
        f"{component}/{name}": tensor
        for component, attached in learner.adapters.items()
        for name, tensor in attached.state().items()
    }
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for number, fields in learner.optimizer.state_dict()["state"].items():
        for field, value in fields.items():
            if isinstance(value, Tensor):
                tensors[f"{number}/{field}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                numbers[f"{number}/{field}"] = value
    return Snapshot(step, adapter, tensors, numbers)


def go_back(learner: Learner, snapshot: Snapshot) -> None:
    """Put weights and optimizer back to what they were; the snapshot stays good for another time.

    Raises:
        FileFormatError: it belongs to other layers, another rank or another optimizer.
    """
    for component, attached in learner.adapters.items():
        prefix = f"{component}/"
        attached.load_state(
            {
                name.removeprefix(prefix): tensor
                for name, tensor in snapshot.adapter.items()
                if name.startswith(prefix)
            }
        )
    state = _optimizer_fields(learner, snapshot)
    groups = learner.optimizer.state_dict()["param_groups"]
    learner.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _optimizer_fields(learner: Learner, snapshot: Snapshot) -> dict[int, dict[str, Any]]:
    """{number of the parameter: {field: value}}, as PyTorch's optimizers take it."""
    sizes = [parameter.numel() for parameter in learner.parameters]
    state: dict[int, dict[str, Any]] = {}
    # Copies: an optimizer on the CPU would go on in the snapshot's own tensors.
    copies = {name: tensor.clone() for name, tensor in snapshot.optimizer.items()}
    try:
        for name, value in (*copies.items(), *snapshot.numbers.items()):
            number, _, field = name.partition("/")
            if isinstance(value, Tensor) and value.numel() > 2 * sizes[int(number)]:
                raise ValueError(f"{name} is larger than its parameter")
            state.setdefault(int(number), {})[field] = value
    except (ValueError, IndexError) as error:
        raise FileFormatError(
            f"The optimizer's state does not fit this training: {error}",
            fix="Use the settings that the run was started with.",
        ) from error
    return state
