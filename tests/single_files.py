"""Small bases of every family as single files: modules, and their tensors under LDM's names.

The names are made here by rules of their own, the other way round than the trainer reads them.
Sizes keep to the rules of the released models for what shapes do not show: 32 groups, 64 channels
a head (8 heads in the UNet of SD 1.x).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


@dataclass(frozen=True)
class Modules:
    """A base's modules; `second` is SDXL's second text encoder."""

    family: str
    unet: Any
    vae: Any
    text: Any
    second: Any = None


def small_modules(family: str, *, channels: int = 4) -> Modules:
    """A base of `sd1`, `sd2` or `sdxl` with random weights and an input of so many channels."""
    torch.manual_seed(0)
    large = family == "sdxl"
    unet: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": channels,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 128 if large else 64,
        "attention_head_dim": 8 if family == "sd1" else (1, 1),
        "use_linear_projection": family != "sd1",
    }
    if large:
        unet |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 64,
        }
    return Modules(
        family,
        UNet2DConditionModel(**unet).eval(),
        small_vae(),
        CLIPTextModel(_text(family == "sd2")).eval(),
        CLIPTextModelWithProjection(_text(True)).eval() if large else None,
    )


def small_vae() -> Any:
    """A VAE of three levels: four pixels a latent."""
    return AutoencoderKL(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        sample_size=32,
    ).eval()


def _text(open_clip: bool) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=77,
        projection_dim=64,
        hidden_act="gelu" if open_clip else "quick_gelu",
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )


def ldm_tensors(modules: Modules) -> dict[str, Tensor]:
    """The tensors of a base as a single file holds them."""
    tensors = {
        f"model.diffusion_model.{name}": tensor for name, tensor in ldm_unet(modules.unet).items()
    }
    vae = ldm_vae(modules.vae)
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in vae.items()}
    if modules.family == "sd1":
        return tensors | clip("cond_stage_model.transformer.", modules.text)
    if modules.family == "sd2":
        return tensors | open_clip("cond_stage_model.model.", modules.text)
    tensors |= clip("conditioner.embedders.0.transformer.", modules.text)
    return tensors | open_clip("conditioner.embedders.1.model.", modules.second)


def ldm_unet(unet: Any) -> dict[str, Tensor]:
    """A UNet's tensors under LDM's names, without prefix."""
    names = list(unet.state_dict())
    layers = int(unet.config.layers_per_block)
    return {ldm_unet_name(n, layers, names): tensor for n, tensor in unet.state_dict().items()}


def ldm_unet_name(name: str, layers: int, names: list[str]) -> str:
    for new, old in UNET_ENDS.items():
        if name.startswith(f"{new}."):
            return old + name[len(new) :]
    for new, old in RESIDUAL.items():
        name = re.sub(rf"(resnets\.\d+)\.{new}\.", rf"\1.{old}.", name)
    for place, number in MIDDLE.items():
        name = name.replace(f"mid_block.{place}.", f"middle_block.{number}.")
    match = re.match(r"(down|up)_blocks\.(\d+)\.([a-z]+)\.(\d+)\.(.*)", name)
    if not match:
        return name
    side, level, kind, layer, rest = match.groups()
    first = int(level) * (layers + 1) + (side == "down")
    block = "input_blocks" if side == "down" else "output_blocks"
    if kind == "downsamplers":
        return f"{block}.{first + layers}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        attention = any(n.startswith(f"up_blocks.{level}.attentions.") for n in names)
        return f"{block}.{first + layers}.{2 if attention else 1}.{rest}"
    return f"{block}.{first + int(layer)}.{int(kind == 'attentions')}.{rest}"


def ldm_vae(vae: Any) -> dict[str, Tensor]:
    """A VAE's tensors under LDM's names, without prefix; its attention as 1x1 convolutions."""
    levels = len(vae.config.block_out_channels)
    tensors = {}
    for name, tensor in vae.state_dict().items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", new)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(
            r"up_blocks\.(\d)\.(resnets|upsamplers\.0)",
            lambda m: f"up.{levels - 1 - int(m[1])}.{'block' if m[2] == 'resnets' else 'upsample'}",
            new,
        )
        for part, old in VAE_ATTENTION.items():
            new = new.replace(f"mid_block.attentions.0.{part}.", f"mid.attn_1.{old}.")
        if ".mid.attn_1." in new and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        tensors[new] = tensor
    return tensors


def clip(prefix: str, encoder: nn.Module) -> dict[str, Tensor]:
    """OpenAI's CLIP, with the positions that old files keep beside the weights."""
    tensors = {
        f"{prefix}text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in encoder.state_dict().items()
    }
    return tensors | {f"{prefix}text_model.embeddings.position_ids": torch.arange(77)[None]}


def open_clip(prefix: str, encoder: nn.Module) -> dict[str, Tensor]:
    """OpenCLIP: queries, keys and values in one tensor."""
    old = {name.removeprefix("text_model."): t for name, t in encoder.state_dict().items()}
    tensors = {
        "positional_embedding": old["embeddings.position_embedding.weight"],
        "token_embedding.weight": old["embeddings.token_embedding.weight"],
        "ln_final.weight": old["final_layer_norm.weight"],
        "ln_final.bias": old["final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
    }
    if "text_projection.weight" in old:
        tensors["text_projection"] = old["text_projection.weight"].T
    for name, tensor in old.items():
        match = re.match(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$", name)
        if match and match[2] in OPEN_CLIP:
            block = f"transformer.resblocks.{match[1]}"
            tensors[f"{block}.{OPEN_CLIP[match[2]]}.{match[3]}"] = tensor
        elif match and match[2] == "self_attn.q_proj":
            fused = [old[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            block = f"transformer.resblocks.{match[1]}"
            tensors[f"{block}.attn.in_proj_{match[3]}"] = torch.cat(fused)
    return {prefix + name: tensor for name, tensor in tensors.items()}


def save(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    """Write a `.safetensors` file; a `.` in a metadata key is written `__` here."""
    whole = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    said = {key.replace("__", "."): value for key, value in metadata.items()}
    save_file(whole, path, said or None)
    return path
