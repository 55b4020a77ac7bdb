"""What is trained and how one step of it goes: adapters on a frozen base, loss, gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.adapters.attach import Attached, attach
from trainer.adapters.plans import BlockRule
from trainer.adapters.targets import select_layers
from trainer.data.batches import BatchPlan
from trainer.data.caption_variants import CaptionStyle, vary
from trainer.diffusion.noise import draw_for_step
from trainer.diffusion.objective import diffusion_loss
from trainer.diffusion.schedule import NoiseSchedule
from trainer.families import Backbone
from trainer.training.embeddings import together, with_dropped
from trainer.transfer import to_device
from trainer.types import Batch, Prompts

# Embeddings of captions that vary are kept for so many texts: 231 x 2048 numbers each at most.
KEPT_TEXTS = 512


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What is attached where.

    targets, text_targets: of the UNet and the text encoders, names of `trainer.adapters.targets`.
    text_rank, text_alpha: of the text encoders; None: as in the UNet. include, exclude, rules: for
    the UNet's layers.
    """

    kind: str
    rank: int
    alpha: float
    targets: str
    text_encoder: bool
    seed: int
    text_targets: str = "attention"
    text_rank: int | None = None
    text_alpha: float | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rules: tuple[BlockRule, ...] = ()


@dataclass(frozen=True, slots=True)
class Objective:
    """What counts as an error; the fields are those of the settings section of that name."""

    schedule: NoiseSchedule
    min_snr_gamma: float
    noise_offset: float
    caption_dropout: float
    prior_weight: float
    prior_target: str
    batch_size: int
    seed: int
    prior_batch_size: int = 1


def attach_adapters(backbone: Backbone, plan: AdapterPlan) -> dict[str, Attached]:
    """Attach adapters to each component that is trained; its base weights are frozen.

    Raises:
        ConfigError: a pattern fits no layer, or no layer is left.
    """
    encoders = [name for name in backbone.components if name != "unet" and plan.text_encoder]
    # An adapter is made where its layer is.
    backbone.hold("unet", *encoders)
    unet = backbone.components["unet"]
    paths = select_layers(unet, "unet", plan.targets, include=plan.include, exclude=plan.exclude)
    attached = {
        "unet": attach(
            unet,
            paths,
            adapter=plan.kind,
            rank=plan.rank,
            alpha=plan.alpha,
            seed=plan.seed,
            rules=plan.rules,
        )
    }
    for name in encoders:
        encoder = backbone.components[name]
        attached[name] = attach(
            encoder,
            select_layers(encoder, name, plan.text_targets),
            adapter=plan.kind,
            rank=plan.text_rank or plan.rank,
            alpha=plan.text_alpha or plan.alpha,
            seed=plan.seed,
        )
    backbone.hold("unet", *encoders)  # adapters of streamed layers were made in main memory
    return attached


@contextmanager
def scaled(adapters: Mapping[str, Attached], factor: float) -> Iterator[None]:
    """The base with so much of what the adapters do now."""
    with ExitStack() as stack:
        for attached in adapters.values():
            stack.enter_context(attached.scaled(factor))
        yield


@contextmanager
def disabled(adapters: Mapping[str, Attached]) -> Iterator[None]:
    """The base as it is without the adapters."""
    with scaled(adapters, 0.0):
        yield


class Learner:
    """Backbone, adapters and optimizer of one run.

    Args:
        backbone: the frozen base.
        adapters: by component, as `attach_adapters` made them.
        optimizer: over the adapters' parameters.
        batches: of the photos.
        prior: batches of the base's own class pictures, or None.
        objective: the loss.
        styles: how the captions of each set of photos vary, by its name; class pictures that the
            base drew belong to none and keep their texts.
        accelerator: device and precision; only its `prepare`, `backward` and clipping are used.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapters: Mapping[str, Attached],
        optimizer: torch.optim.Optimizer,
        batches: BatchPlan,
        prior: BatchPlan | None,
        objective: Objective,
        accelerator: Accelerator,
        styles: Mapping[str, CaptionStyle] | None = None,
    ) -> None:
        self.backbone = backbone
        self.adapters = dict(adapters)
        self.optimizer: Any = accelerator.prepare(optimizer)
        self.batches = batches
        self.prior = prior
        self.objective = objective
        self.accelerator = accelerator
        self.styles = dict(styles or {})
        self._embedded: dict[str, Prompts] = {}

    def know(self, embedded: Mapping[str, Prompts]) -> None:
        """What the frozen text encoders make of texts, as `_embedding` would make it."""
        self._embedded.update(embedded)

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        return [p for attached in self.adapters.values() for p in attached.parameters()]

    def loss(self, index: int) -> Tensor:
        """Loss of batch `index` since the start of training, a scalar.

        Every photo weighs its set's weight / batch_size, also in a batch that its bucket could
        not fill.
        """
        batch = self.batches.batch(index)
        count = len(batch.samples)
        prior = self.prior.batch(index) if self.prior else None
        if prior is None:
            losses_B = self._losses(batch, index) * self._weights(batch)
            return losses_B.sum() / self.objective.batch_size
        kept = len(prior.samples) if self.objective.prior_target == "base" else 0
        if _alike(batch, prior):
            # One pass over both is quicker than two.
            losses_B = self._losses(_joined(batch, prior), index, kept)
            photos_B, prior_B = losses_B[:count], losses_B[count:]
        else:
            photos_B, prior_B = self._losses(batch, index), self._losses(prior, index, kept)
        photo_loss = (photos_B * self._weights(batch)).sum() / self.objective.batch_size
        prior_loss = (prior_B * self._weights(prior)).sum() / self.objective.prior_batch_size
        return photo_loss + self.objective.prior_weight * prior_loss

    def sample_losses(self, index: int) -> Iterator[tuple[Batch, Tensor]]:
        """The photos of batch `index`, then the class pictures beside them, each with its loss
        alone, [B]."""
        batch = self.batches.batch(index)
        yield batch, self._losses(batch, index)
        if self.prior:
            prior = self.prior.batch(index)
            kept = len(prior.samples) if self.objective.prior_target == "base" else 0
            yield prior, self._losses(prior, index, kept)

    def _weights(self, batch: Batch) -> Tensor:
        """How much each sample counts, [B]."""
        weights = [sample.weight for sample in batch.samples]
        return to_device(torch.tensor(weights), self.accelerator.device)

    def _losses(self, batch: Batch, index: int, kept: int = 0) -> Tensor:
        """Loss of each sample, [B]; of the last `kept` against what the base itself predicts."""
        objective, device = self.objective, self.accelerator.device
        _, *shape = batch.latents_BChw.shape
        draws = draw_for_step(
            objective.seed,
            index,
            batch.keys,
            (shape[0], shape[1], shape[2]),
            timesteps=objective.schedule.timesteps,
            noise_offset=objective.noise_offset,
            caption_dropout=objective.caption_dropout,
        )
        # Few numbers, mixed by the processor, so that it never waits for the device.
        mixed = batch.latents_BChw, draws.noise_BChw, draws.timesteps_B
        noisy_BChw = to_device(objective.schedule.add_noise(*mixed), device)
        target_BChw = to_device(objective.schedule.target(*mixed), device)
        timesteps_B = to_device(draws.timesteps_B, device)
        sizes_B6 = to_device(torch.tensor([sample.sizes for sample in batch.samples]), device)
        if kept:
            with torch.no_grad(), disabled(self.adapters):
                prompts = self._prompts(_last(batch, kept), index, draws.keep_caption[-kept:])
                base_BChw = self.backbone.predict(
                    noisy_BChw[-kept:], timesteps_B[-kept:], prompts.to(device), sizes_B6[-kept:]
                )
            target_BChw = torch.cat([target_BChw[:-kept], base_BChw])
        prompts = self._prompts(batch, index, draws.keep_caption).to(device)
        weights_Bhw = batch.weights_Bhw
        return diffusion_loss(
            self.backbone.predict(noisy_BChw, timesteps_B, prompts, sizes_B6),
            target_BChw,
            objective.schedule,
            draws.timesteps_B,
            objective.min_snr_gamma,
            None if weights_Bhw is None else to_device(weights_Bhw, device),
        )

    def _texts(self, batch: Batch, index: int) -> list[str]:
        """The caption of each sample at batch `index`."""
        texts = []
        seen: Counter[str] = Counter()
        for sample in batch.samples:
            style = self.styles.get(sample.set_name)
            if style is None:
                texts.append(sample.text)
                continue
            # A photo that comes twice in a batch is drawn for twice, as its noise is.
            seen[sample.key] += 1
            key = f"{sample.key}#{seen[sample.key]}"
            texts.append(vary(sample.texts, style, seed=self.objective.seed, step=index, key=key))
        return texts

    def _prompts(self, batch: Batch, index: int, keep: Sequence[bool]) -> Prompts:
        """The embeddings of a batch; captions that are dropped become the empty text."""
        if batch.prompts is not None:
            if all(keep):
                return batch.prompts
            return with_dropped(batch.prompts, keep, self._embedding(""))
        captions = self._texts(batch, index)
        texts = [text if kept else "" for text, kept in zip(captions, keep, strict=True)]
        if self.adapters.keys() - {"unet"}:
            return self.backbone.encode_prompts(texts)
        return together([self._embedding(text) for text in texts], self._embedding(""))

    def _embedding(self, text: str) -> Prompts:
        """What the frozen text encoders make of a text, float32 and kept for later."""
        if text not in self._embedded:
            if len(self._embedded) >= KEPT_TEXTS:
                self._embedded.clear()
            encoders = self.backbone.components.keys() - {"unet"}
            with torch.no_grad(), self.backbone.complete(*encoders):
                self._embedded[text] = self.backbone.encode_prompts([text]).kept()
        return self._embedded[text]


def _last(batch: Batch, count: int) -> Batch:
    return Batch(
        latents_BChw=batch.latents_BChw[-count:],
        samples=batch.samples[-count:],
        prompt_BTD=None if batch.prompt_BTD is None else batch.prompt_BTD[-count:],
        weights_Bhw=None if batch.weights_Bhw is None else batch.weights_Bhw[-count:],
        pooled_BP=None if batch.pooled_BP is None else batch.pooled_BP[-count:],
    )


def _alike(first: Batch, second: Batch) -> bool:
    """Whether pictures and prompts of two batches have the same shapes, so that they can be one."""
    if first.latents_BChw.shape[1:] != second.latents_BChw.shape[1:]:
        return False
    if first.prompt_BTD is None or second.prompt_BTD is None:
        return True
    return first.prompt_BTD.shape[1:] == second.prompt_BTD.shape[1:]


def _joined(first: Batch, second: Batch) -> Batch:
    prompt_BTD = pooled_BP = weights_Bhw = None
    if first.prompt_BTD is not None and second.prompt_BTD is not None:
        prompt_BTD = torch.cat([first.prompt_BTD, second.prompt_BTD])
    if first.pooled_BP is not None and second.pooled_BP is not None:
        pooled_BP = torch.cat([first.pooled_BP, second.pooled_BP])
    if first.weights_Bhw is not None or second.weights_Bhw is not None:
        weights_Bhw = torch.cat([_weights(first), _weights(second)])
    return Batch(
        latents_BChw=torch.cat([first.latents_BChw, second.latents_BChw]),
        samples=first.samples + second.samples,
        prompt_BTD=prompt_BTD,
        weights_Bhw=weights_Bhw,
        pooled_BP=pooled_BP,
    )


def _weights(batch: Batch) -> Tensor:
    if batch.weights_Bhw is not None:
        return batch.weights_Bhw
    count, _, height, width = batch.latents_BChw.shape
    return torch.ones(count, height, width)
