"""Draws the pretraining pictures and writes their captions as tokens and labels."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pretraining import palette
from pretraining.avatars import draw_avatar
from pretraining.captions import Caption, sample_caption
from pretraining.looks import (
    BEARDS,
    BROWS,
    CLOTHES,
    COLOURS,
    EYES,
    FACES,
    GLASSES,
    HAIR_STYLES,
    HATS,
    MARKS,
    MOUTHS,
    PATTERNS,
    SCENES,
    STYLES,
    Context,
    Identity,
    sample_context,
    sample_identity,
    sample_style,
)
from pretraining.recipe import Recipe
from pretraining.tokenizer import FOLDER as TOKENIZER_FOLDER
from pretraining.tokenizer import build_tokenizer

PICTURES = "pictures.npy"
HELD_OUT_PICTURES = "held_out.npy"
TOKENS = "tokens.npy"
LABELS = "labels.npy"
_HELD_OUT_SEED = 50_000_000
_CHUNK = 500


def picture(seed: int, size: int) -> NDArray[np.uint8]:
    """Picture number `seed`: uint8 [size, size, 3]."""
    identity, context = looks(seed)
    return np.asarray(draw_avatar(identity, context, size, sample_style(seed)))


def captions(seed: int, count: int) -> list[Caption]:
    """The captions of picture number `seed`."""
    identity, context = looks(seed)
    style = sample_style(seed)
    return [sample_caption(identity, context, seed * 1000 + k, style=style) for k in range(count)]


def looks(seed: int) -> tuple[Identity, Context]:
    """The looks of picture number `seed`."""
    return sample_identity(seed), sample_context(seed)


def _pictures(first: int, count: int, size: int) -> NDArray[np.uint8]:
    return np.stack([picture(seed, size) for seed in range(first, first + count)])


def draw(recipe: Recipe, work: Path, processes: int) -> None:
    """Draw all pictures, the training ones and those kept to measure on."""
    plans = ((PICTURES, 0, recipe.pictures), (HELD_OUT_PICTURES, _HELD_OUT_SEED,
             recipe.held_out_pictures))  # fmt: skip
    for name, first, count in plans:
        if (work / name).exists():
            continue
        starts = range(first, first + count, _CHUNK)
        sizes = [min(_CHUNK, first + count - start) for start in starts]
        job = partial(_pictures, size=recipe.resolution_px)
        if processes == 1:
            parts = list(map(job, starts, sizes))
        else:
            with ProcessPoolExecutor(processes) as pool:
                parts = list(pool.map(job, starts, sizes))
        temporary = work / f"part-{name}"
        np.save(temporary, np.concatenate(parts))
        temporary.replace(work / name)


def vocabulary_texts(count: int = 8000) -> list[str]:
    """Captions without invented names, which must stay spelled out letter by letter."""
    return [
        sample_caption(*looks(seed), seed, named_share=0.0, style=sample_style(seed)).text
        for seed in range(count)
    ]


def label_fields() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The looks that captions state, each with its possible values."""
    return (
        ("skin", tuple(palette.SKIN)),
        ("face", FACES),
        ("hair_style", HAIR_STYLES),
        ("hair_colour", tuple(palette.HAIR)),
        ("eyes", EYES),
        ("brows", BROWS),
        ("beard", BEARDS),
        ("glasses", GLASSES),
        ("mark", MARKS),
        ("hat", HATS),
        ("hat_colour", COLOURS),
        ("clothes", CLOTHES),
        ("clothes_colour", COLOURS),
        ("mouth", MOUTHS),
        ("background", PATTERNS + SCENES),
        ("background_colour", COLOURS),
        ("style", STYLES),
    )


def label(identity: Identity, context: Context, style: str, caption: Caption) -> list[int]:
    """For every look: 0 where the caption does not state it, else 1 + its value's index."""
    values = asdict(identity) | asdict(context) | {"style": style}
    return [
        1 + options.index(values[name]) if name in caption.fields else 0
        for name, options in label_fields()
    ]


def tokenize(recipe: Recipe, work: Path) -> None:
    """Build the tokenizer and write all captions.

    Tokens are uint16 [N, K, 77], labels uint8 [N, K, looks]; K captions for each picture.
    """
    if (work / LABELS).exists():
        return
    tokenizer = build_tokenizer(recipe, vocabulary_texts(), work / TOKENIZER_FOLDER)
    shape = (recipe.pictures, recipe.captions_per_picture)
    tokens = np.zeros((*shape, recipe.tokens), np.uint16)
    labels = np.zeros((*shape, len(label_fields())), np.uint8)
    for seed in range(recipe.pictures):
        described = captions(seed, recipe.captions_per_picture)
        encoded = tokenizer(
            [c.text for c in described], padding="max_length", max_length=recipe.tokens
        )
        tokens[seed] = encoded.input_ids
        labels[seed] = [label(*looks(seed), sample_style(seed), c) for c in described]
    np.save(work / TOKENS, tokens)
    np.save(work / LABELS, labels)
