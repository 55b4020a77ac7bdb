"""What is in a photo folder, by name alone: pictures, masks, captions, other and system files."""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from trainer.data.decode import shown
from trainer.errors import DataError

PHOTO_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp"),
    *(".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".hif"),
)
MASK_ENDING = "-mask"  # of the name before its suffix, in upper or lower case
SYSTEM_FILES = ("__macosx", "thumbs.db", "desktop.ini")


@dataclass(slots=True)
class Listing:
    """The files of a folder.

    pictures, masks: sorted by `natural_key`.
    other: files that are neither pictures, masks nor the sidecar captions of pictures.
    locked: sub-folders that cannot be listed, each with the system's reason.
    linked: links to folders that would have been looked into if they were folders.
    has_folders: whether there are sub-folders.
    hidden: how many system files and hidden files and folders were passed over.
    """

    pictures: list[Path] = field(default_factory=list)
    masks: list[Path] = field(default_factory=list)
    other: list[Path] = field(default_factory=list)
    locked: list[tuple[Path, str]] = field(default_factory=list)
    linked: list[Path] = field(default_factory=list)
    has_folders: bool = False
    hidden: int = 0


def list_folder(folder: Path, *, recursive: bool) -> Listing:
    """Sort the files of a folder, and of those below it if `recursive`, by what they are.

    Links to folders are not followed: they may lead back here, or to the whole disk.

    Raises:
        DataError: there is no such folder, or it cannot be listed.
    """
    _require_folder(folder)
    listing = Listing()

    def unreadable(error: OSError) -> None:
        place, reason = Path(error.filename), error.strerror or "unknown reason"
        if place != folder:
            listing.locked.append((place, reason))
            return
        raise DataError(
            f"The folder '{shown(folder)}' cannot be listed ({reason}).",
            where=shown(folder.absolute()),
            fix="Give yourself the permission to read it.",
        ) from error

    seen: set[tuple[int, int]] = set()
    for root, folder_names, file_names in os.walk(folder, onerror=unreadable):
        place = Path(root)
        if _seen_before(place, seen):
            folder_names.clear()
            continue
        folders = [name for name in folder_names if not _is_hidden(name)]
        names = [name for name in file_names if not _is_hidden(name)]
        listing.hidden += len(folder_names) + len(file_names) - len(folders) - len(names)
        listing.has_folders |= bool(folders)
        folder_names[:] = sorted(folders) if recursive else []
        listing.linked += [place / name for name in folder_names if (place / name).is_symlink()]
        _sort_out(listing, [place / name for name in names])
    for paths in (listing.pictures, listing.masks):
        paths.sort(key=lambda path: natural_key(path.relative_to(folder)))
    return listing


def folders_with_pictures(folder: Path) -> tuple[Path, ...]:
    """The folders below a folder that hold pictures of their own, in natural order."""
    found = {path.parent for path in list_folder(folder, recursive=True).pictures} - {folder}
    return tuple(sorted(found, key=natural_key))


def pair_masks(listing: Listing) -> tuple[dict[Path, Path], list[tuple[Path, str]]]:
    """Find the photos of the masks: "a-mask.png" is the mask of every picture named "a".

    Returns:
        The mask of each photo that has one; and the masks left over, each with what is odd about
        it, going on from its name.
    """
    photos: dict[tuple[Path, str], list[Path]] = {}
    for path in listing.pictures:
        photos.setdefault(_folded(stem_key(path)), []).append(path)
    pairs: dict[Path, Path] = {}
    left_over = []
    for mask in listing.masks:
        stem = mask.stem[: -len(MASK_ENDING)]
        own = photos.get(_folded(stem_key(mask.with_name(f"{stem}{mask.suffix}"))), [])
        if not own:
            left_over.append(
                (mask, f"is a mask by its name, but there is no photo '{shown(stem)}'")
            )
        elif own[0] in pairs:
            first = shown(pairs[own[0]].name)
            left_over.append((mask, f"is a second mask of {shown(own[0].name)}, beside {first}"))
        else:
            pairs.update(dict.fromkeys(own, mask))
    return pairs, left_over


def stem_key(path: Path) -> tuple[Path, str]:
    """Equal for a photo and its sidecar, whichever way accented letters are written in each."""
    return path.parent, unicodedata.normalize("NFC", path.stem)


def natural_key(path: Path) -> tuple[tuple[tuple[tuple[int, int], ...], str], ...]:
    """Sorts "2.jpg" before "10.jpg", the same on every file system."""
    stems = (*path.parts[:-1], path.stem)
    return tuple((_characters(s), part) for s, part in zip(stems, path.parts, strict=True))


def _characters(name: str) -> tuple[tuple[int, int], ...]:
    """The characters' numbers, with a run of digits as one character and its value."""
    folded = unicodedata.normalize("NFC", name).casefold()
    runs = re.findall(r"[0-9]+|[^0-9]", folded, re.DOTALL)
    return tuple((ord("0"), int(r)) if r[0] in "0123456789" else (ord(r), 0) for r in runs)


def _require_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    where = shown(folder.absolute())
    if folder.exists():
        raise DataError(
            f"'{shown(folder)}' is a file, not a folder.",
            where=where,
            fix=f"Give the folder that holds the photos: '{shown(folder.parent)}'.",
        )
    try:
        beside = folder.absolute().parent.iterdir()
        names = {path.name.casefold(): path.name for path in beside if path.is_dir()}
    except OSError:  # the parent is missing or locked: there is nothing to suggest
        names = {}
    near = difflib.get_close_matches(folder.name.casefold(), names, n=1)
    fix = "Check the path of the photo folder."
    if near:
        fix = f"Did you mean '{shown(folder.parent / names[near[0]])}'?"
    raise DataError(f"There is no folder '{shown(folder)}'.", where=where, fix=fix)


def _seen_before(folder: Path, seen: set[tuple[int, int]]) -> bool:
    """Whether a folder was reached before, by a junction of Windows or a mount that leads back."""
    try:
        status = folder.stat()
    except OSError:  # deleted meanwhile
        return True
    key = (status.st_dev, status.st_ino)
    if key in seen and status.st_ino:  # 0 where the file system does not number its files
        return True
    seen.add(key)
    return False


def _sort_out(listing: Listing, files: list[Path]) -> None:
    pictures = [path for path in files if path.suffix.lower() in PHOTO_SUFFIXES]
    photos: list[Path] = []
    for path in pictures:
        is_mask = path.stem.casefold().endswith(MASK_ENDING)
        (listing.masks if is_mask else photos).append(path)
    listing.pictures += photos
    captioned = {stem_key(path) for path in photos}
    for path in files:
        is_sidecar = path.suffix.lower() == ".txt" and stem_key(path) in captioned
        if path.suffix.lower() not in PHOTO_SUFFIXES and not is_sidecar:
            listing.other.append(path)


def _folded(key: tuple[Path, str]) -> tuple[Path, str]:
    return key[0], key[1].casefold()


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.casefold() in SYSTEM_FILES
