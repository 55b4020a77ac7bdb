"""The report of a run: one HTML page that needs nothing else, made from plain values."""

from __future__ import annotations

import base64
import importlib.resources
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath

import jinja2
from PIL import Image, ImageOps

from trainer.report.curves import line_chart
from trainer.report.doctor_page import finalized, short
from trainer.report.steps import BestStep

THUMBNAIL_PX = 160
THUMBNAIL_BYTES = 12_000
SHEET_QUALITY = 90
KIB = 1024


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One score, drawn as a scale from 0 (`low`) to 1 (`high`).

    Args:
        name: what was measured ("Likeness, with the trigger word").
        sentence: the same in words, with its numbers.
        before: the value before training, or None where there is none.
        after: the value after training.
        mark: a value to compare with ("highest of any other picture"), or None.
        mark_name: what `mark` is.
        low: what 0 means.
        high: what 1 means.
    """

    name: str
    sentence: str
    before: float | None
    after: float
    mark: float | None = None
    mark_name: str = ""
    low: str = "other pictures"
    high: str = "your photos"


@dataclass(frozen=True, slots=True)
class PhotoRow:
    """One photo of the folder and what became of it; `bucket` is "64x64", `origin` "sidecar"."""

    name: str
    image: Image.Image
    caption: str
    origin: str
    bucket: str
    size: str = ""


@dataclass(frozen=True, slots=True)
class SettingRow:
    """One resolved setting; `origin` says where its value came from ("default", a file)."""

    name: str
    value: str
    origin: str = ""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Loss and learning rate of one optimizer step."""

    step: int
    loss: float
    learning_rate: float


@dataclass(frozen=True, slots=True)
class FileFacts:
    """The LoRA file; `hashes` maps the name of a hash to it, `facts` holds rank, family, ....

    `verified` tells whether every tensor was found in the model's key table after reading the
    file back, `verification` says so in words.
    """

    path: str
    size_bytes: int
    hashes: Mapping[str, str]
    verified: bool
    verification: str
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return file_name(self.path)


@dataclass(frozen=True, slots=True)
class ReportData:
    """Everything the page shows.

    Args:
        title: the name of what was trained.
        headline: what was learned, in one plain sentence.
        summary: a few words more on how it was done ("14 photos, 300 steps, 2 min 31 s").
        trigger: the trigger word.
        example_prompt: a prompt to type, holding the trigger word.
        base: the base model it was trained on and fits, in words.
        notes: things to know before using the file, shown in a box of their own.
        good: whether the training did what it should; colours the headline's mark.
        best: which step to take, or None where nothing was compared. Its file is the one that the
            page says how to use.
        scores_note: said instead of the scores where there are none.
        settings_toml: the resolved settings as they were saved.
        saved_steps: steps at which a file was written, marked in the curves.
        more_photos: how many there are besides those shown.
        versions: program or package name to version.
        command: the command line that started the run.
    """

    title: str
    headline: str
    summary: str
    trigger: str
    example_prompt: str
    file: FileFacts
    base: str = ""
    contact_sheet: Image.Image | None = None
    scores: tuple[ScoreRow, ...] = ()
    best: BestStep | None = None
    scores_note: str = ""
    notes: tuple[str, ...] = ()
    good: bool = True
    curve: tuple[CurvePoint, ...] = ()
    saved_steps: tuple[int, ...] = ()
    photos: tuple[PhotoRow, ...] = ()
    more_photos: int = 0
    settings: tuple[SettingRow, ...] = ()
    settings_toml: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""

    @property
    def use_path(self) -> str:
        """The file to use: that of the best step where there is one."""
        return self.best.file if self.best and self.best.file else self.file.path

    @property
    def use_name(self) -> str:
        return file_name(self.use_path)


def file_name(path: str) -> str:
    """The file name alone, whichever system wrote the path."""
    return PurePath(path.replace("\\", "/")).name


def render_report(report: ReportData) -> str:
    """The page as HTML text (write it as UTF-8); all text in it is escaped and made harmless."""
    template = importlib.resources.files("trainer.report").joinpath("page.html.j2")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=finalized,
    )
    environment.filters["short"] = short
    environment.filters["thumbnail"] = thumbnail_uri
    environment.filters["sheet"] = sheet_uri
    environment.filters["megabytes"] = megabytes
    environment.filters["percent"] = scale_percent
    environment.filters["stem"] = lambda name: name.removesuffix(".safetensors")
    steps = [point.step for point in report.curve]
    losses = [point.loss for point in report.curve]
    rates = [point.learning_rate for point in report.curve]
    marks = report.saved_steps
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        report=report,
        loss_chart=line_chart(steps, losses, label="loss", smoothed=True, marks=marks),
        rate_chart=line_chart(steps, rates, label="learning rate", smoothed=False, marks=marks),
    )


def thumbnail_uri(image: Image.Image) -> str:
    """A square JPEG of at most `THUMBNAIL_BYTES`, as a data address."""
    side = (THUMBNAIL_PX, THUMBNAIL_PX)
    small = ImageOps.fit(image.convert("RGB"), side, Image.Resampling.LANCZOS)
    for quality in (86, 74, 60, 40, 20):
        data = _jpeg(small, quality)
        if len(data) <= THUMBNAIL_BYTES:
            break
    return _data_uri(data)


def sheet_uri(image: Image.Image) -> str:
    """The contact sheet as a JPEG, as a data address."""
    return _data_uri(_jpeg(image.convert("RGB"), SHEET_QUALITY))


def megabytes(size_bytes: int) -> str:
    """A file size as people read it."""
    if size_bytes < KIB * KIB:
        return f"{size_bytes / KIB:.0f} kB"
    return f"{size_bytes / (KIB * KIB):.1f} MB"


def scale_percent(value: float) -> float:
    """Where a score stands on the drawn scale, which reaches from -0.25 to 1.25, in percent."""
    return round(100 * (min(1.25, max(-0.25, value)) + 0.25) / 1.5, 1)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    # Not optimize=True: Pillow's buffer for it is too small for noise, and saving then fails.
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _data_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")
