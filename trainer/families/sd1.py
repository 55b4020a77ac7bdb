"""Stable Diffusion 1.x, at any size: one CLIP text encoder, attention entered by convolutions."""

from __future__ import annotations

from dataclasses import replace

from trainer.families import FamilyNames
from trainer.families.stable_diffusion import StableDiffusion

NAMES = FamilyNames(
    prefixes={"unet": ("lora_unet", ""), "text_encoder": ("lora_te", "text_model.")},
    architecture="stable-diffusion-v1/lora",
    implementation="diffusers",
    version="sd_v1",
    v2=False,
)

FAMILY = StableDiffusion(
    name="sd1",
    words="Stable Diffusion 1.x",
    names=NAMES,
    v_names=replace(NAMES, version="sd_v1_v"),
    # The last layer with its normalisation; many models after it were trained with clip skip 2.
    skips=True,
)
