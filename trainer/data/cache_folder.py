"""The cache as files in a folder: where it is, what is in it, and how to make it smaller.

Knows nothing of tensors, so that looking at the cache takes no time. Only files that name
themselves as ours, by their name and in their header, are ever deleted.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.untrusted import parse_json, read_json

# The part of an entry's header that proves it to be ours and whole.
CHECKSUM = "sha256"
# How long nothing may have been written to a file for it to be a left-over of a run that died.
LEFT_OVER_SECONDS = 24 * 60 * 60
# Headers of our entries are below 2 KiB; whatever claims a longer one is not ours.
_LONGEST_HEADER = 64 * 1024
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}\.[0-9]+(-[0-9a-f]+)?\.tmp")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Where the doctor keeps what it measured on each photo, in sub-folders by the first two digits.
FACTS_FOLDER = "facts"
_FACTS = re.compile(r"[0-9a-f]{64}\.json")
# The hashes of large model files.
HASHES_NAME = "file-hashes.json"
# What was tried out on this machine.
_TRIAL = re.compile(r"trial-[0-9a-f]{64}\.json")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the cache.

    kind: "latents", "weights", "prompt", "prior", "facts", "hashes" or "trial". made: when, ISO
    8601 in UTC. version: of the program that made it. source: the photo's name or the text it was
    made of. Each of these is "" where the file does not say. used: when it was last read or
    written (seconds since 1970; to about a day).
    """

    path: Path
    kind: str
    made: str
    version: str
    source: str
    size_bytes: int
    used: float


@dataclass(frozen=True, slots=True)
class Listing:
    """All of a cache folder: our entries, and how many files there are not known to be ours."""

    entries: tuple[Entry, ...]
    strangers: int


def cache_root() -> Path:
    """The folder for all caches: `LIKENESS_CACHE`, else the platform's place for a user's caches.

    Nothing is created.
    """
    chosen = os.environ.get("LIKENESS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home folder, as in some containers
        return Path(tempfile.gettempdir()) / "likeness-cache"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else home / "AppData" / "Local") / "likeness" / "cache"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "likeness"
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG base directory specification: relative paths there are to be ignored.
    return (base if base.is_absolute() else home / ".cache") / "likeness"


def entry_path(folder: Path, key: str) -> Path:
    """Where the entry of a key is.

    Raises:
        ValueError: the key is not a fingerprint.
    """
    if not _SHA256.fullmatch(key):
        raise ValueError(f"a cache key is a fingerprint, not {key!r}")
    return folder / f"{key}.safetensors"


def trial_path(folder: Path, key: str) -> Path:
    """Where the answer to a trial is kept; of a key that is a fingerprint."""
    return folder / f"trial-{key}.json"


def list_entries(folder: Path) -> Listing:
    """What is in a cache folder; empty if there is no such folder.

    Raises:
        OSError: the folder is there but may not be read.
    """
    entries, strangers = [], 0
    for path in _files(folder):
        if not _TEMPORARY.fullmatch(path.name):
            entry = _entry(path)
            entries += [entry] if entry else []
            strangers += entry is None
    return Listing(tuple(entries), strangers)


def left_overs(folder: Path) -> tuple[Path, ...]:
    """Half-written files of runs that died: ours by name, and old."""
    now, found = time.time(), []
    for path in _files(folder):
        if _TEMPORARY.fullmatch(path.name):
            try:
                age = now - path.stat().st_mtime
            except OSError:  # finished or removed just now
                continue
            if age > LEFT_OVER_SECONDS:
                found.append(path)
    return tuple(found)


def unused_for(entries: Iterable[Entry], days: float) -> list[Entry]:
    """The entries that no run has read for so many days."""
    limit = time.time() - days * 24 * 60 * 60
    return [entry for entry in entries if entry.used <= limit]


def beyond_limit(entries: Sequence[Entry], limit_bytes: float) -> list[Entry]:
    """The entries to delete, those unused for the longest first, for the rest to fit the limit."""
    total = sum(entry.size_bytes for entry in entries)
    chosen = []
    for entry in sorted(entries, key=lambda entry: (entry.used, entry.path.name)):
        if total <= limit_bytes:
            break
        chosen.append(entry)
        total -= entry.size_bytes
    return chosen


def delete(paths: Iterable[Path]) -> int:
    """Delete files; how many are gone. One that is in use elsewhere (Windows) stays."""
    gone = 0
    for path in paths:
        try:
            path.unlink()
            gone += 1
        except FileNotFoundError:  # another run was quicker
            gone += 1
        except OSError:
            continue
    return gone


def _files(folder: Path) -> Iterator[Path]:
    """All files where ours may be; links are never followed out of the folder."""
    facts = folder / FACTS_FOLDER
    for place in (folder, *sorted(facts.glob("[0-9a-f][0-9a-f]"))):
        if place.is_dir() and (place == folder or not (facts.is_symlink() or place.is_symlink())):
            yield from (p for p in place.iterdir() if p.is_file() and not p.is_symlink())


def _entry(path: Path) -> Entry | None:
    """What a file says of itself; None if it is not one of ours."""
    try:
        stat = path.stat()
        words = _words(path)
    except (OSError, ValueError):
        return None
    if words is None:
        return None
    kind, made, version, source = words
    return Entry(path, kind, made, version, source, stat.st_size, stat.st_mtime)


def _words(path: Path) -> tuple[str, str, str, str] | None:
    """Kind, date, version and source of a file of ours."""
    if _ENTRY.fullmatch(path.name):
        metadata = _metadata(path)
        if not _SHA256.fullmatch(str(metadata.get(CHECKSUM))):
            return None
        kind, made, version, source = (
            str(metadata.get(name, "")) for name in ("kind", "made", "version", "source")
        )
        return kind, made, version, source
    if path.name == HASHES_NAME:
        return ("hashes", "", "", "") if _has(path, "check") else None
    if _TRIAL.fullmatch(path.name):
        return ("trial", "", "", "") if _has(path, "answer") else None
    if _FACTS.fullmatch(path.name) and path.parent.parent.name == FACTS_FOLDER:
        return ("facts", "", "", "") if _has(path, "digest") else None
    return None


def _has(path: Path, name: str) -> bool:
    """Whether a file is a JSON object with a value of that name."""
    kept = read_json(path)
    return isinstance(kept, dict) and name in kept


def _metadata(path: Path) -> dict[str, Any]:
    """The metadata in a safetensors file's header; raises ValueError if there is none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER:
            raise ValueError("the header is too long to be ours")
        header = parse_json(file.read(length))
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise ValueError("the header has no metadata")
    return metadata
