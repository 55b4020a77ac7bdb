"""What lies behind the avatar: coloured patterns and five places."""

import random

from pretraining.looks import Context
from pretraining.palette import SOFT, Rgb, darker, lighter
from pretraining.pen import Pen, star


def draw_background(pen: Pen, context: Context) -> None:
    """Fill the whole picture with the context's pattern or scene."""
    rng = random.Random(context.scatter)
    if context.is_scene:
        _SCENES[context.background](pen, rng)
        return
    colour = SOFT[context.background_colour]
    _backdrop(pen, colour)
    second = darker(colour, 0.3) if sum(colour) > 600 else lighter(colour, 0.55)
    if context.background == "stripes":
        for i in range(-4, 11):
            x = i * 16 + rng.random()
            pen.polygon([(x, 105), (x + 8, 105), (x + 48, -5), (x + 40, -5)], second)
    elif context.background == "dots":
        for row in range(7):
            for column in range(7):
                x = column * 17 + (8.5 if row % 2 else 0)
                pen.ellipse((x, row * 17), 4.2, 4.2, second)


def _backdrop(pen: Pen, colour: Rgb) -> None:
    pen.box(-5, -5, 105, 105, colour)


def _beach(pen: Pen, rng: random.Random) -> None:
    _backdrop(pen, (136, 212, 250))
    pen.ellipse((84 + rng.uniform(-4, 4), 16), 9, 9, (255, 226, 88))
    pen.box(-5, 50, 105, 105, (32, 136, 200))
    pen.polygon([(-5, 60), (105, 56), (105, 62), (-5, 66)], (124, 208, 232))
    pen.polygon([(-5, 70), (105, 64), (105, 105), (-5, 105)], (248, 220, 150))


def _forest(pen: Pen, rng: random.Random) -> None:
    _backdrop(pen, (190, 226, 180))
    pen.box(-5, 76, 105, 105, (92, 150, 70))
    for i, x in enumerate((2.0, 22.0, 78.0, 98.0, 50.0)):
        top = rng.uniform(0, 10)
        x += rng.uniform(-3, 3)
        green = ((34, 108, 62), (52, 134, 70))[i % 2]
        pen.box(x - 2.5, 66, x + 2.5, 84, (104, 70, 44))
        pen.polygon([(x, top), (x + 15, 44), (x - 15, 44)], green)
        pen.polygon([(x, top + 20), (x + 18, 72), (x - 18, 72)], green)


def _night_sky(pen: Pen, rng: random.Random) -> None:
    _backdrop(pen, (24, 26, 78))
    pen.ellipse((18, 18), 10, 10, (252, 244, 198))
    pen.ellipse((23, 15), 8.5, 8.5, (24, 26, 78))
    for x in (40, 62, 78, 92, 6, 88, 10, 96):
        y = rng.uniform(6, 70)
        pen.polygon(star((x + rng.uniform(-4, 4), y), rng.uniform(2.2, 4)), (255, 246, 180))


def _city(pen: Pen, rng: random.Random) -> None:
    _backdrop(pen, (250, 196, 150))
    tones: tuple[Rgb, ...] = ((92, 92, 132), (120, 112, 150), (74, 78, 116))
    for i, x in enumerate((-4, 14, 34, 52, 70, 88)):
        top = rng.uniform(8, 38)
        pen.box(x, top, x + 17, 105, tones[i % 3])
        for row in range(5):
            for column in range(2):
                left, upper = x + 3.5 + column * 6.5, top + 5 + row * 11
                pen.box(left, upper, left + 3.5, upper + 5, (255, 230, 130))


def _snow(pen: Pen, rng: random.Random) -> None:
    _backdrop(pen, (176, 208, 232))
    pen.polygon([(-5, 72), (24, 28), (52, 72)], (140, 164, 196))
    pen.polygon([(14, 43), (24, 28), (34, 43), (24, 48)], (252, 254, 255))
    pen.polygon([(46, 72), (80, 20), (112, 72)], (124, 150, 186))
    pen.polygon([(69, 37), (80, 20), (91, 37), (80, 43)], (252, 254, 255))
    pen.box(-5, 70, 105, 105, (246, 250, 255))
    for x in (4, 16, 30, 44, 58, 70, 84, 95):
        pen.ellipse((x + rng.uniform(-3, 3), rng.uniform(4, 66)), 2.2, 2.2, (255, 255, 255))


_SCENES = {
    "beach": _beach,
    "forest": _forest,
    "night sky": _night_sky,
    "city": _city,
    "snow": _snow,
}
