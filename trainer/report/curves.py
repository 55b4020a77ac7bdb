"""Line charts as SVG text, for a page that must work without any script or download."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 44
SMOOTHING = 0.9  # share of the running mean kept at each point, as TensorBoard's slider


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a chart: its range and the round values marked on it."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def place(self, value: float, start: float, end: float) -> float:
        """Where `value` lies between the pixels `start` and `end`."""
        return start + (value - self.low) / (self.high - self.low) * (end - start)


def smooth(values: Sequence[float], keep: float = SMOOTHING) -> list[float]:
    """Running mean without the pull towards zero at the start (Adam's bias correction)."""
    result = []
    mean = 0.0
    for count, value in enumerate(values, start=1):
        mean = keep * mean + (1 - keep) * value
        result.append(mean / (1 - keep**count))
    return result


def nice_axis(low: float, high: float, wanted: int = 5) -> Axis:
    """Round the range outwards to multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        spread = abs(low) * 0.5 or 1.0
        low, high = (0.0, low + spread) if low >= 0 else (low - spread, 0.0)
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(first * step, last * step, tuple(n * step for n in range(first, last + 1)))


@dataclass(frozen=True, slots=True)
class Series:
    """A named line: values over steps. The name stands in the legend."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]

    def points(self) -> list[tuple[int, float]]:
        """Steps and values, without what is no number."""
        pairs = zip(self.steps, self.values, strict=True)
        return [(step, value) for step, value in pairs if math.isfinite(value)]


def series_chart(series: Sequence[Series], *, label: str, best: int | None) -> Markup:
    """Few values of several lines over steps, with a legend; empty without two points in a line.

    Every value is a dot with its number as a tooltip. Lines differ in colour and in their dashes.

    Args:
        series: at most four lines, in the order of the legend.
        label: what the values are, written beside the axis and read out by screen readers.
        best: a step to be marked over the whole height.
    """
    lines = [(line, line.points()) for line in series]
    if max((len(points) for _, points in lines), default=0) < 2:
        return Markup("")
    xs = [step for _, points in lines for step, _ in points]
    ys = [value for _, points in lines for _, value in points]
    across = Axis(min(xs), max(xs), nice_axis(min(xs), max(xs), 6).ticks)
    upright = nice_axis(min(0.0, *ys), max(1.0, *ys), 6)
    parts = [_grid(across, upright, label)]
    if best is not None:
        parts.append(_best_mark(across, best))
    for number, (line, points) in enumerate(lines, start=1):
        line_xs, line_ys = [step for step, _ in points], [value for _, value in points]
        parts.append(_line(across, upright, line_xs, line_ys, f"line-{number}"))
        parts += [
            Markup(
                '<circle class="dot-{}{}" cx="{:.1f}" cy="{:.1f}" r="{}">'
                "<title>step {}: {} {:.2f}</title></circle>"
            ).format(
                number,
                " chosen" if step == best else "",
                across.place(step, LEFT, WIDTH - RIGHT),
                upright.place(value, HEIGHT - BOTTOM, TOP),
                5.5 if step == best else 3.5,
                *(step, line.name, value),
            )
            for step, value in points
        ]
    legend = Markup("").join(
        Markup(
            '<span><svg class="key" viewBox="0 0 26 10" aria-hidden="true"><polyline '
            'class="line-{0}" points="0,5 26,5"/><circle class="dot-{0}" cx="13" cy="5" r="3.5"/>'
            "</svg>{1}</span>"
        ).format(number, line.name)
        for number, line in enumerate(series, start=1)
    )
    return Markup('{}\n<div class="keys">{}</div>').format(
        _svg(label, Markup("\n").join(parts)), legend
    )


def line_chart(
    steps: Sequence[int],
    values: Sequence[float],
    *,
    label: str,
    smoothed: bool,
    marks: Sequence[int] = (),
) -> Markup:
    """A chart of `values` over `steps`; empty when fewer than two values are finite.

    Args:
        label: what the values are, written beside the axis and read out by screen readers.
        smoothed: draw the values thin and their running mean thick.
        marks: steps at which a file was saved, drawn as upright dashed lines.
    """
    points = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
    if len(points) < 2:
        return Markup("")
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    across = Axis(xs[0], max(xs[-1], xs[0] + 1), nice_axis(xs[0], xs[-1], 6).ticks)
    upright = nice_axis(min(0.0, *ys), max(ys))
    parts = [_grid(across, upright, label), *(_mark(across, step) for step in marks)]
    if smoothed:
        parts += [_line(across, upright, xs, ys, "raw")]
        parts += [_line(across, upright, xs, smooth(ys), "main")]
    else:
        parts += [_line(across, upright, xs, ys, "main")]
    return _svg(label, Markup("\n").join(parts))


def _svg(label: str, body: Markup) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">\n{}\n</svg>'
    ).format(WIDTH, HEIGHT, label, body)


def _grid(across: Axis, upright: Axis, label: str) -> Markup:
    parts = []
    for tick in upright.ticks:
        y = upright.place(tick, HEIGHT - BOTTOM, TOP)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in across.ticks:
        if not across.low <= tick <= across.high or abs(tick - round(tick)) > 1e-6:
            continue  # a short run has round values between its whole steps
        x = across.place(tick, LEFT, WIDTH - RIGHT)
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:.0f}</text>'
        )
    below = f'x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle"'
    parts.append(f"<text {below}>step</text>")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    beside = f'transform="translate(13 {middle}) rotate(-90)" text-anchor="middle"'
    parts.append(f"<text {beside}>{escape(label)}</text>")
    return Markup("\n".join(parts))


def _mark(across: Axis, step: int) -> Markup:
    if not across.low <= step <= across.high:
        return Markup("")
    x = across.place(step, LEFT, WIDTH - RIGHT)
    return Markup(
        '<line class="mark" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}">'
        "<title>saved at step {3}</title></line>"
    ).format(x, TOP, HEIGHT - BOTTOM, step)


def _best_mark(across: Axis, step: int) -> Markup:
    x = across.place(step, LEFT, WIDTH - RIGHT)
    # Near the right edge the word stands before the line.
    left, anchor = (x - 6, "end") if x > WIDTH - RIGHT - 40 else (x + 6, "start")
    return Markup(
        '<line class="best" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>'
        '<text class="best-word" x="{3:.1f}" y="{4}" text-anchor="{5}">best</text>'
    ).format(x, TOP - 6, HEIGHT - BOTTOM, left, TOP + 3, anchor)


def _line(across: Axis, upright: Axis, xs: Sequence[int], ys: Sequence[float], name: str) -> Markup:
    path = " ".join(
        f"{across.place(x, LEFT, WIDTH - RIGHT):.1f},{upright.place(y, HEIGHT - BOTTOM, TOP):.1f}"
        for x, y in zip(xs, ys, strict=True)
    )
    return Markup('<polyline class="{}" points="{}"/>').format(name, path)
