"""Checkpoints: everything a run needs to go on as if it had never stopped.

    checkpoints/step-000100/
        adapter.safetensors     the trained weights, fp32
        optimizer.safetensors   the optimizer's tensors
        state.json              step, settings, numbers, the SHA-256 of the other files and its own

A checkpoint is written under another name, flushed to disk and then renamed; older ones go only
after that. Nothing is pickled. Data order, noise and learning rate are functions of the step, so
they need no state.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.errors import FileFormatError, OutputError
from trainer.training.learner import Learner

FORMAT = 1
FOLDER = re.compile(r"step-(\d{6,})")
# What a damaged checkpoint raises: its files, its JSON (RecursionError too) and its tensors.
READ_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
    SafetensorError,
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as read back. `facts` is what the run said about itself when it saved."""

    step: int
    facts: Mapping[str, Any]
    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    numbers: Mapping[str, Any]
    scaler: Mapping[str, Any]


def save_checkpoint(
    folder: Path, learner: Learner, step: int, facts: Mapping[str, Any], keep: int
) -> Path:
    """Write a checkpoint and remove all but the newest `keep`.

    Args:
        folder: the run's `checkpoints` folder.
        step: finished optimizer steps.
        facts: plain values to be compared when the run goes on.

    Raises:
        OutputError: it cannot be written; older checkpoints are untouched.
    """
    adapter = {
        f"{component}/{name}": tensor
        for component, attached in learner.adapters.items()
        for name, tensor in attached.state().items()
    }
    tensors, numbers = _optimizer_state(learner)
    scaler = learner.accelerator.scaler
    final = folder / f"step-{step:06d}"
    temporary = folder / f".tmp-{step:06d}-{os.getpid()}"
    try:
        _remove(temporary)
        temporary.mkdir(parents=True)
        save_file(adapter, temporary / "adapter.safetensors")
        save_file(tensors, temporary / "optimizer.safetensors")
        state = {
            "format": FORMAT,
            "step": step,
            "facts": facts,
            "numbers": numbers,
            "scaler": scaler.state_dict() if scaler is not None else {},
            "sha256": {path.name: _sha256(path) for path in sorted(temporary.iterdir())},
        }
        state["seal"] = _seal(state)
        (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        for path in temporary.iterdir():
            _flush(path)
        _remove(final)
        temporary.rename(final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(
            f"The checkpoint of step {step} cannot be written: {error}",
            where=str(final),
            fix="Free some space or make the folder writable, then go on with --resume.",
        ) from error
    for old in _folders(folder)[keep:]:
        # One that cannot be removed (another program has it open) is no reason to stop.
        with contextlib.suppress(OSError):
            _remove(old)
    return final


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a sentence about each damaged one before it."""
    notices: list[str] = []
    for path in _folders(folder):
        try:
            return _read(path), notices
        except FileFormatError as error:
            notices.append(f"{path.name} is damaged and was passed over: {error.what}")
    return None, notices


def restore(learner: Learner, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights and optimizer state into a learner.

    Raises:
        FileFormatError: it belongs to other layers or another rank.
    """
    for component, attached in learner.adapters.items():
        prefix = f"{component}/"
        attached.load_state(
            {
                name.removeprefix(prefix): tensor
                for name, tensor in checkpoint.adapter.items()
                if name.startswith(prefix)
            }
        )
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in checkpoint.optimizer.items():
        number, _, field = name.partition("/")
        state.setdefault(int(number), {})[field] = tensor
    for name, value in checkpoint.numbers.items():
        number, _, field = name.partition("/")
        state.setdefault(int(number), {})[field] = value
    groups = learner.optimizer.state_dict()["param_groups"]
    learner.optimizer.load_state_dict({"state": state, "param_groups": groups})
    if learner.accelerator.scaler is not None and checkpoint.scaler:
        learner.accelerator.scaler.load_state_dict(dict(checkpoint.scaler))


def _optimizer_state(learner: Learner) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for number, fields in learner.optimizer.state_dict()["state"].items():
        for field, value in fields.items():
            if isinstance(value, Tensor):
                tensors[f"{number}/{field}"] = value.detach().cpu().contiguous()
            else:
                numbers[f"{number}/{field}"] = value
    return tensors, numbers


def _read(folder: Path) -> Checkpoint:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise FileFormatError(f"it has format {state['format']}, this version reads {FORMAT}")
        if state.pop("seal") != _seal(state):
            raise FileFormatError("state.json is not what was written")
        for name in ("adapter.safetensors", "optimizer.safetensors"):
            if _sha256(folder / name) != state["sha256"][name]:
                raise FileFormatError(f"{name} is not what was written")
        return Checkpoint(
            step=int(state["step"]),
            facts=state["facts"],
            adapter=load_file(folder / "adapter.safetensors"),
            optimizer=load_file(folder / "optimizer.safetensors"),
            numbers=state["numbers"],
            scaler=state["scaler"],
        )
    except READ_ERRORS as error:
        raise FileFormatError(f"{type(error).__name__}: {error}", where=str(folder)) from error


def _folders(folder: Path) -> list[Path]:
    """Finished checkpoints, the highest step first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _remove(folder: Path) -> None:
    """Remove a folder so that it is never seen half there."""
    if folder.exists():
        doomed = folder.with_name(f".del-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _seal(state: Mapping[str, Any]) -> str:
    """SHA-256 of everything else in state.json."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
