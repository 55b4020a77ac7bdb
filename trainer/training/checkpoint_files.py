"""Checkpoints as files: which there are, whether they are whole, putting them in place, clearing.

What a checkpoint is stands in its `state.json`, with the SHA-256 of its other files and of itself:
neither names nor dates count.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trainer.errors import FileFormatError
from trainer.untrusted import parse_json, read_text

FORMAT = 1
STATE = "state.json"
WEIGHTS = ("adapter.safetensors", "optimizer.safetensors")
# What the guards go back to, where it is not the checkpoint's own state.
SNAPSHOT = "snapshot.safetensors"
# A checkpoint that replaces one of the same step is called "-new" until that one is gone.
_FOLDER = re.compile(r"step-\d{6,}(-new)?")
# The facts name every picture and its captions: thousands of photos make some megabytes.
_MOST_STATE_BYTES = 2**28
# What a damaged checkpoint raises: its files, its JSON and its tensors.
READ_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    OverflowError,
    SafetensorError,
)


def read_state(folder: Path) -> dict[str, Any]:
    """What state.json says, sealed as it was written."""
    try:
        state: dict[str, Any] = parse_json(read_text(folder / STATE, _MOST_STATE_BYTES))
        if state["format"] != FORMAT:
            raise FileFormatError(f"it has format {state['format']}, this version reads {FORMAT}")
        if state.pop("seal") != seal_of(state) or type(state["step"]) is not int:
            raise FileFormatError("state.json is not what was written")
    except READ_ERRORS as error:
        raise FileFormatError(f"{type(error).__name__}: {error}", where=str(folder)) from error
    return state


def tensor_files(state: Mapping[str, Any]) -> list[str]:
    """The files of tensors in a checkpoint."""
    return [*WEIGHTS, *([SNAPSHOT] if SNAPSHOT in state["sha256"] else [])]


def require_as_written(path: Path, sha256: str, most_bytes: int | None) -> None:
    size = path.stat().st_size
    if most_bytes is not None and size > most_bytes:
        raise FileFormatError(f"{path.name} has {size} bytes, far more than this training needs")
    if file_sha256(path) != sha256:
        raise FileFormatError(f"{path.name} is not what was written")


def checkpoint_folders(folder: Path) -> list[Path]:
    """What may be finished checkpoints, in the order of their names."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _FOLDER.fullmatch(p.name) and p.is_dir())


def put_in_place(temporary: Path, final: Path) -> None:
    """Rename a written checkpoint; at every moment it or the one that it replaces is there."""
    if final.exists():
        beside = final.with_name(f"{final.name}-new")
        remove(beside)
        temporary.rename(beside)
        remove(final)
        temporary = beside
    temporary.rename(final)


def prune(folder: Path, newest: Path, step: int, keep: int) -> None:
    """Keep the newest checkpoint and the whole ones before it, `keep` in all.

    Damaged ones do not count. Those of later steps go as well: the run went on from an earlier
    step and comes to them again.
    """
    older: list[tuple[int, Path]] = []
    doomed: list[Path] = []
    for path in checkpoint_folders(folder):
        if path == newest:
            continue
        try:
            older.append((read_state(path)["step"], path))
        except FileFormatError as error:
            # What cannot be read just now may be read again later.
            if not isinstance(error.__cause__, OSError) or not (path / STATE).exists():
                doomed.append(path)
    kept = 1
    for own, path in sorted(older, key=lambda found: found[0], reverse=True):
        if own < step and kept < keep and _is_whole(path):
            kept += 1
        else:
            doomed.append(path)
    for path in doomed:
        # One that cannot be removed (another program has it open) is no reason to stop.
        with contextlib.suppress(OSError):
            remove(path)


def _is_whole(folder: Path) -> bool:
    try:
        state = read_state(folder)
        for name in tensor_files(state):
            require_as_written(folder / name, state["sha256"][name], None)
    except (FileNotFoundError, KeyError, TypeError, FileFormatError):
        return False
    except OSError:  # what cannot be read just now may be read again later
        return True
    return True


def remove(folder: Path) -> None:
    """Remove a folder so that it is never seen half there."""
    if folder.exists():
        doomed = folder.with_name(f".del-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def seal_of(state: Mapping[str, Any]) -> str:
    """SHA-256 of everything else in state.json."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
