"""The folders of a training: what is in each, and what of it cannot be trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from trainer.config.settings import TrainConfig
from trainer.data.captions import orphan_sidecars
from trainer.data.decode import shown
from trainer.data.listing import natural_key
from trainer.data.photos import PhotoProblem, PhotoScan, require_usable, scan_folder
from trainer.data.sets import PhotoSet
from trainer.doctor.sidecars import Sidecar, read_sidecars
from trainer.training.reports import stage_progress


@dataclass(frozen=True, slots=True)
class Folder:
    """What is in the folder of a set."""

    scan: PhotoScan
    sidecars: Mapping[Path, Sidecar]
    orphans: tuple[Path, ...]


def look_through(config: TrainConfig, kept: PhotoSet, console: Console, *, workers: int) -> Folder:
    """Look through the folder of a set; of a large one it is said how far that is.

    Raises:
        DataError: it cannot be listed, or holds no photos.
    """
    say = stage_progress(console, f"files read in {shown(kept.folder.name)}")
    found = scan_folder(
        kept.folder,
        recursive=kept.recursive,
        maximum_megapixels=config.data.maximum_megapixels,
        masks=config.data.masks,
        workers=workers,
        # The end needs no word: how many photos there are is said with everything else.
        progress=lambda done, total: say(done, total) if done < total else None,
    )
    if not config.caption.use_sidecars:
        return Folder(found, {}, ())
    sidecars = read_sidecars(found.photos)
    orphans = orphan_sidecars(kept.folder, found.photos, recursive=kept.recursive)
    return Folder(found, sidecars, orphans)


def require_all_usable(
    folders: Sequence[Folder], lost: Sequence[PhotoProblem] = (), *, skip_bad: bool
) -> None:
    """Name all that cannot be trained on at once, whatever set it is in.

    lost: photos that went away after their folder was looked through.

    Raises:
        DataError: some cannot be used and `skip_bad` is off, or none of a set can.
    """
    scans = []
    for folder in folders:
        unfit = [
            PhotoProblem(path, f"has a caption that cannot be used: {s.problem.rstrip('.')}", s.fix)
            for path, s in folder.sidecars.items()
            if s.problem
        ]
        own = {photo.path for photo in folder.scan.photos}
        unfit += [problem for problem in lost if problem.path in own]
        bad = {problem.path: problem for problem in (*folder.scan.problems, *unfit)}
        usable = tuple(photo for photo in folder.scan.photos if photo.path not in bad)
        problems = tuple(bad[path] for path in sorted(bad, key=natural_key))
        scans.append(PhotoScan(usable, problems, hidden=0, other=0))
    everything = PhotoScan(
        photos=tuple(photo for scan in scans for photo in scan.photos),
        problems=tuple(problem for scan in scans for problem in scan.problems),
        hidden=0,
        other=0,
    )
    require_usable(everything, skip_bad=skip_bad)
    for scan in scans:
        require_usable(scan, skip_bad=True)
