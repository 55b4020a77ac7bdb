"""Sample images during training: what to draw (prompts files) and drawing it.

A prompts file has one prompt per line; `#` starts a comment. `{trigger}` and `{class}` are filled
in. At the end of a line come sd-scripts' options: `--n` negative prompt, `--w` and `--h` size in
px, `--d` seed, `--l` guidance scale, `--s` sampling steps.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from trainer.errors import DataError
from trainer.families import Backbone
from trainer.training.embeddings import filled
from trainer.training.memory import is_memory_full, let_go
from trainer.types import Size
from trainer.untrusted import read_text, shortened

# No list of prompts is larger; a line of it is shown in errors up to here.
_FILE_BYTES = 1_000_000
_SHOWN_CHARACTERS = 200

OPTION = re.compile(r"\s--([A-Za-z]+)(?=\s|$)(.*?)(?=\s--[A-Za-z]+(?:\s|$)|$)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class PreviewPrompt:
    """One sample image to draw."""

    text: str
    negative: str
    size: Size
    seed: int
    guidance: float
    steps: int
    triggered: bool

    def without(self, trigger: str) -> PreviewPrompt:
        """The same picture without the trigger word, to see what leaks into everything else."""
        return replace(self, text=without_word(self.text, trigger), triggered=False)


@dataclass(frozen=True, slots=True)
class PreviewDefaults:
    """What a line of a prompts file does not say; seeds count up from `seed`."""

    size: Size
    seed: int
    guidance: float
    steps: int
    side_step_px: int


def read_prompts(
    path: Path, trigger: str, class_noun: str, defaults: PreviewDefaults
) -> list[PreviewPrompt]:
    """Read a prompts file.

    Raises:
        DataError: a line has an option that is not known or a value that does not fit, or there
            is no prompt; the line is named.
    """
    try:
        lines = read_text(path, _FILE_BYTES).splitlines()
    except (OSError, ValueError) as error:
        raise DataError(
            f"The prompts file cannot be read: {error}",
            where=str(path),
            fix="It has to be a text file in UTF-8 with one prompt per line.",
        ) from error
    prompts: list[PreviewPrompt] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            own = replace(defaults, seed=defaults.seed + len(prompts))
            where = f"{path}, line {number}: {shortened(text, _SHOWN_CHARACTERS)}"
            prompts.append(parse_prompt(text, trigger, class_noun, own, where))
    if not prompts:
        raise DataError(
            "The prompts file has no prompt.",
            where=str(path),
            fix="Write one per line, such as: {trigger} {class}, beach background",
        )
    return prompts


def parse_prompt(
    line: str, trigger: str, class_noun: str, defaults: PreviewDefaults, where: str
) -> PreviewPrompt:
    """One line of a prompts file; `where` names it in an error."""
    first = OPTION.search(f" {line}")
    text = f" {line}"[: first.start()].strip() if first else line
    options = {name.lower(): value.strip() for name, value in OPTION.findall(f" {line}")}
    if unknown := sorted(set(options) - set("nwhdls")):
        raise DataError(
            f"The prompt has an option that is not known: --{shortened(unknown[0], 40)}",
            where=where,
            fix="Known are --n TEXT, --w PX, --h PX, --d SEED, --l GUIDANCE and --s STEPS.",
        )

    def number(name: str, default: float, lowest: float, highest: float) -> float:
        if name not in options:
            return default
        try:
            value = float(options[name])
        except ValueError:
            value = float("nan")
        if not lowest <= value <= highest:
            raise DataError(
                f"The prompt's option --{name} {shortened(options[name], 40)} is not between "
                f"{lowest:g} and {highest:g}.",
                where=where,
                fix="Correct the number.",
            )
        return value

    step = defaults.side_step_px
    width = max(step, int(number("w", defaults.size.width, step, 2048)) // step * step)
    height = max(step, int(number("h", defaults.size.height, step, 2048)) // step * step)

    def fill(part: str) -> str:
        return part.replace("{trigger}", trigger).replace("{class}", class_noun)

    text = fill(text)
    return PreviewPrompt(
        text=text,
        negative=fill(options.get("n", "")),
        size=Size(width, height),
        seed=int(number("d", defaults.seed, 0, 2**53)),
        guidance=number("l", defaults.guidance, 1.0, 30.0),
        steps=int(number("s", defaults.steps, 1, 200)),
        triggered=without_word(text, trigger) != text.strip(" ,"),
    )


def without_word(text: str, word: str) -> str:
    """A prompt or caption without a word, and without what is left of its commas."""
    bare = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)\s*", "", text, flags=re.IGNORECASE)
    return bare.strip(" ,")


def chunk_size(size: Size) -> int:
    """Pictures drawn at once: about two of 512 px, so that a small GPU is not filled."""
    return max(1, min(16, 2 * 512 * 512 // size.area))


@torch.no_grad()
def draw(
    backbone: Backbone,
    prompts: Sequence[PreviewPrompt],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Image.Image]:
    """Draw each prompt, in the order given, as a plain diffusers pipeline would.

    Text encoders, UNet and VAE take turns, so that a small GPU need not hold them all.
    """
    chunks = _chunks(prompts)
    with _encoders_at_hand(backbone):
        told = [
            _conditioning(
                backbone, [prompts[n].text for n in chunk], [prompts[n].negative for n in chunk]
            )
            for chunk in chunks
        ]
    drawn: list[Tensor] = []
    for chunk, conditioning in zip(chunks, told, strict=True):
        first, seeds = prompts[chunk[0]], [prompts[n].seed for n in chunk]
        how = first.size, first.steps, first.guidance
        drawn.append(_latents(backbone, conditioning, seeds, *how))
        progress(sum(map(len, drawn)), len(prompts))
    images: dict[int, Image.Image] = {}
    with backbone.complete("vae"):
        for chunk, latents_NChw in zip(chunks, drawn, strict=True):
            images.update(zip(chunk, decode(backbone, latents_NChw), strict=True))
    return [images[number] for number in range(len(prompts))]


def _chunks(prompts: Sequence[PreviewPrompt]) -> list[list[int]]:
    """The prompts by their numbers, in the groups that are drawn at once."""

    def alike(number: int) -> tuple[object, ...]:
        prompt = prompts[number]
        return (prompt.size, prompt.steps, prompt.guidance)

    chunks = []
    order = sorted(range(len(prompts)), key=lambda number: (alike(number), number))
    for _, group in groupby(order, key=alike):
        numbers = list(group)
        width = chunk_size(prompts[numbers[0]].size)
        chunks += [numbers[start : start + width] for start in range(0, len(numbers), width)]
    return chunks


@torch.no_grad()
def draw_latents(
    backbone: Backbone,
    texts: Sequence[str],
    seeds: Sequence[int],
    *,
    size: Size,
    steps: int,
    guidance: float,
    negatives: Sequence[str] | None = None,
) -> Tensor:
    """Latents [N, C, h, w] float32 of N pictures of one size, each from its own seed."""
    with _encoders_at_hand(backbone):
        conditioning = _conditioning(backbone, texts, negatives or [""] * len(texts))
    return _latents(backbone, conditioning, seeds, size, steps, guidance)


def _encoders_at_hand(backbone: Backbone) -> AbstractContextManager[None]:
    return backbone.complete(*(name for name in backbone.components if name != "unet"))


def _latents(
    backbone: Backbone,
    conditioning: Mapping[str, Tensor],
    seeds: Sequence[int],
    size: Size,
    steps: int,
    guidance: float,
) -> Tensor:
    with backbone.complete("unet"):
        result = backbone.pipeline()(
            **conditioning,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            width=size.width,
            height=size.height,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="latent",
        )
    latents_NChw: Tensor = result.images.float().cpu()
    return latents_NChw


def _conditioning(
    backbone: Backbone, texts: Sequence[str], negatives: Sequence[str]
) -> dict[str, Tensor]:
    """The prompts as the training encodes them, by the names of a pipeline's arguments."""
    wanted, unwanted = backbone.encode_prompts(texts), backbone.encode_prompts(negatives)
    tokens = max(prompts.embeddings_BTD.shape[1] for prompts in (wanted, unwanted))
    empty = backbone.encode_prompts([""])
    arguments = {}
    for start, prompts in (("", wanted), ("negative_", unwanted)):
        prompts = filled(prompts, tokens, empty)
        arguments[f"{start}prompt_embeds"] = prompts.embeddings_BTD
        if prompts.pooled_BP is not None:
            arguments[f"{start}pooled_prompt_embeds"] = prompts.pooled_BP
    return arguments


@torch.no_grad()
def decode(backbone: Backbone, latents_NChw: Tensor) -> list[Image.Image]:
    """Latents as pictures, in the way the pipeline itself does it; what is no number is black."""
    from diffusers.image_processor import VaeImageProcessor

    height, width = (side * backbone.facts.pixels_per_latent for side in latents_NChw.shape[2:])
    with backbone.complete("vae"):
        parts = latents_NChw.split(chunk_size(Size(width, height)))
        pixels_NCHW = torch.cat([_decoded(backbone, part).cpu() for part in parts])
    pixels_NCHW.nan_to_num_(nan=-1.0)
    images: list[Image.Image] = VaeImageProcessor().postprocess(pixels_NCHW, "pil")
    return images


def _decoded(backbone: Backbone, latents_NChw: Tensor) -> Tensor:
    """Pixels; one picture after the other and in tiles where memory does not suffice otherwise."""
    try:
        return backbone.decode_latents(latents_NChw)
    except (MemoryError, RuntimeError) as error:
        if not is_memory_full(error):
            raise
        let_go(error)
    return torch.cat([backbone.decode_latents(one[None], tiled=True) for one in latents_NChw])


def parameters(prompt: PreviewPrompt, *, model: str, sampler: str) -> str:
    """What a picture was drawn from, as A1111 writes it into its PNG files."""
    return "\n".join(
        [
            prompt.text,
            *([f"Negative prompt: {prompt.negative}"] if prompt.negative else []),
            f"Steps: {prompt.steps}, Sampler: {sampler}, CFG scale: {prompt.guidance:g}, "
            f"Seed: {prompt.seed}, Size: {prompt.size}, Model: {model}",
        ]
    )


def save_preview(
    path: Path, image: Image.Image, prompt: PreviewPrompt, *, model: str, sampler: str
) -> None:
    """Write a PNG that carries what it was drawn from (see `parameters`)."""
    info = PngInfo()
    info.add_itxt("parameters", parameters(prompt, model=model, sampler=sampler))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first: a run that goes on reads these pictures back.
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        image.save(temporary, "PNG", pnginfo=info)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
