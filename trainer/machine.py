"""What this machine is."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """As its maker calls it, where the system tells: which of two ways is the quicker one differs
    between makers."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    told = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, told), platform.processor() or platform.machine())
