"""Pictures of the class that the base draws before training, for prior preservation.

DreamBooth (arXiv 2208.12242, section 3.2): training on the base's own pictures of the class beside
the photos keeps the class from turning into the one subject. They are drawn straight to latents,
so nothing is lost on a way through the VAE, and kept on disk for the next run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from trainer.data.cache import TensorCache, fingerprint
from trainer.diffusion.noise import seed_of
from trainer.families import Backbone
from trainer.training.encode import CACHE_FORMAT, EncodeOptions, encode_text
from trainer.training.preview import chunk_size, decode, draw_latents
from trainer.types import CachedSample, Size


@dataclass(frozen=True, slots=True)
class PriorOptions:
    """How the class pictures are drawn. base: its fingerprint."""

    base: str
    prompts: tuple[str, ...]
    pictures: int
    size: Size
    sampling_steps: int
    guidance_scale: float
    seed: int


@torch.no_grad()
def draw_prior(
    backbone: Backbone,
    cache: TensorCache,
    options: PriorOptions,
    encoding: EncodeOptions,
    progress: Callable[[int, int], None],
    share: slice = slice(None),
) -> list[CachedSample]:
    """Draw (or find in the cache) the class pictures as training samples.

    Picture n uses prompt n modulo their number and a seed of its own. `encoding` is for the
    prompts. `share`: which of the batches that are drawn at once, all by default.
    """
    if backbone.device.type != "cpu":
        # Nothing of this is trained yet, and a small GPU has no room for it while it draws.
        backbone.release("vae", *(name for name in backbone.components if name != "unet"))
    drawn: list[tuple[int, str, Tensor]] = []
    size = options.size
    for start in range(0, options.pictures, BATCH)[share]:
        numbers = range(start, min(start + BATCH, options.pictures))
        texts = [options.prompts[n % len(options.prompts)] for n in numbers]
        latents_NChw = _draw_batch(numbers, texts, backbone, cache, options)
        drawn += zip(numbers, texts, latents_NChw, strict=True)
        progress(len(drawn), options.pictures)
    samples: list[CachedSample] = []
    for n, text, latents_Chw in drawn:
        prompt: dict[str, Tensor] = {}
        if encoding.cache_prompts:
            prompt = encode_text(text, backbone, cache, encoding)
        samples.append(
            CachedSample(
                key=f"prior-{n}",
                latents_Chw=latents_Chw.clone(),
                texts=(text,),
                prompt_TD=prompt.get("prompt"),
                pooled_P=prompt.get("pooled"),
                sizes=(size.height, size.width, 0, 0, size.height, size.width),
            )
        )
    return samples


def _draw_batch(
    numbers: Sequence[int],
    texts: Sequence[str],
    backbone: Backbone,
    cache: TensorCache,
    options: PriorOptions,
) -> Tensor:
    """Latents [N, C, h, w] of the class pictures of these numbers."""
    size = options.size
    entry = fingerprint(
        "prior",
        CACHE_FORMAT,
        options.base,
        list(texts),
        list(numbers),
        [size.width, size.height],
        options.sampling_steps,
        options.guidance_scale,
        options.seed,
    )

    seeds = [seed_of(options.seed, "prior", n) for n in numbers]
    at_once = chunk_size(size)

    def make() -> dict[str, Tensor]:
        parts = [
            draw_latents(
                backbone,
                texts[start : start + at_once],
                seeds[start : start + at_once],
                size=size,
                steps=options.sampling_steps,
                guidance=options.guidance_scale,
            )
            for start in range(0, len(texts), at_once)
        ]
        return {"latents": torch.cat(parts)}

    shape = (len(numbers), *backbone.latent_shape(size.width, size.height))
    found = cache.get_or_make(entry, make, shapes={"latents": shape}, kind="prior", source=texts[0])
    return found["latents"]


# Pictures that are kept together in the cache.
BATCH = 8


@torch.no_grad()
def prior_images(backbone: Backbone, samples: Sequence[CachedSample]) -> list[Image.Image]:
    """The class pictures as a person sees them."""
    images: list[Image.Image] = []
    for start in range(0, len(samples), BATCH):
        chunk = samples[start : start + BATCH]
        images += decode(backbone, torch.stack([sample.latents_Chw for sample in chunk]))
    return images
