"""Draws one avatar, head and shoulders, as a pure function of its looks and the size."""

from dataclasses import replace

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from pretraining.backgrounds import draw_background
from pretraining.hair import HEADS, Head, draw_hair_behind, draw_hair_in_front
from pretraining.looks import Context, Identity
from pretraining.palette import BOLD, HAIR, INK, SKIN, WHITE, Rgb, darker, lighter, mix
from pretraining.pen import Pen, Pose, arc, new_canvas, star

_NECK = (50.0, 80.0)
_PASTEL_GROUND = (255, 250, 244)
_PIXELS = 32


def draw_avatar(
    identity: Identity, context: Context, size: int = 64, style: str = "flat", oversampling: int = 0
) -> Image.Image:
    """One RGB picture of `size` x `size` px.

    Shapes are drawn `oversampling` times larger and reduced (0: three times up to 128 px, twice
    above), which is what smooths the edges.
    """
    factor = oversampling or (3 if size <= 128 else 2)
    image = new_canvas(size, factor)
    pen = Pen(ImageDraw.Draw(image), unit_px=size * factor / 100, neon=style == "neon")
    shift = (context.shift_x, context.shift_y)
    body = pen.posed(Pose(_NECK, 0.0, context.scale, shift))
    head_pen = pen.posed(Pose(_NECK, context.tilt, context.scale, shift))
    head = HEADS[identity.face]
    skin, hair = SKIN[identity.skin], HAIR[identity.hair_colour]

    draw_background(pen, context)
    head_pen, body = (replace(p, inked=style == "comic") for p in (head_pen, body))
    draw_hair_behind(head_pen, head, identity.hair_style, hair)
    _draw_body(body, context, skin)
    _draw_head(head_pen, head, skin)
    _draw_face(head_pen, head, identity, context.mouth)
    hatted = context.hat != "none"
    draw_hair_in_front(head_pen, head, identity.hair_style, hair, hatted)
    if hatted:
        _HATS[context.hat](head_pen, head, BOLD[context.hat_colour])
    if style == "neon":
        image = _glow(image)
    if style == "pastel":
        image = Image.blend(image, Image.new("RGB", image.size, _PASTEL_GROUND), 0.5)
    if style == "pixel":
        # Squares of two pixels at 64 px, and as large in the picture at any other size.
        image = image.resize((_PIXELS, _PIXELS), Image.Resampling.BOX)
        return image.resize((size, size), Image.Resampling.NEAREST)
    return image.resize((size, size), Image.Resampling.BOX)


def _glow(image: Image.Image) -> Image.Image:
    blurred = image.filter(ImageFilter.GaussianBlur(image.width / 45))
    return ImageChops.add(image, blurred, scale=1.15)


def _draw_body(pen: Pen, context: Context, skin: Rgb) -> None:
    colour = BOLD[context.clothes_colour]
    shade = darker(colour, 0.28)
    if context.clothes == "hoodie":
        pen.blob([(24, 92), (28, 76), (50, 70), (72, 76), (76, 92), (50, 100)], shade)
    pen.polygon([(42, 68), (58, 68), (60, 90), (40, 90)], darker(skin, 0.2))
    shoulders = [(6, 130), (8, 100), (14, 91), (24, 86.5), (38, 83), (50, 91), (62, 83),
                 (76, 86.5), (86, 91), (92, 100), (94, 130)]  # fmt: skip
    pen.polygon(shoulders, colour)
    _CLOTHES[context.clothes](pen, colour, shade)


def _t_shirt(pen: Pen, colour: Rgb, shade: Rgb) -> None:
    pen.line([(38, 83.5), (43, 89), (50, 91.5), (57, 89), (62, 83.5)], 2.4, shade)


def _hoodie(pen: Pen, colour: Rgb, shade: Rgb) -> None:
    pen.line([(34, 84), (41, 91), (50, 95), (59, 91), (66, 84)], 4.5, shade)
    for x in (45, 55):
        pen.line([(x, 93), (x, 103)], 1.8, lighter(colour, 0.75))


def _suit(pen: Pen, colour: Rgb, shade: Rgb) -> None:
    pen.polygon([(38, 83), (50, 112), (62, 83), (50, 91)], WHITE)
    tie = (206, 40, 52) if colour != BOLD["red"] else (44, 60, 150)
    pen.polygon([(47.5, 90), (52.5, 90), (54.5, 106), (50, 112), (45.5, 106)], tie)
    pen.polygon([(38, 82), (33, 85), (36, 95), (50, 114)], shade)
    pen.polygon([(62, 82), (67, 85), (64, 95), (50, 114)], shade)


def _striped_shirt(pen: Pen, colour: Rgb, shade: Rgb) -> None:
    stripe = WHITE if colour != BOLD["white"] else (60, 90, 170)
    pen.polygon([(10, 95), (16, 91), (84, 91), (90, 95)], stripe)
    pen.polygon([(7, 103), (8, 99.5), (92, 99.5), (93, 103)], stripe)
    pen.polygon([(7, 111), (7, 107.5), (93, 107.5), (93, 111)], stripe)
    pen.polygon([(38, 83), (50, 91.5), (62, 83), (57, 94), (43, 94)], colour)


_CLOTHES = {
    "t-shirt": _t_shirt,
    "hoodie": _hoodie,
    "suit": _suit,
    "striped shirt": _striped_shirt,
}


def _draw_head(pen: Pen, head: Head, skin: Rgb) -> None:
    for side in (-1, 1):
        x = 50 + side * (head.half_width + 0.5)
        pen.ellipse((x, 56), 4.6, 6, skin)
        pen.ellipse((x, 56), 2.2, 3.4, darker(skin, 0.2))
    pen.polygon(head.outline()[:-1], skin)


def _draw_face(pen: Pen, head: Head, identity: Identity, mouth: str) -> None:
    skin = SKIN[identity.skin]
    _draw_mark(pen, head, identity.mark, skin)
    hair = HAIR[identity.hair_colour]
    if identity.beard == "beard":
        low = head.outline(1.02, 8, 172)
        pen.polygon([*low, (33, 62), (41, 65), (50, 63), (59, 65), (67, 62)], hair)
    _draw_mouth(pen, mouth)
    if identity.beard == "moustache":
        pen.blob([(50, 62.5), (57, 62), (63, 67.5), (56, 67), (50, 65.8), (44, 67), (37, 67.5),
                  (43, 62)], hair)  # fmt: skip
    pen.line([(50, 57), (51.5, 61), (48.8, 61.2)], 1.6, darker(skin, 0.34))
    brow = darker(hair, 0.3) if identity.hair_colour != "white" else (176, 176, 176)
    width = 3.2 if identity.brows == "thick" else 1.5
    lift = 2.5 if mouth == "surprised" else 0.0
    slope = {"sad": -1.6, "serious": 1.2}.get(mouth, 0.0)
    for side in (-1, 1):
        inner, outer = 50 + side * 6.0, 50 + side * 15.5
        pen.line(
            [(inner, 44.5 - lift + slope), (50 + side * 11, 42.6 - lift),
             (outer, 44.8 - lift - slope * 0.6)],
            width, brow,
        )  # fmt: skip
        _draw_eye(pen, 50 + side * 10.5, identity.eyes, skin)
    _draw_glasses(pen, head, identity.glasses)


def _draw_mark(pen: Pen, head: Head, mark: str, skin: Rgb) -> None:
    cheek = head.half_width * 0.62
    if mark == "freckles":
        for side in (-1, 1):
            for dx, dy in ((-3.2, 0), (0.6, 1.6), (3.6, -0.4)):
                pen.ellipse((50 + side * cheek + dx, 62 + dy), 1.3, 1.3, darker(skin, 0.4))
    elif mark == "rosy":
        for side in (-1, 1):
            pen.ellipse((50 + side * cheek, 63.5), 4.8, 3.6, mix(skin, (240, 70, 90), 0.45))
    elif mark == "star":
        pen.polygon(star((50 + cheek, 64), 6.2), (255, 226, 60))


def _draw_eye(pen: Pen, x: float, kind: str, skin: Rgb) -> None:
    if kind == "small":
        pen.ellipse((x, 53), 2.7, 3.2, INK)
        return
    pen.ellipse((x, 53), 5.4, 6.0, WHITE)
    pen.ellipse((x, 53.6), 3.3, 3.9, INK)
    pen.ellipse((x + 1.2, 52.0), 1.2, 1.2, WHITE)
    if kind == "sleepy":
        pen.polygon(arc((x, 53), 6.0, 6.6, 180, 360), darker(skin, 0.16))
        pen.line([(x - 5.6, 53), (x + 5.6, 53)], 1.4, INK)


def _draw_mouth(pen: Pen, mouth: str) -> None:
    if mouth == "smiling":
        pen.line(arc((50, 66.5), 8, 5.5, 15, 165), 2.2, (120, 34, 44))
    elif mouth == "laughing":
        pen.polygon(arc((50, 67), 9, 8.5, 0, 180), (130, 26, 40))
        pen.polygon([(41.5, 67), (58.5, 67), (57.6, 70), (42.4, 70)], WHITE)
    elif mouth == "serious":
        pen.line([(43.5, 70), (56.5, 70)], 2.2, (120, 34, 44))
    elif mouth == "sad":
        pen.line(arc((50, 74), 7.5, 5.5, 195, 345), 2.2, (120, 34, 44))
    else:
        pen.ellipse((50, 71), 4.4, 5.2, (120, 26, 40))


def _draw_glasses(pen: Pen, head: Head, kind: str) -> None:
    if kind == "none":
        return
    for side in (-1, 1):
        x = 50 + side * 10.5
        if kind == "sunglasses":
            pen.blob([(x - 8.5, 48), (x + 8.5, 48), (x + 7.5, 57), (x, 60), (x - 7.5, 57)], INK)
            pen.line([(x - 4, 51), (x - 1, 51)], 1.6, (150, 160, 180))
        elif kind == "round":
            pen.line(arc((x, 53), 8.2, 8.2, 0, 360), 1.9, INK)
        else:
            corners = [(x - 8, 46.5), (x + 8, 46.5), (x + 8, 60), (x - 8, 60), (x - 8, 46.5)]
            pen.line(corners, 1.9, INK)
        pen.line([(50 + side * 18.2, 51.5), (50 + side * head.half_width, 50)], 1.7, INK)
    pen.line([(47.6, 52), (52.4, 52)], 1.9, INK)


def _cap(pen: Pen, head: Head, colour: Rgb) -> None:
    low = 41.0
    w, h = head.half_width * 1.1, low - head.top + 5
    pen.polygon(arc((50, low), w, h, 180, 360), colour)
    pen.polygon(arc((50 + w * 0.42, low), w * 1.0, 5, 180, 360), darker(colour, 0.3))
    pen.ellipse((50, low - h), 2.4, 1.8, darker(colour, 0.3))


def _beanie(pen: Pen, head: Head, colour: Rgb) -> None:
    w, top = head.half_width * 1.1, head.top
    pen.ellipse((50, top - 9), 6, 6, lighter(colour, 0.5))
    pen.polygon(arc((50, 39), w, 39 - top + 6, 180, 360), colour)
    pen.polygon([(49 - w, 34), (51 + w, 34), (51 + w, 42.5), (49 - w, 42.5)], darker(colour, 0.25))


def _top_hat(pen: Pen, head: Head, colour: Rgb) -> None:
    w, low = head.half_width, head.top + 11
    pen.polygon([(50 - w * 0.8, low - 32), (50 + w * 0.8, low - 32), (50 + w * 0.72, low),
                 (50 - w * 0.72, low)], colour)  # fmt: skip
    pen.polygon([(50 - w * 0.75, low - 8), (50 + w * 0.75, low - 8), (50 + w * 0.72, low),
                 (50 - w * 0.72, low)], lighter(darker(colour, 0.5), 0.1))  # fmt: skip
    pen.ellipse((50, low), w * 1.35, 4, darker(colour, 0.15))


def _crown(pen: Pen, head: Head, colour: Rgb) -> None:
    w, low = head.half_width * 0.86, head.top + 10
    pen.polygon(
        [(50 - w, low), (50 - w * 1.12, low - 21), (50 - w * 0.5, low - 11), (50, low - 25),
         (50 + w * 0.5, low - 11), (50 + w * 1.12, low - 21), (50 + w, low)],
        colour,
    )  # fmt: skip
    pen.polygon([(50 - w, low - 4), (50 + w, low - 4), (50 + w, low), (50 - w, low)],
                darker(colour, 0.3))  # fmt: skip
    for x in (50 - w * 1.12, 50 + w * 1.12):
        pen.ellipse((x, low - 21), 2.3, 2.3, (255, 236, 150))
    pen.ellipse((50, low - 25), 2.3, 2.3, (255, 236, 150))


_HATS = {"cap": _cap, "beanie": _beanie, "top hat": _top_hat, "crown": _crown}
