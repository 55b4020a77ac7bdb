"""How the cost of a training grows with the work: one table for each direction, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from rich.console import Console
from rich.table import Table

from benchmarks.speed_rows import Row, append_rows, cell, named
from benchmarks.speed_run import Plan, run_plan

AXES = ("batch", "resolution", "rank", "photos", "targets")
# Sides of square pictures, small enough for a processor; a GPU goes to the base's own and beyond.
RESOLUTIONS: Mapping[str, tuple[int, ...]] = {
    "tiny": (32, 48, 64),
    "embedded": (32, 64, 96),
    "sd15": (128, 256, 384),
    "sd21": (128, 256, 384),
    "sdxl": (128, 256, 384),
}
GPU_RESOLUTIONS = (256, 512, 768, 1024)
COLOURS = ("#0b6e99", "#c2571a", "#6b6b6b", "#5a8f29", "#8b4a9c", "#b0a000")
WIDTH, HEIGHT, MARGIN = 250, 170, 46


def values_of(plan: Plan, axis: str) -> tuple[int | str, ...]:
    """The places along an axis that are measured."""
    large = plan.task.device == "cuda" and plan.base not in ("tiny", "embedded")
    resolutions = GPU_RESOLUTIONS if large else RESOLUTIONS[plan.base]
    values: dict[str, tuple[int | str, ...]] = {
        "batch": (1, 2, 4, 8) if large else (1, 2, 4),
        "resolution": resolutions,
        "rank": (4, 16, 64),
        "photos": (8, 32, 128),
        "targets": ("cross-kv", "attention", "attention+ff", "all"),
    }
    return values[axis]


def at(plan: Plan, axis: str, value: int | str) -> Plan:
    """The plan at one place of an axis. More photos cost time before the first step only, so for
    them the cache is empty."""
    if axis == "photos":
        return replace(plan, photos=int(value), cold=True, fresh=False, rounds=1)
    changed: dict[str, Any] = {axis: value}
    plan = replace(plan, task=replace(plan.task, **changed))
    return replace(plan, photos=max(plan.photos, plan.task.batch))


def grow(plan: Plan, axes: Sequence[str], output: Path) -> None:
    """Measure along axes, add the rows to a CSV file, print the tables, and draw the plot beside
    the file."""
    measured: dict[str, list[Row]] = {}
    for axis in axes:
        measured[axis] = []
        for value in values_of(plan, axis):
            rows = run_plan(at(plan, axis, value))
            append_rows(rows, output)
            measured[axis] += rows
        show_axis(axis, measured[axis])
    picture = output.with_name(f"{output.stem}_{plan.base}-growth.svg")
    picture.write_text(plot(plan.base, measured), encoding="utf-8")
    print(f"Rows added to {output}; plot: {picture}")


def cost(axis: str, row: Row) -> tuple[str, float]:
    """What is looked at along an axis, and its figure."""
    if axis == "photos":
        return "CPU seconds to the first step, nothing cached", row.start_cpu_seconds
    if row.clock == "wall":
        return "seconds per step", row.step_seconds
    return "CPU seconds per step", row.step_cpu_seconds


def memory(row: Row) -> tuple[str, float]:
    """The memory that counts on a device, in MB."""
    if row.device == "cuda":
        return "GPU memory, MB", row.device_mb
    return "memory of the process, MB", row.process_mb


def show_axis(axis: str, rows: Sequence[Row]) -> None:
    words, _ = cost(axis, rows[0])
    table = Table(title=f"{rows[0].base}, by {axis}: {words} (memory in MB)", title_justify="left")
    sides = list(dict.fromkeys(named(row) for row in rows))
    table.add_column(axis)
    for side in sides:
        table.add_column(side, justify="right")
    for value in dict.fromkeys(getattr(row, axis) for row in rows):
        here = {named(row): row for row in rows if getattr(row, axis) == value}
        figures = [
            f"{cell(cost(axis, here[side])[1], '.3f')} ({cell(memory(here[side])[1], '.0f')})"
            for side in sides
        ]
        table.add_row(str(value), *figures)
    Console(markup=False).print(table)


def plot(base: str, measured: Mapping[str, Sequence[Row]]) -> str:
    """An SVG picture: for each axis the cost above and the memory below, a line for each side."""
    sides = list(dict.fromkeys(named(row) for rows in measured.values() for row in rows))
    colours = {side: COLOURS[number % len(COLOURS)] for number, side in enumerate(sides)}
    width = MARGIN + len(measured) * (WIDTH + MARGIN)
    height = 2 * (HEIGHT + 2 * MARGIN) + 20
    parts = [f'<text x="{MARGIN}" y="18" font-size="14">Cost as work grows: {escape(base)}</text>']
    for number, side in enumerate(sides):
        x = MARGIN + 230 + 190 * number
        parts.append(f'<text x="{x}" y="18" fill="{colours[side]}">{escape(side)}</text>')
    for column, (axis, rows) in enumerate(measured.items()):
        x = MARGIN + column * (WIDTH + MARGIN)
        for line, figure in enumerate(("cost", "memory")):
            y = 20 + MARGIN + line * (HEIGHT + 2 * MARGIN)
            points: dict[str, list[tuple[str, float]]] = {side: [] for side in sides}
            for row in rows:
                words, value = cost(axis, row) if figure == "cost" else memory(row)
                points[named(row)].append((str(getattr(row, axis)), value))
            parts.append(_panel((x, y), f"{axis}: {words}", points, colours))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">'
        f'<rect width="{width}" height="{height}" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _panel(
    corner: tuple[int, int],
    title: str,
    points: Mapping[str, Sequence[tuple[str, float]]],
    colours: Mapping[str, str],
) -> str:
    """One small picture; places of the axis stand at equal distances, figures start at zero."""
    left, top = corner
    places = list(dict.fromkeys(place for line in points.values() for place, _ in line))
    highest = max(value for line in points.values() for _, value in line) or 1.0
    step = WIDTH / max(1, len(places) - 1)

    def x(place: str) -> float:
        return left + places.index(place) * step

    def y(value: float) -> float:
        return top + HEIGHT * (1 - value / highest)

    bottom = top + HEIGHT
    found = [
        f'<text x="{left}" y="{top - 8}">{escape(title)}</text>',
        f'<path d="M{left} {top}V{bottom}H{left + WIDTH}" fill="none" stroke="#999"/>',
        f'<text x="{left - 4}" y="{top + 4}" text-anchor="end">{highest:.3g}</text>',
        f'<text x="{left - 4}" y="{bottom}" text-anchor="end">0</text>',
    ]
    for place in places:
        label = escape(place)
        found.append(
            f'<text x="{x(place):.0f}" y="{bottom + 15}" text-anchor="middle">{label}</text>'
        )
    for side, line in points.items():
        drawn = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in line)
        colour = colours[side]
        found.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>')
        found += [
            f'<circle cx="{x(place):.1f}" cy="{y(value):.1f}" r="3" fill="{colour}"/>'
            for place, value in line
        ]
    return "".join(found)
