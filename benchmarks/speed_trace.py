"""What a trace of PyTorch's profiler says about waiting: of the host for the GPU, and of the GPU.

A step is a range named `STEP` on the host. Kernels belong to the step in which they were launched;
the trace ties each kernel to its launch by a number. Times are in microseconds.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STEP = "benchmark step"
# Calls in which the host waits until the GPU is done.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
# A number that is asked for (`.item()`, `float(tensor)`) is such a copy, and a wait for it.
TO_HOST = "Memcpy DtoH"
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def read_trace(path: Path) -> dict[str, float]:
    """See `summary`.

    Args:
        path: as `export_chrome_trace` wrote it.
    """
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return summary([event for event in events if event.get("ph") == "X"])


def summary(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the events of a trace say, per step.

    Returns:
        `copies`: from the GPU to the host in a step. `waits`: calls in a step in which the host
        waits for the GPU. `kernels`: things the GPU did in a step. `idle`: share of the time, from
        the first to the last, in which it did nothing. `idle_between`: the part of it between the
        last work of a step and the first of the next. All but `kernels` are nan where the trace
        has nothing of a GPU.
    """
    steps = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("name") == STEP and event.get("cat") == "user_annotation"
    )
    if not steps:
        raise ValueError("there is no step in the trace")
    inside = [event for event in events if steps[0][0] <= event["ts"] <= steps[-1][1]]
    work = _work(events, [start for start, _ in steps])
    if not work:
        unknown = float("nan")
        found = dict.fromkeys(("copies", "waits", "idle", "idle_between"), unknown)
        return {**found, "kernels": 0.0}
    waits = [event for event in inside if event.get("name") in WAITS]
    copies = [name for *_, name in work if name.startswith(TO_HOST)]
    idle, between = _idle(work)
    return {
        "copies": len(copies) / len(steps),
        "waits": len(waits) / len(steps),
        "kernels": len(work) / len(steps),
        "idle": idle,
        "idle_between": between,
    }


def _work(
    events: Sequence[Mapping[str, Any]], starts: Sequence[float]
) -> list[tuple[float, float, int, str]]:
    """Start, end, step and name of all that the GPU did for a step, in order of their starts."""
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver")
        and "correlation" in event.get("args", {})
    }
    found = []
    for event in events:
        if event.get("cat") not in ON_DEVICE:
            continue
        launched = launches.get(event.get("args", {}).get("correlation"))
        step = bisect_right(starts, launched) - 1 if launched is not None else -1
        if step >= 0:
            found.append((event["ts"], event["ts"] + event["dur"], step, event["name"]))
    return sorted(found)


def _idle(work: Sequence[tuple[float, float, int, str]]) -> tuple[float, float]:
    """Shares of the whole time: with nothing going on, and of that at the border of two steps."""
    idle = between = 0.0
    begin, busy_until, last_step, _ = work[0]
    for start, end, step, _ in work[1:]:
        gap = max(0.0, start - busy_until)
        idle += gap
        between += gap if step != last_step else 0.0
        busy_until = max(busy_until, end)
        last_step = step
    span = busy_until - begin
    return idle / span, between / span
