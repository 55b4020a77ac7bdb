"""The output folder of a run: what is called what in it, and who may write to it."""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import OutputError

SETTINGS_FILE = "settings.toml"


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
        return self.root / "checkpoints"

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
    return "_".join(kept.split())[:100].strip("._-") or "lora"


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
            raise OutputError(
                "The output folder already holds a run.",
                where=str(output),
                fix="Go on with it by --resume, replace it by --overwrite, "
                "or give another folder after --output.",
            )
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


def require_free(folder: RunFolder) -> None:
    """Refuse a folder in which files would be replaced that no run has left there.

    Raises:
        OutputError: names them.
    """
    written = (
        *(folder.lora, folder.best_lora, folder.contact_sheet),
        *(folder.report, folder.metrics, folder.scores),
    )
    if taken := [path for path in written if path.exists()]:
        raise OutputError(
            "The output folder holds files that the run would replace.",
            where="\n".join(str(path) for path in taken),
            fix="Give another folder after --output, or replace them by --overwrite.",
        )


def holds_run(folder: Path) -> bool:
    """Whether a run has been started in this folder."""
    return (folder / SETTINGS_FILE).exists()


def open_root(root: Path) -> None:
    """Create the folder and make sure that it can be written.

    Raises:
        OutputError: it cannot.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".write-test-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"The output folder cannot be written: {error.strerror or error}",
            where=str(root),
            fix="Give a folder you may write to after --output.",
        ) from error


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
        settings = tomllib.loads(folder.settings.read_text(encoding="utf-8"))
        return str(settings["run"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return folder.name


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step, so that it is never half written."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"A file of the run cannot be written: {error.strerror or error}",
            where=str(path),
            fix="Free some space or make the folder writable, then go on with --resume.",
        ) from error
