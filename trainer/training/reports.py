"""Consumers of the training loop's reports: the terminal, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
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

from trainer.errors import ConfigError
from trainer.training.numbers import StepNumbers, as_row
from trainer.training.run_folder import write_text
from trainer.untrusted import parse_json

# Of a line of the metrics, which has a few numbers.
_LINE_CHARACTERS = 10_000
# So many lines are kept where they cannot be written.
_KEPT_LINES = 100_000


class Reporter(Protocol):
    """Takes the numbers of each step; `what` says in words what it writes."""

    what: str

    def step(self, report: StepNumbers) -> None: ...

    def close(self) -> None: ...


class TerminalReporter:
    """A progress bar in a terminal; a plain line now and then where there is none."""

    what = "progress"
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

    def step(self, report: StepNumbers) -> None:
        if not report.skipped:
            before = report.loss if self.smoothed is None else self.smoothed
            self.smoothed = 0.95 * before + 0.05 * report.loss
        loss = "-" if self.smoothed is None else f"{self.smoothed:.4f}"
        rate = f"{report.rate:.2e}"
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

    When a run goes on from a checkpoint, lines of steps after it are dropped first. Lines that
    cannot be written are kept until they can be.

    Raises:
        OutputError: the file cannot be written.
    """

    what = "metrics"

    def __init__(self, path: Path, start_step: int) -> None:
        self.path = path
        rows = [row for row in read_metrics(path) if row["step"] <= start_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._size = path.stat().st_size
        self._pending: deque[str] = deque(maxlen=_KEPT_LINES)

    def step(self, report: StepNumbers) -> None:
        """Add a line.

        Raises:
            OSError: it cannot be written now; it comes with the next one.
        """
        self._pending.append(json.dumps(as_row(report)) + "\n")
        # Opened for every line: the file may be gone, and come back as another one.
        with self.path.open("ab") as file:
            file.truncate(min(self._size, file.tell()))  # what was cut off by a full disk goes
            file.write("".join(self._pending).encode())
            file.flush()
            self._size = file.tell()
        self._pending.clear()

    def close(self) -> None:
        """Nothing is open between two lines."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps in a metrics file; a line that was cut off by a crash is left out."""
    rows = []
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in iter(lambda: file.readline(_LINE_CHARACTERS), ""):
                try:
                    row = parse_json(line)
                except ValueError:
                    continue
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
    return rows


class TensorBoardReporter:
    """TensorBoard events beside the other files of the run."""

    what = "TensorBoard events"

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

    def step(self, report: StepNumbers) -> None:
        for name in ("rate",) if report.skipped else ("loss", "rate", "grad_norm"):
            self.writer.add_scalar(f"train/{name}", getattr(report, name), report.step)

    def close(self) -> None:
        self.writer.close()
