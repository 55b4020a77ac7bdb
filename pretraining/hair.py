"""Hair: the part behind the head and the part in front, by style."""

from dataclasses import dataclass

from pretraining.palette import Rgb, darker, lighter
from pretraining.pen import Pen, Point, arc

CENTRE: Point = (50.0, 53.0)


@dataclass(frozen=True, slots=True)
class Head:
    """The head's outline: half width and half height in units, and how square it is."""

    half_width: float
    half_height: float
    power: float

    @property
    def top(self) -> float:
        """Height of the crown of the head."""
        return CENTRE[1] - self.half_height

    def outline(self, grow: float = 1.0, start: float = 0, end: float = 360) -> list[Point]:
        """Points on the head's outline, grown by a factor."""
        return arc(CENTRE, self.half_width * grow, self.half_height * grow, start, end, self.power)


HEADS = {
    "round": Head(26.0, 25.5, 2.0),
    "long": Head(22.5, 28.5, 2.1),
    "square": Head(24.5, 26.5, 3.0),
}


def draw_hair_behind(pen: Pen, head: Head, style: str, colour: Rgb) -> None:
    """The part of the hair that the head and the shoulders cover."""
    shade = darker(colour, 0.22)
    w, top = head.half_width, head.top
    if style == "long":
        pen.blob(
            [(50, top - 4), (50 + w, top + 8), (54 + w, 56), (58 + w, 96), (50, 100),
             (42 - w, 96), (46 - w, 56), (50 - w, top + 8)],
            shade,
        )  # fmt: skip
    elif style == "bob":
        pen.blob(
            [(50, top - 4), (50 + w, top + 7), (56 + w, 52), (55 + w, 76), (50 + w * 0.6, 82),
             (50 - w * 0.6, 82), (45 - w, 76), (44 - w, 52), (50 - w, top + 7)],
            shade,
        )  # fmt: skip
    elif style == "pigtails":
        for side in (-1, 1):
            x = 50 + side * (w + 9)
            pen.ellipse((x, 56), 8.5, 13, colour)
            pen.ellipse((50 + side * (w + 2), 46), 3.2, 3.2, lighter(colour, 0.6))
    elif style == "curly":
        for x, y in _curls(head, (150, 165, 180, 195, 345, 0, 15, 30), 1.1):
            pen.ellipse((x, y), 8, 8, shade)


def draw_hair_in_front(pen: Pen, head: Head, style: str, colour: Rgb, hatted: bool) -> None:
    """The part of the hair over the forehead; under a hat the tall styles lie flat."""
    if style == "bald":
        return
    if hatted:
        if style != "mohawk":
            pen.polygon(_cap(head, 45, 0.0), colour)
        return
    _FRONTS[style](pen, head, colour)


def _cap(head: Head, low: float, part: float) -> list[Point]:
    """Hair from ear to ear; `low` is where it ends at the temples, `part` bends the hairline."""
    w = head.half_width
    return [
        (50 - w * 1.05, low + 6),
        *head.outline(1.07, 190, 350),
        (50 + w * 1.05, low + 6),
        (50 + w * 0.86, low - 2),
        (50 + w * 0.45, head.top + 13),
        (50 + w * part, head.top + 11 - abs(part) * 4),
        (50 - w * 0.45, head.top + 13),
        (50 - w * 0.86, low - 2),
    ]


def _curls(head: Head, angles: tuple[int, ...], grow: float) -> list[Point]:
    points = []
    for angle in angles:
        points.append(head.outline(grow, angle, angle + 1)[0])
    return points


def _short(pen: Pen, head: Head, colour: Rgb) -> None:
    w, top = head.half_width, head.top
    pen.polygon(
        [(50 - w * 1.05, 53), *head.outline(1.08, 190, 350), (50 + w * 1.05, 53),
         (50 + w * 0.9, 42), (50 + w * 0.6, top + 12), (50 + w * 0.1, top + 15),
         (50 - w * 0.5, top + 10), (50 - w * 0.85, 44)],
        colour,
    )  # fmt: skip
    pen.line([(50 - w * 0.5, top + 4), (50, top + 1.5), (50 + w * 0.3, top + 2)], 1.8,
             lighter(colour, 0.25))  # fmt: skip


def _long(pen: Pen, head: Head, colour: Rgb) -> None:
    w, top = head.half_width, head.top
    for side in (-1, 1):
        pen.blob(
            [(50, top - 4), (50 + side * w * 0.7, top - 1), (50 + side * w * 1.14, top + 16),
             (50 + side * w * 1.2, 66), (50 + side * w * 1.02, 78), (50 + side * w * 0.92, 58),
             (50 + side * w * 0.72, top + 20), (50 + side * w * 0.1, top + 7)],
            colour,
        )  # fmt: skip


def _bob(pen: Pen, head: Head, colour: Rgb) -> None:
    w, top = head.half_width, head.top
    pen.polygon(
        [(50 - w * 1.12, 72), (50 - w * 1.16, 54), *head.outline(1.1, 190, 350),
         (50 + w * 1.16, 54), (50 + w * 1.12, 72), (50 + w * 0.92, 70),
         (50 + w * 0.88, top + 17), (50 - w * 0.88, top + 17), (50 - w * 0.92, 70)],
        colour,
    )  # fmt: skip
    pen.line([(50 - w * 0.55, top + 5), (50, top + 3), (50 + w * 0.55, top + 5)], 1.8,
             lighter(colour, 0.25))  # fmt: skip


def _curly(pen: Pen, head: Head, colour: Rgb) -> None:
    for x, y in _curls(head, (195, 214, 233, 252, 270, 288, 307, 326, 345), 1.0):
        pen.ellipse((x, y), 8.2, 8.2, colour)
    for x, y in _curls(head, (225, 255, 285, 315), 0.72):
        pen.ellipse((x, y - 3), 6.5, 6.5, colour)


def _spiky(pen: Pen, head: Head, colour: Rgb) -> None:
    w, top = head.half_width, head.top
    pen.polygon(
        [(50 - w * 1.05, 50), (50 - w * 1.3, 34), (50 - w * 0.92, top + 8),
         (50 - w * 0.95, top - 9), (50 - w * 0.42, top - 1), (50 - w * 0.2, top - 15),
         (50 + w * 0.14, top - 2), (50 + w * 0.55, top - 14), (50 + w * 0.66, top + 2),
         (50 + w * 1.15, top - 5), (50 + w * 1.0, top + 12), (50 + w * 1.3, 36),
         (50 + w * 1.05, 50), (50 + w * 0.8, top + 14), (50 + w * 0.5, top + 19),
         (50 + w * 0.2, top + 12), (50 - w * 0.1, top + 19), (50 - w * 0.4, top + 12),
         (50 - w * 0.8, top + 16)],
        colour,
    )  # fmt: skip


def _bun(pen: Pen, head: Head, colour: Rgb) -> None:
    pen.ellipse((50, head.top - 7), 10.5, 9.5, darker(colour, 0.12))
    pen.polygon(_cap(head, 44, 0.0), colour)
    pen.line([(43, head.top), (57, head.top)], 2.2, lighter(colour, 0.55))


def _pigtails(pen: Pen, head: Head, colour: Rgb) -> None:
    pen.polygon(_cap(head, 44, 0.0), colour)
    pen.line([(50, head.top - 1), (50, head.top + 10)], 1.2, darker(colour, 0.3))


def _mohawk(pen: Pen, head: Head, colour: Rgb) -> None:
    top = head.top
    pen.polygon(
        [(39, top + 13), (36, top + 2), (31, top - 7), (38, top - 7), (38, top - 19),
         (45, top - 13), (50, top - 24), (55, top - 13), (62, top - 19), (62, top - 7),
         (69, top - 7), (64, top + 2), (61, top + 13), (50, top + 9)],
        colour,
    )  # fmt: skip
    pen.line([(50, top - 14), (50, top + 3)], 2.4, lighter(colour, 0.4))


_FRONTS = {
    "short": _short,
    "long": _long,
    "bob": _bob,
    "curly": _curly,
    "spiky": _spiky,
    "bun": _bun,
    "pigtails": _pigtails,
    "mohawk": _mohawk,
}
