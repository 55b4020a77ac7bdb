"""All pictures of a job as latents: the photos, and pictures of the class."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Console

from trainer.config.presets import prompts_path
from trainer.data.cache import TensorCache, cache_root
from trainer.data.caption_variants import vary
from trainer.families import Backbone
from trainer.training.device import Device
from trainer.training.encode import EncodeOptions, encode_photos, encode_text
from trainer.training.fingerprints import text_fingerprint, vae_fingerprint
from trainer.training.finite import only_finite, require_finite
from trainer.training.job import Job
from trainer.training.preview import (
    PreviewDefaults,
    PreviewPrompt,
    read_prompts,
    without_word,
)
from trainer.training.prior import PriorOptions, draw_prior
from trainer.training.reports import stage_progress
from trainer.training.team import ALONE, Team
from trainer.types import CachedSample, Prompts, Size

# Class pictures drawn for the score alone, when prior preservation is off.
SCORE_PICTURES = 16


@dataclass(frozen=True, slots=True)
class Encoded:
    """Everything that is trained on or compared with, as latents.

    photos: of every training picture. plain: of `Job.plain_pictures`. prior: of class pictures,
    those of the class sets or else drawn by the base. others: class pictures that the base drew,
    which scores compare with. embedded: of texts beside the captions, where captions are embedded
    once: what the text encoders make of them.
    """

    photos: tuple[CachedSample, ...]
    plain: tuple[CachedSample, ...]
    prior: tuple[CachedSample, ...]
    others: tuple[CachedSample, ...]
    embedded: Mapping[str, Prompts] = field(default_factory=dict)


def encode_job(
    job: Job,
    device: Device,
    backbone: Backbone,
    base: str,
    console: Console,
    team: Team = ALONE,
) -> Encoded:
    """Encode the photos, and draw or encode the class pictures, unless they are in the cache.

    Several processes share the work, and then take what the others did from the cache; without
    one each does everything.
    """
    config = job.config
    cache = TensorCache(cache_root() if config.data.cache else None)
    options = EncodeOptions(
        vae=vae_fingerprint(job.facts, device),
        text=text_fingerprint(
            job.facts, device, config.model.clip_skip or 0, config.model.prompt_chunks
        ),
        background=config.data.background_rgb,
        transparency=config.data.transparency,
        face_weight=config.data.face_weight,
        cache_prompts=not (config.adapter.text_encoder or job.captions_vary),
        workers=config.data.workers or min(8, os.cpu_count() or 1),
    )
    if team.size > 1 and config.data.cache:
        own = [*job.pictures, *job.class_pictures][team.rank :: team.size]
        words = f"pictures encoded by the first of {team.size} processes"
        encode_photos(own, backbone, cache, options, stage_progress(console, words))
        _draw_class(job, backbone, cache, options, base, console, team)
        team.wait("the photos")
    photos = encode_photos(
        job.pictures, backbone, cache, options, stage_progress(console, "photos encoded")
    )
    prior = encode_photos(
        job.class_pictures,
        backbone,
        cache,
        options,
        stage_progress(console, "pictures of the class encoded"),
    )
    others = _draw_class(job, backbone, cache, options, base, console)
    require_finite(others)

    def say(words: str) -> None:
        console.print(words, style="yellow", highlight=False, soft_wrap=True)

    skip_bad = config.data.skip_bad
    samples = only_finite(job.pictures, photos, skip_bad=skip_bad, say=say)
    prior = list(only_finite(job.class_pictures, prior, skip_bad=skip_bad, say=say).values())
    if cache.notice:
        console.print(cache.notice, style="yellow", soft_wrap=True)
    return Encoded(
        photos=tuple(samples.values()),
        plain=tuple(samples[p] for p in job.plain_pictures if p in samples),
        prior=tuple(prior or others),
        others=tuple(others),
        embedded=_dropped_caption(job, backbone, cache, options),
    )


def _dropped_caption(
    job: Job, backbone: Backbone, cache: TensorCache, options: EncodeOptions
) -> dict[str, Prompts]:
    """The embedding of the empty text, which takes the place of captions that are dropped."""
    if not (options.cache_prompts and job.config.caption.dropout):
        return {}
    made = encode_text("", backbone, cache, options)
    pooled = made.get("pooled")
    return {"": Prompts(made["prompt"][None], None if pooled is None else pooled[None])}


def _draw_class(
    job: Job,
    backbone: Backbone,
    cache: TensorCache,
    options: EncodeOptions,
    base: str,
    console: Console,
    team: Team = ALONE,
) -> list[CachedSample]:
    """Class pictures by the base: as many as are trained on, or a few for the scores alone; of
    these the share of a team's process."""
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
            base=f"{base} {config.model.clip_skip or 0} {config.model.prompt_chunks}",
            prompts=_prior_prompts(job),
            pictures=wanted,
            size=Size(side, side),
            sampling_steps=config.preview.sampling_steps,
            guidance_scale=config.objective.prior_guidance_scale,
            seed=config.run.seed,
        ),
        options,
        stage_progress(console, f"pictures of '{config.caption.class_noun}' drawn by the base"),
        share=slice(team.rank, None, team.size),
    )


def _prior_prompts(job: Job) -> tuple[str, ...]:
    """What class pictures are drawn from: the prompts file and the photos' captions in turn.

    The captions go without the trigger: then the trigger is all that tells a photo from a class
    picture, and nothing else in a caption can take over its meaning.
    """
    caption, settings = job.config.caption, job.config.objective
    path = prompts_path(settings.prior_prompts)
    lines = read_prompts(path, caption.trigger, caption.class_noun, preview_defaults(job))
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


def preview_prompts(job: Job) -> tuple[PreviewPrompt, ...]:
    """What samples are drawn from; nothing without previews."""
    if not job.config.preview.every_steps:
        return ()
    caption = job.config.caption
    path = prompts_path(job.config.preview.prompts)
    return tuple(read_prompts(path, caption.trigger, caption.class_noun, preview_defaults(job)))


def preview_defaults(job: Job) -> PreviewDefaults:
    """What a line of a prompts file leaves open."""
    preview = job.config.preview
    side = job.square_px
    return PreviewDefaults(
        size=Size(side, side),
        seed=preview.seed,
        guidance=preview.guidance_scale,
        steps=preview.sampling_steps,
        side_step_px=8 * job.facts.pixels_per_latent,
    )
