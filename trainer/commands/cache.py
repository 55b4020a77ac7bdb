"""`likeness cache`: what is kept on disk of earlier runs, and making it smaller."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.cache_folder import (
    Entry,
    Listing,
    beyond_limit,
    cache_root,
    delete,
    left_overs,
    list_entries,
    unused_for,
)
from trainer.errors import OutputError, UsageError

# What each kind of entry is, in the order they are shown.
KINDS = {
    "latents": "encoded photos",
    "weights": "weights of masks and faces",
    "prompt": "encoded captions",
    "prior": "pictures of the class",
    "facts": "what was measured on photos",
    "hashes": "hashes of model files",
    "trial": "what is the quickest here",
    "": "of an earlier version",
}
_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


@dataclass(frozen=True, slots=True)
class Request:
    """What was typed. prune_days, limit_gb: None where it was not. A GB is 10**9 bytes."""

    prune_days: float | None = None
    limit_gb: float | None = None
    clear: bool = False


def run(request: Request) -> None:
    """Delete what was asked for, then show what is there.

    Everything in the cache can be made again, so nothing is asked.

    Raises:
        UsageError: a number of days or GB that makes no sense.
        OutputError: the folder may not be read.
    """
    _require_sense(request)
    folder = cache_root()
    try:
        listing = list_entries(folder)
        old = left_overs(folder)
    except OSError as error:
        raise OutputError(
            f"The cache cannot be read: {error.strerror or error}.",
            where=str(folder),
            fix="Give yourself the permission to read it, or name another folder in "
            "LIKENESS_CACHE.",
        ) from error
    if request != Request():
        _delete(_chosen(listing.entries, request), old)
        listing = list_entries(folder)
    _show(folder, listing)


def _require_sense(request: Request) -> None:
    for flag, value in (("--prune-days", request.prune_days), ("--limit", request.limit_gb)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UsageError(f"{flag} {value:g} makes no sense.", fix="Give a number from 0 on.")


def _chosen(entries: Sequence[Entry], request: Request) -> list[Entry]:
    """What is to be deleted."""
    if request.clear:
        return list(entries)
    chosen = [] if request.prune_days is None else unused_for(entries, request.prune_days)
    if request.limit_gb is not None:
        paths = {entry.path for entry in chosen}
        rest = [entry for entry in entries if entry.path not in paths]
        chosen += beyond_limit(rest, request.limit_gb * 1e9)
    return chosen


def _delete(entries: Sequence[Entry], old: Sequence[Path]) -> None:
    gone = [entry for entry in entries if delete([entry.path])]
    freed = sum(entry.size_bytes for entry in gone)
    print(f"Deleted {_counted(len(gone), 'entry', 'entries')}, {_size(freed)}.")
    if stuck := len(entries) - len(gone):
        them = "it" if stuck == 1 else "them"
        kept = _counted(stuck, "entry", "entries")
        print(f"{kept} could not be deleted; another run may be reading {them}.")
    delete(old)


def _show(folder: Path, listing: Listing) -> None:
    print(f"Cache: {folder}")
    if not listing.entries:
        print("It is empty.")
    rows = [("", "entries", "size", "oldest", "newest")]
    named = {kind: kind if kind in KINDS else "" for kind in {e.kind for e in listing.entries}}
    for kind, words in KINDS.items():
        entries = [entry for entry in listing.entries if named[entry.kind] == kind]
        if entries:
            rows.append((words, *_summary(entries)))
    if len(rows) > 2:
        rows.append(("in all", *_summary(listing.entries)))
    if len(rows) > 1:
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        for first, *others in rows:
            cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
            print("  ".join(["", first.ljust(widths[0]), *cells]).rstrip())
    if listing.strangers:
        files = _counted(listing.strangers, "other file", "other files")
        print(f"{files}, damaged or not of this program: left alone.")


def _summary(entries: Sequence[Entry]) -> tuple[str, str, str, str]:
    days = sorted(entry.made[:10] for entry in entries if entry.made) or ["unknown"]
    size = sum(entry.size_bytes for entry in entries)
    return f"{len(entries):,}", _size(size), days[0], days[-1]


def _size(number: int) -> str:
    for unit, factor in _UNITS:
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number} bytes"


def _counted(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
