"""The embedded base's captioner: a small BLIP that describes the drawings.

    python -m pretraining.captioner train      # draws, learns, exports; goes on where it stopped
    python -m pretraining.captioner evaluate   # on drawings it never saw, and on the sample sets

It needs `pictures.npy` in the work folder (`python -m pretraining.build draw`). For a face it
tells what changes from picture to picture and leaves out who is shown, which is what the trigger
word shall mean; for a style it tells both. Which of the two is chosen by a prompt in front of the
caption, as BLIP allows.
"""

import argparse
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from pretraining.captioner_evaluation import evaluate
from pretraining.captioner_material import (
    NOT_SHOWN,
    PROMPTS,
    CaptionerRecipe,
    Material,
    distorted,
    draw_strangers,
    new_tokenizer,
)
from pretraining.data import label_fields
from pretraining.training import Average, generator, load_state, rate_share, save_state

TARGET = Path("trainer/assets/captioner")
STATE = "captioner.pt"


def new_model(
    recipe: CaptionerRecipe, tokenizer: PreTrainedTokenizerFast
) -> BlipForConditionalGeneration:
    """An untrained captioner; its configuration holds the prompts by what is learned."""
    torch.manual_seed(recipe.seed)
    shape = {
        "hidden_size": recipe.width,
        "intermediate_size": 4 * recipe.width,
        "projection_dim": recipe.width,
        "num_attention_heads": recipe.heads,
        "initializer_range": recipe.initial_spread,
    }
    model = BlipForConditionalGeneration(
        BlipConfig(
            text_config={
                **shape,
                "vocab_size": len(tokenizer),
                "num_hidden_layers": recipe.text_layers,
                "max_position_embeddings": recipe.tokens,
                "pad_token_id": tokenizer.pad_token_id,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "sep_token_id": tokenizer.sep_token_id,
            },
            vision_config={
                **shape,
                "num_hidden_layers": recipe.vision_layers,
                "image_size": recipe.resolution_px,
                "patch_size": recipe.patch_px,
            },
            projection_dim=recipe.width,
            image_text_hidden_size=recipe.width,
            initializer_range=recipe.initial_spread,
            caption_prompts=PROMPTS,
        )
    )
    _place_patches(model.vision_model.embeddings.position_embedding)
    return model


@torch.no_grad()
def _place_patches(positions_1TD: Tensor) -> None:
    """Start with waves over the rows and columns, so that nearness need not be learned."""
    width = positions_1TD.shape[-1]
    side = math.isqrt(positions_1TD.shape[1] - 1)
    waves = torch.pi * 2.0 ** torch.linspace(-1, math.log2(side / 2), width // 4)
    angle = torch.arange(side)[:, None] / side * waves
    along = 0.5 * torch.cat([angle.sin(), angle.cos()], dim=1)
    rows, columns = along[:, None].expand(-1, side, -1), along[None].expand(side, -1, -1)
    positions_1TD[0, 1:] = torch.cat([rows, columns], dim=-1).reshape(side * side, width)


class LookReaders(nn.Module):
    """For each look one query over the patches and a classifier; left out of the export."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.1 * torch.randn(len(label_fields()), width))
        self.heads = nn.ModuleList(nn.Linear(width, len(options)) for _, options in label_fields())

    def loss(self, patches_BTD: Tensor, looks_BL: Tensor) -> Tensor:
        """Mean cross-entropy of all looks that can be seen."""
        weights = torch.einsum("ld,btd->blt", self.queries, patches_BTD).softmax(-1)
        read = torch.einsum("blt,btd->bld", weights, patches_BTD)
        losses = [
            F.cross_entropy(head(read[:, i]), looks_BL[:, i], reduction="sum")
            for i, head in enumerate(self.heads)
        ]
        return torch.stack(losses).sum() / (looks_BL != NOT_SHOWN).sum()


# -- training


def train(recipe: CaptionerRecipe, work: Path) -> None:
    """Train, from the newest state in the work folder if there is one.

    Raises:
        FileNotFoundError: the pictures of the base are not in the work folder.
    """
    draw_strangers(recipe, work)
    tokenizer = new_tokenizer(recipe)
    material = Material(recipe, work, tokenizer)
    model = new_model(recipe, tokenizer)
    readers = LookReaders(recipe.width)
    both = nn.ModuleDict({"captioner": model, "readers": readers})
    optimizer = torch.optim.AdamW(
        both.parameters(), lr=recipe.rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    average = Average(both, recipe.ema_decay)
    first = 0
    if state := load_state(work / STATE):
        both.load_state_dict(state["both"])
        optimizer.load_state_dict(state["optimizer"])
        average.values = state["average"]
        first = state["step"]
    started, losses = time.monotonic(), []
    for step in range(first, recipe.steps):
        loss = _loss(recipe, model, readers, material, step)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * rate_share(
                step,
                recipe.steps,
                recipe.warmup_steps,
                recipe.decay_share,
                recipe.final_rate_share,
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), recipe.clip_norm)
        optimizer.step()
        average.update(both, step)
        losses.append(loss.item())
        if (step + 1) % recipe.save_every_steps == 0 or step + 1 == recipe.steps:
            speed = recipe.batch * (step + 1 - first) / (time.monotonic() - started)
            print(
                f"captioner step {step + 1}/{recipe.steps} "
                f"loss {np.mean(losses[-recipe.save_every_steps :]):.4f} {speed:.0f} pictures/s",
                flush=True,
            )
            save_state(
                work / STATE,
                {
                    "both": both.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average.values,
                    "step": step + 1,
                },
            )


def _loss(
    recipe: CaptionerRecipe,
    model: BlipForConditionalGeneration,
    readers: LookReaders,
    material: Material,
    step: int,
) -> Tensor:
    """The loss of step `step`; it and its random draws depend on seed, step and weights alone."""
    rng = generator(recipe.seed, STATE, step)
    kind = "style" if torch.rand((), generator=rng) < recipe.everything_share else "face"
    if step < recipe.looks_steps:
        kind = "face"
    limit = len(material) if kind == "face" else material.named
    index = torch.randint(limit, (recipe.batch,), generator=rng)
    pictures = distorted(material.pick(index), rng)
    with torch.autocast("cpu", torch.bfloat16):
        if step < recipe.looks_steps:
            return readers.loss(
                model.vision_model(pictures).last_hidden_state, material.looks[index]
            )
        ids, targets = material.texts(kind, index)
        made = model(
            pixel_values=pictures, input_ids=ids, attention_mask=(ids != 0).long(), labels=targets
        )
        looks_loss = readers.loss(made.last_hidden_state, material.looks[index])
    return made.loss + recipe.looks_weight * looks_loss


# -- export


def export(recipe: CaptionerRecipe, work: Path, target: Path) -> None:
    """Write the averaged weights in half precision, as a folder that transformers reads.

    Raises:
        FileNotFoundError: nothing was trained yet.
    """
    state = load_state(work / STATE)
    if state is None:
        raise FileNotFoundError(f"{work / STATE} is missing: run the training first")
    tokenizer = new_tokenizer(recipe)
    model = new_model(recipe, tokenizer)
    prefix = "captioner."
    model.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state["average"].items() if k.startswith(prefix)}
    )
    size = {"height": recipe.resolution_px, "width": recipe.resolution_px}
    image_processor = BlipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    temporary = target.with_name(f".{target.name}-new")
    shutil.rmtree(temporary, ignore_errors=True)
    model.half().save_pretrained(temporary)
    BlipProcessor(image_processor, tokenizer).save_pretrained(temporary)
    for path in temporary.iterdir():
        path.chmod(0o644)
    if (target / "README.md").exists():
        shutil.copy(target / "README.md", temporary / "README.md")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def main() -> None:
    """Train and export, or measure what was exported."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("train", "export", "evaluate"))
    parser.add_argument("--work", type=Path, default=Path("pretraining/work"))
    parser.add_argument("--folder", type=Path, default=TARGET, help="of the exported captioner")
    parser.add_argument("--drawings", type=int, default=500, help="how many are measured on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipe = CaptionerRecipe()
    if arguments.what == "train":
        train(recipe, arguments.work)
    if arguments.what in ("train", "export"):
        export(recipe, arguments.work, arguments.folder)
    else:
        sets = {"face": Path("datasets/zia"), "style": Path("datasets/neon")}
        print(evaluate(arguments.folder, arguments.drawings, sets))


if __name__ == "__main__":
    main()
