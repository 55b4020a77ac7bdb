"""Names of tensors in LoRA files of all programs, taken apart.

    lora_unet_down_blocks_0_..._attn1_to_q.lora_down.weight       kohya
    lora_unet_input_blocks_4_1_..._attn1_to_q.lora_down.weight    kohya, blocks as in LDM
    unet.down_blocks.0. ... .attn1.to_q.lora_A.weight             diffusers
    unet.down_blocks.0. ... .attn1.processor.to_q_lora.down.weight  diffusers before 2024
    base_model.model.down_blocks.0. ... .to_q.lora_A.weight       peft
    unet.input_blocks.4.1. ... .attn1.to_q.lora_down.weight       OneTrainer ("OMI")

A name that is not understood to the end is none; nothing is guessed from parts of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from trainer.adapters.ldm_names import BlockNames, ldm_blocks, to_diffusers, to_ldm

# Names of modules that have "_" in them; every other "_" of a kohya name stands for ".".
_WORDS = re.compile(
    "(down_blocks|mid_block|up_blocks|transformer_blocks|time_embedding|add_embedding|linear_[12]"
    "|time_emb_proj|conv_shortcut|conv_norm_out|conv_in|conv_out|proj_in|proj_out|to_out|to_[qkv]"
    "|input_blocks|middle_block|output_blocks|in_layers|out_layers|emb_layers|skip_connection"
    "|time_embed|label_emb|text_model|self_attn|out_proj|[qkv]_proj|final_layer_norm|layer_norm[12]"
    "|text_projection|token_embedding|position_embedding)|_"
)
_BLOCK = r"(?:down_blocks\.\d|mid_block|up_blocks\.\d)"
_UNET_PATH = re.compile(
    rf"{_BLOCK}\.(?:attentions\.\d\.(?:norm|proj_in|proj_out|transformer_blocks\.\d\d?\.(?:norm[123]"
    r"|attn[12]\.(?:to_[qkv]|to_out\.0)|ff\.net\.(?:0\.proj|2)))"
    r"|resnets\.\d\.(?:norm[12]|conv[12]|time_emb_proj|conv_shortcut)|(?:down|up)samplers\.0\.conv)"
    r"|conv_in|conv_out|conv_norm_out|(?:time|add)_embedding\.linear_[12]"
)
_TEXT_PATH = re.compile(
    r"text_model\.(?:encoder\.layers\.\d\d?\.(?:self_attn\.(?:[qkv]|out)_proj|mlp\.fc[12]"
    r"|layer_norm[12])|final_layer_norm|embeddings\.(?:token|position)_embedding)|text_projection"
)
_LDM_BLOCK = re.compile(r"(?:input_blocks|middle_block|output_blocks)\.")
_LDM_OTHERS = {
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}

# Parts as the programs write them, and what they are called here.
_PARTS = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_magnitude_vector": "dora",
    "lora_magnitude_vector.weight": "dora",
    "lora_magnitude_vector.default.weight": "dora",
    "dora_scale": "dora",
}
_SAME_PARTS = re.compile(
    r"alpha|scale|rescale|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|oft_blocks"
    r"|[wb]_norm|diff|diff_b|set_weight|[ab][12]\.weight"
)
_OLD_ATTENTION = re.compile(r"(.+?)(\.processor)?\.to_([qkv]|out)_lora\.(down|up)\.weight")
_DOTTED = re.compile(
    r"(?P<name>.+?)\.(?P<part>(?:lora_(?:A|B|down|up|mid)|lora_linear_layer\.(?:down|up)"
    r"|lora\.(?:down|up))(?:\.default)?\.weight|lora_magnitude_vector(?:\.default)?(?:\.weight)?"
    r"|dora_scale|alpha)"
)
_KOHYA = re.compile(r"(lora_unet|oft_unet|lora_te1|lora_te2|lora_te)_([^.]+)\.(.+)")
_KOHYA_COMPONENTS = {"lora_unet": "unet", "oft_unet": "unet", "lora_te2": "text_encoder_2"}
# Beginnings of dotted names: component ("" for peft, which writes a file each) and style.
_DOTTED_PREFIXES = {
    "unet.": ("unet", "diffusers"),
    "text_encoder.": ("text_encoder", "diffusers"),
    "text_encoder_2.": ("text_encoder_2", "diffusers"),
    "base_model.model.": ("", "peft"),
    "lora_unet.": ("unet", "onetrainer"),
    "lora_te.": ("text_encoder", "onetrainer"),
    "lora_te1.": ("text_encoder", "onetrainer"),
    "lora_te2.": ("text_encoder_2", "onetrainer"),
    "clip_l.": ("text_encoder", "onetrainer"),
    "clip_g.": ("text_encoder_2", "onetrainer"),
}


@dataclass(frozen=True, slots=True)
class Name:
    """A tensor's name, taken apart; `path` still as the file has it, with dots."""

    layer: str
    prefix: str
    style: str
    component: str
    path: str
    part: str


def layers_per_block(paths: Iterable[str]) -> int:
    """How many attentions a level of the UNet has on the way down: 2 in every released one.

    LDM's numbers only make sense when it is known. Attention is never where the next level begins
    (`input_blocks.3` with 2), so the names of a small model of its own tell.
    """
    places = {int(m[1]) for p in paths if (m := re.match(r"input_blocks\.(\d\d?)\.1\.", p))}
    fitting = (n for n in (2, 1, 3) if all(place % (n + 1) for place in places))
    return next(fitting, 2)


def unet_blocks(per_block: int) -> BlockNames:
    """Pairs of diffusers' and LDM's names for any Stable Diffusion UNet."""
    # Without attention first: its names of samplers would be taken for an attention's.
    return (*_block_table("Plain", per_block), *_block_table("CrossAttn", per_block))


def _block_table(kind: str, per_block: int) -> BlockNames:
    kinds = [kind] * 4
    return ldm_blocks(
        {"down_block_types": kinds, "up_block_types": kinds, "layers_per_block": per_block}
    )


def taken_apart(key: str) -> Name | None:
    if kohya := _KOHYA.fullmatch(key):
        prefix, flat, part = kohya.groups()
        known = _part(part)
        path = _WORDS.sub(lambda m: m[1] or ".", flat)
        style = "kohya-oft" if prefix == "oft_unet" else "kohya"
        component = _KOHYA_COMPONENTS.get(prefix, "text_encoder")
        return Name(f"{prefix}_{flat}", prefix, style, component, path, known) if known else None
    old = _OLD_ATTENTION.fullmatch(key)
    dotted = _DOTTED.fullmatch(key)
    if not (old or dotted):
        return None
    if old:
        end = "to_out.0" if old[3] == "out" else f"to_{old[3]}"
        layer, part, style = f"{old[1]}.{end}", old[4], "diffusers-old"
    else:
        assert dotted is not None
        layer, part, style = dotted["name"], _part(dotted["part"]), "diffusers"
    prefix = next((p for p in _DOTTED_PREFIXES if layer.startswith(p)), "")
    component, usual = _DOTTED_PREFIXES.get(prefix, ("unet", "diffusers-old"))
    if style == "diffusers":
        style = "onetrainer" if ".lora_down." in key or ".lora_up." in key else usual
    path = layer.removeprefix(prefix)
    if "self_attn." in path:
        path = re.sub(r"self_attn\.to_([qkv]|out)(?:\.0)?$", r"self_attn.\1_proj", path)
    return Name(layer, prefix.rstrip("."), style, component, path, part)


def _part(written: str) -> str:
    """What a part is called here; empty if it is none."""
    return _PARTS.get(written) or (written if _SAME_PARTS.fullmatch(written) else "")


def _from_ldm(path: str, blocks: BlockNames) -> str:
    if path in _LDM_OTHERS:
        return _LDM_OTHERS[path]
    # The table holds layers with weights; a norm stands two places before its convolution.
    norm = re.fullmatch(r"(.+)\.(in_layers|out_layers)\.0", path)
    if norm:
        place = {"in_layers": 2, "out_layers": 3}[norm[2]]
        return to_diffusers(f"{norm[1]}.{norm[2]}.{place}", blocks).replace(".conv", ".norm")
    return to_diffusers(path, blocks)


def canonical(path: str, blocks: BlockNames) -> tuple[str, str, bool]:
    """(dotted path as diffusers and transformers 4 name it, "unet" | "text" | "", was it LDM's).

    An empty second value says that no Stable Diffusion model has such a layer.
    """
    if path.startswith(("encoder.layers.", "final_layer_norm")):
        path = f"text_model.{path}"
    is_ldm = bool(_LDM_BLOCK.match(path)) or path in _LDM_OTHERS
    if is_ldm:
        path = _from_ldm(path, blocks)
    if _TEXT_PATH.fullmatch(path):
        return path, "text", is_ldm
    return path, "unet" if _UNET_PATH.fullmatch(path) else "", is_ldm


def kohya_name(component: str, path: str, family: str, per_block: int) -> str:
    """What kohya's trainer calls a layer: the one name that all programs know.

    Args:
        component: "unet", "text_encoder" or "text_encoder_2".
        path: as `canonical` gives it.
        family: "sd1", "sd2" or "sdxl", whose UNet has LDM's names.
        per_block: see `layers_per_block`.
    """
    if component == "unet":
        path = _to_ldm(path, per_block) if family == "sdxl" else path
        return f"lora_unet_{path.replace('.', '_')}"
    number = "" if family != "sdxl" else "2" if component == "text_encoder_2" else "1"
    return f"lora_te{number}_{path.replace('.', '_')}"


def _to_ldm(path: str, per_block: int) -> str:
    # Levels of SDXL without attention have no layer whose name depends on it.
    blocks = _block_table("CrossAttn", per_block)
    norm = re.fullmatch(r"(.+resnets\.\d)\.norm([12])", path)
    if norm:
        place = to_ldm(f"{norm[1]}.conv{norm[2]}", blocks)
        return f"{place.rpartition('.')[0]}.0"
    return to_ldm(path, blocks)
