"""Limits for one input: processor time, and memory of the whole process."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Of processor time, so that a busy machine changes nothing. The slowest input takes a tenth of it.
SECONDS = 5.0
# Beyond what the process has when the readers and their libraries are loaded.
MEMORY_BYTES = 1_000_000_000


class TookTooLong(BaseException):
    """An input took longer than `SECONDS`; no reader catches this."""


@contextmanager
def time_bound(seconds: float = SECONDS) -> Iterator[None]:
    """Interrupt what takes longer (where the system has such a timer), and fail it anyway."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise TookTooLong(f"more than {seconds:g} s")

    started = time.process_time()
    if sys.platform != "win32":
        before = signal.signal(signal.SIGVTALRM, interrupt)
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
    if time.process_time() - started > seconds:
        raise TookTooLong(f"more than {seconds:g} s")


def peak_bytes() -> int:
    """The most memory that this process has had; 0 where the system does not say."""
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def limit_memory(more_bytes: int = MEMORY_BYTES) -> None:
    """Let the system refuse this process any memory beyond so much more than it has (Linux)."""
    if sys.platform != "linux":
        return
    import resource
    from pathlib import Path

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
