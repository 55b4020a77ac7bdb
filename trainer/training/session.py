"""A job made ready to train: base loaded, photos encoded, adapters attached, state restored."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from trainer.config.presets import prompts_path
from trainer.data.batches import BatchPlan
from trainer.data.cache import TensorCache, cache_root
from trainer.data.caption_variants import vary
from trainer.diffusion.schedule import schedule_from_config
from trainer.errors import ConfigError
from trainer.families import FAMILIES, Backbone, LoadOptions
from trainer.optim import build_optimizer
from trainer.training.device import Device, choose_device
from trainer.training.encode import EncodeOptions, encode_photos
from trainer.training.fingerprints import base_fingerprint, text_fingerprint, vae_fingerprint
from trainer.training.job import Job, differences, resume_facts
from trainer.training.learner import AdapterPlan, Learner, Objective, attach_adapters
from trainer.training.loop import LoopPlan
from trainer.training.preview import (
    PreviewDefaults,
    PreviewPrompt,
    read_prompts,
    without_word,
)
from trainer.training.prior import PriorOptions, draw_prior
from trainer.training.reports import stage_progress
from trainer.training.state import Checkpoint, newest_checkpoint, restore
from trainer.types import CachedSample, Size

# Class pictures drawn for the score alone, when prior preservation is off.
SCORE_PICTURES = 16


@dataclass(frozen=True, slots=True)
class Encoded:
    """Everything that is trained on or compared with, as latents.

    photos: of every training picture. plain: of `Job.plain_pictures`. prior: of class pictures,
    those of the class sets or else drawn by the base. others: class pictures that the base drew,
    which scores compare with.
    """

    photos: tuple[CachedSample, ...]
    plain: tuple[CachedSample, ...]
    prior: tuple[CachedSample, ...]
    others: tuple[CachedSample, ...]


@dataclass(frozen=True, slots=True)
class Session:
    """Everything a run needs while it trains.

    facts: what must be equal for the run to go on later. prompts: of the samples, none without
    previews. start_step: optimizer steps done before.
    """

    job: Job
    device: Device
    backbone: Backbone
    learner: Learner
    plan: LoopPlan
    facts: dict[str, Any]
    encoded: Encoded
    prompts: tuple[PreviewPrompt, ...]
    start_step: int

    @property
    def epochs(self) -> int:
        """Epochs in the whole training, the last one counted even when it is not full."""
        batches = self.plan.total_steps * self.plan.accumulate_steps
        return -(-batches // self.learner.batches.batches_per_epoch)


def open_session(job: Job, console: Console, *, resume: bool) -> Session:
    """Load, encode, attach and, when asked, restore the newest checkpoint.

    Nothing in the output folder is touched.

    Raises:
        TrainerError: anything the user can do something about.
    """
    config = job.config
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    device = choose_device(config.model.device, config.model.precision, config.model.attention)
    for notice in device.notices:
        console.print(notice, style="yellow", soft_wrap=True)
    backbone: Backbone = FAMILIES.load(job.facts.family).load(
        job.facts, LoadOptions(device.device, device.dtype, device.attention)
    )
    prompts = _preview_prompts(job)
    base = base_fingerprint(job.facts, device)
    encoded = _encode(job, device, backbone, base, console)
    adapters = attach_adapters(
        backbone,
        AdapterPlan(
            kind=config.adapter.kind,
            rank=config.adapter.rank,
            alpha=config.adapter.alpha,
            targets=config.adapter.targets,
            text_encoder=config.adapter.text_encoder,
            seed=config.run.seed,
        ),
    )
    learner = _learner(job, device, backbone, adapters, encoded)
    drawn = [] if job.class_pictures else [sample.text for sample in encoded.prior]
    facts = resume_facts(job, base, drawn)
    checkpoint = _checkpoint(job, facts, console) if resume else None
    start_step = checkpoint.step if checkpoint else 0
    if checkpoint:
        restore(learner, checkpoint)
    return Session(
        job=job,
        device=device,
        backbone=backbone,
        learner=learner,
        plan=LoopPlan(
            total_steps=config.run.total_steps,
            last_step=job.last_step,
            schedule=config.optimizer.schedule,
            warmup_steps=min(config.optimizer.warmup_steps, config.run.total_steps // 10),
            accumulate_steps=config.optimizer.accumulate_steps,
            max_grad_norm=config.optimizer.max_grad_norm,
        ),
        facts=facts,
        encoded=encoded,
        prompts=prompts,
        start_step=start_step,
    )


def _encode(job: Job, device: Device, backbone: Backbone, base: str, console: Console) -> Encoded:
    config = job.config
    cache = TensorCache(cache_root() if config.data.cache else None)
    options = EncodeOptions(
        vae=vae_fingerprint(job.facts, device),
        text=text_fingerprint(job.facts, device),
        background=job.background,
        transparency=config.data.transparency,
        face_weight=config.data.face_weight,
        cache_prompts=not (config.adapter.text_encoder or job.captions_vary),
        workers=config.data.workers or min(8, os.cpu_count() or 1),
    )
    photos = encode_photos(
        job.pictures, backbone, cache, options, stage_progress(console, "photos encoded")
    )
    samples = dict(zip(job.pictures, photos, strict=True))
    prior = encode_photos(
        job.class_pictures,
        backbone,
        cache,
        options,
        stage_progress(console, "pictures of the class encoded"),
    )
    others = _draw_class(job, backbone, cache, options, base, console)
    if cache.notice:
        console.print(cache.notice, style="yellow", soft_wrap=True)
    return Encoded(
        photos=tuple(photos),
        plain=tuple(samples[picture] for picture in job.plain_pictures),
        prior=tuple(prior or others),
        others=tuple(others),
    )


def _draw_class(
    job: Job,
    backbone: Backbone,
    cache: TensorCache,
    options: EncodeOptions,
    base: str,
    console: Console,
) -> list[CachedSample]:
    """Class pictures by the base: as many as are trained on, or a few for the scores alone."""
    config = job.config
    trained_on = config.objective.prior_weight and not job.class_pictures
    wanted = config.objective.prior_pictures if trained_on else 0
    if not wanted and config.preview.every_steps:
        wanted = SCORE_PICTURES
    if not wanted:
        return []
    side = job.square_px
    return draw_prior(
        backbone,
        cache,
        PriorOptions(
            base=base,
            prompts=_prior_prompts(job),
            pictures=wanted,
            size=Size(side, side),
            sampling_steps=config.preview.sampling_steps,
            guidance_scale=config.objective.prior_guidance_scale,
            seed=config.run.seed,
        ),
        options,
        stage_progress(console, f"pictures of '{config.caption.class_noun}' drawn by the base"),
    )


def _prior_prompts(job: Job) -> tuple[str, ...]:
    """What class pictures are drawn from: the prompts file and the photos' captions in turn.

    The captions go without the trigger: then the trigger is all that tells a photo from a class
    picture, and nothing else in a caption can take over its meaning.
    """
    caption, settings = job.config.caption, job.config.objective
    path = prompts_path(settings.prior_prompts)
    lines = read_prompts(path, caption.trigger, caption.class_noun, _defaults(job))
    bare = []
    for photo in job.photos:
        style = job.styles[photo.set_name]
        text = vary(photo.texts, style, seed=0, step=0, key=photo.photo.digest)
        bare.append(without_word(text, style.trigger))
    own = list(dict.fromkeys(text for text in bare if text))
    count = max(len(lines), len(own), 1)
    prompts: list[str] = []
    for number in range(count):
        prompts += [own[number % len(own)]] if own else []
        prompts += [lines[number % len(lines)].text]
        if number % 2 and settings.prior_target == "base":
            # What guidance compares every prompt with: nothing else keeps it where it was.
            prompts += [""]
    return tuple(prompts)


def _learner(
    job: Job, device: Device, backbone: Backbone, adapters: dict[str, Any], encoded: Encoded
) -> Learner:
    config = job.config
    rates = {
        "unet": config.optimizer.learning_rate,
        "text_encoder": config.optimizer.text_encoder_learning_rate,
    }
    accelerator = Accelerator(
        cpu=device.device.type == "cpu",
        mixed_precision="fp16" if device.precision == "fp16" else "no",
    )
    optimizer = build_optimizer(
        config.optimizer.name,
        [(name, attached.parameters(), rates[name]) for name, attached in adapters.items()],
        weight_decay=config.optimizer.weight_decay,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
    )
    batches = BatchPlan(
        encoded.photos,
        batch_size=config.data.batch_size,
        seed=config.run.seed,
    )
    prior = None
    if config.objective.prior_weight:
        prior = BatchPlan(
            encoded.prior, batch_size=config.objective.prior_batch_size, seed=config.run.seed
        )
    schedule = schedule_from_config(backbone.scheduler_config, config.objective.prediction)
    objective = Objective(
        schedule=schedule,
        min_snr_gamma=config.objective.min_snr_gamma,
        noise_offset=config.objective.noise_offset,
        caption_dropout=config.caption.dropout,
        prior_weight=config.objective.prior_weight,
        prior_target=config.objective.prior_target,
        batch_size=config.data.batch_size,
        seed=config.run.seed,
    )
    return Learner(
        backbone, adapters, optimizer, batches, prior, objective, accelerator, job.styles
    )


def _defaults(job: Job) -> PreviewDefaults:
    preview = job.config.preview
    side = job.square_px
    return PreviewDefaults(
        size=Size(side, side),
        seed=preview.seed,
        guidance=preview.guidance_scale,
        steps=preview.sampling_steps,
        side_step_px=8 * job.facts.pixels_per_latent,
    )


def _preview_prompts(job: Job) -> tuple[PreviewPrompt, ...]:
    if not job.config.preview.every_steps:
        return ()
    caption = job.config.caption
    path = prompts_path(job.config.preview.prompts)
    return tuple(read_prompts(path, caption.trigger, caption.class_noun, _defaults(job)))


def _checkpoint(job: Job, facts: dict[str, Any], console: Console) -> Checkpoint | None:
    checkpoint, notices = newest_checkpoint(job.folder.checkpoints)
    for notice in notices:
        console.print(notice, style="yellow", soft_wrap=True)
    if checkpoint is None:
        console.print("There is no checkpoint yet: starting at step 0.")
        return None
    if changed := differences(checkpoint.facts, facts):
        raise ConfigError(
            "The run cannot go on: this is not what it was started with.",
            where="\n".join(changed),
            fix="Put these back, or start a new run without --resume.",
        )
    console.print(f"Going on from step {checkpoint.step}.", highlight=False)
    return checkpoint

