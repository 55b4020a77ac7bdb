"""What is to be done, decided and checked before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.settings import TrainConfig
from trainer.families import BaseFacts
from trainer.training.run_folder import RunFolder
from trainer.types import Bucketed

# Settings that may differ when a run goes on: they do not change what a step computes.
FREE_ON_RESUME = {
    "run.stop_at_step",
    "run.save_every_steps",
    "run.keep_checkpoints",
    "run.threads",
    "run.tensorboard",
    "data.cache",
    "data.skip_bad",
    "model.base",  # its content is compared instead
    "preview",
}


@dataclass(frozen=True, slots=True)
class Job:
    """A run as it was decided.

    source: the photo folder. origins: where each setting came from. command: what was typed.
    """

    source: Path
    config: TrainConfig
    origins: Mapping[str, str]
    facts: BaseFacts
    folder: RunFolder
    photos: tuple[Bucketed, ...]
    command: str

    @property
    def background(self) -> tuple[int, int, int]:
        """The colour behind transparent pictures, RGB 0..255."""
        red, green, blue = bytes.fromhex(self.config.data.background.removeprefix("#"))
        return red, green, blue

    @property
    def square_px(self) -> int:
        """Side of the square training pictures: the resolution in whole bucket steps."""
        step = self.config.data.bucket_step_px or self.facts.bucket_step_px
        return (self.config.data.resolution or self.facts.resolution) // step * step

    @property
    def last_step(self) -> int:
        return self.config.run.stop_at_step or self.config.run.total_steps

    @property
    def note(self) -> str:
        """For whom the LoRA file is."""
        if self.facts.embedded:
            return "for the Likeness embedded base; fits no real SD 1.5"
        if not self.facts.fits_real:
            return (
                f"for the small base '{self.facts.name}' (cross-attention width "
                f"{self.facts.width}); fits no real SD 1.5"
            )
        return ""


def resume_facts(job: Job, base_fingerprint: str, prior_texts: Sequence[str]) -> dict[str, Any]:
    """What must be equal for a run to go on: settings, photos, base, and the class pictures."""
    settings = {
        f"{section}.{name}": value
        for section, values in job.config.model_dump().items()
        if section not in FREE_ON_RESUME
        for name, value in values.items()
        if f"{section}.{name}" not in FREE_ON_RESUME
    }
    prior: list[str] = []
    if job.config.objective.prior_weight:
        # The class pictures are drawn in as many steps as the samples are.
        settings["preview.sampling_steps"] = job.config.preview.sampling_steps
        prior = list(prior_texts)
    photos = [[photo.captioned.photo.digest, photo.captioned.text] for photo in job.photos]
    return {
        "settings": settings,
        "photos": sorted(photos),
        "base": base_fingerprint,
        "prior": prior,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed between a checkpoint's facts and the run's, one line each."""
    lines = [
        f"{name}: was {before['settings'].get(name)!r}, now {value!r}"
        for name, value in now["settings"].items()
        if before["settings"].get(name) != value
    ]
    if before["photos"] != now["photos"]:
        lines.append(
            f"the photos or captions: was {len(before['photos'])} photos, now {len(now['photos'])}"
            if len(before["photos"]) != len(now["photos"])
            else "the photos or captions: a picture or a text has changed"
        )
    if before["prior"] != now["prior"] and len(before["prior"]) == len(now["prior"]):
        lines.append("objective.prior_prompts: the prompts in the file have changed")
    if before["base"] != now["base"]:
        lines.append("the base model: its files have changed")
    return lines
