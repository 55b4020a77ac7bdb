"""The diagnosis as the values of the doctor's page, thumbnails and trained crops among them.

Photos are decoded one at a time and only their thumbnails are kept, so that a folder of any size
needs the memory of one photo and of a page of bounded size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from trainer.data.decode import WHITE, PictureError, decode_upright
from trainer.data.pixels import crop_image
from trainer.doctor.findings import LEVELS, BucketRow, Diagnosis, Finding, PhotoVerdict
from trainer.doctor.words import name_of, worst_first
from trainer.report.doctor_page import (
    CropTile,
    DoctorPage,
    FindingRow,
    PhotoCard,
    SizeRow,
    picture_uri,
    times,
)
from trainer.types import Box, Bucketed, Size

CARDS = 500  # photos shown at most
FEW = 60  # up to so many photos, thumbnails have twice the pixels, for fine screens
THUMBNAIL_PX = 160

_ORIGINS = {
    "sidecar": "from its .txt file",
    "captioner": "by the captioner",
    "template": "from the template",
}


def page_of(diagnosis: Diagnosis, *, background: tuple[int, int, int] = WHITE) -> DoctorPage:
    """Everything the page shows; of a large folder the photos with the most to say.

    Args:
        diagnosis: what was found.
        background: what shows through where a photo is transparent, as in training.
    """
    verdicts = sorted(diagnosis.photos, key=lambda verdict: -LEVELS.index(verdict.level))[:CARDS]
    side_px = THUMBNAIL_PX * (2 if len(verdicts) <= FEW else 1)
    shown = {
        verdict.path: _with_pictures(_card(diagnosis, verdict), verdict, background, side_px)
        for verdict in verdicts
    }
    in_order = [verdict.path for verdict in diagnosis.photos if verdict.path in shown]
    return DoctorPage(
        folder=name_of_folder(diagnosis),
        headline=headline(diagnosis),
        counts={level: n for level in reversed(LEVELS) if (n := diagnosis.count(level))},
        findings=_rows(diagnosis.whole),
        steps=diagnosis.steps,
        faces_by=diagnosis.faces_by,
        cards=tuple(card for card, _ in shown.values()),
        sheet=tuple(tile for path in in_order for tile in shown[path][1]),
        sizes=tuple(_size_row(row) for row in diagnosis.buckets),
        left_out=len(diagnosis.photos) - len(verdicts),
    )


def name_of_folder(diagnosis: Diagnosis) -> str:
    return diagnosis.folder.resolve().name or "photos"


def headline(diagnosis: Diagnosis) -> str:
    """Whether the photos can be trained on, in one sentence."""
    total = len(diagnosis.photos)
    usable = total - diagnosis.count("bad")
    if usable == 0:
        return "No photo can be trained on."
    if usable < total:
        return f"{usable:,} of {total:,} photos can be trained on."
    return (
        "The photo can be trained on." if total == 1 else f"All {total:,} photos can be trained on."
    )


def trained_area(crop: Bucketed) -> Box:
    """What of the upright photo is trained, in its own pixels."""
    size = crop.captioned.photo.size
    across, down = size.width / crop.resized.width, size.height / crop.resized.height
    return Box(
        round(crop.left * across),
        round(crop.top * down),
        round((crop.left + crop.bucket.width) * across),
        round((crop.top + crop.bucket.height) * down),
    )


def _card(diagnosis: Diagnosis, verdict: PhotoVerdict) -> PhotoCard:
    """The card without pictures."""
    photo, captioned, facts = verdict.photo, verdict.captioned, verdict.facts
    return PhotoCard(
        name=name_of(diagnosis, verdict),
        level=verdict.level,
        findings=_rows(verdict.findings),
        size=photo.size if photo else None,
        caption=captioned.text if captioned else "",
        origin=_ORIGINS.get(captioned.origin, captioned.origin) if captioned else "",
        tokens=verdict.tokens,
        trained_at=_sizes(verdict.crops),
        crops=tuple(_by_area(verdict.crops)),
        faces=tuple(face.box for face in facts.faces or ()) if facts else (),
    )


def _with_pictures(
    card: PhotoCard, verdict: PhotoVerdict, background: tuple[int, int, int], side_px: int
) -> tuple[PhotoCard, list[CropTile]]:
    """The card with its thumbnail, and the photo's tiles of the contact sheet."""
    if verdict.photo is None:
        return card, []
    wanted = [crop.resized for crop in verdict.crops]
    enough = Size(
        max([side_px, *(size.width for size in wanted)]),
        max([side_px, *(size.height for size in wanted)]),
    )
    path = verdict.photo.path
    try:
        image = decode_upright(path, background=background, at_least=enough)
    except PictureError:  # it went away meanwhile; the page says what was found all the same
        return card, []
    tiles = [
        CropTile(
            name=card.name,
            size=crops[-1].bucket,
            trained_at=_sizes(crops),
            picture=picture_uri(crop_image(crops[-1], image), side_px),
        )
        for crops in _by_area(verdict.crops).values()
    ]
    return replace(card, picture=picture_uri(image, side_px)), tiles


def _by_area(crops: Sequence[Bucketed]) -> dict[Box, list[Bucketed]]:
    """The crops by what they show of the photo, the largest training size last."""
    areas: dict[Box, list[Bucketed]] = {}
    for crop in sorted(crops, key=lambda crop: crop.bucket.area):
        areas.setdefault(trained_area(crop), []).append(crop)
    return dict(sorted(areas.items(), key=lambda item: item[1][-1].bucket.area))


def _sizes(crops: Sequence[Bucketed]) -> str:
    sizes = sorted({crop.bucket for crop in crops}, key=lambda size: size.area)
    return " and ".join(times(size) for size in sizes)


def _rows(findings: Sequence[Finding]) -> tuple[FindingRow, ...]:
    return tuple(FindingRow(f.level, f.what, f.fix) for f in worst_first(findings))


def _size_row(row: BucketRow) -> SizeRow:
    return SizeRow(
        size=f"{times(row.size)} px",
        photos=row.photos,
        batches=row.batches,
        short=row.short,
        enlarged=row.enlarged,
        cropped=row.cropped,
    )
