"""Stable Diffusion 2.x, epsilon (512 px) and v (768 px): OpenCLIP's text encoder.

It was trained on the layer before OpenCLIP's last, and its files leave the last one out: theirs
has 23 layers, of which the last is the one. A1111 and ComfyUI take it whatever clip skip says.
"""

from __future__ import annotations

from dataclasses import replace

from trainer.families import FamilyNames
from trainer.families.stable_diffusion import StableDiffusion

NAMES = FamilyNames(
    prefixes={"unet": ("lora_unet", ""), "text_encoder": ("lora_te", "text_model.")},
    architecture="stable-diffusion-v2-512/lora",
    implementation="diffusers",
    version="sd_v2",
    v2=True,
)

FAMILY = StableDiffusion(
    name="sd2",
    words="Stable Diffusion 2.x",
    names=NAMES,
    v_names=replace(NAMES, architecture="stable-diffusion-v2-768-v/lora", version="sd_v2_v"),
)
