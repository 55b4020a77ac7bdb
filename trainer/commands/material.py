"""From folders to training pictures: everything that is read and judged before a base is loaded.

`likeness train` begins with it and `likeness prepare` is nothing else, so that what the doctor
shows is what is trained.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console

from trainer.commands.describe import describer_of
from trainer.commands.folders import Folder, look_through, require_all_usable
from trainer.commands.sets import photo_sets
from trainer.config.reader import Resolved
from trainer.config.settings import TrainConfig
from trainer.data.buckets import BucketPlan, place_photos
from trainer.data.cache import cache_root
from trainer.data.caption_variants import CaptionStyle
from trainer.data.captions import caption_photos
from trainer.data.decode import PictureError
from trainer.data.photos import PhotoProblem
from trainer.data.pixels import require_visible
from trainer.data.sets import PhotoSet, balanced
from trainer.data.variants import VariantPlan, add_variants
from trainer.doctor.checkup import CheckedSet, Checkup, diagnose
from trainer.doctor.examine import Examination, examine
from trainer.doctor.facts import FactStore
from trainer.doctor.findings import Diagnosis
from trainer.faces import FaceFinder, open_finder
from trainer.families import FAMILIES, BaseFacts, early
from trainer.training.reports import stage_progress
from trainer.types import Bucketed, Captioned, Photo


@dataclass(frozen=True, slots=True)
class Material:
    """What is trained on, and what is to be said of it.

    sets: the sets of photos and what is in their folders. styles: of their captions, by name.
    pictures: the training pictures of each set.
    """

    sets: tuple[CheckedSet, ...]
    styles: Mapping[str, CaptionStyle]
    pictures: tuple[tuple[Bucketed, ...], ...]
    diagnosis: Diagnosis

    def photos_of(self, role: str) -> tuple[Captioned, ...]:
        """The photos of all sets of a role, "subject" or "class"."""
        return tuple(item for kept in self.sets if kept.role == role for item in kept.captioned)

    def pictures_of(self, role: str) -> tuple[Bucketed, ...]:
        """The training pictures of all sets of a role."""
        both = zip(self.sets, self.pictures, strict=True)
        return tuple(picture for kept, made in both if kept.role == role for picture in made)


def gather(
    source: Path,
    resolved: Resolved,
    facts: BaseFacts,
    console: Console,
    *,
    strict: bool,
    processes: int = 1,
) -> Material:
    """Read, caption, examine and place all photos.

    Args:
        source: the main photo folder. facts: of the base.
        resolved: the settings, with resolution and bucket step filled in.
        console: where progress and the captioner's notice go.
        strict: as a training needs it: photos that cannot be used are an error, unless
            `data.skip_bad` leaves them out. processes: that train together.

    Raises:
        DataError: there are no photos, or `strict` and some cannot be used.
        ConfigError: the sets, the captioner or the face detector cannot be had.
    """
    config, data = resolved.config, resolved.config.data
    sets = photo_sets(source, resolved)
    describe = describer_of(config, facts, console)
    finder, faces_by = open_finder(
        data.face_detector,
        data.face_detector_file,
        data.face_recognizer_file,
        download=data.face_download,
        drawings=facts.embedded,
    )
    folders = [look_through(config, kept, console, workers=workers_of(config)) for kept in sets]
    if strict:
        require_all_usable(folders, skip_bad=data.skip_bad)
    examination = _examine(config, folders, finder, console)
    lost = {problem.path for problem in examination.problems}
    if strict and lost:
        require_all_usable(folders, examination.problems, skip_bad=data.skip_bad)
    styles = {kept.name: caption_style(config, kept) for kept in sets}
    captioned = [
        _caption(config, kept, folder, styles[kept.name], describe, lost)
        for kept, folder in zip(sets, folders, strict=True)
    ]
    placed = _place(config, facts, sets, captioned, examination)
    pictures = _vary(config, sets, placed)
    hidden = _hidden(pictures, data.transparency)
    if hidden:
        if strict:
            require_all_usable(folders, hidden, skip_bad=data.skip_bad)
        gone = {problem.path for problem in hidden}
        captioned = [
            tuple(item for item in items if item.photo.path not in gone) for items in captioned
        ]
        placed = _place(config, facts, sets, captioned, examination)
        pictures = _vary(config, sets, placed)
    checked = _checked(sets, folders, captioned, placed)
    diagnosis = diagnose(
        Checkup(
            folder=source,
            kind=config.run.kind,
            sets=checked,
            facts=examination.facts,
            resolutions=resolutions_of(config, facts),
            batch_size=config.data.batch_size,
            total_steps=config.run.total_steps,
            accumulate_steps=config.optimizer.accumulate_steps * processes,
            lost=(*examination.problems, *hidden),
            faces_by=faces_by,
            faces_certain=finder is not None and finder.certain,
            count_tokens=FAMILIES.load(facts.family).token_counter(facts),
            longest_tokens=75 * config.model.prompt_chunks,
        )
    )
    return Material(checked, styles, pictures, diagnosis)


def _examine(
    config: TrainConfig, folders: Sequence[Folder], finder: FaceFinder | None, console: Console
) -> Examination:
    """Measure all photos, or find what is kept of them."""
    store = FactStore(cache_root() / "facts" if config.data.cache else None)
    examination = examine(
        [photo for folder in folders for photo in folder.scan.photos],
        finder,
        store,
        workers=workers_of(config),
        progress=stage_progress(console, "photos examined"),
        background=config.data.background_rgb,
    )
    early.wait()  # what follows may load models itself
    if store.notice:
        console.print(store.notice, style="yellow", soft_wrap=True)
    return examination


def _hidden(
    pictures: Sequence[Sequence[Bucketed]], transparency: Literal["background", "mask"]
) -> tuple[PhotoProblem, ...]:
    """The photos of which a mask or transparency leaves nothing where they are cropped."""
    problems: dict[Path, PhotoProblem] = {}
    for picture in (picture for made in pictures for picture in made):
        path = picture.captioned.photo.path
        if path not in problems:
            try:
                require_visible(picture, transparency)
            except PictureError as error:
                problems[path] = PhotoProblem(path, error.reason, error.fix)
    return tuple(problems.values())


def _checked(
    sets: Sequence[PhotoSet],
    folders: Sequence[Folder],
    captioned: Sequence[tuple[Captioned, ...]],
    placed: Sequence[tuple[Bucketed, ...]],
) -> tuple[CheckedSet, ...]:
    return tuple(
        CheckedSet(
            name=kept.name,
            folder=kept.folder,
            role=kept.role,
            trigger=kept.trigger,
            scan=folder.scan,
            captioned=items,
            crops=crops,
            sidecars=folder.sidecars,
            orphans=folder.orphans,
        )
        for kept, folder, items, crops in zip(sets, folders, captioned, placed, strict=True)
    )


def workers_of(config: TrainConfig) -> int:
    """How many photos are read at the same time."""
    return config.data.workers or min(8, os.cpu_count() or 1)


def resolutions_of(config: TrainConfig, facts: BaseFacts) -> tuple[int, ...]:
    """The training resolutions, in pixels of a square's side."""
    return config.data.resolutions or (facts.resolution,)


def caption_style(config: TrainConfig, kept: PhotoSet) -> CaptionStyle:
    """What is done to the captions of a set."""
    caption = config.caption
    return CaptionStyle(
        trigger=kept.trigger,
        class_noun=kept.class_noun,
        prefix=caption.prefix,
        suffix=caption.suffix,
        separator=caption.separator,
        shuffle_tags=caption.shuffle_tags,
        keep_tags=caption.keep_tags,
        tag_dropout=caption.tag_dropout,
        wildcards=caption.wildcards,
    )


def _caption(
    config: TrainConfig,
    kept: PhotoSet,
    folder: Folder,
    style: CaptionStyle,
    describe: Callable[[Photo], str] | None,
    lost: Set[Path],
) -> tuple[Captioned, ...]:
    """The photos that can be trained on, each with its texts."""
    unread = {path for path, sidecar in folder.sidecars.items() if sidecar.problem} | lost
    captioned = caption_photos(
        [photo for photo in folder.scan.photos if photo.path not in unread],
        trigger=kept.trigger,
        class_noun=kept.class_noun,
        template=kept.template,
        use_sidecars=config.caption.use_sidecars,
        describe=describe,
        style=style,
        several_lines=config.caption.several_lines,
    )
    return tuple(replace(item, set_name=kept.name) for item in captioned)


def _place(
    config: TrainConfig,
    facts: BaseFacts,
    sets: Sequence[PhotoSet],
    captioned: Sequence[Sequence[Captioned]],
    examination: Examination,
) -> list[tuple[Bucketed, ...]]:
    """The plain training pictures of each set."""
    data = config.data
    plan = BucketPlan(
        resolutions=resolutions_of(config, facts),
        step_px=data.bucket_step_px or facts.bucket_step_px,
        max_aspect=data.max_aspect,
        enlarge=data.enlarge,
        face_crop=data.face_crop,
    )
    faces = {digest: seen.faces or () for digest, seen in examination.facts.items()}
    filled = [number for number, items in enumerate(captioned) if items]
    shares = dict(
        zip(
            filled,
            balanced([sets[n] for n in filled], [len(captioned[n]) for n in filled]),
            strict=True,
        )
    )
    placed: list[tuple[Bucketed, ...]] = []
    for number, items in enumerate(captioned):
        repeats, weight = shares.get(number, (1, 1.0))
        set_key = sets[number].name if number else ""
        placed.append(
            place_photos(items, plan, faces, repeats=repeats, weight=weight, set_key=set_key)
        )
    return placed


def _vary(
    config: TrainConfig, sets: Sequence[PhotoSet], placed: Sequence[Sequence[Bucketed]]
) -> tuple[tuple[Bucketed, ...], ...]:
    """All training pictures of each set: the plain ones and their variants."""
    data = config.data
    return tuple(
        add_variants(
            pictures,
            VariantPlan(
                count=data.variants,
                zoom=data.zoom,
                shift=data.shift,
                colour=data.colour,
                flip=kept.flip,
                seed=config.run.seed,
            ),
        )
        for kept, pictures in zip(sets, placed, strict=True)
    )
