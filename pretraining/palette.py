"""Named colours of the drawings; every name is a word of the caption vocabulary."""

Rgb = tuple[int, int, int]

SKIN: dict[str, Rgb] = {
    "pale": (255, 222, 196),
    "tan": (232, 178, 132),
    "brown": (168, 112, 74),
    "dark": (104, 68, 48),
    "green": (134, 196, 92),
    "blue": (112, 160, 236),
    "purple": (182, 138, 222),
    "teal": (38, 186, 176),
}

HAIR: dict[str, Rgb] = {
    "black": (40, 36, 44),
    "brown": (112, 68, 40),
    "blond": (246, 208, 98),
    "orange": (240, 122, 34),
    "red": (190, 44, 40),
    "grey": (150, 152, 160),
    "white": (242, 242, 238),
    "pink": (246, 126, 178),
    "blue": (56, 102, 214),
}

# Clothes and hats are bold, backgrounds soft, so that a figure stands out from a
# background of the same name.
BOLD: dict[str, Rgb] = {
    "red": (216, 44, 48),
    "orange": (244, 130, 28),
    "yellow": (250, 206, 40),
    "green": (40, 152, 72),
    "blue": (40, 92, 206),
    "purple": (126, 58, 178),
    "pink": (244, 104, 166),
    "white": (246, 246, 246),
    "grey": (124, 128, 138),
    "black": (38, 38, 46),
}

SOFT: dict[str, Rgb] = {
    "red": (238, 108, 104),
    "orange": (252, 178, 98),
    "yellow": (254, 232, 134),
    "green": (142, 214, 146),
    "blue": (132, 188, 248),
    "purple": (186, 156, 236),
    "pink": (254, 184, 214),
    "white": (252, 252, 250),
    "grey": (184, 188, 196),
    "black": (66, 66, 78),
}

INK: Rgb = (38, 30, 40)
WHITE: Rgb = (255, 255, 255)


def mix(first: Rgb, second: Rgb, share: float) -> Rgb:
    """Blend two colours; `share` is the part of the second, 0 to 1."""
    return (
        round(first[0] + (second[0] - first[0]) * share),
        round(first[1] + (second[1] - first[1]) * share),
        round(first[2] + (second[2] - first[2]) * share),
    )


def darker(colour: Rgb, share: float = 0.18) -> Rgb:
    """The same colour in shade; `share` is how far towards a warm black, 0 to 1."""
    return mix(colour, (30, 16, 40), share)


def lighter(colour: Rgb, share: float = 0.3) -> Rgb:
    """The same colour in light; `share` is how far towards white, 0 to 1."""
    return mix(colour, WHITE, share)
