"""Diagnoses made by hand, for the tests of how they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.doctor.findings import BucketRow, Diagnosis, Finding, PhotoFacts, PhotoVerdict
from trainer.types import Box, Bucketed, Captioned, Face, Photo, Size

BLURRED = Finding("blurred", "warning", "is blurred", "Take a sharper one.")
SAME = Finding("duplicate", "warning", "has the same picture as anna 02.jpg", "Keep one of them.")
ANIMATION = Finding("notice", "note", "is an animation; its first picture is used", "")
LANDSCAPE, SQUARE = Size(120, 80), Size(64, 64)
EMPTY = Finding("unreadable", "bad", "is empty (0 bytes)", "Copy it again, or remove it.")
FEW = Finding("few", "warning", "There are only 4 photos.", "Ten or more give a better likeness.")


def save_picture(path: Path, size: Size, seed: int = 0) -> None:
    """A smooth picture: its left half is redder than its right."""
    ramp = np.linspace(230, 20, size.width)[None, :].repeat(size.height, 0)
    values = np.stack([ramp, ramp * 0 + 40 * (seed % 6), ramp[:, ::-1]], axis=-1)
    Image.fromarray(values.astype(np.uint8)).save(path)


def place(photo: Photo, bucket: Size, caption: str = "ohwx person") -> Bucketed:
    """The photo at a training size, cut from its middle."""
    scale = max(bucket.width / photo.size.width, bucket.height / photo.size.height)
    resized = Size(round(photo.size.width * scale), round(photo.size.height * scale))
    left, top = (resized.width - bucket.width) // 2, (resized.height - bucket.height) // 2
    return Bucketed(Captioned(photo, (caption,), "sidecar"), bucket, resized, left, top)


def verdict(
    path: Path,
    findings: Sequence[Finding] = (),
    *,
    size: Size = LANDSCAPE,
    buckets: Sequence[Size] = (SQUARE,),
    caption: str = "ohwx person",
    face: bool = False,
) -> PhotoVerdict:
    """A photo that can be used."""
    photo = Photo(path, size, digest=f"{abs(hash(path.name)):064x}"[:64])
    faces = (Face(Box(40, 20, 70, 60), 0.9, ((50.0, 30.0), (62.0, 31.5))),) if face else ()
    crops = tuple(place(photo, bucket, caption) for bucket in buckets)
    return PhotoVerdict(
        path=path,
        set_name="anna",
        findings=tuple(findings),
        photo=photo,
        captioned=Captioned(photo, (caption, "another text"), "sidecar", "anna"),
        facts=PhotoFacts(
            digest=photo.digest,
            sharpness=120.5,
            reblur=0.3,
            dark=0.01,
            bright=0.02,
            mean=118.0,
            hash=2**64 - 1,
            mirrored_hash=3,
            background=(10.0, 20.5, 30.0),
            faces=faces if face else None,
        ),
        crops=crops,
        tokens=12,
    )


def diagnosis(folder: Path, *photos: PhotoVerdict) -> Diagnosis:
    """A diagnosis with one of everything around the photos."""
    return Diagnosis(
        folder=folder,
        photos=photos,
        whole=(FEW,),
        buckets=(BucketRow(Size(64, 64), 4, 2, 1, 3, 0.125),),
        steps=("4 photos x 25 epochs = 100 steps of 1 photo.",),
        faces_by="Faces were looked for with the basic detector, which misses many.",
    )


def anna(folder: Path, *, written: bool = False) -> Diagnosis:
    """Four files, one of each level; with `written` the pictures are there."""
    found = diagnosis(
        folder,
        verdict(folder / "anna 01.jpg", face=True),
        verdict(folder / "anna 02.gif", [ANIMATION]),
        verdict(folder / "anna 03.jpg", [BLURRED, SAME], buckets=[Size(64, 64), Size(96, 64)]),
        PhotoVerdict(folder / "anna 10.png", "anna", (EMPTY,)),
    )
    if written:
        folder.mkdir(parents=True, exist_ok=True)
        for number, each in enumerate(found.photos):
            if each.photo:
                save_picture(each.path, each.photo.size, number)
    return found
