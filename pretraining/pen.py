"""A small vector pen on top of Pillow: shapes in units of a hundredth of the picture's side."""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from pretraining.palette import INK, Rgb, mix

Point = tuple[float, float]

NEON_GROUND: Rgb = (14, 10, 34)
_OUTLINE = 2.4
_INK_OUTLINE = 1.8
# Shapes no larger than this would be all ink.
_INK_FROM = 9.0


@dataclass(frozen=True, slots=True)
class Pose:
    """Where local units land: rotate by `tilt` degrees about `pivot`, scale about it, shift."""

    pivot: Point = (50.0, 50.0)
    tilt: float = 0.0
    scale: float = 1.0
    shift: Point = (0.0, 0.0)

    def place(self, point: Point) -> Point:
        """Map one point from local units to units of the picture."""
        angle = math.radians(self.tilt)
        dx, dy = (point[0] - self.pivot[0]) * self.scale, (point[1] - self.pivot[1]) * self.scale
        return (
            self.pivot[0] + dx * math.cos(angle) - dy * math.sin(angle) + self.shift[0],
            self.pivot[1] + dx * math.sin(angle) + dy * math.cos(angle) + self.shift[1],
        )


def glow_colour(colour: Rgb) -> Rgb:
    """The bright tube colour that stands for a fill colour in the neon style."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))
    if saturation < 0.25:
        return (210, 240, 255) if value > 0.35 else (96, 120, 255)
    red, green, blue = colorsys.hsv_to_rgb(hue, max(saturation, 0.75), 1.0)
    return (round(red * 255), round(green * 255), round(blue * 255))


@dataclass(frozen=True, slots=True)
class Pen:
    """Draws filled shapes (flat), with ink around them (inked), or glowing outlines on dark fills
    (neon)."""

    canvas: ImageDraw.ImageDraw
    unit_px: float
    neon: bool = False
    inked: bool = False
    pose: Pose = Pose()

    def posed(self, pose: Pose) -> "Pen":
        """The same pen with shapes rotated, scaled and shifted."""
        return replace(self, pose=pose)

    def _pixels(self, points: Sequence[Point]) -> list[Point]:
        placed = (self.pose.place(point) for point in points)
        return [(x * self.unit_px, y * self.unit_px) for x, y in placed]

    def polygon(self, points: Sequence[Point], fill: Rgb) -> None:
        """Fill a closed shape."""
        pixels = self._pixels(points)
        self.canvas.polygon(pixels, fill=mix(NEON_GROUND, fill, 0.1) if self.neon else fill)
        if self.neon or (self.inked and _extent(points) > _INK_FROM):
            colour = glow_colour(fill) if self.neon else INK
            units = _OUTLINE if self.neon else _INK_OUTLINE
            width = max(1, round(units * self.unit_px * self.pose.scale))
            self.canvas.line([*pixels, pixels[0], pixels[1]], colour, width, joint="curve")

    def line(self, points: Sequence[Point], width: float, fill: Rgb) -> None:
        """Draw an open line with round ends, `width` units thick."""
        pixels = self._pixels(points)
        thick_px = max(1.0, width * self.unit_px * self.pose.scale)
        colour = glow_colour(fill) if self.neon else fill
        self.canvas.line(pixels, fill=colour, width=round(thick_px), joint="curve")
        for x, y in (pixels[0], pixels[-1]):
            r = thick_px / 2
            self.canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    def ellipse(self, centre: Point, rx: float, ry: float, fill: Rgb) -> None:
        """Fill an ellipse."""
        self.polygon(arc(centre, rx, ry, 0, 360)[:-1], fill)

    def blob(self, points: Sequence[Point], fill: Rgb) -> None:
        """Fill the smooth closed curve through the points."""
        self.polygon(smooth(points), fill)

    def box(self, left: float, top: float, right: float, bottom: float, fill: Rgb) -> None:
        """Fill an upright rectangle."""
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], fill)


def _extent(points: Sequence[Point]) -> float:
    """The longer side of the upright box around the points."""
    columns, rows = zip(*points, strict=True)
    return max(max(columns) - min(columns), max(rows) - min(rows))


def arc(
    centre: Point, rx: float, ry: float, start: float, end: float, power: float = 2.0
) -> list[Point]:
    """Points along an ellipse, degrees clockwise from the right; power > 2 squares it off."""
    count = max(8, round(abs(end - start) / 9))
    points = []
    for i in range(count + 1):
        angle = math.radians(start + (end - start) * i / count)
        c, s = math.cos(angle), math.sin(angle)
        points.append(
            (
                centre[0] + rx * math.copysign(abs(c) ** (2 / power), c),
                centre[1] + ry * math.copysign(abs(s) ** (2 / power), s),
            )
        )
    return points


def smooth(points: Sequence[Point], parts: int = 6) -> list[Point]:
    """The closed Catmull-Rom curve through the points."""
    curve = []
    n = len(points)
    for i in range(n):
        p0, p1, p2, p3 = (points[(i + k) % n] for k in (-1, 0, 1, 2))
        for j in range(parts):
            t = j / parts
            curve.append(
                (
                    _catmull_rom(p0[0], p1[0], p2[0], p3[0], t),
                    _catmull_rom(p0[1], p1[1], p2[1], p3[1], t),
                )
            )
    return curve


def _catmull_rom(a: float, b: float, c: float, d: float, t: float) -> float:
    return 0.5 * (
        2 * b
        + (c - a) * t
        + (2 * a - 5 * b + 4 * c - d) * t * t
        + (3 * b - a - 3 * c + d) * t * t * t
    )


def star(centre: Point, radius: float, points: int = 5) -> list[Point]:
    """The corners of an upright star."""
    corners = []
    for i in range(2 * points):
        angle = -math.pi / 2 + math.pi * i / points
        reach = radius if i % 2 == 0 else radius * 0.45
        corners.append((centre[0] + reach * math.cos(angle), centre[1] + reach * math.sin(angle)))
    return corners


def new_canvas(size: int, oversampling: int) -> Image.Image:
    """An empty picture at the drawing resolution."""
    return Image.new("RGB", (size * oversampling, size * oversampling))
