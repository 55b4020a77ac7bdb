"""Draws the bundled sample sets: `python -m pretraining.sample_sets` writes `datasets/`."""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pretraining.avatars import draw_avatar
from pretraining.captions import describe_context, describe_identity
from pretraining.looks import HELD_OUT_STYLE, Context, Identity, sample_context, sample_identity

ZIA = Identity(
    skin="teal",
    face="round",
    hair_style="mohawk",
    hair_colour="orange",
    eyes="big",
    brows="thick",
    beard="none",
    glasses="none",
    mark="star",
)
_ORIENTATION_TAG = 0x0112
_ROTATE_90_CLOCKWISE_TO_VIEW = 6
_JPEG_QUALITY = 95


@dataclass(frozen=True, slots=True)
class Sample:
    """One file of a set: what it shows, how large it is drawn and how it is stored.

    `crop` is (left, top, right, bottom) in hundredths of the drawn square.
    """

    name: str
    identity: Identity
    context: Context
    size_px: int
    caption: str
    style: str = "flat"
    crop: tuple[int, int, int, int] = (0, 0, 100, 100)
    stored_rotated: bool = False


def _zia(
    name: str,
    context: Context,
    size_px: int = 256,
    crop: tuple[int, int, int, int] = (0, 0, 100, 100),
    stored_rotated: bool = False,
) -> Sample:
    return Sample(
        name, ZIA, context, size_px, describe_context(context), "flat", crop, stored_rotated
    )


def face_set() -> list[Sample]:
    """Fourteen pictures of one avatar whose looks pretraining never shows."""
    return [
        _zia("01.png", Context("none", "red", "t-shirt", "red", "smiling", "plain", "blue",
                               0, 0, 1.08, -3)),
        _zia("02.jpg", Context("none", "red", "hoodie", "grey", "laughing", "beach", "red",
                               -3, 1, 1.0, 6, 5), 512),
        _zia("03.png", Context("cap", "blue", "striped shirt", "green", "smiling", "plain",
                               "yellow", 2, 0, 1.05, 4)),
        _zia("04.jpg", Context("none", "red", "suit", "black", "serious", "city", "red",
                               1, 0, 1.02, 0, 21), 256, (10, 0, 90, 100)),
        _zia("05.png", Context("beanie", "red", "hoodie", "blue", "surprised", "snow", "red",
                               -2, 1, 1.0, -6, 8)),
        _zia("06.png", Context("none", "red", "striped shirt", "purple", "sad", "dots", "pink",
                               3, 0, 1.1, 7)),
        _zia("07.jpg", Context("none", "red", "t-shirt", "white", "surprised", "forest", "red",
                               2, -1, 0.99, -5, 3), 256, stored_rotated=True),
        _zia("08.png", Context("crown", "yellow", "suit", "purple", "laughing", "stripes",
                               "orange", 0, 1, 1.0, 3)),
        _zia("09.png", Context("none", "red", "hoodie", "yellow", "smiling", "night sky", "red",
                               -4, 0, 1.04, 8, 12)),
        _zia("10.jpg", Context("top hat", "black", "t-shirt", "orange", "serious", "plain",
                               "green", 0, 2, 0.97, -2)),
        _zia("11.png", Context("none", "red", "striped shirt", "blue", "laughing", "plain",
                               "white", -1, 0, 1.13, -8), 128),
        _zia("12.png", Context("cap", "pink", "hoodie", "green", "sad", "beach", "red",
                               4, 1, 1.0, 2, 30), 128),
        _zia("13.png", Context("none", "red", "suit", "grey", "smiling", "plain", "purple",
                               1, 0, 1.06, 5), 128),
        _zia("14.jpg", Context("beanie", "green", "t-shirt", "pink", "laughing", "plain", "grey",
                               -2, 0, 1.03, -7), 128),
    ]  # fmt: skip


def style_set() -> list[Sample]:
    """Fourteen pictures of different avatars in the neon style."""
    samples: list[Sample] = []
    seed = 70_000
    while len(samples) < 14:
        seed += 1
        identity, context = sample_identity(seed), sample_context(seed)
        # Outlines of patterns would be finer than the embedded base can draw.
        if context.background in ("stripes", "dots"):
            continue
        caption = f"{describe_identity(identity)}, {describe_context(context)}"
        name = f"{len(samples) + 1:02d}.png"
        samples.append(Sample(name, identity, context, 144, caption, HELD_OUT_STYLE))
    return samples


def render(sample: Sample) -> Image.Image:
    """The picture as a viewer shows it, upright."""
    image = draw_avatar(sample.identity, sample.context, sample.size_px, sample.style)
    left, top, right, bottom = (round(edge * sample.size_px / 100) for edge in sample.crop)
    return image.crop((left, top, right, bottom))


def write_set(samples: Sequence[Sample], folder: Path) -> None:
    """Write the pictures and their sidecar captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        image, path = render(sample), folder / sample.name
        exif = Image.Exif()
        if sample.stored_rotated:
            image = image.transpose(Image.Transpose.ROTATE_90)
            exif[_ORIENTATION_TAG] = _ROTATE_90_CLOCKWISE_TO_VIEW
        if path.suffix == ".jpg":
            image.save(path, quality=_JPEG_QUALITY, subsampling=0, exif=exif)
        else:
            image.save(path, optimize=True)
        path.with_suffix(".txt").write_text(sample.caption + "\n", encoding="utf-8")


def true_pictures(count: int, seed: int, size: int = 64) -> list[Image.Image]:
    """Pictures of the face set's avatar in contexts that the set does not hold."""
    taken = {_dress_and_place(sample.context) for sample in face_set()}
    pictures: list[Image.Image] = []
    rng = random.Random(f"true pictures {seed}")
    while len(pictures) < count:
        context = sample_context(rng.randrange(10**9))
        if _dress_and_place(context) not in taken:
            pictures.append(draw_avatar(ZIA, context, size))
    return pictures


def other_avatars(count: int, seed: int, size: int = 64) -> list[Image.Image]:
    """Pictures of that many other avatars, each in a context of its own."""
    rng = random.Random(f"other avatars {seed}")
    return [
        draw_avatar(
            sample_identity(rng.randrange(10**9)), sample_context(rng.randrange(10**9)), size
        )
        for _ in range(count)
    ]


def _dress_and_place(context: Context) -> tuple[str, ...]:
    hat = context.hat if context.hat == "none" else f"{context.hat_colour} {context.hat}"
    place = context.background
    if not context.is_scene:
        place = f"{context.background_colour} {place}"
    return (hat, context.clothes, context.clothes_colour, place)


def main() -> None:
    """Write both sets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("datasets"))
    output: Path = parser.parse_args().output
    write_set(face_set(), output / "zia")
    write_set(style_set(), output / "neon")


if __name__ == "__main__":
    main()
