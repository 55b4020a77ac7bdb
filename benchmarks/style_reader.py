"""Reads looks in drawings of one style, and knows which of them can be read there at all.

The reader that comes with the trainer knows the styles of the base; in a style of other colours or
lines it misreads true drawings, so it cannot say whether a prompt was followed. Here it is trained
further on drawings of the style, whose truth is known. What it still cannot read in at least
`READABLE_SHARE` of fresh true drawings is not asked for: a picture in two inks shows no colour of a
hat. Nothing of this is chosen by hand, and no sample of a LoRA enters.
"""

import hashlib
import json
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pretraining import data
from pretraining.captions import describe_context
from pretraining.looks import Context, Identity, sample_context, sample_identity, sample_style
from pretraining.read_prompts import knowledge
from pretraining.reader import heads, measure, truth
from pretraining.score_training import (
    ScoreRecipe,
    disturbed,
    export_net,
    load_base_vae,
    soft_copies,
    train_net,
)
from pretraining.training import generator, pixels
from trainer.scoring.avatar_net import FOLDER, load_net
from trainer.scoring.reader import NAME, PromptReader

Paint = Callable[[Identity, Context, int], Image.Image]

WORK = Path(__file__).resolve().parent / "work"
READABLE_SHARE = 0.9
_SIDE_PX = 64
_TRAINING_SEED = 58_000_000
_FRESH_SEED = 59_000_000


@dataclass(frozen=True, slots=True)
class StyleRecipe:
    """How the reader is trained further: drawings in the style, others as the base knows them
    (samples may be in between), optimizer steps, pictures in a step, and the highest rate."""

    pictures: int = 3_000
    others: int = 1_000
    steps: int = 300
    batch: int = 96
    rate: float = 1e-3
    fresh: int = 240


@dataclass(frozen=True, slots=True)
class StyleReader:
    """Reads one style.

    looks: those that count. share: how many of these it finds in fresh true drawings of the style
    that went through the base's autoencoder: the most that samples can reach. by_look: the same of
    every look that the evaluation prompts name, those that do not count as well.
    """

    reader: PromptReader
    looks: frozenset[str]
    share: float
    by_look: Mapping[str, float]


def follow(
    reader: PromptReader,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    looks: Collection[str],
) -> float:
    """Share of these looks, where prompts name them, that the reader finds: the mean over all
    pictures whose prompt names any."""
    shares = []
    for seen, prompt in zip(reader.read(images), prompts, strict=True):
        named = {look: value for look, value in reader.names(prompt).items() if look in looks}
        right = reader.compare(seen, named).values()
        if right:
            shares.append(sum(right) / len(right))
    return float(np.mean(shares))


def readable_looks(by_look: Mapping[str, float]) -> frozenset[str]:
    """The looks that a reader finds often enough in true drawings to be asked for in samples."""
    return frozenset(look for look, share in by_look.items() if share >= READABLE_SHARE)


def judge(reader: PromptReader, paint: Paint, count: int) -> StyleReader:
    """Measure a reader on fresh true drawings, of the kind that the evaluation prompts ask for."""
    contexts = plain_contexts(random.Random("readable"), count)
    drawn = [
        np.asarray(paint(sample_identity(_FRESH_SEED + number), context, _SIDE_PX))
        for number, context in enumerate(contexts)
    ]
    soft = soft_copies(np.stack(drawn), load_base_vae(), seed=3, most_noise=0.0)
    prompts = [describe_context(context) for context in contexts]
    by_look = measure(reader, soft, [reader.names(prompt) for prompt in prompts]).by_look
    looks = readable_looks(by_look)
    images = [Image.fromarray(picture) for picture in soft]
    share = follow(reader, images, prompts, looks) if looks else float("nan")
    return StyleReader(reader, looks, share, by_look)


def plain_contexts(rng: random.Random, count: int) -> list[Context]:
    """Contexts such as evaluation prompts ask for: plain backgrounds and places."""
    found: list[Context] = []
    while len(found) < count:
        context = sample_context(rng.randrange(10**9))
        if context.background not in ("stripes", "dots"):
            found.append(context)
    return found


def style_reader(
    name: str, paint: Paint, recipe: StyleRecipe | None = None, work: Path = WORK
) -> StyleReader:
    """The reader of a style, trained (two core minutes) unless its weights are in the work folder
    already; those made with another recipe, reader or drawing code are not taken."""
    recipe = recipe or StyleRecipe()
    folder = work / f"reader-{name}-{_fingerprint(paint, recipe)}"
    if not (folder / f"{NAME}.json").exists():
        _train(paint, recipe, folder)
    return judge(PromptReader.load(folder), paint, recipe.fresh)


def _fingerprint(paint: Paint, recipe: StyleRecipe) -> str:
    """Changes with everything that the weights depend on."""
    drawn = paint(sample_identity(1), sample_context(1), _SIDE_PX).tobytes()
    start = (FOLDER / f"{NAME}.safetensors").read_bytes()
    facts = json.dumps([asdict(recipe), asdict(ScoreRecipe())]).encode()
    return hashlib.sha256(drawn + start + facts).hexdigest()[:12]


def _train(paint: Paint, recipe: StyleRecipe, folder: Path) -> None:
    pictures, labels = _material(paint, recipe)
    net, _ = load_net(FOLDER, NAME)
    net.requires_grad_(True)
    folder.mkdir(parents=True, exist_ok=True)
    common = ScoreRecipe(
        rate=recipe.rate, warmup_steps=20, save_every_steps=100, reader_batch=recipe.batch
    )
    loss = partial(_loss, recipe=recipe, pictures=pictures, labels=labels)
    train_net(net, common, folder / "state.pt", recipe.steps, loss)
    export_net(net, common, knowledge(), folder, NAME)


def _material(paint: Paint, recipe: StyleRecipe) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pictures, clean and as a diffusion model might draw them, and the looks they show."""
    drawn, labels = [], []
    for seed in range(_TRAINING_SEED, _TRAINING_SEED + recipe.pictures + recipe.others):
        identity, context = data.looks(seed)
        if seed < _TRAINING_SEED + recipe.pictures:
            drawn.append(np.asarray(paint(identity, context, _SIDE_PX)))
            # No name of a style fits: the loss leaves it out.
            labels.append([*truth(identity, context, "flat")[:-1], -1])
        else:
            drawn.append(data.picture(seed, _SIDE_PX))
            labels.append(truth(identity, context, sample_style(seed)))
    clean = np.stack(drawn)
    soft = soft_copies(clean, load_base_vae(), seed=4)
    return np.concatenate([clean, soft]), np.array([*labels, *labels])


def _loss(
    net: nn.Module,
    step: int,
    recipe: StyleRecipe,
    pictures: NDArray[np.uint8],
    labels: NDArray[np.int64],
) -> Tensor:
    """Mean cross-entropy of all looks that the batch's pictures show."""
    rng = generator("style reader", step)
    index = torch.randint(len(pictures), (recipe.batch,), generator=rng).numpy()
    batch = disturbed(pixels(torch.from_numpy(pictures[index])), rng)
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(batch.contiguous(memory_format=torch.channels_last)).float()
    true = torch.from_numpy(labels[index])
    losses = [
        F.cross_entropy(part, true[:, k], ignore_index=-1)
        for k, part in enumerate(heads(logits))
        if (true[:, k] >= 0).any()
    ]
    return torch.stack(losses).mean()
