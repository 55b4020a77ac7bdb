"""Settings of the run itself: what is learned, how long, and how often it is saved."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from trainer.config.fields import Section, setting
from trainer.untrusted import is_device_name


class RunSettings(Section):
    """What is learned, how long, and with which random numbers."""

    kind: Literal["face", "style"] = setting(
        "face", "what is learned; chooses the preset and the score"
    )
    name: str | None = setting(
        None,
        "name of the LoRA file without ending; default: the photo folder's name",
        min_length=1,
        max_length=100,
        pattern=r"^[\w][\w.-]*$",
    )
    total_steps: int = setting(
        1500, "length of the whole training", "optimizer steps", ge=1, le=1_000_000
    )
    stop_at_step: int = setting(
        0,
        "end early here with a checkpoint; the schedule stays that of total_steps; 0 = off",
        "optimizer steps",
        ge=0,
        le=1_000_000,
    )
    save_every_steps: int = setting(
        250, "write a LoRA file and a checkpoint this often", "optimizer steps", ge=1
    )
    save_every_minutes: float = setting(
        0.0, "write a checkpoint this often as well; 0 = by steps alone", "minutes", ge=0, le=10_000
    )
    keep_checkpoints: int = setting(
        2, "how many of the newest checkpoints are kept", "checkpoints", ge=1, le=1000
    )
    save_retry_minutes: float = setting(
        10.0,
        "how long a save that fails (a full disk, a drive that is gone) is tried again before it "
        "goes to run.fallback_folder",
        "minutes",
        ge=0,
        le=10_000,
    )
    fallback_folder: str = setting(
        "", "where a save goes that fails for too long; unset: a folder beside the caches"
    )
    tolerated_bad_steps: int = setting(
        5,
        "steps in a row that may fail (their numbers are not finite, so they change nothing) "
        "before training goes back to its last good state with half the learning rate",
        "optimizer steps",
        ge=1,
        le=1000,
    )
    log_every_steps: int | None = setting(
        None,
        "how many steps' numbers are read from the device at once; unset: 10 on a GPU, which has "
        "to be waited for, 1 on a CPU",
        "optimizer steps",
        ge=1,
        le=1000,
    )
    seed: int = setting(0, "start of all random numbers", ge=0, le=2**31 - 1)
    threads: int = setting(
        0, "processor threads; 0 = let PyTorch decide; 1 is fastest on a busy machine", ge=0, le=256
    )
    tensorboard: bool = setting(False, "write TensorBoard events as well")
    sidecars: bool = setting(
        False, "write NAME.json and NAME.preview.png beside the LoRA file, which A1111 shows"
    )

    @field_validator("name")
    @classmethod
    def _is_no_device(cls, name: str | None) -> str | None:
        if name is not None and is_device_name(name):
            raise ValueError("is a name that Windows keeps for devices; take another")
        return name
