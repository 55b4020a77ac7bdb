"""The sets that quality is measured on: the repository's own two, and freshly drawn ones.

Every set can draw its subject in contexts that its photos do not hold: the truth that samples are
compared with.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from PIL import Image, ImageOps

from pretraining.avatars import draw_avatar
from pretraining.looks import HELD_OUT_STYLE, Context, Identity, sample_context, sample_identity
from pretraining.sample_sets import (
    ZIA,
    Sample,
    face_set,
    other_avatars,
    render,
    style_set,
    write_set,
)

SIDE_PX = 64


@dataclass(frozen=True, slots=True)
class FaceSet:
    """Photos of one avatar."""

    name: str
    identity: Identity
    samples: tuple[Sample, ...]
    kind = "face"
    score = "identity"

    def photos(self) -> list[Image.Image]:
        return [render(sample) for sample in self.samples]

    def write(self, folder: Path) -> None:
        write_set(self.samples, folder)

    def unseen(self, count: int) -> list[Image.Image]:
        """The subject in contexts that no photo shows."""
        return [draw_avatar(self.identity, c, SIDE_PX) for c in _new_contexts(self, count)]

    def others(self, count: int) -> list[Image.Image]:
        """Other avatars."""
        return other_avatars(count, seed=91, size=SIDE_PX)


@dataclass(frozen=True, slots=True)
class StyleSet:
    """Pictures of different avatars in one drawing style."""

    name: str
    paint: Callable[[Identity, Context, int], Image.Image]
    samples: tuple[Sample, ...]
    kind = "style"
    score = "style"

    def photos(self) -> list[Image.Image]:
        return [self.paint(s.identity, s.context, s.size_px) for s in self.samples]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        for sample, photo in zip(self.samples, self.photos(), strict=True):
            photo.save(folder / sample.name)
            (folder / sample.name).with_suffix(".txt").write_text(sample.caption, encoding="utf-8")

    def unseen(self, count: int) -> list[Image.Image]:
        """Other avatars in the style."""
        rng = random.Random(f"unseen {self.name}")
        seeds = [rng.randrange(10**9) for _ in range(count)]
        return [self.paint(sample_identity(n), sample_context(n), SIDE_PX) for n in seeds]

    def others(self, count: int) -> list[Image.Image]:
        """Flat pictures."""
        return other_avatars(count, seed=92, size=SIDE_PX)


def neon(identity: Identity, context: Context, size: int) -> Image.Image:
    """The style of the repository's own set."""
    return draw_avatar(identity, context, size, HELD_OUT_STYLE)


def blueprint(identity: Identity, context: Context, size: int) -> Image.Image:
    """Light lines on blue paper."""
    lines = draw_avatar(identity, context, size, "comic").convert("L")
    return ImageOps.colorize(ImageOps.autocontrast(lines), (226, 238, 255), (20, 52, 120))


def sunset(identity: Identity, context: Context, size: int) -> Image.Image:
    """Two inks, dark violet to yellow, whatever the colours were."""
    grey = draw_avatar(identity, context, size).convert("L")
    return ImageOps.colorize(grey, (58, 12, 92), (255, 226, 120), (236, 84, 84))


@cache
def all_sets() -> dict[str, FaceSet | StyleSet]:
    """Every set by name."""
    faces: list[FaceSet | StyleSet] = [FaceSet("zia", ZIA, tuple(face_set()))]
    for name, identity in HELD_OUT_AVATARS.items():
        samples = [_recast(s, identity) for s in face_set()]
        faces.append(FaceSet(name, identity, tuple(samples)))
    drawn = tuple(style_set())
    styles = [StyleSet(paint.__name__, paint, drawn) for paint in (neon, blueprint, sunset)]
    return {chosen.name: chosen for chosen in [*faces, *styles]}


# Each has something that pretraining never shows, and each something else.
HELD_OUT_AVATARS = {
    "mira": Identity(
        skin="tan", face="long", hair_style="mohawk", hair_colour="pink", eyes="big",
        brows="thin", beard="none", glasses="round", mark="star",
    ),
    "otto": Identity(
        skin="teal", face="square", hair_style="bald", hair_colour="black", eyes="small",
        brows="thick", beard="beard", glasses="none", mark="none",
    ),
    "lune": Identity(
        skin="purple", face="round", hair_style="mohawk", hair_colour="white", eyes="sleepy",
        brows="thin", beard="none", glasses="none", mark="star",
    ),
}  # fmt: skip


def _recast(sample: Sample, identity: Identity) -> Sample:
    """The same picture of somebody else."""
    return replace(sample, identity=identity)


def _new_contexts(chosen: FaceSet, count: int) -> list[Context]:
    taken = {_place(sample.context) for sample in chosen.samples}
    rng = random.Random(f"unseen {chosen.name}")
    found: list[Context] = []
    while len(found) < count:
        context = sample_context(rng.randrange(10**9))
        if _place(context) not in taken:
            found.append(context)
    return found


def _place(context: Context) -> Sequence[str]:
    return (context.hat, context.clothes, context.clothes_colour, context.background)
