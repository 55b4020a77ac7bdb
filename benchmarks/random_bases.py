"""Bases of random weights in the shapes of the published ones, and photos to train them on.

The architectures come from the configurations that the trainer ships (`trainer/assets/families`).
What is learned on them is nothing, but a step costs what it costs on the real weights. A base is
kept in its folder: made once, used by every run after.
`python -m benchmarks.random_bases sd15 FOLDER` makes one in a process of its own.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.speed_task import CLASS_NOUN, TRIGGER

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ROOT / "trainer" / "assets" / "families"
EMBEDDED = ROOT / "trainer" / "assets" / "base"
# By name: the folder of its UNet, VAE and schedule, and that of its text encoders.
ARCHITECTURES = {
    "sd15": ("sd1", "sd1"),
    "sd21": ("sd2-v", "sd2"),
    "sdxl": ("sdxl", "sdxl"),
}
BASES = ("tiny", "embedded", *ARCHITECTURES)


def config_of(name: str, part: str) -> dict[str, Any]:
    """The published configuration of a part of an architecture."""
    pictures, words = ARCHITECTURES[name]
    family = words if part.startswith("text_encoder") else pictures
    file = "scheduler_config.json" if part == "scheduler" else "config.json"
    values: dict[str, Any] = json.loads(
        (FAMILIES / family / part / file).read_text(encoding="utf-8")
    )
    return values


def base_folder(name: str, home: Path) -> Path:
    """The folder of a base, made in `home` if it is not there yet."""
    if name == "embedded":
        return EMBEDDED
    folder = home / f"base-{name}"
    if not (folder / "model_index.json").is_file():
        unfinished = home / f".base-{name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        make_base(name, unfinished)
        unfinished.rename(folder)
    return folder


def make_base(name: str, folder: Path) -> None:
    """Write a base of random weights, in half precision but for the tiny one."""
    from tests.tiny import save_tiny_base

    if name == "tiny":
        save_tiny_base(folder)
        shutil.rmtree(folder.parent / f".{folder.name}-parts")
        return
    torch.manual_seed(0)
    # Random numbers are drawn where that is quickest.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float16)
        try:
            pipeline = _pipeline(name, folder)
        finally:
            torch.set_default_dtype(before)
    pipeline.save_pretrained(folder)


def _pipeline(name: str, folder: Path) -> Any:
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        EulerDiscreteScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from tests.tiny import tiny_tokenizer

    words = folder.parent / f"{folder.name}-words"
    double = name == "sdxl"
    with torch.device("cpu"):
        scheduler_class = EulerDiscreteScheduler if double else DDIMScheduler
        scheduler = scheduler_class.from_config(config_of(name, "scheduler"))
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_config(config_of(name, "unet")),
        "vae": AutoencoderKL.from_config(config_of(name, "vae")),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**config_of(name, "text_encoder"))),
        # Bytes are words enough; the embeddings have the published size.
        "tokenizer": tiny_tokenizer(words / "tokenizer"),
        "scheduler": scheduler,
    }
    if double:
        second = CLIPTextConfig(**config_of(name, "text_encoder_2"))
        parts["text_encoder_2"] = CLIPTextModelWithProjection(second)
        parts["tokenizer_2"] = tiny_tokenizer(words / "tokenizer_2", pad_token="!")
        pipeline = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    shutil.rmtree(words)
    return pipeline.to(torch.float16)


def draw_photos(folder: Path, count: int, side: int) -> None:
    """Square pictures of smooth noise, each another, with a caption beside each."""
    folder.mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
        grain = rng.integers(-12, 13, (side, side, 1))
        photo = Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))
        photo.save(folder / f"{number:05}.png")
        caption = f"{TRIGGER} {CLASS_NOUN}, picture {number}"
        (folder / f"{number:05}.txt").write_text(caption, encoding="utf-8")


if __name__ == "__main__":
    print(base_folder(sys.argv[1], Path(sys.argv[2])))
