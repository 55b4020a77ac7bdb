"""The doctor's page: one HTML file that needs nothing else, made from plain values.

It holds no script: the filter is made of radio buttons and CSS, and the page's own content
security policy forbids everything but its style and its pictures.
"""

from __future__ import annotations

import base64
import importlib.resources
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2
from PIL import Image

from trainer.types import Box, Size
from trainer.untrusted import printable, shortened

GENERATOR = "Likeness doctor"
_HEAD_BYTES = 2048  # of a file, in which the generator's tag of such a page stands
TEXT_CHARACTERS = 600  # of any text on the page, so that its size is bounded

# Bytes of a JPEG at most, for each pixel of its longer side: 160 px may weigh 12 kB.
_BYTES_PER_PX = 75


@dataclass(frozen=True, slots=True)
class FindingRow:
    """One thing that was found; `level` is "ok", "note", "warning" or "bad"."""

    level: str
    what: str
    fix: str


@dataclass(frozen=True, slots=True)
class PhotoCard:
    """One photo and what was found.

    size: of the upright photo; None where the file cannot be used. crops: what of it is trained,
    in pixels of the photo, that of the largest training size last; faces likewise. picture: a
    thumbnail of the whole photo as a data address, "" for none. trained_at: the training sizes in
    words.
    """

    name: str
    level: str
    findings: tuple[FindingRow, ...]
    size: Size | None = None
    caption: str = ""
    origin: str = ""
    tokens: int | None = None
    trained_at: str = ""
    crops: tuple[Box, ...] = ()
    faces: tuple[Box, ...] = ()
    picture: str = ""


@dataclass(frozen=True, slots=True)
class CropTile:
    """A picture as it is trained, of the photo `name`.

    size: its training size. trained_at: all sizes at which this part of the photo is trained, in
    words. picture: a thumbnail as a data address.
    """

    name: str
    size: Size
    trained_at: str
    picture: str


@dataclass(frozen=True, slots=True)
class SizeRow:
    """One training size: photos and batches in an epoch, places of the last batch that stay empty,
    photos that are enlarged, and the mean share (0..1) that the crop leaves out."""

    size: str
    photos: int
    batches: int
    short: int
    enlarged: int
    cropped: float


@dataclass(frozen=True, slots=True)
class DoctorPage:
    """Everything the page shows.

    Args:
        folder: the name of the photo folder.
        headline: the outcome in one sentence.
        counts: level to number of photos, in the order in which they are shown.
        findings: on all photos together.
        steps: sentences on repeats, steps and epochs.
        faces_by: what looked for faces, in a sentence.
        cards: the photos, the worst first.
        sheet: the same photos as they are trained, in the order of the folder.
        sizes: the training sizes.
        left_out: photos that have no card because there are so many.
    """

    folder: str
    headline: str
    counts: Mapping[str, int]
    findings: tuple[FindingRow, ...] = ()
    steps: tuple[str, ...] = ()
    faces_by: str = ""
    cards: tuple[PhotoCard, ...] = ()
    sheet: tuple[CropTile, ...] = ()
    sizes: tuple[SizeRow, ...] = ()
    left_out: int = 0


def render_doctor(page: DoctorPage) -> str:
    """The page as HTML text (write it as UTF-8); all text in it is escaped and made harmless."""
    template = importlib.resources.files("trainer.report").joinpath("doctor.html.j2")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=finalized,
    )
    environment.filters["short"] = short
    environment.filters["sentence"] = _sentence
    environment.filters["times"] = times
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        page=page, generator=GENERATOR
    )


def is_doctor_page(path: Path) -> bool:
    """Whether a file is such a page, which may be replaced by a newer one.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(_HEAD_BYTES)
    return f'<meta name="generator" content="{GENERATOR}">'.encode() in start


def picture_uri(image: Image.Image, side_px: int) -> str:
    """A JPEG with sides of at most `side_px`, never enlarged, as a data address."""
    small = image.convert("RGB")
    small.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    for quality in (82, 70, 56, 40, 20):
        data = _jpeg(small, quality)
        if len(data) <= _BYTES_PER_PX * side_px:
            break
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")


def short(text: str) -> str:
    """At most `TEXT_CHARACTERS` of a text; a caption file may hold a whole book."""
    return shortened(text, TEXT_CHARACTERS)


def times(size: Size) -> str:
    """A size as people write it; no line is broken within it."""
    return f"{size.width}\N{NO-BREAK SPACE}\N{MULTIPLICATION SIGN}\N{NO-BREAK SPACE}{size.height}"


def _sentence(text: str) -> str:
    """A clause as a sentence: "is blurred" becomes "Is blurred."."""
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def finalized(value: object) -> object:
    """Every value that a template shows; `Markup` is a str too, but made here."""
    return printable(value) if type(value) is str else value


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
