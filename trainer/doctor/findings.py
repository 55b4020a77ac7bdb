"""What the doctor says of photos and of a set, and everything that is shown with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.types import Bucketed, Captioned, Face, Photo, Size

# From harmless to unusable.
Level = Literal["ok", "note", "warning", "bad"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "bad")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found.

    code: a stable word for programs ("blurred"). level: "note" needs nothing done, "warning" can
    spoil the training, "bad" keeps the photo out of it. what: a clause that goes on from the
    file's name ("is blurred"); of a set as a whole a sentence. fix: what to do, a sentence.
    """

    code: str
    level: Level
    what: str
    fix: str


@dataclass(frozen=True, slots=True)
class PhotoFacts:
    """What is measured once on a photo's pixels and kept by its content.

    sharpness, reblur: see `trainer.data.quality`, of the largest face where there is one.
    dark, bright, mean: shares of pixels that are nearly black and nearly white, and the mean grey
    value 0..255; of the largest face where there is one.
    hash, mirrored_hash: perceptual hashes, 64 bits, of the photo and its mirror image.
    background: mean RGB of the border, 0..255. faces: None where nothing could look for them.
    thumbnail: the photo at 16x16 px, RGB; black where it was not made.
    """

    digest: str
    sharpness: float
    reblur: float
    dark: float
    bright: float
    mean: float
    hash: int
    mirrored_hash: int
    background: tuple[float, float, float]
    faces: tuple[Face, ...] | None
    thumbnail: bytes = bytes(16 * 16 * 3)


@dataclass(frozen=True, slots=True)
class PhotoVerdict:
    """One file of the folder and what is to be said of it.

    photo, captioned, facts: None where the file cannot be used. crops: how it is trained, one for
    each resolution (without flips and variants). tokens: of its caption; None when not counted.
    """

    path: Path
    set_name: str
    findings: tuple[Finding, ...]
    photo: Photo | None = None
    captioned: Captioned | None = None
    facts: PhotoFacts | None = None
    crops: tuple[Bucketed, ...] = ()
    tokens: int | None = None

    @property
    def level(self) -> Level:
        """The worst of its findings."""
        return max((f.level for f in self.findings), key=LEVELS.index, default="ok")


@dataclass(frozen=True, slots=True)
class BucketRow:
    """One training size.

    photos: how many are trained at it in an epoch, repeats counted. batches: in an epoch. short:
    places of its last batch that stay empty. enlarged: photos that are made larger for it.
    cropped: mean share of the resized pictures that the crop leaves out.
    """

    size: Size
    photos: int
    batches: int
    short: int
    enlarged: int
    cropped: float


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything the doctor has to say of a folder.

    whole: findings on the set. steps: sentences that spell out repeats, steps and epochs.
    faces_by: what looked for faces, and what it cannot do, in a sentence.
    """

    folder: Path
    photos: tuple[PhotoVerdict, ...]
    whole: tuple[Finding, ...]
    buckets: tuple[BucketRow, ...]
    steps: tuple[str, ...]
    faces_by: str

    def count(self, level: Level) -> int:
        """How many photos have this level."""
        return sum(verdict.level == level for verdict in self.photos)
