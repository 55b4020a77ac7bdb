"""What the guards of a run have counted: plain values, kept in its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

# A loss runs away when the median of the last so many is so many times that of the first: single
# losses differ a hundredfold with the timestep.
WINDOW = 50
RUNAWAY = 3.0


@dataclass(slots=True)
class Tally:
    """What a guard has counted.

    rate_factor: what learning rates are multiplied with. applied, skipped: steps. overflows: steps
    that fp16's loss scaler left out, as it does. streak: bad steps in a row until now. times_back:
    how often training went back. culprits: bad steps by photo. first, last: losses that tell
    whether it runs away. notes: what was said. still: whether it was looked for an adapter that
    changes nothing. snapshot_steps: as in the plan when the run began.
    """

    rate_factor: float = 1.0
    applied: int = 0
    skipped: int = 0
    overflows: int = 0
    streak: int = 0
    times_back: int = 0
    culprits: dict[str, int] = field(default_factory=dict)
    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ran_away: bool = False
    still: bool = False
    snapshot_steps: int = 0


def runs_away(first: Sequence[float], last: Sequence[float]) -> bool:
    """Whether the median of the last losses is far above that of the first ones."""
    return len(first) == len(last) == WINDOW and median(last) > RUNAWAY * median(first)
