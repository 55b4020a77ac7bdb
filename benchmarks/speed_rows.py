"""Rows of the speed benchmark: the CSV file and the table."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One side of one configuration.

    side: ours, plain or plain-cached; settings: of ours, further ones. process: "kept" through the
    run, or "fresh" for each block. losses_alike: whether the mean loss is within a factor of 2 of
    the first side's.
    step_seconds: median over all timed steps, wall time; low and high: of the blocks' medians.
    step_cpu_seconds: the same in the process's CPU seconds. images_per_second: by wall time.
    clock: what the ratios and the utilisation are taken from: "cpu" seconds or the "wall".
    vs_plain, vs_cached, vs_ours: how many times faster than that side: the median over rounds of
    the ratio of the two blocks that stood beside each other. tflop_per_image: operations of a step,
    counted. matrix_tflops: measured rate of a matrix product in this precision. mfu: share of it.
    device_mb, reserved_mb: most memory of the device while training; device_start_mb: before.
    process_mb: most memory of the process; training_mb: what it held while training.
    start_seconds, start_cpu_seconds: from the start of the process to the end of the first step,
    our latents `cached` on disk or not.
    copies, waits, kernels, idle, idle_between: see `speed_trace.summary`; nan without a trace.
    """

    base: str
    side: str
    settings: str
    resolution: int
    batch: int
    rank: int
    targets: str
    text_encoder: bool
    precision: str
    attention: str
    checkpointing: bool
    min_snr_gamma: float
    device: str
    threads: int
    photos: int
    rounds: int
    steps: int
    process: str
    cached: bool
    parameters: int
    loss: float
    losses_alike: bool
    step_seconds: float
    step_seconds_low: float
    step_seconds_high: float
    step_cpu_seconds: float
    step_cpu_seconds_low: float
    step_cpu_seconds_high: float
    images_per_second: float
    clock: str
    vs_plain: float
    vs_cached: float
    vs_ours: float
    tflop_per_image: float
    matrix_tflops: float
    mfu: float
    device_mb: float
    reserved_mb: float
    device_start_mb: float
    process_mb: float
    training_mb: float
    start_seconds: float
    start_cpu_seconds: float
    file_mb: float
    copies: float
    waits: float
    kernels: float
    idle: float
    idle_between: float
    date: str
    machine: str
    versions: str


def rounded(value: float, digits: int = 4) -> float:
    """To so many digits that count."""
    if not math.isfinite(value) or value == 0:
        return value
    return round(value, digits - 1 - math.floor(math.log10(abs(value))))


def append_rows(rows: Sequence[Row], path: Path) -> None:
    """Add rows to the file, which is made if it is missing.

    Raises:
        SystemExit: the file has other columns.
    """
    names = [field.name for field in fields(Row)]
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    if not new:
        with path.open(encoding="utf-8", newline="") as stream:
            if next(csv.reader(stream), []) != names:
                raise SystemExit(f"{path} has other columns; name another file with --output")
    with path.open("a", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, names, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            values = asdict(row)
            for name, value in values.items():
                if isinstance(value, float):
                    values[name] = "" if math.isnan(value) else rounded(value)
            writer.writerow(values)


def cell(value: float, form: str = ".2f") -> str:
    return "-" if math.isnan(value) else format(value, form)


def titled(row: Row) -> str:
    """The configuration in words."""
    words = [row.base, f"{row.resolution} px", f"batch {row.batch}", f"rank {row.rank}"]
    words += [row.targets, row.precision, row.attention]
    words += ["text encoder"] * row.text_encoder + ["checkpointing"] * row.checkpointing
    return ", ".join(words)


def named(row: Row) -> str:
    """A side by its name and what was set beside."""
    return f"{row.side} {row.settings}".strip()


def show(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the tables of one configuration."""
    first = rows[0]
    console = console or Console(markup=False, highlight=False)
    console.width = max(console.width, 120)
    speed = _table(
        f"{titled(first)}\n{first.machine}, {first.threads} threads; ratios by {first.clock} "
        f"seconds, {first.rounds} rounds of {first.steps} steps",
        ("s/step", "CPU s/step", "[of rounds]", "images/s"),
        ("x plain", "x cached", "x ours", "MFU %", "loss"),
    )
    memory = _table(
        "", ("GPU MB", "process MB", "while training"), ("start s", "start CPU s", "file MB")
    )
    for row in rows:
        low, high = cell(row.step_cpu_seconds_low, ".3f"), cell(row.step_cpu_seconds_high, ".3f")
        speed.add_row(
            named(row),
            cell(row.step_seconds, ".3f"),
            cell(row.step_cpu_seconds, ".3f"),
            f"[{low}-{high}]",
            cell(row.images_per_second),
            *(cell(value) for value in (row.vs_plain, row.vs_cached, row.vs_ours)),
            cell(100 * row.mfu, ".1f"),
            cell(row.loss, ".3f"),
        )
        megabytes = (row.device_mb, row.process_mb, row.training_mb)
        memory.add_row(
            named(row),
            *(cell(value, ".0f") for value in megabytes),
            cell(row.start_seconds, ".1f"),
            cell(row.start_cpu_seconds, ".1f"),
            cell(row.file_mb),
        )
    console.print(speed)
    console.print(memory)
    for row in rows:
        for line in remarks(row):
            console.print(line)


def _table(title: str, *names: Sequence[str]) -> Table:
    table = Table(title=title or None, title_justify="left")
    table.add_column("side")
    for name in (name for part in names for name in part):
        table.add_column(name, justify="right")
    return table


def remarks(row: Row) -> list[str]:
    """What the profiler found, and what is wrong."""
    said = []
    if not math.isnan(row.copies):
        idle, between = cell(100 * row.idle, ".1f"), cell(100 * row.idle_between, ".1f")
        said.append(
            f"{named(row)}: in a step {row.copies:.1f} copies to the host, {row.waits:.1f} waits "
            f"for the GPU, {row.kernels:.0f} kernels; idle {idle} %, between steps {between} %"
        )
    if not row.losses_alike:
        said.append(f"{named(row)}: its loss is not that of the others; is it the same work?")
    return said
