"""What was found by trying on this machine, and is kept to from then on.

Two ways that are about as quick win by turns, and each ends in last digits of its own. So the first
answer holds for every run on a machine, as long as its hardware and the libraries stay the same:
the same command then gives the same file again.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Collection
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from trainer.data.cache import fingerprint
from trainer.data.cache_folder import cache_root, delete, trial_path
from trainer.data.publish import publish
from trainer.machine import processor_name
from trainer.untrusted import read_json

# Raise it when a trial is made in another way: what was found before is then found anew.
VERSION = 1
# What answers depend on, beside the hardware.
_LIBRARIES = ("torch", "xformers")

# What this process has found or read, by its key: where nothing can be written, too, all of a run
# is told the same.
_known: dict[str, str] = {}


def answer(
    question: str,
    device: torch.device,
    among: Collection[str],
    trial: Callable[[], str],
    holds: Callable[[str], bool] = bool,
) -> str:
    """What a trial found when it was first made on this machine.

    It is kept in the cache folder; where that cannot be written it holds for this process.

    Args:
        question: what is tried, with all that the answer depends on but hardware and libraries.
        device: that it is tried on.
        among: the possible answers.
        trial: makes it; "" where nothing could be found out, which is not kept.
        holds: whether a kept answer still can be taken; else it is tried anew.
    """
    machine = hardware(device)
    key = fingerprint("trial", VERSION, question, machine, [*map(_version, _LIBRARIES)])
    if key not in _known:
        path = trial_path(cache_root(), key)
        found = _read(path, among)
        if found and not holds(found):
            delete([path])
            found = ""
        if not found:
            found = trial()
            if not found:
                return ""
            try:
                _write(path, {"question": f"{question} on {machine}", "answer": found})
            except FileExistsError:  # another run was quicker
                found = _read(path, among) or found
            except OSError:
                pass
        _known[key] = found
    return _known[key]


def hardware(device: torch.device) -> str:
    """The name of what computes."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def _read(path: Path, among: Collection[str]) -> str:
    """The answer in a file; "" where there is none or it is not as it was written."""
    try:
        kept = read_json(path)
        if kept.pop("check") != fingerprint(kept) or kept["answer"] not in among:
            raise ValueError("not as it was written")
    except OSError:  # none, or it cannot be read just now
        return ""
    except (ValueError, LookupError, TypeError, AttributeError):
        delete([path])
        return ""
    with suppress(OSError):
        os.utime(path)  # says when it was last used
    return str(kept["answer"])


def _write(path: Path, kept: dict[str, str]) -> None:
    """Raises FileExistsError: there is an answer by now; OSError: the folder cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem[-64:]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        text = json.dumps(kept | {"check": fingerprint(kept)})
        temporary.write_text(text, encoding="utf-8")
        publish(temporary, path)
    finally:
        delete([temporary])
