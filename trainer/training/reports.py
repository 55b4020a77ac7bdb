"""Consumers of the training loop's reports: the terminal, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from trainer.errors import ConfigError, OutputError
from trainer.training.loop import StepDone


class Reporter(Protocol):
    """Takes each step's report."""

    def step(self, report: StepDone) -> None: ...

    def close(self) -> None: ...


class TerminalReporter:
    """A progress bar in a terminal; a plain line now and then where there is none."""

    LINES = 20  # plain lines over a whole run

    def __init__(self, console: Console, total_steps: int, start_step: int) -> None:
        self.console = console
        self.total = total_steps
        self.every = max(1, total_steps // self.LINES)
        self.smoothed: float | None = None
        self.progress: Progress | None = None
        self.task = TaskID(0)
        if console.is_terminal:
            self.progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}  rate {task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self.task = self.progress.add_task(
                "training", total=total_steps, completed=start_step, loss="-", rate="-"
            )
            self.progress.start()

    def step(self, report: StepDone) -> None:
        before = report.loss if self.smoothed is None else self.smoothed
        self.smoothed = 0.95 * before + 0.05 * report.loss
        loss, rate = f"{self.smoothed:.4f}", f"{report.rate:.2e}"
        if self.progress is not None:
            self.progress.update(self.task, completed=report.step, loss=loss, rate=rate)
        elif report.step % self.every == 0 or report.step == self.total:
            left = (self.total - report.step) * report.seconds
            self.console.print(
                f"step {report.step}/{self.total}  loss {loss}  rate {rate}  "
                f"{report.seconds:.2f} s/step  about {left:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


# A stage that takes longer says where it is this often.
PROGRESS_SECONDS = 5.0


def stage_progress(console: Console, words: str) -> Callable[[int, int], None]:
    """A progress callback for a stage before training: a line at its end, and in a long one every
    `PROGRESS_SECONDS` as well."""
    said_at = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said_at
        now = time.monotonic()
        if done == total:
            console.print(f"  {words}: {total}", highlight=False)
        elif now - said_at >= PROGRESS_SECONDS:
            said_at = now
            console.print(f"  {words}: {done} of {total}", highlight=False)

    return progress


class MetricsFile:
    """metrics.jsonl: one JSON object per step, flushed, the source of truth for every curve.

    When a run goes on from a checkpoint, lines of steps after it are dropped first.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        rows = [row for row in read_metrics(path) if row["step"] <= start_step]
        try:
            self.file = path.open("w", encoding="utf-8", newline="\n")
            for row in rows:
                self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            raise OutputError(
                f"The metrics cannot be written: {error.strerror}", where=str(path)
            ) from error

    def step(self, report: StepDone) -> None:
        self.file.write(json.dumps(asdict(report)) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps in a metrics file; a line that was cut off by a crash is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


class TensorBoardReporter:
    """TensorBoard events beside the other files of the run."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "TensorBoard is not installed.",
                where="run.tensorboard = true",
                fix='Install it with: pip install "likeness[tensorboard]"',
            ) from error
        self.writer = SummaryWriter(str(folder))

    def step(self, report: StepDone) -> None:
        for name in ("loss", "rate", "grad_norm"):
            self.writer.add_scalar(f"train/{name}", getattr(report, name), report.step)

    def close(self) -> None:
        self.writer.close()
