"""Stable Diffusion XL and its relatives (arXiv 2307.01952): two text encoders.

The UNet sees the layers before the last of CLIP and OpenCLIP side by side, without their last
normalisation, and is told the second encoder's pooled embedding and the sizes of the picture
(section 2.2). A1111 and ComfyUI take these layers whatever clip skip says.
"""

from __future__ import annotations

from trainer.families import FamilyNames
from trainer.families.prompts import Prompting
from trainer.families.stable_diffusion import StableDiffusion

NAMES = FamilyNames(
    prefixes={
        "unet": ("lora_unet", ""),
        "text_encoder": ("lora_te1", "text_model."),
        "text_encoder_2": ("lora_te2", "text_model."),
    },
    architecture="stable-diffusion-xl-v1-base/lora",
    implementation="https://github.com/Stability-AI/generative-models",
    version="sdxl_base_v1-0",
    v2=False,
    ldm=True,
)

FAMILY = StableDiffusion(
    name="sdxl",
    words="Stable Diffusion XL",
    names=NAMES,
    v_names=NAMES,
    encoders=2,
    prompting=Prompting(layer=2, norm=False),
    upcast_vae=True,
)
