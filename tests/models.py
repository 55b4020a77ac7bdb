"""Models of every family: the released ones on the meta device, and small ones of their layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from trainer.adapters.naming import KeyNaming, naming_of

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_FILES = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}
CONFIGURATIONS = Path(__file__).parent.parent / "trainer" / "assets" / "families"
RANK = 4


def configuration(family: str, component: str) -> dict[str, Any]:
    """As it is shipped."""
    path = CONFIGURATIONS / family / component / "config.json"
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return table


@cache
def components_of(family: str) -> Mapping[str, nn.Module]:
    """A released model without its weights. Who attaches something to it detaches it again."""
    with torch.device("meta"):
        models: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel.from_config(configuration(family, "unet")),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configuration(family, "text_encoder"))),
        }
        if family == "sdxl":
            second = CLIPTextConfig(**configuration(family, "text_encoder_2"))
            models["text_encoder_2"] = CLIPTextModelWithProjection(second)
    return models


def namings_of(family: str, models: Mapping[str, nn.Module]) -> dict[str, KeyNaming]:
    """How each component's layers are called in a file, for models of any size."""
    xl = family == "sdxl"
    prefixes = {
        "unet": ("lora_unet", ""),
        "text_encoder": ("lora_te1" if xl else "lora_te", "text_model."),
        "text_encoder_2": ("lora_te2", "text_model."),
    }
    return {name: naming_of(model, *prefixes[name], ldm=xl) for name, model in models.items()}


def golden_table(family: str) -> dict[str, dict[str, tuple[str, str]]]:
    """{group: {module name: (down shape, up shape)}} as on record, at rank 4."""
    text = (GOLDEN / f"{GOLDEN_FILES[family]}_lora_keys.txt").read_text(encoding="utf-8")
    table: dict[str, dict[str, tuple[str, str]]] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            group, name, down, up = line.split()
            table.setdefault(group, {})[name] = (down, up)
    return table


def small_unet(family: str) -> UNet2DConditionModel:
    """A UNet with the layout of a family, eight to sixteen channels wide."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "sample_size": 8,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "use_linear_projection": family != "sd1",
    }
    if family != "sdxl":
        return UNet2DConditionModel(
            **shape,
            block_out_channels=(8, 16),
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    return UNet2DConditionModel(
        **shape,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=40,
    )


def small_components(family: str) -> dict[str, nn.Module]:
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
    )
    models = {"unet": small_unet(family), "text_encoder": CLIPTextModel(config)}
    if family == "sdxl":
        models["text_encoder_2"] = CLIPTextModelWithProjection(config)
    return models
