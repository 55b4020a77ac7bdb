"""One side of the speed benchmark: a training in a process of its own that steps when it is told.

The process trains its first step at once and says how long that took from the start. Then it waits
for orders ("a block of so many steps"), times each block and answers; when there are no more orders
it trains to its end and writes its file. The sides take turns in this way, so that whatever else
the machine does falls on each alike.

Our side is the real command, `likeness train ...`, from the parsing of its words to its LoRA file:
only its loop, `train` of `trainer.training.loop`, is wrapped, so that it waits between blocks. A
step's time therefore holds all that the command does at a step.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

from benchmarks.speed_task import Task

SIDES = ("ours", "plain", "plain-cached")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Order:
    """steps: how many to do now. profile: look at them with PyTorch's profiler, untimed."""

    steps: int
    profile: bool = False


@dataclass(frozen=True, slots=True)
class Opened:
    """A training after its first step.

    parameters: numbers that are trained. seconds, cpu_seconds: from the start of the process to
    the end of the first step. device_mb: the most memory of the device until then; nan on a CPU.
    """

    parameters: int
    loss: float
    seconds: float
    cpu_seconds: float
    device_mb: float


@dataclass(frozen=True, slots=True)
class Block:
    """Steps that were done in a row.

    seconds, cpu_seconds: of each step; on a GPU `seconds` are those between marks in its queue, so
    that nothing waits for the sake of being timed. device_mb, reserved_mb: the most memory of the
    device since the first step, as tensors took it and as PyTorch held it; nan on a CPU.
    process_mb: the most memory of the process so far; now_mb: what it holds at the end of the
    block; nan where the system does not say. trace: what the profiler found.
    """

    seconds: list[float]
    cpu_seconds: list[float]
    losses: list[float]
    device_mb: float
    reserved_mb: float
    process_mb: float
    now_mb: float
    trace: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Closed:
    """A training after its end. file_mb: of the LoRA file it wrote."""

    file_mb: float


class StepTimer:
    """Marks the ends of steps, without making a GPU wait."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.walls = [self._now()]
        self.cpus = [time.process_time()]

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        import torch

        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def step(self) -> None:
        self.walls.append(self._now())
        self.cpus.append(time.process_time())

    def seconds(self) -> tuple[list[float], list[float]]:
        """Seconds and CPU seconds of each step; call it when the device is done."""
        pairs = list(zip(self.walls, self.walls[1:], strict=False))
        if self.cuda:
            walls = [before.elapsed_time(after) / 1000 for before, after in pairs]
        else:
            walls = [after - before for before, after in pairs]
        cpus = [after - before for before, after in zip(self.cpus, self.cpus[1:], strict=False)]
        return walls, cpus


class Gate:
    """Lets a training step when it is told.

    Args:
        task: what is trained.
        orders: called for the next order; None ends the training.
        answer: called with what was found.
    """

    def __init__(
        self,
        task: Task,
        orders: Callable[[], Order | None],
        answer: Callable[[Opened | Block | Closed], None],
    ) -> None:
        self.task = task
        self.orders = orders
        self.answer = answer

    def over(self, steps: Iterator[T], loss: Callable[[T], float], parameters: int) -> Iterator[T]:
        """The same steps, each passed on; between blocks it waits for the next order."""
        first = next(steps)
        yield first
        self._wait()
        self.answer(
            Opened(
                parameters,
                float(loss(first)),
                time.time() - self.task.started,
                time.process_time(),
                self._device_mb("max_memory_allocated"),
            )
        )
        self._forget_peak()
        while order := self.orders():
            done: list[T] = []
            trace: dict[str, float] = {}
            timer = StepTimer(self.task.device)
            with _profiled(order, self.task.device, trace) as mark:
                for _ in range(order.steps):
                    with mark():
                        done.append(next(steps))
                        yield done[-1]
                    timer.step()
            self._wait()
            self.answer(self._block(timer, [float(loss(step)) for step in done], trace))
        yield from steps

    def _block(self, timer: StepTimer, losses: list[float], trace: dict[str, float]) -> Block:
        seconds, cpu_seconds = timer.seconds()
        return Block(
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            losses=losses,
            device_mb=self._device_mb("max_memory_allocated"),
            reserved_mb=self._device_mb("max_memory_reserved"),
            process_mb=process_mb(),
            now_mb=now_mb(),
            trace=trace,
        )

    def _wait(self) -> None:
        if self.task.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def _device_mb(self, name: str) -> float:
        if self.task.device != "cuda":
            return float("nan")
        import torch

        return float(getattr(torch.cuda, name)()) / 1e6

    def _forget_peak(self) -> None:
        if self.task.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()


class _profiled:
    """The profiler around a block, if it was ordered; gives what marks a step."""

    def __init__(self, order: Order, device: str, found: dict[str, float]) -> None:
        self.order, self.device, self.found = order, device, found
        self.profiler: Any = None

    def __enter__(self) -> Callable[[], Any]:
        if not self.order.profile:
            return nullcontext
        import torch

        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.device == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=kinds)
        self.profiler.__enter__()
        from benchmarks.speed_trace import STEP

        return lambda: torch.profiler.record_function(STEP)

    def __exit__(self, *reason: Any) -> None:
        if self.profiler is None:
            return
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        self.profiler.__exit__(*reason)
        from benchmarks.speed_trace import read_trace

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self.profiler.export_chrome_trace(str(path))
            self.found.update(read_trace(path))


def process_mb() -> float:
    """The most memory this process had so far; nan where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows has no such count
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def now_mb() -> float:
    """The memory this process holds now; nan where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return float("nan")
    held = next(line for line in lines if line.startswith("VmRSS"))
    return int(held.split()[1]) * 1024 / 1e6


def run_ours(task: Task, gate: Gate) -> Path:
    """`likeness train` with its loop behind the gate; returns its LoRA file."""
    from trainer import cli
    from trainer.commands import train as command
    from trainer.training.loop import train as original

    def train(learner: Any, *rest: Any, **named: Any) -> Iterator[Any]:
        parameters = sum(parameter.numel() for parameter in learner.parameters)
        steps = original(learner, *rest, **named)
        return gate.over(iter(steps), lambda report: report.loss, parameters)

    with patch.object(command, "train", train):
        code = cli.main(task.command)
    if code:
        raise SystemExit(f"likeness train ended with exit code {code}")
    return next(task.output_folder.glob("*.safetensors"))


def run_plain(task: Task, gate: Gate, *, cached: bool) -> Path:
    """The plain baseline behind the gate; returns its LoRA file."""
    from benchmarks.plain_baseline import open_training

    training = open_training(task, cached=cached)
    for _ in gate.over(training.steps(), float, training.parameters):
        pass
    return training.save()


def run_side(side: str, task: Task, gate: Gate) -> None:
    if side == "ours":
        file = run_ours(task, gate)
    else:
        file = run_plain(task, gate, cached=side == "plain-cached")
    gate.answer(Closed(file.stat().st_size / 1e6))


def main() -> None:
    """The process of one side: orders come as lines of JSON, answers go as such; all that is
    printed beside goes to the error stream."""
    side, task = sys.argv[1], Task.from_json(sys.argv[2])
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)

        def answer(found: Opened | Block | Closed) -> None:
            out.write(json.dumps({"kind": type(found).__name__} | asdict(found)) + "\n")
            out.flush()

        def order() -> Order | None:
            line = sys.stdin.readline()
            return Order(**json.loads(line)) if line.strip() else None

        run_side(side, task, Gate(task, order, answer))


if __name__ == "__main__":
    main()
