"""Checkpoints: everything a run needs to go on as if it had never stopped.

    checkpoints/step-000100/
        adapter.safetensors     the trained weights, fp32
        optimizer.safetensors   the optimizer's tensors
        snapshot.safetensors    in some: an earlier state, which the guards would go back to
        state.json              step, settings, numbers, the SHA-256 of the other files and its own

A checkpoint is written under another name, flushed to disk and then renamed; older ones go only
after that. What a checkpoint is stands in it: neither its name nor its date counts. Nothing is
pickled. Data order, noise and learning rate are functions of the step, so they need no state.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.errors import FileFormatError, OutputError
from trainer.training.checkpoint_files import (
    FORMAT,
    READ_ERRORS,
    SNAPSHOT,
    STATE,
    WEIGHTS,
    checkpoint_folders,
    file_sha256,
    prune,
    put_in_place,
    read_state,
    remove,
    require_as_written,
    seal_of,
    tensor_files,
)
from trainer.training.learner import Learner
from trainer.training.run_folder import CHECKPOINTS, flush, flush_folder
from trainer.training.snapshot import Snapshot, go_back, take_snapshot


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as read back. `facts` is what the run said about itself when it saved."""

    step: int
    facts: Mapping[str, Any]
    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    numbers: Mapping[str, Any]
    scaler: Mapping[str, Any]
    guard: Mapping[str, Any]
    snapshot: Mapping[str, Tensor]


def save_checkpoint(
    folder: Path,
    learner: Learner,
    step: int,
    facts: Mapping[str, Any],
    keep: int,
    guard: Mapping[str, Any] = MappingProxyType({}),
    snapshot: Mapping[str, Tensor] = MappingProxyType({}),
) -> Path:
    """Write a checkpoint and remove all but the newest `keep`.

    Args:
        folder: the run's `checkpoints` folder.
        step: finished optimizer steps.
        facts: plain values to be compared when the run goes on.
        guard: what the guards remember, plain values. snapshot: their tensors, if there are any.

    Raises:
        OutputError: it cannot be written; older checkpoints are untouched.
    """
    now = take_snapshot(learner, step)
    scaler = learner.accelerator.scaler
    final = folder / f"step-{step:06d}"
    temporary = folder / f".tmp-{step:06d}-{os.getpid()}"
    try:
        remove(temporary)
        folder.mkdir(exist_ok=True)  # not its parents: a drive that is gone leaves an empty place
        temporary.mkdir()
        save_file(dict(now.adapter), temporary / WEIGHTS[0])
        save_file(dict(now.optimizer), temporary / WEIGHTS[1])
        if snapshot:
            save_file(dict(snapshot), temporary / SNAPSHOT)
        names = sorted(path.name for path in temporary.iterdir())
        state = {
            "format": FORMAT,
            "step": step,
            "facts": facts,
            "numbers": dict(now.numbers),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "guard": dict(guard),
            "sha256": {name: file_sha256(temporary / name) for name in names},
        }
        state["seal"] = seal_of(state)
        (temporary / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        for name in (*names, STATE):
            flush(temporary / name)
        flush_folder(temporary)
        put_in_place(temporary, final)
        flush_folder(folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"The checkpoint of step {step} cannot be written: {error}",
            where=str(final),
            fix="Free some space or make the folder writable, then go on with --resume.",
        ) from error
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
    prune(folder, final, step, keep)
    return final


def newest_checkpoint(
    folder: Path, most_bytes: int | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint of the highest step that is whole, and a sentence about each damaged one.

    Args:
        folder: the run's `checkpoints` folder.
        most_bytes: see `read_checkpoint`.
    """
    notices: list[str] = []
    steps: list[tuple[int, Path]] = []
    for path in checkpoint_folders(folder):
        try:
            steps.append((int(read_state(path)["step"]), path))
        except FileFormatError as error:
            notices.append(_passed_over(path, error))
    for _, path in sorted(steps, key=lambda found: found[0], reverse=True):
        try:
            return read_checkpoint(path, most_bytes), notices
        except FileFormatError as error:
            notices.append(_passed_over(path, error))
    return None, notices


def checkpoint_at(
    place: Path, most_bytes: int | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint that a folder is, or the newest in it if it holds a run or its checkpoints.

    Raises:
        FileFormatError: it is a checkpoint itself, and damaged.
    """
    if (place / STATE).is_file():
        return read_checkpoint(place, most_bytes), []
    below = place / CHECKPOINTS
    return newest_checkpoint(below if below.is_dir() else place, most_bytes)


def read_checkpoint(folder: Path, most_bytes: int | None = None) -> Checkpoint:
    """The checkpoint in a folder, whatever it is called.

    Args:
        most_bytes: a file of tensors that is larger is refused before it is read
            (`largest_bytes`).

    Raises:
        FileFormatError: it is damaged, or none at all.
    """
    state = read_state(folder)
    try:
        for name in ("facts", "numbers", "scaler", "guard"):
            if not isinstance(state.get(name, {}), dict):
                raise FileFormatError(f"{name} is no table")
        for name in tensor_files(state):
            require_as_written(folder / name, state["sha256"][name], most_bytes)
        return Checkpoint(
            step=int(state["step"]),
            facts=state["facts"],
            adapter=load_file(folder / WEIGHTS[0]),
            optimizer=load_file(folder / WEIGHTS[1]),
            numbers=state["numbers"],
            scaler=state["scaler"],
            guard=state.get("guard", {}),
            snapshot=load_file(folder / SNAPSHOT) if SNAPSHOT in state["sha256"] else {},
        )
    except READ_ERRORS as error:
        raise FileFormatError(f"{type(error).__name__}: {error}", where=str(folder)) from error


def checkpoint_bytes(learner: Learner) -> int:
    """About the size of a checkpoint, in bytes."""
    now = take_snapshot(learner, 0)
    return sum(tensor.nbytes for part in (now.adapter, now.optimizer) for tensor in part.values())


def largest_bytes(learner: Learner) -> int:
    """More than any file of a learner's checkpoints holds, whatever its optimizer remembers."""
    return 64 * sum(parameter.numel() for parameter in learner.parameters) + 2**24


def restore(learner: Learner, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights and optimizer state into a learner.

    Raises:
        FileFormatError: it belongs to other layers, another rank or another optimizer.
    """
    then = Snapshot(checkpoint.step, checkpoint.adapter, checkpoint.optimizer, checkpoint.numbers)
    go_back(learner, then)
    if learner.accelerator.scaler is not None and checkpoint.scaler:
        learner.accelerator.scaler.load_state_dict(dict(checkpoint.scaler))


def _passed_over(path: Path, error: FileFormatError) -> str:
    return f"{path.name} is damaged and was passed over: {error.what}"
