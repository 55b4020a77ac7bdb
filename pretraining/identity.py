"""The identity embedding: pictures of one avatar land close together, whatever it wears.

`python -m pretraining.identity` draws, trains and writes `trainer/assets/likeness/`;
`--evaluate` measures the committed weights on avatars that were never trained on.
"""

import argparse
import math
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pretraining.avatars import draw_avatar
from pretraining.identity_evaluation import evaluate
from pretraining.looks import Identity, sample_context, sample_identity, sample_style
from pretraining.odd_avatars import draw_odd, odd_avatar
from pretraining.score_training import (
    TARGET,
    WORK,
    ScoreRecipe,
    disturbed,
    export_net,
    load_base_vae,
    new_net,
    soft_copies,
    train_net,
)
from pretraining.training import generator, pixels
from trainer.scoring.embedders import NAME, AvatarEmbedder

STATE = "identity.pt"
VIEWS = "identity_views.npy"
SOFT = "identity_soft.npy"
ODD_VIEWS = "odd_views.npy"
ODD_SOFT = "odd_soft.npy"
_SEED = 1_000_000
# What a near twin may differ in; eyes and eyebrows are a pixel or two.
_TWIN_LOOKS = ("skin", "hair_style", "hair_colour", "beard", "glasses", "mark", "face")


def avatar(number: int) -> Identity:
    """Training avatar `number`; an odd one is the near twin of the one before."""
    first = sample_identity(_SEED + number - number % 2)
    return twin(first, _SEED + number) if number % 2 else first


def twin(identity: Identity, seed: int) -> Identity:
    """An avatar that differs in one or two looks; the held-out looks never come up."""
    rng = random.Random(f"twin {seed}")
    changed = rng.sample(_TWIN_LOOKS, rng.randint(1, 2))
    while True:
        other = sample_identity(rng.randrange(10**9))
        result = replace(identity, **{name: getattr(other, name) for name in changed})
        if result != identity:
            return result


def prepare(recipe: ScoreRecipe, work: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pictures [avatars, views, 64, 64, 3], the odd avatars last, and a soft copy of each first."""
    views = recipe.identity_views
    plans = (
        (VIEWS, SOFT, recipe.identity_avatars, _draw),
        (ODD_VIEWS, ODD_SOFT, recipe.identity_odd_avatars, _draw_odd),
    )
    parts, soft_parts = [], []
    for name, soft_name, count, draw in plans:
        if not (work / name).exists():
            drawn = [
                np.asarray(draw(number, number * views + view))
                for number in range(count)
                for view in range(views)
            ]
            np.save(work / name, np.stack(drawn).reshape(count, views, *drawn[0].shape))
        pictures = np.load(work / name)
        if not (work / soft_name).exists():
            copies = soft_copies(pictures[:, 0], load_base_vae(), recipe.seed)
            np.save(work / soft_name, copies)
        parts.append(pictures)
        soft_parts.append(np.load(work / soft_name))
    return np.concatenate(parts), np.concatenate(soft_parts)


def _draw(number: int, context: int) -> Image.Image:
    # A near twin must not be told apart by the drawing style.
    style = sample_style(_SEED + number // 2)
    return draw_avatar(avatar(number), sample_context(_SEED + context), style=style)


def _draw_odd(number: int, context: int) -> Image.Image:
    return draw_odd(odd_avatar(number), 2 * _SEED + context)


def recoloured(pictures_B3hw: Tensor, rng: torch.Generator) -> Tensor:
    """Turn all hues by one angle and stretch all colours alike.

    The same for a whole batch, so that a recolouring shows new skins and hair without telling the
    avatars of the batch apart.
    """
    angle = 2 * math.pi * float(torch.rand((), generator=rng))
    stretch = 0.7 + 0.5 * float(torch.rand((), generator=rng))
    # Rotation about the grey axis (Rodrigues' formula); `across` is the cross product with it.
    grey = torch.full((3, 3), 1 / 3)
    across = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    turned = math.cos(angle) * (torch.eye(3) - grey) + math.sin(angle) * across
    matrix = grey + stretch * turned
    return torch.einsum("ij,bjhw->bihw", matrix, pictures_B3hw).clamp(-1, 1)


def identity_loss(
    net: nn.Module,
    step: int,
    recipe: ScoreRecipe,
    pictures: NDArray[np.uint8],
    soft: NDArray[np.uint8],
) -> Tensor:
    """InfoNCE in both directions (van den Oord and others 2018, arXiv 1807.03748, eq. 4).

    The batch holds avatars and their near twins, two pictures of each, half of them with features
    of chance; all others are negatives.
    """
    rng = generator(recipe.seed, "identity", step)
    common, all_pairs = recipe.identity_avatars // 2, len(pictures) // 2
    quarter = (recipe.identity_batch // 4,)
    pairs = torch.cat(
        [
            torch.randint(common, quarter, generator=rng),
            torch.randint(common, all_pairs, quarter, generator=rng),
        ]
    )
    numbers = torch.cat([2 * pairs, 2 * pairs + 1]).numpy()
    first, second = torch.randperm(recipe.identity_views, generator=rng)[:2].tolist()
    views = []
    for view in (first, second):
        chosen = pictures[numbers, view]
        if view == 0:
            use = torch.rand(len(numbers), generator=rng) < 1.5 * recipe.identity_soft_share
            chosen = np.where(use.numpy()[:, None, None, None], soft[numbers], chosen)
        views.append(pixels(torch.from_numpy(chosen)))
    batch = torch.cat(views)
    if torch.rand((), generator=rng) < recipe.identity_recoloured_share:
        batch = recoloured(batch, rng)
    batch = disturbed(batch, rng).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        embedded = net(batch)
    one_BD, two_BD = F.normalize(embedded.float(), dim=1).chunk(2)
    logits = one_BD @ two_BD.T / recipe.identity_temperature
    same = torch.arange(len(logits))
    return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2


def train_identity(recipe: ScoreRecipe, work: Path) -> nn.Module:
    """Draw what is missing and train, going on from the work folder's state."""
    pictures, soft = prepare(recipe, work)
    net = new_net(recipe, recipe.identity_dimensions)
    loss = partial(identity_loss, recipe=recipe, pictures=pictures, soft=soft)
    train_net(net, recipe, work / STATE, recipe.identity_steps, loss)
    return net


def main() -> None:
    """Train and export the embedding, or measure it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--output", type=Path, default=TARGET)
    parser.add_argument("--evaluate", action="store_true", help="only measure the weights there")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.evaluate:
        recipe = ScoreRecipe()
        arguments.work.mkdir(parents=True, exist_ok=True)
        net = train_identity(recipe, arguments.work)
        export_net(net, recipe, {}, arguments.output, NAME)
    evaluate(AvatarEmbedder.load(arguments.output), arguments.seed)


if __name__ == "__main__":
    main()
