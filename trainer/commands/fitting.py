"""A job and the card it is to fit into: the memory class that was asked for becomes settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trainer.commands.sets import SO_FAR
from trainer.config.reader import Resolved, replace_values
from trainer.config.settings import TrainConfig
from trainer.errors import ConfigError, DeviceError
from trainer.training.device import Device
from trainer.training.job import FREE_ON_RESUME, Job
from trainer.training.memory_class import (
    CHOSEN,
    CLASSES,
    GIB,
    Choice,
    Need,
    choose,
    need,
    room_now,
    room_of,
    work_of,
)

# What is not combined with compiled blocks: another value than the first, in the words of the user.
_UNCOMPILED: Mapping[str, tuple[Any, str]] = {
    "model.weights": ("same", "packed weights"),
    "model.checkpointing": (False, "blocks that are computed twice"),
    "model.stream_blocks": (False, "streamed blocks"),
}


def require_gpu(config: TrainConfig, device: Device) -> None:
    """Make sure that what is made for the memory of an NVIDIA GPU is asked for on one.

    Raises:
        DeviceError, ConfigError: it is not, or blocks are to be streamed whose layers keep their
            weights, or compiled with what that is not made for.
    """
    model = config.model
    _require_alone(config)
    if model.stream_blocks and model.fast == "off":
        raise ConfigError(
            "PyTorch's own layers cannot be streamed: they keep their weights for the backward "
            "pass.",
            where="model.stream_blocks = true, model.fast = 'off'",
            fix="Set model.fast=lean, or leave model.stream_blocks out.",
        )
    if device.device.type == "cuda":
        return
    here = f"this run is on '{device.device.type}'"
    if model.stream_blocks:
        raise DeviceError(
            f"Blocks are streamed to an NVIDIA GPU; {here}.",
            where="model.stream_blocks = true",
            fix="Leave it out.",
        )
    if model.memory in CLASSES:
        raise DeviceError(
            f"The memory class {model.memory} is that of an NVIDIA GPU; {here}.",
            where="model.memory",
            fix="Set model.memory=off, or leave it out.",
        )


def _require_alone(config: TrainConfig) -> None:
    for setting, (plain, words) in _UNCOMPILED.items():
        value = _value(config, setting)
        if config.model.compile and value != plain:
            raise ConfigError(
                f"model.compile cannot be combined with {words}.",
                where=f"model.compile = true, {setting} = {json.dumps(value)}",
                fix="Leave one of the two out.",
            )


def fitted(job: Job, device: Device, processes: int = 1) -> tuple[Job, str]:
    """The job with settings that fit into its memory class, and a line for the user.

    Settings that someone has made stay as they are. When a run goes on, what it was begun with
    counts as set; a class that is named for going on may still change what computes the same.
    """
    name = job.config.model.memory
    if name == "off" or device.device.type != "cuda":
        return job, ""
    room = room_of(CLASSES[name]) if name in CLASSES else room_now(device, processes)
    work = work_of(job, device)
    choice, fits = choose(work, room, _fixed(job))
    values = {
        setting: value
        for setting, value in choice.settings.items()
        if _value(job.config, setting) != value and setting not in _fixed(job)
    }
    changed = replace_values(Resolved(job.config, job.origins), values, f"memory class {name}")
    job = replace(job, config=changed.config, origins=changed.origins)
    return job, _words(name, choice, need(work, choice), room, fits)


def _fixed(job: Job) -> dict[str, Any]:
    """Of the settings that a class chooses those that are not its own to choose."""
    named_now = job.origins["model.memory"] not in ("default", SO_FAR)

    def is_open(setting: str) -> bool:
        origin = job.origins[setting]
        free = setting in FREE_ON_RESUME and origin == SO_FAR and named_now
        return origin == "default" or free

    fixed = {setting: _value(job.config, setting) for setting in CHOSEN if not is_open(setting)}
    if job.config.model.fast == "off":  # whose layers cannot be streamed
        fixed.setdefault("model.stream_blocks", False)
    if job.config.model.compile:
        fixed = {setting: plain for setting, (plain, _) in _UNCOMPILED.items()} | fixed
    return fixed


def _value(config: TrainConfig, setting: str) -> Any:
    section, _, name = setting.partition(".")
    return getattr(getattr(config, section), name)


def _words(name: str, choice: Choice, needed: Need, room: float, fits: bool) -> str:
    why = ", the quickest that fits" if fits and choice != Choice() else ""
    line = (
        f"Memory    {name}: {choice.words}{why}; a step takes about {needed.all / GIB:.1f} of "
        f"{room / GIB:.1f} GB (frozen {needed.frozen / GIB:.1f}, trained "
        f"{needed.trained / GIB:.1f}, activations {(needed.kept + needed.beside) / GIB:.1f})"
    )
    if fits:
        return line
    return (
        f"{line}\n          That is too much: lower data.resolution or data.batch_size, or train "
        "without the text encoder."
    )
