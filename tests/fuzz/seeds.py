"""Good files of every kind, which inputs are made from by altering them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import features
from safetensors.torch import save

from tests.hostile import HAS_HEIC, encoded, heic, moving, picture
from tests.single_files import ldm_tensors, small_modules
from trainer.config.reader import to_toml
from trainer.config.settings import TrainConfig

BLOCK = "down_blocks_0_attentions_0_transformer_blocks_0"
DOTTED = "down_blocks.0.attentions.0.transformer_blocks.0"
TEXT = "text_model_encoder_layers_0_self_attn_q_proj"

LORA_NAMES = (
    *(f"lora_unet_{BLOCK}_attn1_to_q.{part}" for part in ("lora_down.weight", "alpha")),
    f"lora_unet_{BLOCK}_attn1_to_q.lora_up.weight",
    f"lora_unet_{BLOCK}_attn1_to_q.dora_scale",
    f"lora_unet_{BLOCK}_attn2_to_k.hada_w1_a",
    f"lora_unet_{BLOCK}_attn2_to_k.lokr_w1",
    f"lora_unet_{BLOCK}_ff_net_2.lora_mid.weight",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
    f"lora_te_{TEXT}.lora_down.weight",
    f"lora_te1_{TEXT}.lora_up.weight",
    f"lora_te2_{TEXT}.alpha",
    f"unet.{DOTTED}.attn1.to_q.lora_A.weight",
    f"unet.{DOTTED}.attn1.to_q.lora_B.weight",
    f"unet.{DOTTED}.attn1.processor.to_q_lora.down.weight",
    f"base_model.model.{DOTTED}.attn1.to_q.lora_A.weight",
    f"base_model.model.{DOTTED}.attn1.to_q.lora_B.weight",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    "bundle_emb.anna.clip_l",
    "lora_unet_conv_in.diff",
    "oft_unet_mid_block.oft_blocks",
)
# Layers that programs load: down, up, alpha.
MODULES = (
    *(
        (f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha")
        for name in (
            f"lora_unet_{BLOCK}_attn1_to_q",
            f"lora_unet_{BLOCK}_attn2_to_k",
            f"lora_unet_{BLOCK}_ff_net_2",
            "lora_unet_down_blocks_0_attentions_0_proj_in",
            "lora_unet_mid_block_resnets_0_conv1",
            f"lora_te_{TEXT}",
        )
    ),
    *(
        (f"{name}.lora_A.weight", f"{name}.lora_B.weight", "")
        for name in (f"unet.{DOTTED}.attn1.to_q", f"unet.{DOTTED}.attn2.to_v")
    ),
)
BASE_NAMES = (
    *("conv_in.weight", "time_embedding.linear_1.weight", "v_pred", "ztsnr", "edm_mean"),
    "model.diffusion_model.input_blocks.0.0.weight",
    "model.diffusion_model.input_blocks.1.0.in_layers.2.weight",
    "model.diffusion_model.input_blocks.1.1.proj_in.weight",
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    "model.diffusion_model.input_blocks.3.0.op.weight",
    "model.diffusion_model.middle_block.1.proj_in.weight",
    "model.diffusion_model.output_blocks.0.0.in_layers.0.weight",
    "model.diffusion_model.label_emb.0.0.weight",
    "model.diffusion_model.time_embed.0.weight",
    "model.diffusion_model.out.2.weight",
    "first_stage_model.encoder.conv_in.weight",
    "first_stage_model.encoder.down.0.block.0.conv1.weight",
    "first_stage_model.decoder.up.0.block.0.conv1.weight",
    "first_stage_model.decoder.conv_in.weight",
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
    "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight",
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
    "conditioner.embedders.1.model.text_projection",
    "control_model.input_blocks.0.0.weight",
)
METADATA = {
    "ss_network_dim": "4",
    "ss_base_model_version": "sd_v1-5",
    "modelspec.resolution": "512x512",
    "modelspec.prediction_type": "v",
    "modelspec.architecture": "stable-diffusion-xl-v1-base",
    "likeness.settings": "[run]\nkind = 'face'\n",
    "lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 2, "unet.rank_pattern": {}}',
}


def container(entries: Mapping[str, Any], data: bytes, metadata: Any = None) -> bytes:
    """A safetensors file of any header."""
    table = {**({} if metadata is None else {"__metadata__": metadata}), **entries}
    text = json.dumps(table).encode("utf-8")
    return len(text).to_bytes(8, "little") + text + data


@cache
def settings() -> tuple[bytes, ...]:
    """Settings files: everything, and the tables within tables."""
    sets = "[[data.sets]]\nfolder = 'more'\nweight = 2.0\n[[adapter.blocks]]\npattern = 'mid*'\n"
    return (to_toml(TrainConfig()).encode(), sets.encode(), b"[run]\nseed = 3\n")


@cache
def loras() -> tuple[bytes, ...]:
    """LoRA files in the names of several programs."""
    down, up = torch.ones(2, 8), torch.ones(8, 2)
    kohya = f"lora_unet_{BLOCK}_attn1_to_q"
    plain = {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up}
    dotted = f"unet.{DOTTED}.attn1.to_q"
    return (
        save({**plain, f"{kohya}.alpha": torch.tensor(2.0)}, METADATA),
        save({f"{dotted}.lora_A.weight": down.half(), f"{dotted}.lora_B.weight": up.half()}),
        save({name: torch.ones(2, 2) for name in LORA_NAMES}),
    )


@cache
def bases() -> tuple[bytes, ...]:
    """Single files that look like a base for a while, and the headers of small bases."""
    tensors = {name: torch.ones(2, 2) for name in BASE_NAMES}
    small = [ldm_tensors(small_modules(family)) for family in ("sd1", "sd2", "sdxl")]
    return (save(tensors, METADATA), *(_header(tensors) for tensors in small))


def _header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The header of a file alone: what a base is, is told without its weights."""
    entries, end = {}, 0
    for name, tensor in tensors.items():
        size = 2 * tensor.numel()
        places = [end, end + size]
        entries[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": places}
        end += size
    return container(entries, b"", METADATA)


@cache
def pickles() -> tuple[bytes, ...]:
    """Checkpoints of PyTorch, in the format of today and that of before 1.6."""
    tensors = {name: torch.ones(2, 2) for name in BASE_NAMES[:6]}
    files = []
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save(
            {"state_dict": tensors, "step": 3}, buffer, _use_new_zipfile_serialization=zipped
        )
        files.append(buffer.getvalue())
    return tuple(files)


@cache
def pictures() -> tuple[bytes, ...]:
    """A picture in every format that is read."""
    small = picture(1, 40, 36)
    found = [encoded(small, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")]
    found += [encoded(small.quantize(16), "PNG"), encoded(small.convert("CMYK"), "JPEG")]
    found += [encoded(small.convert("LA"), "PNG"), moving(2, "GIF"), moving(2, "WEBP")]
    found += [encoded(small, "TIFF", compression="tiff_lzw"), moving(2, "MPO")]
    found += [encoded(small, "JPEG", progressive=True), encoded(small.convert("1"), "TIFF")]
    if features.check("avif"):
        found.append(encoded(small, "AVIF"))
    if HAS_HEIC:
        found.append(heic(1))
    return tuple(found)


def configurations(base: Path) -> dict[str, bytes]:
    """The JSON files of a base in diffusers' format, by their place in it."""
    return {
        path.relative_to(base).as_posix(): path.read_bytes()
        for path in sorted(base.rglob("*.json"))
    }
