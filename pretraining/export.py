"""Writes the newest averaged weights as a diffusers folder in half precision."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from torch import nn

from pretraining import text, unet
from pretraining.recipe import Recipe
from pretraining.tokenizer import FOLDER, load_tokenizer
from pretraining.training import load_state
from pretraining.vae import LATENTS, load_vae

CARD = "README.md"


def assemble(recipe: Recipe, work: Path) -> StableDiffusionPipeline:
    """The pipeline of the newest states in the work folder, float32."""
    denoiser, encoder = unet.new_unet(recipe), text.new_text_encoder(recipe, work)
    state = load_state(work / unet.STATE)
    if state is None:
        raise FileNotFoundError(f"{work / unet.STATE} is missing: run the unet stage first")
    nn.ModuleDict({"unet": denoiser, "text": encoder}).load_state_dict(state["average"])
    vae = load_vae(recipe, work).to(memory_format=torch.contiguous_format)
    set_posterior_noise(vae, recipe.vae_latent_noise)
    latents = np.load(work / LATENTS, mmap_mode="r")
    vae.register_to_config(scaling_factor=unet.scaling_factor(recipe, latents))
    schedule = unet.noise_schedule().config
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=encoder.eval(),
        tokenizer=load_tokenizer(work / FOLDER),
        unet=denoiser.eval(),
        scheduler=DDIMScheduler(
            num_train_timesteps=schedule.num_train_timesteps,
            beta_start=schedule.beta_start,
            beta_end=schedule.beta_end,
            beta_schedule=schedule.beta_schedule,
            prediction_type=schedule.prediction_type,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def set_posterior_noise(vae: AutoencoderKL, deviation: float) -> None:
    """Make the encoder's posterior as wide as the noise the latents were trained with.

    Training never used the predicted variance; left as it is, every tool that samples the
    posterior (all trainers do) would drown the picture in noise of deviation 1.
    """
    channels = vae.config.latent_channels
    with torch.no_grad():
        vae.quant_conv.weight[channels:] = 0
        vae.quant_conv.bias[channels:] = 2 * math.log(deviation)


def export(recipe: Recipe, work: Path, target: Path) -> None:
    """Replace the target folder by the newest weights; its model card stays."""
    temporary = target.with_name(f".{target.name}-new")
    shutil.rmtree(temporary, ignore_errors=True)
    assemble(recipe, work).to(torch.float16).save_pretrained(temporary)
    # Plain loading takes the text encoder's precision from this entry and the others' from
    # the caller; without it the text encoder alone would come up in half precision.
    config_path = temporary / "text_encoder" / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.rmtree(temporary / "tokenizer")
    shutil.copytree(work / FOLDER, temporary / "tokenizer")
    for path in temporary.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    if (target / CARD).exists():
        shutil.copy(target / CARD, temporary / CARD)
    old = target.with_name(f".{target.name}-old")
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)
