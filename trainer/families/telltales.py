"""By which names of tensors a model file is known for what it is.

Each is the part of a name that all models of a kind have and no other kind has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from trainer.families.header import Header

LORA = re.compile(
    r"(\.lora_(down|up|A|B)\b|\.lora\.(down|up)\.|_lora\.(down|up)\.|\.lora_(linear|conv)"
    r"|\.hada_w\d|\.lokr_w\d|\.oft_blocks|\.dora_scale|^lora_(unet|te)|\.glora_|\.diff_?b?$)"
)
CONTROLNET = ("control_model.", "controlnet_cond_embedding.", "input_hint_block.")
CONTROLNET_DIFFUSERS = "controlnet_down_blocks."

# Models whose UNet is another network, or none at all; the first that fits is taken.
OTHER_MODELS = (
    ("motion_modules.", "AnimateDiff motion module"),
    ("distilled_guidance_layer.", "Chroma"),
    ("single_stream_modulation.", "Flux 2"),
    ("double_stream_blocks.", "HiDream"),
    ("individual_token_refiner.", "HunyuanVideo"),
    ("double_blocks.0.img_attn.", "Flux"),
    ("single_transformer_blocks.", "Flux"),
    ("joint_blocks.", "Stable Diffusion 3"),
    ("double_layers.0.attn.w2q", "AuraFlow"),
    ("context_embedder.", "Stable Diffusion 3"),
    ("txt_norm.", "Qwen-Image"),
    ("txtfusion.", "Krea 2"),
    ("cap_embedder.", "Lumina 2 or Z-Image"),
    ("cross_attn.kv_linear.", "PixArt or Sana"),
    ("adaln_single.", "PixArt or LTX-Video"),
    ("patchify_proj.", "LTX-Video"),
    ("mlp_t5.", "HunyuanDiT"),
    ("head.modulation", "Wan"),
    ("extra_pos_embedder.", "Cosmos"),
    ("clip_txt_mapper.", "Stable Cascade"),
    ("channelwise.", "Stable Cascade"),
)

_VAE = ("encoder.conv_in.weight", "decoder.conv_in.weight")
_TEXT_ENCODER = (
    "text_model.encoder.layers.",
    "encoder.layers.0.self_attn.",
    "transformer.resblocks.",
    "encoder.block.0.layer.",
)
_EMBEDDING = ("string_to_param", "emb_params")
_SDXL_EMBEDDING = {"clip_l", "clip_g"}
# Of other programs, a textual inversion is a table of a few vectors, as wide as a text encoder.
_EMBEDDING_WIDTHS = {768, 1024, 1280}
_EMBEDDING_TENSORS = 4


def is_lora(names: Iterable[str]) -> bool:
    """Whether these are the tensors of a LoRA file or one of its relatives."""
    return any(LORA.search(name) for name in names)


def is_controlnet(names: Iterable[str]) -> bool:
    """Whether these are the tensors of a ControlNet."""
    return any(name.startswith(CONTROLNET) or CONTROLNET_DIFFUSERS in name for name in names)


def other_model(names: Iterable[str]) -> str:
    """The name of a model that is no Stable Diffusion 1, 2 or XL; "" where none is recognised."""
    text = "\n".join(names)
    return next((what for part, what in OTHER_MODELS if part in text), "")


def is_vae(names: Iterable[str]) -> bool:
    """Whether these are the tensors of a VAE in a file of its own."""
    plain = {name.removeprefix("first_stage_model.").removeprefix("vae.") for name in names}
    return plain.issuperset(_VAE)


def is_text_encoder(names: Iterable[str]) -> bool:
    """Whether these are the tensors of a text encoder in a file of its own."""
    return any(part in name for name in names for part in _TEXT_ENCODER)


def is_textual_inversion(header: Header) -> bool:
    """Whether the file holds a few embedding vectors alone."""
    names = set(header.tensors)
    if names == _SDXL_EMBEDDING or any(name.startswith(_EMBEDDING) for name in names):
        return True
    shapes = [info.shape for info in header.tensors.values()]
    return 0 < len(shapes) <= _EMBEDDING_TENSORS and all(
        len(shape) in (1, 2) and shape[-1] in _EMBEDDING_WIDTHS for shape in shapes
    )
