"""Configurations of the three families, and the sizes of a base from the shapes of its tensors.

The configurations of the released models ship with the package, in the layout of diffusers:
`trainer/assets/families/FAMILY/PART/config.json`. `sd2-v` holds what SD 2.x at 768 px has
otherwise than `sd2`. Of a smaller or larger model of a family everything is read from the shapes
except what shapes do not show, for which the rules of the released models hold: groups of a
normalisation (32), heads of attention (8 in the UNet of SD 1.x, else one for 64 channels).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FAMILIES_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "families"
HEAD_WIDTH = 64
# Numbers in SDXL's size and crop conditioning.
TIME_IDS = 6

Shapes = Mapping[str, tuple[int, ...]]


def shipped_config(family: str, part: str, prediction: str = "epsilon") -> dict[str, Any]:
    """The configuration of a part of the released model.

    Args:
        family: `sd1`, `sd2` or `sdxl`.
        part: `unet`, `vae`, `text_encoder`, `text_encoder_2` or `scheduler`.
        prediction: `v_prediction` takes that of SD 2.x at 768 px where it differs.

    Raises:
        FileNotFoundError: the family has no such part.
    """
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    path = FAMILIES_FOLDER / family / part / name
    variant = FAMILIES_FOLDER / f"{family}-v" / part / name
    if prediction == "v_prediction" and variant.is_file():
        path = variant
    return json.loads(path.read_text(encoding="utf-8"))


def unet_config(shapes: Shapes, shipped: Mapping[str, Any], pooled: int = 0) -> dict[str, Any]:
    """The configuration of a UNet with diffusers' names.

    Args:
        shapes: of its tensors. shipped: that of the released model.
        pooled: width of the pooled text embedding, in SDXL.

    Raises:
        KeyError, IndexError: a tensor is missing that the sizes are read from.
    """
    levels = _count(shapes, r"down_blocks\.(\d)\.")
    channels = [shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)]
    depths = [_depth(shapes, f"down_blocks.{i}") for i in range(levels)]
    # Where the last level has no attention its entry is that of the middle block.
    transformers = [depth or 1 for depth in depths[:-1]] + [_depth(shapes, "mid_block") or 1]
    heads = shipped["attention_head_dim"]
    if isinstance(heads, list):
        heads = [max(width // HEAD_WIDTH, 1) for width in channels]
    width = next((s[1] for n, s in shapes.items() if n.endswith("attn2.to_k.weight")), 0)
    config = {
        **shipped,
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": _count(shapes, r"down_blocks\.0\.resnets\.(\d)\."),
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in depths[::-1]],
        "transformer_layers_per_block": transformers if set(transformers) != {1} else 1,
        "attention_head_dim": heads,
        "cross_attention_dim": width,
    }
    if pooled:
        entering = shapes["add_embedding.linear_1.weight"][1]
        config["projection_class_embeddings_input_dim"] = entering
        config["addition_time_embed_dim"] = (entering - pooled) // TIME_IDS
    return config


def vae_config(shapes: Shapes, shipped: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a VAE with diffusers' names; arguments and errors as `unet_config`."""
    levels = _count(shapes, r"encoder\.down_blocks\.(\d)\.")
    return {
        **shipped,
        "block_out_channels": [
            shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)
        ],
        "layers_per_block": _count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
    }


def text_config(shapes: Shapes, shipped: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a CLIP text encoder; arguments and errors as `unet_config`.

    Names are without `text_model.`. OpenCLIP's file of SD 2.x has one layer more than is used.
    """
    vocabulary, hidden = shapes["embeddings.token_embedding.weight"]
    layers = _count(shapes, r"encoder\.layers\.(\d\d?)\.")
    projection = shapes.get("text_projection.weight", ())
    return {
        **shipped,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": min(layers, int(shipped["num_hidden_layers"])),
        "num_attention_heads": max(hidden // HEAD_WIDTH, 1),
        "projection_dim": projection[0] if projection else shipped["projection_dim"],
    }


def _depth(shapes: Shapes, block: str) -> int:
    """Transformer blocks in each attention of a level; 0 without attention."""
    return _count(shapes, re.escape(block) + r"\.attentions\.0\.transformer_blocks\.(\d\d?)\.")


def _count(names: Iterable[str], pattern: str) -> int:
    """How many numbers, counted from 0, stand at a place in the names.

    Patterns take as many digits as a model can have, so that no name asks for millions of layers.
    """
    found = (re.match(pattern, name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)
