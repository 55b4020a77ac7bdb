"""The rows of `benchmarks.quality`: what one file of a run gave, kept in a CSV file."""

import csv
import platform
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Row:
    """What one file of a run gave.

    checkpoint: "last" or "best". likeness, leak: with and without the trigger, 0 = other avatars
    (for a style flat drawings), 1 = unseen true pictures. following: share of the looks named in
    the prompts that the reader finds in the samples with the trigger; base_following: the same of
    the base. looks: share of the subject's own looks that the reader finds, which the choice of the
    best step does not see; nan for a style. drift: see `trainer.scoring.drift`. copying: share
    of samples that repeat a photo. seconds: of the whole command. style_following: as following, by
    a reader that knows the style, of the looks that can be read in true drawings of it
    (`benchmarks.style_reader`); style_base: what the base shows of the same looks of the same
    prompts without the trigger, by the reader that comes with the trainer; style_true: what the
    style's reader finds of them in true drawings, the most there is to reach. nan for a face.
    """

    set: str
    configuration: str
    seed: int
    checkpoint: str
    step: int
    likeness: float
    leak: float
    base_likeness: float
    following: float
    base_following: float
    looks: float
    drift: float
    copying: float
    seconds: float
    style_following: float = float("nan")
    style_base: float = float("nan")
    style_true: float = float("nan")


def done(path: Path) -> set[tuple[str, str, int]]:
    """The runs whose rows are there."""
    if not path.exists():
        return set()
    with path.open(encoding="utf-8", newline="") as stream:
        return {(r["set"], r["configuration"], int(r["seed"])) for r in csv.DictReader(stream)}


def append(path: Path, row: Row) -> None:
    """Add a row, and the header to a new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Row)])
        if new:
            writer.writeheader()
        writer.writerow(asdict(row))


def hardware() -> str:
    """A short name of what this runs on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().replace(" ", "-")
    return f"cpu-{platform.machine()}"
