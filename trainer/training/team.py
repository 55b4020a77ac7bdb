"""Several processes that train one LoRA: who does what, and what is summed.

Every process holds the whole model and the whole plan of batches. Of each step's micro-batches a
process takes those that are its own, the gradients are summed, and all make the same optimizer
step, so the weights stay equal without ever being sent. The leader alone prints and writes.

`Team` is what the rest of the training sees of it; `launched.py` is a team of several.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor, nn

# What a launcher says in the environment; without all of it a process is alone.
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Team:
    """A process alone, which is a team of one: nothing in it costs anything.

    Attributes:
        rank: number of this process, from 0. size: how many there are.
        way_out: what to do when another process is lost; renewed with every checkpoint.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self.way_out = ""

    @property
    def leader(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def command(self) -> str:
        """What starts a training like this one, up to the photo folder."""
        return "likeness train"

    def mine(self, count: int) -> range:
        """Which of a step's `count` micro-batches this process takes."""
        return range(self.rank, count, self.size)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by the sum of all processes' gradients of that parameter."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, of the same shape and on the same device.

        On a GPU it is for numbers of a step alone, after `sum_gradients`.
        """
        return tensor

    def stop(self, number: int) -> int:
        """The highest of all processes' signals, 0 for none: then all stop after the same step."""
        return number

    def told(self, text: str) -> str:
        """The leader's text, in every process."""
        return text

    def wait(self, for_what: str) -> None:
        """Go on when all processes are here; `for_what` they come together, in words.

        Raises:
            TeamError: one of them has ended.
        """

    @contextmanager
    def leader_first(self, for_what: str) -> Iterator[None]:
        """The leader does what is inside, and then the others do."""
        if not self.leader:
            self.wait(for_what)
        yield
        if self.leader:
            self.wait(for_what)

    def require_alike(self, what: str, text: str) -> None:
        """Make sure that every process has the same text as the leader.

        Raises:
            TeamError: one has another; the message says that `what` differs.
        """

    def require_device(self, device: torch.device) -> None:
        """Make sure that this process has a device of its own.

        Raises:
            DeviceError: there are more processes on this machine than GPUs.
        """

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


ALONE = Team()


def open_team(say: Callable[[str], None]) -> Team:
    """The team that this process was started in; `ALONE` where nothing says otherwise.

    Args:
        say: shows a sentence to the user, from any thread.

    Raises:
        TeamError: the processes do not find each other.
    """
    if any(name not in os.environ for name in LAUNCHED) or int(os.environ["WORLD_SIZE"]) < 2:
        return ALONE
    # Not every build of PyTorch has what several processes need.
    from trainer.training.launched import Launched

    return Launched(say)
