"""Photos and captions become latents and prompt embeddings, once, and are kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.data.cache import TensorCache, fingerprint
from trainer.data.pixels import load_pixels
from trainer.diffusion.noise import generator_of
from trainer.families import Backbone
from trainer.types import Bucketed, CachedSample

# Part of every cache key: change it when what is cached changes.
CACHE_FORMAT = 1


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """base: fingerprint of the base and number format. background: RGB behind transparency."""

    base: str
    background: tuple[int, int, int]
    flip: bool
    cache_prompts: bool


@torch.no_grad()
def encode_photos(
    photos: Sequence[Bucketed],
    backbone: Backbone,
    cache: TensorCache,
    options: EncodeOptions,
    progress: Callable[[int, int], None],
) -> list[CachedSample]:
    """Encode every photo (and its mirror image when asked).

    Args:
        progress: called with (photos done, photos in all).
    """
    samples = []
    for done, photo in enumerate(photos, start=1):
        for flip in (False, True) if options.flip else (False,):
            samples.append(_encode(photo, flip, backbone, cache, options))
        progress(done, len(photos))
    return samples


def _encode(
    photo: Bucketed, flip: bool, backbone: Backbone, cache: TensorCache, options: EncodeOptions
) -> CachedSample:
    digest = photo.captioned.photo.digest
    text = photo.captioned.text
    where = [photo.bucket.width, photo.bucket.height, photo.left, photo.top]
    size = [photo.resized.width, photo.resized.height]
    key = digest + ("+flip" if flip else "")

    def make() -> dict[str, Tensor]:
        pixels_CHW = load_pixels(photo, background=options.background, flip=flip)
        return {"latents": encode_one(backbone, pixels_CHW, key)}

    entry = fingerprint(
        "latents", CACHE_FORMAT, options.base, key, *where, *size, list(options.background)
    )
    latents_Chw = cache.get_or_make(entry, make)["latents"]
    prompt_TD = encode_text(text, backbone, cache, options) if options.cache_prompts else None
    return CachedSample(key=key, latents_Chw=latents_Chw, text=text, prompt_TD=prompt_TD)


@torch.no_grad()
def encode_one(backbone: Backbone, pixels_CHW: Tensor, key: str) -> Tensor:
    """Latents [C, h, w] of one picture; the posterior is drawn with numbers that `key` fixes."""
    _, height, width = pixels_CHW.shape
    noise_Chw = torch.randn(backbone.latent_shape(width, height), generator=generator_of(key))
    return backbone.encode_pixels(pixels_CHW[None], noise_Chw[None])[0].cpu()


@torch.no_grad()
def encode_text(
    text: str, backbone: Backbone, cache: TensorCache, options: EncodeOptions
) -> Tensor:
    """Prompt embeddings [T, D] float32 of one caption."""
    entry = fingerprint("prompt", CACHE_FORMAT, options.base, text)

    def make() -> dict[str, Tensor]:
        return {"prompt": backbone.encode_prompts([text])[0].float().cpu()}

    return cache.get_or_make(entry, make)["prompt"]
