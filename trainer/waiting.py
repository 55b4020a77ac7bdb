"""How threads wait for each other between two operations.

A thread that spins is there at once when the next operation comes, which with the many short ones
of a training step makes two threads half as quick again as threads that sleep. On a processor that
another program uses too, spinning takes the time from the very thread that is waited for: steps
then take several times as long. So threads spin for a moment where nothing else runs, and sleep
otherwise.
"""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from pathlib import Path
from statistics import median

# Rounds of the waiting loop of GNU's OpenMP, which PyTorch brings along on Linux: microseconds.
# Longer spins gain no more, and cost much if another program starts later (benchmarks/LOG.md).
SPINS = 6000
# The kernel's count of what wants to run, as "running/all" in the fourth place.
LOAD = Path("/proc/loadavg")
_LOOKS = 7
_SECONDS = 0.05


def choose_waiting(environment: MutableMapping[str, str], load: Path = LOAD) -> None:
    """Say in the environment how OpenMP's threads wait; before PyTorch is imported. What the user
    has set stays."""
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environment.keys():
        return
    environment["OMP_WAIT_POLICY"] = "PASSIVE"
    if others_at_work(load) == 0:
        environment["GOMP_SPINCOUNT"] = str(SPINS)


def others_at_work(load: Path = LOAD) -> int | None:
    """How many other threads of this machine want to compute: the median of several looks; None
    where the system does not tell."""
    looks = []
    try:
        for _ in range(_LOOKS):
            time.sleep(_SECONDS / _LOOKS)
            running = load.read_text(encoding="ascii").split()[3].partition("/")[0]
            looks.append(int(running) - 1)  # without the one that looks
    except (OSError, ValueError, IndexError):
        return None
    return max(0, int(median(looks)))
