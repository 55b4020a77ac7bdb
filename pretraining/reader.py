"""The reader: a small net that says which looks a picture shows, to see if a prompt was followed.

`python -m pretraining.reader` draws, trains and writes `trainer/assets/likeness/`;
`--evaluate` measures the committed weights on fresh drawings.
"""

import argparse
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pretraining import data
from pretraining.avatars import draw_avatar
from pretraining.captions import sample_caption
from pretraining.looks import (
    HELD_OUT_HAIR_STYLE,
    HELD_OUT_MARK,
    HELD_OUT_SKIN,
    HELD_OUT_STYLE,
    Context,
    Identity,
    sample_context,
    sample_identity,
    sample_style,
)
from pretraining.read_prompts import knowledge
from pretraining.recipe import Recipe
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
from trainer.scoring.reader import NAME, PromptReader

STATE = "reader.pt"
SOFT = "reader_soft.npy"
RARE = "reader_rare.npy"
_RARE_SEED = 55_000_000
_FRESH_SEED = 56_000_000


def rare_looks(seed: int) -> tuple[Identity, Context, str]:
    """Looks in which those that the base never saw are common: the reader has to know them."""
    rng = generator("rare looks", seed)
    draws = torch.rand(4, generator=rng).tolist()
    identity, style = sample_identity(seed), sample_style(seed)
    if draws[0] < 0.3:
        identity = replace(identity, skin=HELD_OUT_SKIN)
    if draws[1] < 0.3:
        identity = replace(identity, hair_style=HELD_OUT_HAIR_STYLE)
    if draws[2] < 0.3:
        identity = replace(identity, mark=HELD_OUT_MARK)
    return identity, sample_context(seed), HELD_OUT_STYLE if draws[3] < 0.3 else style


def truth(identity: Identity, context: Context, style: str) -> list[int]:
    """The index of every look's value, or -1 where the picture does not show it."""
    values = asdict(identity) | asdict(context) | {"style": style}
    hidden = set()
    if context.hat == "none":
        hidden.add("hat_colour")
    if context.is_scene:
        hidden.add("background_colour")
    if identity.glasses == "sunglasses":
        hidden.add("eyes")
    return [
        -1 if name in hidden else options.index(values[name])
        for name, options in data.label_fields()
    ]


def outputs() -> int:
    """How many values all looks have together."""
    return sum(len(options) for _, options in data.label_fields())


def heads(logits_BF: Tensor) -> tuple[Tensor, ...]:
    """The outputs that belong to each look."""
    return logits_BF.split([len(options) for _, options in data.label_fields()], dim=1)


def prepare(recipe: ScoreRecipe, work: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64], int]:
    """All pictures, their looks, and how many of them, the first ones, are clean drawings."""
    data.draw(Recipe(), work, processes=1)
    common = np.load(work / data.PICTURES, mmap_mode="r")
    rare_seeds = range(_RARE_SEED, _RARE_SEED + recipe.reader_rare_pictures)
    if not (work / RARE).exists():
        drawn = [np.asarray(_draw(*rare_looks(seed))) for seed in rare_seeds]
        np.save(work / RARE, np.stack(drawn))
    rare = np.load(work / RARE)
    soft_common, soft_rare = recipe.reader_soft_pictures, recipe.reader_soft_rare_pictures
    if not (work / SOFT).exists():
        chosen = np.concatenate([common[:soft_common], rare[:soft_rare]])
        np.save(work / SOFT, soft_copies(chosen, load_base_vae(), recipe.seed))
    looks = [truth(*data.looks(seed), sample_style(seed)) for seed in range(len(common))]
    rare_truth = [truth(*rare_looks(seed)) for seed in rare_seeds]
    labels = np.array([*looks, *rare_truth, *looks[:soft_common], *rare_truth[:soft_rare]])
    return np.concatenate([common, rare, np.load(work / SOFT)]), labels, len(common) + len(rare)


def _draw(identity: Identity, context: Context, style: str) -> NDArray[np.uint8]:
    return np.asarray(draw_avatar(identity, context, style=style))


def reader_loss(
    net: nn.Module,
    step: int,
    recipe: ScoreRecipe,
    pictures: NDArray[np.uint8],
    labels: NDArray[np.int64],
    clean: int,
) -> Tensor:
    """Mean cross-entropy of all looks that the batch's pictures show."""
    rng = generator(recipe.seed, "reader", step)
    style = [name for name, _ in data.label_fields()].index("style")
    index = _draw_index(recipe, len(pictures), labels[:clean, style], rng)
    batch = disturbed(pixels(torch.from_numpy(pictures[index])), rng)
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(batch.contiguous(memory_format=torch.channels_last)).float()
    true = torch.from_numpy(labels[index])
    losses = [
        F.cross_entropy(part, true[:, k], ignore_index=-1) for k, part in enumerate(heads(logits))
    ]
    return torch.stack(losses).mean()


def _draw_index(
    recipe: ScoreRecipe, pictures: int, clean_styles: NDArray[np.int64], rng: torch.Generator
) -> NDArray[np.int64]:
    """Which pictures make up a batch: soft ones, clean ones in the pixel style, any clean ones."""
    count, clean = recipe.reader_batch, len(clean_styles)
    kind = torch.rand(count, generator=rng)
    any_soft = torch.randint(clean, pictures, (count,), generator=rng)
    any_clean = torch.randint(clean, (count,), generator=rng)
    styles = dict(data.label_fields())["style"]
    pixel = torch.from_numpy(np.flatnonzero(clean_styles == styles.index("pixel")))
    in_pixels = pixel[torch.randint(len(pixel), (count,), generator=rng)]
    soft_share = recipe.reader_soft_share
    pixel_below = soft_share + (1 - soft_share) * recipe.reader_pixel_share
    chosen = torch.where(kind < pixel_below, in_pixels, any_clean)
    return torch.where(kind < soft_share, any_soft, chosen).numpy()


def train_reader(recipe: ScoreRecipe, work: Path) -> nn.Module:
    """Draw what is missing and train, going on from the work folder's state."""
    pictures, labels, clean = prepare(recipe, work)
    net = new_net(recipe, outputs())
    loss = partial(reader_loss, recipe=recipe, pictures=pictures, labels=labels, clean=clean)
    train_net(net, recipe, work / STATE, recipe.reader_steps, loss)
    return net


def export(net: nn.Module, recipe: ScoreRecipe, target: Path) -> None:
    """Write the weights and all that the trainer needs to know of them."""
    export_net(net, recipe, knowledge(), target, NAME)


def fresh(
    count: int, first_seed: int, rare: bool
) -> tuple[NDArray[np.uint8], list[str], list[dict[str, str]]]:
    """Drawings that no training saw, their captions, and the looks that the captions name."""
    pictures, prompts, named = [], [], []
    for seed in range(first_seed, first_seed + count):
        common = (*data.looks(seed), sample_style(seed))
        identity, context, style = rare_looks(seed) if rare else common
        pictures.append(_draw(identity, context, style))
        # No caption of the base says "neon", nor that there is a star.
        caption = sample_caption(identity, context, seed, style="flat" if rare else style)
        values = asdict(identity) | asdict(context) | {"style": style}
        looks = {name: values[name] for name in caption.fields if name != "style" or not rare}
        if rare:
            looks |= {"mark": identity.mark, "style": style}
        prompts.append(caption.text)
        named.append(looks)
    return np.stack(pictures), prompts, named


@dataclass(frozen=True, slots=True)
class Reading:
    """How many of the named looks were found, of all and of each look; exact counts a look that
    is covered by another as any other."""

    share: float
    exact: float
    by_look: dict[str, float]


def measure(
    reader: PromptReader, pictures: NDArray[np.uint8], named: list[dict[str, str]]
) -> Reading:
    """Compare what the reader finds with what is named."""
    seen = reader.read([Image.fromarray(picture) for picture in pictures])
    right: dict[str, list[bool]] = {name: [] for name, _ in data.label_fields()}
    exact = []
    for found, wanted in zip(seen, named, strict=True):
        for look, is_right in reader.compare(found, wanted).items():
            right[look].append(is_right)
        exact += [found.get(look) == value for look, value in wanted.items()]
    return Reading(
        share=float(np.mean([value for values in right.values() for value in values])),
        exact=float(np.mean(exact)),
        by_look={look: float(np.mean(values)) for look, values in right.items() if values},
    )


def evaluate(reader: PromptReader, count: int, seed: int) -> None:
    """Print how much of what captions name the reader finds in fresh drawings."""
    vae = load_base_vae()
    common, _, named = fresh(count, seed, rare=False)
    rare, _, rare_named = fresh(count // 2, seed + count, rare=True)
    readings = {
        "drawings": measure(reader, common, named),
        "through the autoencoder": measure(reader, soft_copies(common, vae, 2, 0.0), named),
        "with noise on the latents": measure(reader, soft_copies(common, vae, 2), named),
        "held-out looks, drawings": measure(reader, rare, rare_named),
        "held-out looks, autoencoder": measure(reader, soft_copies(rare, vae, 2, 0.0), rare_named),
    }
    for name, reading in readings.items():
        print(f"{name}: named looks found {reading.share:.3f}, exactly {reading.exact:.3f}")
    for look, _ in data.label_fields():
        shares = (f"{reading.by_look[look]:.3f}" for reading in readings.values())
        print(f"  {look:18} {'  '.join(shares)}")


def main() -> None:
    """Train and export the reader, or measure it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--output", type=Path, default=TARGET)
    parser.add_argument("--evaluate", action="store_true", help="only measure the weights there")
    parser.add_argument("--pictures", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=_FRESH_SEED)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.evaluate:
        recipe = ScoreRecipe()
        arguments.work.mkdir(parents=True, exist_ok=True)
        export(train_reader(recipe, arguments.work), recipe, arguments.output)
    evaluate(PromptReader.load(arguments.output), arguments.pictures, arguments.seed)


if __name__ == "__main__":
    main()
