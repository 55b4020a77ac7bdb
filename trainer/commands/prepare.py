"""`likeness prepare`: the doctor looks at a photo folder and says what is wrong, before training.

A table in a terminal, one plain line for each photo elsewhere, or JSON; and one HTML page with the
photos as they are trained. Nothing is ever written into the photo folder.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from trainer.commands.terminal import Terminal
from trainer.config.photo_settings import DataSettings
from trainer.config.reader import build_config, override_layer, parse_override, read_toml
from trainer.doctor import words
from trainer.doctor.as_json import as_json
from trainer.doctor.findings import Diagnosis
from trainer.doctor.page import page_of
from trainer.errors import OutputError, UsageError
from trainer.report.doctor_page import is_doctor_page, render_doctor
from trainer.training.run_folder import file_stem

STEM_CHARACTERS = 60  # of the page's file name; a name may have 255 bytes, a character four


@dataclass(frozen=True, slots=True)
class Request:
    """The command line of `likeness prepare`; None where nothing was given."""

    photos: Path
    kind: str | None = None
    trigger: str | None = None
    class_noun: str | None = None
    base: str | None = None
    config: Path | None = None
    overrides: tuple[str, ...] = ()
    json: bool = False
    page: Path | None = None


def run(request: Request) -> int:
    """Examine the photos and show what was found.

    Returns:
        The exit code: 0 where the photos can be trained on, 1 where none can be used, or some
        cannot and `data.skip_bad` is off.

    Raises:
        TrainerError: there is no such folder, a setting is wrong, or the page cannot be written.
    """
    from trainer.commands.checkup import check

    settings = _data_settings(request)
    if request.page is not None:
        require_page_place(request.page, request.photos)
    # Progress goes beside the result, so that `--json` prints the object and nothing else.
    aside = Terminal(stderr=True, soft_wrap=True)
    diagnosis = check(request, aside)
    page = request.page
    if page is None and not request.json:
        page = free_page(request.photos, diagnosis)
    if page is not None:
        with aside.status("Drawing the page"):
            html = render_doctor(page_of(diagnosis, background=settings.background_rgb))
        _write_page(page, html)
    if request.json:
        print(as_json(diagnosis))
    else:
        show(diagnosis, page)
    return exit_code(diagnosis, skip_bad=settings.skip_bad)


def show(diagnosis: Diagnosis, page: Path | None) -> None:
    """Print everything: laid out for a terminal, as plain lines for a file or another program."""
    last = words.counts(diagnosis)
    if page is not None:
        last += f" The page: {words.plain(page)}"
    if not _in_terminal():
        for line in [*words.lines(diagnosis), last]:
            print(line)
        return
    console = Terminal()
    tables = (
        words.table(diagnosis, console.width),
        words.whole_table(diagnosis, console.width),
        words.bucket_table(diagnosis),
    )
    for table in tables:
        if table is not None:
            console.print(table)
            console.print()
    for line in words.closing(diagnosis):
        console.print(Text(line))
    console.print(Text(last, style="bold"), soft_wrap=True)


def _in_terminal() -> bool:
    return sys.stdout.isatty()


def exit_code(diagnosis: Diagnosis, *, skip_bad: bool) -> int:
    """0 where the photos can be trained on, else 1."""
    bad = diagnosis.count("bad")
    if bad == len(diagnosis.photos) or (bad and not skip_bad):
        return 1
    return 0


def free_page(photos: Path, diagnosis: Diagnosis) -> Path:
    """Where the page goes if nothing was said: `FOLDER-doctor.html` in the current folder.

    From inside a photo folder it goes above it. A page of an earlier check is replaced; any other
    file stays, and the page gets a number.
    """
    folders = {photos.resolve(), *(v.path.parent.resolve() for v in diagnosis.photos)}
    here = Path.cwd().resolve()
    outside = (
        place
        for place in (here, *here.parents)
        if not any(place.is_relative_to(folder) for folder in folders)
    )
    place = next(outside, Path.home())  # a whole disk of photos has nothing above it
    place = Path() if place == here else place
    stem = f"{file_stem(photos.resolve().name)[:STEM_CHARACTERS]}-doctor"
    number = 1
    while True:
        page = place / (f"{stem}.html" if number == 1 else f"{stem}-{number}.html")
        if _may_write(page):
            return page
        number += 1


def require_page_place(page: Path, photos: Path) -> None:
    """Check the place that was asked for.

    Raises:
        UsageError: it is in the photo folder, or no name of an HTML file.
        OutputError: another file is there.
    """
    if page.suffix.lower() not in (".html", ".htm"):
        raise UsageError(
            f"The page cannot be called '{words.plain(page.name)}'.",
            fix="Give it a name that ends in .html.",
        )
    if page.resolve().is_relative_to(photos.resolve()):
        raise UsageError(
            "The page cannot be put into the photo folder, where nothing is ever written.",
            where=words.plain(page),
            fix="Give a place outside of it.",
        )
    if not _may_write(page):
        raise OutputError(
            "There is another file where the page should go.",
            where=words.plain(page),
            fix="Give another name, or move that file away.",
        )


def _may_write(page: Path) -> bool:
    """Whether nothing is there, or a page of ours that may be replaced."""
    if not page.is_file():
        return not (page.exists() or page.is_symlink())
    try:
        return is_doctor_page(page)
    except OSError:  # what cannot be looked into is not ours
        return False


def _write_page(page: Path, html: str) -> None:
    """Write the page in one step, so that it is never half there."""
    temporary = page.with_name(f".likeness-doctor-{os.getpid()}.tmp")
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(html, encoding="utf-8", newline="\n")
        temporary.replace(page)
    except OSError as error:
        with contextlib.suppress(OSError):  # what is in the way may be in the way of this too
            temporary.unlink(missing_ok=True)
        raise OutputError(
            f"The page cannot be written: {error.strerror or error}",
            where=words.plain(page),
            fix="Give a place that can be written to with --page FILE.html.",
        ) from error


def _data_settings(request: Request) -> DataSettings:
    """The settings of photos that were given; no preset has an opinion on those used here."""
    layers = [read_toml(request.config, request.config.name)] if request.config else []
    typed = [parse_override(text) for text in request.overrides]
    return build_config([*layers, override_layer(typed, "command line")]).config.data
