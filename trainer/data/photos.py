"""A folder of files -> the photos in it, and one sentence for each that cannot be used.

Nothing a camera, phone, browser or operating system leaves in a folder may crash a run or be
dropped in silence: each picture is either a `Photo` or a `PhotoProblem`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from trainer.data.decode import PictureError, decode_upright, measure, read_mask, shown
from trainer.data.listing import (
    MASK_ENDING,
    PHOTO_SUFFIXES,
    Listing,
    folders_with_pictures,
    list_folder,
    natural_key,
    pair_masks,
)
from trainer.data.opening import file_digest
from trainer.errors import DataError
from trainer.types import Photo, Size

__all__ = ["PhotoProblem", "PhotoScan", "decode_upright", "require_usable", "scan_folder"]

# A photo narrower than this would lose nearly everything to the crop.
MAXIMUM_ASPECT = 10


@dataclass(frozen=True, slots=True)
class PhotoProblem:
    """A file that cannot be used; `reason` goes on from its name ("is empty (0 bytes)")."""

    path: Path
    reason: str
    fix: str


@dataclass(frozen=True, slots=True)
class PhotoScan:
    """What a folder holds.

    photos, problems: in natural order of their names ("2.jpg" before "10.jpg").
    hidden: files and folders of the operating system, skipped.
    other: files that are neither photos nor the captions or masks of photos, skipped.
    duplicates: groups of photos whose files are equal byte for byte; all are in `photos`.
    linked: links to folders, which are not followed.
    below: sub-folders with pictures, which were not looked into.
    """

    photos: tuple[Photo, ...]
    problems: tuple[PhotoProblem, ...]
    hidden: int
    other: int
    duplicates: tuple[tuple[Path, ...], ...] = ()
    linked: tuple[Path, ...] = ()
    below: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class _Limits:
    minimum_side_px: int
    maximum_megapixels: float


def scan_folder(
    folder: Path,
    *,
    recursive: bool = False,
    minimum_side_px: int = 32,
    maximum_megapixels: float = 100.0,
    masks: bool = True,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PhotoScan:
    """Find the photos in a folder and decode each one once; none is kept in memory.

    Args:
        folder: where to look.
        recursive: look into its sub-folders too; links to folders are never followed.
        minimum_side_px: photos with a shorter side are problems.
        maximum_megapixels: photos and masks with more pixels are problems, refused before decoding.
        masks: read the masks beside the photos ("a-mask.png" for every picture named "a"); they
            are never taken for photos.
        workers: photos decoded at the same time.
        progress: called with (photos done, photos in all).

    Raises:
        DataError: there is no such folder, it cannot be listed, or it holds no photos at all.
    """
    listing = list_folder(folder, recursive=recursive)
    if not listing.pictures and not listing.locked and not listing.masks:
        raise _no_photos(folder, recursive, listing)
    pairs, left_over = pair_masks(listing)
    problems = [_locked_folder(path, reason) for path, reason in listing.locked]
    problems += [_odd_mask(path, reason) for path, reason in left_over]
    photos: list[Photo] = []
    limits = _Limits(minimum_side_px, maximum_megapixels)
    read = partial(_read, masks=pairs if masks else {}, limits=limits)
    with closing(_in_order(read, listing.pictures, workers)) as results:
        for done, (photo, found) in enumerate(results, start=1):
            photos += [photo] if photo else []
            problems += found
            progress(done, len(listing.pictures))
    # One line for a mask that several photos share.
    problems = list({problem.path: problem for problem in problems}.values())
    problems.sort(key=lambda problem: natural_key(problem.path.relative_to(folder)))
    return PhotoScan(
        photos=tuple(photos),
        problems=tuple(problems),
        hidden=listing.hidden,
        other=len(listing.other),
        duplicates=_duplicates(photos),
        linked=tuple(listing.linked),
        below=folders_with_pictures(folder) if listing.has_folders and not recursive else (),
    )


def require_usable(scan: PhotoScan, *, skip_bad: bool) -> tuple[Photo, ...]:
    """The photos to train on.

    Args:
        scan: what the folder holds.
        skip_bad: train on the usable photos even if there are others.

    Raises:
        DataError: no photo is usable, or some are not and `skip_bad` is off; all are listed.
    """
    if scan.photos and (skip_bad or not scan.problems):
        return scan.photos
    bad, total = len(scan.problems), len(scan.problems) + len(scan.photos)
    fix = "Fix these"
    if scan.photos:
        fix += f", or run with --set data.skip_bad=true to train on the other {len(scan.photos)}"
    raise DataError(
        f"Photo folder problem: {bad} of {total} photos cannot be used.",
        where="\n".join(f"{shown(p.path)} {p.reason}. {p.fix}" for p in scan.problems),
        fix=f"{fix}.",
    )


def _in_order(
    read: Callable[[Path], tuple[Photo | None, list[PhotoProblem]]],
    paths: Sequence[Path],
    workers: int,
) -> Generator[tuple[Photo | None, list[PhotoProblem]], None, None]:
    """What `read` says of each path, in their order; Pillow decodes without holding the GIL."""
    if workers <= 1:
        yield from map(read, paths)
        return
    pool = ThreadPoolExecutor(workers)
    try:
        yield from pool.map(read, paths)
    finally:  # Ctrl-C waits for the photos at work only
        pool.shutdown(cancel_futures=True)


def _read(
    path: Path, *, masks: Mapping[Path, Path], limits: _Limits
) -> tuple[Photo | None, list[PhotoProblem]]:
    """A photo with its mask, or why not; a mask that cannot be used leaves the photo without."""
    try:
        measured = measure(path, maximum_megapixels=limits.maximum_megapixels)
        _require_photo_shape(path, measured.size, limits.minimum_side_px)
        photo = Photo(path, measured.size, file_digest(path), notices=measured.notices)
    except PictureError as error:
        return None, [PhotoProblem(path, error.reason, error.fix)]
    mask = masks.get(path)
    if mask is None:
        return photo, []
    try:
        read_mask(mask, photo.size, maximum_megapixels=limits.maximum_megapixels)
        return replace(photo, mask=mask, mask_digest=file_digest(mask)), []
    except PictureError as error:
        notice = f"has a mask that cannot be used ({shown(mask.name)}); all of it is trained"
        photo = replace(photo, notices=(*photo.notices, notice))
        return photo, [PhotoProblem(mask, error.reason, error.fix)]


def _require_photo_shape(path: Path, size: Size, minimum_side_px: int) -> None:
    short, long = sorted((size.width, size.height))
    pixels = f"is {size.width} x {size.height} px"
    if short < minimum_side_px:
        reason = f"{pixels}; the smallest usable side is {minimum_side_px} px"
        raise PictureError(path, reason, "Use a larger version, or remove it.")
    if long > MAXIMUM_ASPECT * short:
        reason = f"{pixels}; nearly all of it would be cropped away"
        raise PictureError(path, reason, "Cut it to the shape of a photo, or remove it.")


def _locked_folder(path: Path, reason: str) -> PhotoProblem:
    fix = "Give yourself the permission to read it, or remove it."
    return PhotoProblem(path, f"is a folder that cannot be listed ({reason})", fix)


def _odd_mask(path: Path, reason: str) -> PhotoProblem:
    fix = f"Rename it if it is a photo itself (not to end in '{MASK_ENDING}'), or remove it."
    return PhotoProblem(path, reason, fix)


def _no_photos(folder: Path, recursive: bool, listing: Listing) -> DataError:
    where = shown(folder.absolute())
    if not recursive and listing.has_folders:
        below = len(list_folder(folder, recursive=True).pictures)
        if below:
            return DataError(
                f"All photos ({below}) are in sub-folders of '{shown(folder)}'.",
                where=where,
                fix="Run with --set data.recursive=true, or give one of the sub-folders.",
            )
    number = len(listing.other)
    found = f"it holds {number} other file{'s'[: number != 1]}" if number else "it is empty"
    kinds = ", ".join(suffix[1:] for suffix in PHOTO_SUFFIXES)
    return DataError(
        f"There are no photos in '{shown(folder)}': {found}.",
        where=where,
        fix=f"Put photos into it ({kinds}).",
    )


def _duplicates(photos: list[Photo]) -> tuple[tuple[Path, ...], ...]:
    groups: dict[str, list[Path]] = {}
    for photo in photos:
        groups.setdefault(photo.digest, []).append(photo.path)
    return tuple(tuple(paths) for paths in groups.values() if len(paths) > 1)
