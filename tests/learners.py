"""Learners of the tiny base on random latents, for the tests of the training itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from trainer.data.batches import BatchPlan
from trainer.diffusion.schedule import schedule_from_config
from trainer.families import FAMILIES, Backbone, LoadOptions
from trainer.families.detect import inspect_base
from trainer.optim import build_optimizer
from trainer.training.learner import AdapterPlan, Learner, Objective, attach_adapters
from trainer.training.loop import LoopPlan
from trainer.types import CachedSample


@dataclass(frozen=True, slots=True)
class Recipe:
    """What differs between learners; the fields are those of the settings."""

    prediction: str = "auto"
    min_snr_gamma: float = 5.0
    noise_offset: float = 0.0
    caption_dropout: float = 0.0
    prior_weight: float = 0.0
    prior_target: str = "noise"
    batch_size: int = 2
    text_encoder: bool = True
    sizes: tuple[tuple[int, int], ...] = ((8, 8),) * 4
    prior_size: tuple[int, int] = (8, 8)
    rate: float = 0.01
    seed: int = 0


def load_backbone(base: Path, **options: Any) -> Backbone:
    """A base of any family; options: others than those of `LoadOptions`."""
    plain = LoadOptions(torch.device("cpu"), torch.float32, "sdpa")
    facts = inspect_base(base)
    return FAMILIES.load(facts.family).load(facts, replace(plain, **options))


def vae_of(backbone: Any) -> Any:
    return backbone._part("vae")


def make_learner(base: Path | Backbone, recipe: Recipe = Recipe()) -> Learner:  # noqa: B008
    backbone = load_backbone(base) if isinstance(base, Path) else base
    adapters = attach_adapters(
        backbone, AdapterPlan("lora", 2, 2.0, "attention+ff", recipe.text_encoder, recipe.seed)
    )
    optimizer = build_optimizer(
        "adamw",
        [(name, attached.parameters(), recipe.rate) for name, attached in adapters.items()],
        weight_decay=0.01,
        betas=(0.9, 0.999),
    )
    photos = make_samples("photo", recipe.sizes, backbone, recipe)
    prior = None
    if recipe.prior_weight:
        prior = BatchPlan(
            make_samples("prior", [recipe.prior_size] * 3, backbone, recipe),
            batch_size=1,
            seed=recipe.seed,
        )
    return Learner(
        backbone,
        adapters,
        optimizer,
        BatchPlan(photos, batch_size=recipe.batch_size, seed=recipe.seed),
        prior,
        Objective(
            schedule=schedule_from_config(backbone.scheduler_config, recipe.prediction),
            min_snr_gamma=recipe.min_snr_gamma,
            noise_offset=recipe.noise_offset,
            caption_dropout=recipe.caption_dropout,
            prior_weight=recipe.prior_weight,
            prior_target=recipe.prior_target,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
        ),
        Accelerator(cpu=backbone.device.type == "cpu"),
    )


def make_samples(
    name: str, sizes: Sequence[tuple[int, int]], backbone: Backbone, recipe: Recipe
) -> list[CachedSample]:
    """Random latents of the given (height, width), each with a caption of its own."""
    draw = torch.Generator().manual_seed(len(name) + len(sizes))
    samples = []
    for number, (height, width) in enumerate(sizes):
        text = f"{name} {number}"
        prompt_TD = pooled_P = None
        if not recipe.text_encoder:
            with torch.no_grad():
                prompts = backbone.encode_prompts([text])
            prompt_TD = prompts.embeddings_BTD[0]
            pooled_P = None if prompts.pooled_BP is None else prompts.pooled_BP[0]
        latents = torch.randn(4, height, width, generator=draw)
        sample = CachedSample(
            f"{name}-{number}",
            latents,
            (text,),
            prompt_TD,
            pooled_P=pooled_P,
            sizes=(96, 100, number, 2, 4 * height, 4 * width),
        )
        samples.append(sample)
    return samples


def make_plan(steps: int, *, last: int = 0, accumulate: int = 1, clip: float = 1.0) -> LoopPlan:
    return LoopPlan(
        total_steps=steps,
        last_step=last or steps,
        schedule="cosine",
        warmup_steps=1,
        accumulate_steps=accumulate,
        max_grad_norm=clip,
    )
