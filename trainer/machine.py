"""What this machine is."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

# Seconds that this thread, or this program, has worked, which others beside it change less than
# the time that passes. Windows counts them 64 times a second only, too seldom for short trials.
THREAD_CLOCK = time.perf_counter if os.name == "nt" else time.thread_time
PROCESS_CLOCK = time.perf_counter if os.name == "nt" else time.process_time


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """As its maker calls it, where the system tells: which of two ways is the quicker one differs
    between makers."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    told = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, told), platform.processor() or platform.machine())
