"""`likeness caption`: writes what a captioner says of each photo into a .txt file beside it.

Every file is written whole as soon as its words are known, and what is there stays. So a run that
was stopped goes on with the photos that are left when the command is given again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.captioners import GENERAL_THRESHOLD, Captioner, CaptionerOptions
from trainer.commands.describe import OWN, open_captioner, require_captioner
from trainer.commands.terminal import Terminal
from trainer.data.captions import find_sidecars, read_sidecar, write_sidecar
from trainer.data.decode import WHITE, decode_upright, shown
from trainer.data.listing import stem_key
from trainer.data.photos import require_usable, scan_folder
from trainer.errors import DataError, ModelError, OutputError, Stopped, TrainerError, UsageError
from trainer.types import Photo

# A file of nothing but a few blanks is no caption that anybody wrote.
_EMPTY_BYTES = 1000
_PROMPT_CHARACTERS = 2000
_REPLACE = "--overwrite replaces it."


@dataclass(frozen=True, slots=True)
class Request:
    """The command line of `likeness caption`."""

    photos: Path
    kind: str = "face"
    captioner: str = OWN
    model: str = ""
    prompt: str | None = None
    threshold: float | None = None
    character_threshold: float | None = None
    exclude: str = ""
    rating: bool = False
    recursive: bool = False
    overwrite: bool = False


@dataclass(slots=True)
class _Tally:
    """What has become of the photos so far."""

    written: int = 0
    wordless: int = 0
    failed: list[TrainerError] = field(default_factory=list)


def run(request: Request) -> None:
    """Write the captions; files that are there stay unless they are to be overwritten.

    Raises:
        UsageError: flags that do not go together.
        TrainerError: no photo can be used, the captioner cannot be loaded (nothing has been
            written then), or it failed on every single photo.
        OutputError: nothing can be written there; what was written before stays.
        Stopped: by Ctrl-C.
    """
    options = _options(request)
    console = Terminal(soft_wrap=True)
    scan = scan_folder(request.photos, recursive=request.recursive)
    photos = require_usable(scan, skip_bad=True)
    for problem in scan.problems:
        name = shown(problem.path.name)
        console.print(f"{name} {problem.reason}. {problem.fix}", style="yellow")
    wanted, kept = _wanted(photos, console, overwrite=request.overwrite)
    tally = _Tally()
    if wanted:
        captioner = open_captioner(
            request.captioner, options, console, kind=request.kind, device="auto"
        )
        try:
            _describe_all(wanted, captioner, request, console, tally)
        except KeyboardInterrupt as stop:
            left = len(wanted) - tally.written - tally.wordless - len(tally.failed)
            raise Stopped(
                2,
                f"Stopped. Captions written: {tally.written}; photos left: {left}. "
                + _how_to_go_on(overwrite=request.overwrite),
            ) from stop
    _sum_up(tally, kept, console)
    if tally.failed and len(tally.failed) == len(wanted):
        raise tally.failed[0]


def _options(request: Request) -> CaptionerOptions:
    """What the captioner is loaded with.

    Raises:
        UsageError: a flag is out of range, or of no use to this captioner.
    """
    require_captioner(request.captioner, request.model)
    of_taggers = (
        ("--threshold", request.threshold),
        ("--character-threshold", request.character_threshold),
        ("--exclude", request.exclude or None),
        ("--rating", request.rating or None),
    )
    flags = [(flag, "tagger") for flag, value in of_taggers if value is not None]
    flags += [("--prompt", "transformers")] * (request.prompt is not None)
    for flag, captioner in flags:
        if request.captioner != captioner:
            raise UsageError(
                f"{flag} is for the captioner '{captioner}'.",
                where=f"--captioner {request.captioner}",
                fix=f"Leave it out, or choose --captioner {captioner}.",
            )
    for flag, value in of_taggers[:2]:
        if isinstance(value, float) and not 0 < value <= 1:
            raise UsageError(f"{flag} {value:g} is not above 0 and at most 1.")
    if len(request.prompt or "") > _PROMPT_CHARACTERS:
        raise UsageError(f"--prompt is longer than {_PROMPT_CHARACTERS} characters.")
    return CaptionerOptions(
        model=request.model,
        prompt=request.prompt,
        threshold=GENERAL_THRESHOLD if request.threshold is None else request.threshold,
        character_threshold=request.character_threshold,
        exclude=tuple(request.exclude.split(",")),
        rating=request.rating,
    )


def _wanted(
    photos: Sequence[Photo], console: Console, *, overwrite: bool
) -> tuple[list[tuple[Photo, Path]], int]:
    """The photos to be described, each with the file for its caption, and how many keep theirs."""
    sidecars = find_sidecars(photos)
    wanted: list[tuple[Photo, Path]] = []
    first: dict[tuple[Path, str], Photo] = {}
    kept = 0
    for photo in photos:
        sidecar = sidecars.get(photo.path)
        if sidecar and not overwrite and not _is_empty(sidecar):
            kept += 1
        elif other := first.get(stem_key(photo.path)):
            name = shown(photo.path.name)
            console.print(f"{name}: shares the caption of {shown(other.path.name)}")
        else:
            first[stem_key(photo.path)] = photo
            wanted.append((photo, sidecar or photo.path.with_suffix(".txt")))
    return wanted, kept


def _is_empty(sidecar: Path) -> bool:
    return sidecar.stat().st_size <= _EMPTY_BYTES and not read_sidecar(sidecar)


def _describe_all(
    wanted: Sequence[tuple[Photo, Path]],
    captioner: Captioner,
    request: Request,
    console: Console,
    tally: _Tally,
) -> None:
    with _progress(len(wanted), console) as advance:
        for number, (photo, path) in enumerate(wanted, 1):
            line = f"{number} of {len(wanted)}  {shown(photo.path.name)}: "
            try:
                text = captioner.caption(photo, _decoder(photo), request.kind)
                if text:
                    _write(path, text, overwrite=request.overwrite)
            except (DataError, ModelError) as error:
                tally.failed.append(error)
                console.print(line + f"{error.what} {error.fix}", style="yellow")
            else:
                tally.written += bool(text)
                tally.wordless += not text
                console.print(
                    line + (text or "the captioner has no words for it"),
                    style="" if text else "yellow",
                )
            advance()


def _write(path: Path, text: str, *, overwrite: bool) -> None:
    """Write a caption, unless somebody has written one since the folder was read.

    Raises:
        DataError: somebody has, or the file that is there is write-protected.
        OutputError: nothing can be written here: the folder is write-protected, the disk is full.
    """
    try:
        write_sidecar(path, text, overwrite=overwrite or (path.exists() and _is_empty(path)))
    except FileExistsError as error:
        raise DataError(
            "it has a .txt file by now, which stays.", where=str(path), fix=_REPLACE
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        if path.exists():
            raise DataError(
                f"its .txt file cannot be replaced: {reason}.",
                where=str(path),
                fix="Give yourself the permission to write it.",
            ) from error
        raise OutputError(
            f"Captions cannot be written: {reason}",
            where=str(path),
            fix="Free some space or make the folder writable, and give the same command again.",
        ) from error


def _decoder(photo: Photo) -> Callable[[], Image.Image]:
    return lambda: decode_upright(photo.path, background=WHITE)


@contextmanager
def _progress(total: int, console: Console) -> Iterator[Callable[[], None]]:
    """A line that stays below the others on a terminal; elsewhere the lines say enough."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=total, rate="")

        def advance() -> None:
            bar.advance(task)
            minutes = max(time.monotonic() - started, 1e-3) / 60
            bar.update(task, rate=f"{bar.tasks[0].completed / minutes:.0f} photos a minute")

        yield advance


def _sum_up(tally: _Tally, kept: int, console: Console) -> None:
    if tally.written:
        console.print(
            f"Captions written: {tally.written}, each in a .txt file beside its photo. Edit them "
            "as you like; the trigger word is put in front when you train."
        )
    if tally.wordless:
        console.print(f"Photos without words, which got no file: {tally.wordless}")
    if tally.failed:
        console.print(f"Photos that could not be described: {len(tally.failed)}")
    if kept:
        console.print(f"Photos with a .txt file, which stays: {kept}. {_REPLACE}")


def _how_to_go_on(*, overwrite: bool) -> str:
    again = "The same command goes on with them"
    return f"{again}, without --overwrite." if overwrite else f"{again}."
