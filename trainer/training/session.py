"""A job made ready to train: base loaded, photos encoded, adapters attached, state restored."""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from trainer.adapters.plans import BlockRule
from trainer.adapters.start import put_start
from trainer.data.batches import BatchPlan
from trainer.data.cache import fingerprint
from trainer.data.decode import shown
from trainer.data.variants import sample_key
from trainer.diffusion.schedule import schedule_from_config
from trainer.errors import ConfigError, DataError
from trainer.families import FAMILIES, Backbone, LoadOptions
from trainer.families.attention import widest
from trainer.optim import build_optimizer
from trainer.training.device import Device, Kept, blocks_for, choose_device, finish_for
from trainer.training.fingerprints import base_fingerprint
from trainer.training.guards import Guard, GuardPlan
from trainer.training.heap import keep_big_blocks_apart, keep_blocks_for_reuse
from trainer.training.job import Job, differences, resume_facts
from trainer.training.learner import AdapterPlan, Learner, Objective, attach_adapters
from trainer.training.loop import LoopPlan
from trainer.training.memory import explained, helps_encoding, helps_loading
from trainer.training.preview import PreviewPrompt
from trainer.training.samples import Encoded, encode_job, preview_prompts
from trainer.training.state import Checkpoint, checkpoint_at, largest_bytes, restore
from trainer.training.team import ALONE, Team

# The state that the guards go back to is at most so many steps old, in a quiet run.
MOST_SNAPSHOT_STEPS = 500


@dataclass(frozen=True, slots=True)
class Session:
    """Everything a run needs while it trains.

    facts: what must be equal for the run to go on later. prompts: of the samples, none without
    previews. start_step: optimizer steps done before. guard: what watches over it. team: the
    processes that train together.
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
    guard: Guard
    team: Team = ALONE

    @property
    def epochs(self) -> int:
        """Epochs in the whole training, the last one counted even when it is not full."""
        batches = self.plan.total_steps * self.plan.accumulate_steps * self.team.size
        return -(-batches // self.learner.batches.batches_per_epoch)


def open_session(job: Job, console: Console, *, resume: bool, team: Team = ALONE) -> Session:
    """Load, encode, attach and, when asked, restore the newest checkpoint.

    Nothing in the output folder is touched.

    Raises:
        TrainerError: anything the user can do something about.
    """
    config = job.config
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    device = _device(job, team, resume=resume)
    for notice in device.notices:
        console.print(notice, style="yellow", soft_wrap=True)
    if device.attention_words:
        console.print(device.attention_words, highlight=False, soft_wrap=True)
    backbone = _load(job, device)
    prompts = preview_prompts(job)
    base = base_fingerprint(job.facts, device)
    with explained("encoding the photos", partial(helps_encoding, job, device, backbone)):
        encoded = encode_job(job, device, backbone, base, console, team)
    # What has done its work goes; it comes back for samples.
    backbone.release("vae", *_idle_encoders(job, device, backbone))
    with explained("loading the base", partial(helps_loading, job, device)):
        keep_big_blocks_apart()
        adapters = attach_adapters(backbone, _adapter_plan(job))
        if prompts:  # samples are drawn before the first step
            keep_blocks_for_reuse()
    for notice in backbone.notices:
        console.print(notice, style="yellow", soft_wrap=True)
    learner = _learner(job, device, backbone, adapters, encoded)
    drawn = [] if job.class_pictures else [sample.text for sample in encoded.prior]
    facts = resume_facts(job, base, drawn, team.size) | asdict(device.kept)
    team.require_alike("settings, photos, base or attention", fingerprint(facts))
    checkpoint = _checkpoint(job, learner, facts, console) if resume else None
    start_step = checkpoint.step if checkpoint else 0
    team.require_alike("the checkpoint to go on from", str(start_step))
    if checkpoint:
        restore(learner, checkpoint)
    elif config.adapter.init:
        _begin(job, learner, console)
    team.way_out = (
        "Go on from the newest checkpoint, or from the start if there is none, with: "
        f'{team.command} "{job.source}" --output "{job.folder.root}" --resume'
    )
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
            read_steps=_read_steps(job, device),
        ),
        facts=facts,
        encoded=encoded,
        prompts=prompts,
        start_step=start_step,
        guard=_guard(job, device, checkpoint),
        team=team,
    )


def _load(job: Job, device: Device) -> Backbone:
    model = job.config.model
    backbone: Backbone = FAMILIES.load(job.facts.family).load(
        job.facts,
        LoadOptions(
            device.device,
            device.dtype,
            device.attention,
            clip_skip=model.clip_skip or 0,
            prompt_chunks=model.prompt_chunks,
            checkpointing=model.checkpointing,
            checkpoint_share=model.checkpoint_share,
            blocks=blocks_for(model.fast, device.device),
            weights=device.weights,
            stream_blocks=model.stream_blocks,
            compiling=device.compiling,
            finish=finish_for(model.fast, device),
        ),
    )
    return backbone


def _idle_encoders(job: Job, device: Device, backbone: Backbone) -> list[str]:
    """Those that may go: not trained ones nor, on a processor, those that read varying captions."""
    needed = job.config.adapter.text_encoder or (device.device.type == "cpu" and job.captions_vary)
    return [] if needed else [name for name in backbone.components if name != "unet"]


def _adapter_plan(job: Job) -> AdapterPlan:
    config = job.config
    return AdapterPlan(
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
    batches = BatchPlan(encoded.photos, batch_size=config.data.batch_size, seed=config.run.seed)
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
    learner = Learner(
        backbone, adapters, optimizer, batches, prior, objective, accelerator, job.styles
    )
    learner.know(encoded.embedded)
    return learner


def _device(job: Job, team: Team, *, resume: bool) -> Device:
    """The leader measures what is the quickest, and the others take the same."""
    model = job.config.model
    kept = _before(job) if resume else Kept()
    buckets = [picture.bucket for picture in (*job.pictures, *job.class_pictures)]

    def chosen(kept: Kept) -> Device:
        return choose_device(
            model.device,
            model.precision,
            model.attention,
            weights=model.weights,
            shape=widest(job.facts, buckets, job.config.data.batch_size),
            width=job.facts.attention.width,
            kept=kept,
            compiling=model.compile,
        )

    device = chosen(kept) if team.leader else None
    told = team.told(" ".join(astuple(device.kept)) if device else "")
    device = device or chosen(Kept(*told.split()))
    team.require_device(device.device)
    return device


def _before(job: Job) -> Kept:
    """What the run was begun with; nothing where nothing was saved yet."""
    checkpoint, _ = checkpoint_at(job.resume_from or job.folder.root)
    return Kept.of(checkpoint.facts) if checkpoint else Kept()


def _read_steps(job: Job, device: Device) -> int:
    """How many steps' numbers are read at once: only a GPU has to be waited for."""
    return job.config.run.log_every_steps or (1 if device.device.type == "cpu" else 10)


def _guard(job: Job, device: Device, checkpoint: Checkpoint | None) -> Guard:
    pictures = (*job.pictures, *job.class_pictures)
    run, read = job.config.run, _read_steps(job, device)
    guard = Guard(
        GuardPlan(
            tolerated_steps=run.tolerated_bad_steps,
            # Looked at only when numbers are read.
            snapshot_steps=-(-min(run.save_every_steps, MOST_SNAPSHOT_STEPS) // read) * read,
            names={sample_key(p): shown(p.captioned.photo.path.name) for p in pictures},
            precision=device.precision,
        )
    )
    if checkpoint:
        guard.load_state(checkpoint.guard, checkpoint.snapshot)
    return guard


def _begin(job: Job, learner: Learner, console: Console) -> None:
    """Start from the LoRA file that was given."""
    if job.start is None:
        raise DataError(
            "The LoRA file that the training is to start from is not there.",
            where=job.config.adapter.init,
            fix="Put it back, or name it after --init.",
        )
    start, lacking = job.start, put_start(job.start, learner.adapters)
    words = f"Starting from {start.path.name}: {len(start.layers)} layers."
    if lacking:
        words += f" {lacking} that it does not have are trained from nothing."
    console.print(words, highlight=False, soft_wrap=True)


def _checkpoint(
    job: Job, learner: Learner, facts: dict[str, Any], console: Console
) -> Checkpoint | None:
    place = job.resume_from or job.folder.root
    checkpoint, notices = checkpoint_at(place, largest_bytes(learner))
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
