"""The output folder of a run: what is called what in it, and who may write to it."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from trainer.errors import OutputError
from trainer.untrusted import is_device_name, read_text

SETTINGS_FILE = "settings.toml"
CHECKPOINTS = "checkpoints"
_SHOWN_FILES = 20


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths inside an output folder; `name` is the stem of the LoRA files."""

    root: Path
    name: str

    @property
    def lora(self) -> Path:
        """The finished LoRA file, written last."""
        return self.root / f"{self.name}.safetensors"

    @property
    def unfinished_lora(self) -> Path:
        """The LoRA file until everything else is there."""
        return self.root / f"{self.name}.unfinished"

    @property
    def best_lora(self) -> Path:
        """The LoRA file of the best step so far."""
        return self.root / f"{self.name}-best.safetensors"

    def step_lora(self, step: int) -> Path:
        return self.root / f"{self.name}-{step}.safetensors"

    @property
    def checkpoints(self) -> Path:
        return self.root / CHECKPOINTS

    @property
    def previews(self) -> Path:
        return self.root / "previews"

    @property
    def contact_sheet(self) -> Path:
        return self.root / "contact_sheet.png"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def settings(self) -> Path:
        return self.root / SETTINGS_FILE

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def scores(self) -> Path:
        return self.root / "scores.json"


def file_stem(name: str) -> str:
    """A folder's name as a file name that every system and prompt syntax takes."""
    kept = "".join(c if c.isalpha() or c.isdecimal() or c in "_.-" else " " for c in name)
    stem = "_".join(kept.split())[:100].strip("._-") or "lora"
    return f"lora_{stem}" if is_device_name(stem) else stem


def choose_root(
    photos: Path, output: Path | None, *, resume: bool, overwrite: bool, runs: Path
) -> Path:
    """Decide the output folder of a run without touching the disk.

    Args:
        photos: the photo folder; its name names the run.
        output: what the user asked for, if anything.
        resume: go on with the run that is there (without `output`: the newest of this set); where
            there is none yet, one is started, so that a script can always say so.
        overwrite: a run that is there may be replaced.
        runs: where runs without a name go.

    Raises:
        OutputError: the folder holds a run, or a file is in its place.
    """
    if output is not None:
        if output.exists() and not output.is_dir():
            raise OutputError(
                "The output is a file, not a folder.",
                where=str(output),
                fix="Give another name after --output.",
            )
        if holds_run(output) and not (resume or overwrite):
            refuse_run(output)
        return output
    stem = file_stem(photos.resolve().name)
    numbers = sorted(
        int(match[1])
        for path in (runs.iterdir() if runs.is_dir() else ())
        if (match := re.fullmatch(re.escape(stem) + r"-(\d+)", path.name))
    )
    if resume and numbers:
        return runs / f"{stem}-{numbers[-1]}"
    return runs / f"{stem}-{numbers[-1] + 1 if numbers else 1}"


def refuse_run(root: Path) -> NoReturn:
    """Say that a folder holds a run already.

    Raises:
        OutputError: always.
    """
    raise OutputError(
        "The output folder already holds a run.",
        where=str(root),
        fix="Go on with it by --resume, replace it by --overwrite, "
        "or give another folder after --output.",
    )


def run_of(place: Path) -> Path | None:
    """The run folder that a folder is, or that it belongs to as a checkpoint or as the folder of
    them; None if it stands alone."""
    for root, below in ((place, place / CHECKPOINTS), (place.parent, place)):
        if below.name == CHECKPOINTS and below.is_dir():
            return root
    return place.parent.parent if place.parent.name == CHECKPOINTS else None


def require_free(folder: RunFolder) -> None:
    """Refuse a folder in which files would be replaced that no run has left there.

    Raises:
        OutputError: names them.
    """
    written = [
        *(folder.lora, folder.best_lora, folder.contact_sheet),
        *(folder.report, folder.metrics, folder.scores),
        *sorted(folder.previews.glob("step-*.png")),
        *sorted(folder.root.glob(f"{glob.escape(folder.name)}-[0-9]*.safetensors")),
    ]
    if taken := [path for path in written if path.exists()][:_SHOWN_FILES]:
        raise OutputError(
            "The output folder holds files that the run would replace.",
            where="\n".join(str(path) for path in taken),
            fix="Give another folder after --output, or replace them by --overwrite.",
        )


def holds_run(folder: Path) -> bool:
    """Whether a run has been started in this folder."""
    checkpoints = folder / CHECKPOINTS
    return (folder / SETTINGS_FILE).exists() or (
        checkpoints.is_dir() and any(checkpoints.glob("step-*"))
    )


def open_root(root: Path, *, numbered: bool = False) -> Path:
    """Create the folder and make sure that it can be written.

    Args:
        numbered: its name ends in a number, and is to be new: where another run has taken it in
            the meantime, the next number is.

    Returns:
        The folder.

    Raises:
        OutputError: it cannot.
    """
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        while numbered and not _made(root):
            stem, _, number = root.name.rpartition("-")
            root = root.with_name(f"{stem}-{int(number) + 1}")
        root.mkdir(exist_ok=True)
        probe = root / f".write-test-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"The output folder cannot be written: {error.strerror or error}",
            where=str(root),
            fix="Give a folder you may write to after --output.",
        ) from error
    return root


def _made(folder: Path) -> bool:
    """Whether a folder was made; not if it was there."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def sweep(folder: RunFolder) -> None:
    """Remove what a dead run has left half written; the caller holds the folder's lock.

    In a folder in which no run has begun, only what comes before its beginning.
    """
    left: list[Path] = []
    places: list[tuple[Path, tuple[str, ...]]] = [
        (folder.root, (f".{SETTINGS_FILE}.tmp-*", ".write-test-*"))
    ]
    if holds_run(folder.root):
        left.append(folder.unfinished_lora)
        places += [
            (folder.root, (".*.tmp-*", ".likeness-*.tmp")),
            (folder.previews, (".*.tmp-*",)),
            (folder.checkpoints, (".tmp-*", ".del-*")),
        ]
    for place, patterns in places:
        left += [path for pattern in patterns for path in place.glob(pattern)]
    for path in left:
        # What another program has open is no reason not to go on.
        with contextlib.suppress(OSError):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def clear_run(folder: RunFolder) -> None:
    """Remove an older run's own files before it is replaced; anything else stays."""
    names = "|".join(re.escape(name) for name in {folder.name, _name_of_run(folder)})
    step_files = re.compile(rf"({names})(-\d+|-best)?\.safetensors")
    for path in sorted(folder.root.iterdir()):
        if step_files.fullmatch(path.name):
            path.unlink()
    for path in sorted(folder.checkpoints.glob("step-*")):
        shutil.rmtree(path)
    for path in sorted(folder.previews.glob("step-*.png")):
        path.unlink()
    for parent in (folder.checkpoints, folder.previews):
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
    for path in sorted((folder.root / "tensorboard").glob("events.out.tfevents.*")):
        path.unlink()
    for path in (folder.contact_sheet, folder.report, folder.metrics, folder.scores):
        path.unlink(missing_ok=True)


def _name_of_run(folder: RunFolder) -> str:
    """What the run that lies in a folder is called."""
    try:
        settings = tomllib.loads(read_text(folder.settings))
        return str(settings["run"]["name"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return folder.name


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step, so that it is never half written.

    Raises:
        OutputError: it cannot be written; what was there is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        flush(temporary)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"A file of the run cannot be written: {error.strerror or error}",
            where=str(path),
            fix="Free some space or make the folder writable, then go on with --resume.",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have a file's content on the disk, not only on its way there."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can do that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network folders
            raise
    finally:
        os.close(handle)
