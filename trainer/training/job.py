"""What is to be done, decided and checked before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from trainer.adapters.start import Start
from trainer.config.settings import TrainConfig
from trainer.data.caption_variants import CaptionStyle
from trainer.families import BaseFacts
from trainer.training.run_folder import RunFolder
from trainer.types import Bucketed, Captioned, Variant

# Settings that may differ when a run goes on: they do not change what a step computes.
FREE_ON_RESUME = {
    "run.stop_at_step",
    "run.save_every_steps",
    "run.save_every_minutes",
    "run.keep_checkpoints",
    "run.save_retry_minutes",
    "run.fallback_folder",
    "run.threads",
    "run.tensorboard",
    "run.sidecars",
    "data.cache",
    "data.workers",
    "data.skip_bad",
    "data.face_download",
    "model.base",  # its content is compared instead, as are those of the next two
    "model.vae",
    "model.tokenizer",
    "model.download",
    "model.checkpointing",
    "model.checkpoint_share",
    "model.stream_blocks",
    "model.memory",  # what it has led to is compared
    "adapter.init",  # its content is compared instead
    "adapter.save_precision",
    "preview",
}


# How a difference of a setting is put that is multiplied by the number of processes.
PROCESSES_COUNT = {
    "optimizer.accumulate_steps": "optimizer.accumulate_steps, times the number of processes"
}


@dataclass(frozen=True, slots=True)
class Job:
    """A run as it was decided.

    source: the photo folder. origins: where each setting came from.
    photos: what is learned. pictures: the training pictures made of them: one for each photo,
    resolution and variant. class_pictures: those of the class sets; none where the base draws
    them. styles: how captions vary, by set of photos. command: what was typed.
    """

    source: Path
    config: TrainConfig
    origins: Mapping[str, str]
    facts: BaseFacts
    folder: RunFolder
    photos: tuple[Captioned, ...]
    pictures: tuple[Bucketed, ...]
    class_pictures: tuple[Bucketed, ...]
    styles: Mapping[str, CaptionStyle]
    command: str
    resume_from: Path | None = None
    start: Start | None = None

    @property
    def plain_pictures(self) -> tuple[Bucketed, ...]:
        """How each photo is trained at the highest resolution when nothing about it is changed."""
        best: dict[tuple[str, Path], Bucketed] = {}
        for picture in self.pictures:
            if picture.variant == Variant():
                place = (picture.captioned.set_name, picture.captioned.photo.path)
                held = best.get(place)
                if held is None or held.bucket.area < picture.bucket.area:
                    best[place] = picture
        return tuple(best.values())

    @property
    def captions_vary(self) -> bool:
        """Whether any photo is trained on another text at another step."""
        captioned = [*self.photos, *(picture.captioned for picture in self.class_pictures)]
        return any(
            item.set_name in self.styles and self.styles[item.set_name].varies(item.texts)
            for item in captioned
        )

    @property
    def square_px(self) -> int:
        """Side of the largest square training pictures: the resolution in whole bucket steps."""
        step = self.config.data.bucket_step_px or self.facts.bucket_step_px
        return max(self.config.data.resolutions or (self.facts.resolution,)) // step * step

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


def resume_facts(
    job: Job, base_fingerprint: str, prior_texts: Sequence[str], processes: int = 1
) -> dict[str, Any]:
    """What must be equal for a run to go on: settings, photos, base, and the class pictures.

    In two processes a step is what it is in one with twice as many batches, so a run may go on in
    another number of `processes`.
    """
    settings = {
        f"{section}.{name}": value
        for section, values in job.config.model_dump().items()
        if section not in FREE_ON_RESUME
        for name, value in values.items()
        if f"{section}.{name}" not in FREE_ON_RESUME
    }
    settings["optimizer.accumulate_steps"] *= processes
    prior: list[str] = []
    if job.config.objective.prior_weight:
        # The class pictures are drawn in as many steps as the samples are.
        settings["preview.sampling_steps"] = job.config.preview.sampling_steps
        prior = list(prior_texts)
    for further in settings.get("data.sets", []):
        further.pop("folder")  # its photos are compared instead
    weighed = job.config.data.face_weight != 1.0
    photos = [
        _picture_facts(picture, faces=weighed) for picture in (*job.pictures, *job.class_pictures)
    ]
    return {
        "settings": settings,
        "photos": sorted(photos),
        "base": base_fingerprint,
        "prior": prior,
        "init": job.start.digest if job.start else "",
    }


def _picture_facts(picture: Bucketed, *, faces: bool) -> list[Any]:
    """What of a training picture must be equal, in JSON's types; with `faces` those in it too."""
    boxes = [list(astuple(face.box)) for face in picture.faces] if faces else []
    photo, variant = picture.captioned.photo, asdict(picture.variant)
    place = [picture.bucket.width, picture.bucket.height, picture.left, picture.top]
    place += [picture.resized.width, picture.resized.height]
    return [
        photo.digest,
        photo.mask_digest,
        list(picture.captioned.texts),
        place,
        [variant[name] for name in sorted(variant)],
        [picture.repeats, picture.weight],
        *([boxes] if boxes else []),
    ]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed between a checkpoint's facts and the run's, one line each. A setting that
    the version of the checkpoint did not have is taken to have been as it is by default."""
    defaults = TrainConfig().model_dump()
    settings = {
        name: before["settings"].get(name, defaults[name.partition(".")[0]][name.partition(".")[2]])
        for name in now["settings"]
    }
    lines = [
        f"{PROCESSES_COUNT.get(name, name)}: was {settings[name]!r}, now {value!r}"
        for name, value in now["settings"].items()
        if settings[name] != value
    ]
    if before["photos"] != now["photos"]:
        lines.append(
            f"the photos or captions: was {len(before['photos'])} training pictures, now "
            f"{len(now['photos'])}"
            if len(before["photos"]) != len(now["photos"])
            else "the photos or captions: a picture or a text has changed"
        )
    if before["prior"] != now["prior"] and len(before["prior"]) == len(now["prior"]):
        lines.append("objective.prior_prompts: the prompts in the file have changed")
    if now["init"] and before.get("init", "") != now["init"]:
        lines.append("adapter.init: another LoRA file than the one that it was started from")
    formats = before.get("precision"), now.get("precision")
    if all(formats) and formats[0] != formats[1]:
        lines.append("the number format of the base: was {}, now {}".format(*formats))
    elif before["base"] != now["base"]:
        lines.append("the base model: its files have changed")
    return lines
