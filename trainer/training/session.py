"""A job made ready to train: base loaded, photos encoded, adapters attached, state restored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from trainer.adapters.plans import BlockRule
from trainer.config.presets import prompts_path
from trainer.data.batches import BatchPlan
from trainer.diffusion.schedule import schedule_from_config
from trainer.errors import ConfigError
from trainer.families import FAMILIES, Backbone, LoadOptions
from trainer.optim import build_optimizer
from trainer.training.device import Device, choose_device
from trainer.training.fingerprints import base_fingerprint
from trainer.training.job import Job, differences, resume_facts
from trainer.training.learner import AdapterPlan, Learner, Objective, attach_adapters
from trainer.training.loop import LoopPlan
from trainer.training.preview import (
    PreviewPrompt,
    read_prompts,
)
from trainer.training.samples import Encoded, encode_job, preview_defaults
from trainer.training.state import Checkpoint, newest_checkpoint, restore


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
        job.facts,
        LoadOptions(
            device.device,
            device.dtype,
            device.attention,
            clip_skip=config.model.clip_skip or 0,
            prompt_chunks=config.model.prompt_chunks,
            checkpointing=config.model.checkpointing,
        ),
    )
    for notice in backbone.notices:
        console.print(notice, style="yellow", soft_wrap=True)
    prompts = _preview_prompts(job)
    base = base_fingerprint(job.facts, device)
    encoded = encode_job(job, device, backbone, base, console)
    # What has done its work leaves the device; it comes back for samples.
    encoders = [name for name in backbone.components if name != "unet"]
    backbone.release("vae", *([] if config.adapter.text_encoder else encoders))
    adapters = attach_adapters(
        backbone,
        AdapterPlan(
            kind=config.adapter.kind,
            rank=config.adapter.rank,
            alpha=config.adapter.alpha,
            targets=config.adapter.targets,
            text_encoder=config.adapter.text_encoder,
            seed=config.run.seed,
            text_targets=config.adapter.text_encoder_targets,
            text_rank=config.adapter.text_encoder_rank,
            text_alpha=config.adapter.text_encoder_alpha,
            include=tuple(config.adapter.include),
            exclude=tuple(config.adapter.exclude),
            rules=tuple(BlockRule(**block.model_dump()) for block in config.adapter.blocks),
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


def _learner(
    job: Job, device: Device, backbone: Backbone, adapters: dict[str, Any], encoded: Encoded
) -> Learner:
    config = job.config
    text_rate = config.optimizer.text_encoder_learning_rate
    rates = {
        "unet": config.optimizer.learning_rate,
        "text_encoder": text_rate,
        "text_encoder_2": config.optimizer.text_encoder_2_learning_rate or text_rate,
    }
    accelerator = Accelerator(
        cpu=device.device.type == "cpu",
        mixed_precision="fp16" if device.precision == "fp16" else "no",
    )
    optimizer = build_optimizer(
        config.optimizer.name,
        [
            (name, parameters, rates[name] * factor)
            for name, attached in adapters.items()
            for factor, parameters in attached.parameter_groups()
        ],
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
        prior_batch_size=config.objective.prior_batch_size,
    )
    return Learner(
        backbone, adapters, optimizer, batches, prior, objective, accelerator, job.styles
    )


def _preview_prompts(job: Job) -> tuple[PreviewPrompt, ...]:
    if not job.config.preview.every_steps:
        return ()
    caption = job.config.caption
    path = prompts_path(job.config.preview.prompts)
    return tuple(read_prompts(path, caption.trigger, caption.class_noun, preview_defaults(job)))


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
