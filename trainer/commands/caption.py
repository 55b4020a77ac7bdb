"""`likeness caption`: writes what a captioner says of each photo into a .txt file beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from trainer.commands.describe import OWN, describer
from trainer.data.captions import find_sidecars, write_sidecar
from trainer.data.listing import stem_key
from trainer.data.photos import require_usable, scan_folder

WHITE = (255, 255, 255)


@dataclass(frozen=True, slots=True)
class Request:
    """The command line of `likeness caption`."""

    photos: Path
    kind: str = "face"
    captioner: str = OWN
    recursive: bool = False
    overwrite: bool = False


def run(request: Request) -> None:
    """Write the captions; files that are there stay unless they are to be overwritten.

    Raises:
        TrainerError: no photo can be used, or the captioner cannot; nothing has been written then.
    """
    console = Console(markup=False, highlight=False, soft_wrap=True)
    scan = scan_folder(request.photos, recursive=request.recursive)
    photos = require_usable(scan, skip_bad=True)
    for problem in scan.problems:
        console.print(f"{problem.path.name} {problem.reason}. {problem.fix}", style="yellow")
    sidecars = find_sidecars(photos)
    describe = describer(
        "blip", request.captioner, console, kind=request.kind, background=WHITE, device="auto"
    )
    written: dict[tuple[Path, str], Path] = {}
    kept = 0
    for photo in photos:
        sidecar = sidecars.get(photo.path)
        if sidecar and not request.overwrite:
            kept += 1
        elif first := written.get(stem_key(photo.path)):
            console.print(f"{photo.path.name}: shares the caption of {first.name}")
        elif text := describe(photo):
            path = sidecar or photo.path.with_suffix(".txt")
            write_sidecar(path, text, overwrite=bool(sidecar))
            written[stem_key(photo.path)] = photo.path
            console.print(f"{photo.path.name}: {text}")
        else:
            console.print(f"{photo.path.name}: the captioner has no words for it", style="yellow")
    if written:
        console.print(
            f"Captions written: {len(written)}, each in a .txt file beside its photo. Edit them as "
            "you like; the trigger word is put in front when you train."
        )
    if kept:
        console.print(f"Photos with a .txt file, which stays: {kept}. --overwrite replaces it.")
