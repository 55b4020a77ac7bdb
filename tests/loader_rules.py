"""What programs make of the tensors of a LoRA file, written down from their documented behaviour.

Independent of the trainer: the released UNets are laid out here once more, level by level, with
both names of each layer. `not_applied` says which tensors a program does not apply.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache

LOADERS = ("comfyui", "forge", "a1111", "diffusers")
PARTS = ("lora_down.weight", "lora_up.weight", "alpha")

# Transformer depth of each level of the UNet and of its middle; 0: no attention there.
DEPTHS = {"sd1": (1, 1, 1, 0), "sd2": (1, 1, 1, 0), "sdxl": (0, 2, 10)}
MIDDLE_DEPTH = {"sd1": 1, "sd2": 1, "sdxl": 10}
TEXT_LAYERS = {
    "sd1": {"lora_te_": 12, "lora_te1_": 12},
    "sd2": {"lora_te_": 23, "lora_te1_": 23},
    "sdxl": {"lora_te1_": 12, "lora_te2_": 32},
}
# OpenCLIP's encoders, whose q, k, v and out A1111 fuses into one module; lora_te1_ of SD 2 is not
# among the names it looks for.
OPENCLIP = {"sd1": (), "sd2": ("lora_te_",), "sdxl": ("lora_te2_",)}
A1111_TEXT = {
    "sd1": ("lora_te_", "lora_te1_"),
    "sd2": ("lora_te_",),
    "sdxl": ("lora_te1_", "lora_te2_"),
}
ATTENTION = ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj")
FORGE_LIMIT = 12
LDM_STYLE = re.compile(r"lora_unet_(?:input_blocks|middle_block|output_blocks)_")
DIFFUSERS_STYLE = re.compile(r"lora_unet_(?:down_blocks|mid_block|up_blocks)_")


def _transformer(ours: str, ldm: str, depth: int) -> Iterator[tuple[str, str]]:
    layers = ["proj_in", "proj_out"]
    for i in range(depth):
        block = f"transformer_blocks_{i}"
        layers += [f"{block}_ff_net_0_proj", f"{block}_ff_net_2"]
        for attention in ("attn1", "attn2"):
            layers += [f"{block}_{attention}_{x}" for x in ("to_q", "to_k", "to_v", "to_out_0")]
    for layer in layers if depth else ():
        yield f"{ours}_{layer}", f"{ldm}_{layer}"


def _residual(ours: str, ldm: str, shortcut: bool) -> Iterator[tuple[str, str]]:
    yield f"{ours}_conv1", f"{ldm}_in_layers_2"
    yield f"{ours}_conv2", f"{ldm}_out_layers_3"
    yield f"{ours}_time_emb_proj", f"{ldm}_emb_layers_1"
    if shortcut:
        yield f"{ours}_conv_shortcut", f"{ldm}_skip_connection"


@cache
def unet_layers(family: str) -> dict[str, str]:
    """LDM's name of every layer that trainers adapt, by diffusers' name."""
    depths, pairs, place = DEPTHS[family], list[tuple[str, str]](), 0
    last = len(depths) - 1
    for level, depth in enumerate(depths):
        for i in range(2):
            place += 1
            # The width doubles with the first block of each level but the first and, in the four
            # levels of SD 1 and 2, the last.
            wider = i == 0 and 0 < level < 3
            ours, ldm = f"down_blocks_{level}", f"input_blocks_{place}"
            pairs += _residual(f"{ours}_resnets_{i}", f"{ldm}_0", wider)
            pairs += _transformer(f"{ours}_attentions_{i}", f"{ldm}_1", depth)
        if level < last:
            place += 1
            pairs.append((f"{ours}_downsamplers_0_conv", f"input_blocks_{place}_0_op"))
    pairs += _residual("mid_block_resnets_0", "middle_block_0", False)
    pairs += _transformer("mid_block_attentions_0", "middle_block_1", MIDDLE_DEPTH[family])
    pairs += _residual("mid_block_resnets_1", "middle_block_2", False)
    for level, depth in enumerate(reversed(depths)):
        for i in range(3):
            ours, ldm = f"up_blocks_{level}", f"output_blocks_{3 * level + i}"
            pairs += _residual(f"{ours}_resnets_{i}", f"{ldm}_0", True)
            pairs += _transformer(f"{ours}_attentions_{i}", f"{ldm}_1", depth)
        if level < last:
            inside = 2 if depth else 1
            pairs.append((f"{ours}_upsamplers_0_conv", f"{ldm}_{inside}_conv"))
    return dict(pairs)


@cache
def text_layers(family: str, prefix: str) -> frozenset[str]:
    return frozenset(
        f"{prefix}text_model_encoder_layers_{i}_{layer}"
        for i in range(TEXT_LAYERS[family].get(prefix, 0))
        for layer in (*ATTENTION, "mlp_fc1", "mlp_fc2")
    )


@cache
def known_names(family: str) -> frozenset[str]:
    """Names that ComfyUI and Forge look for: both names of the UNet's layers, all encoders."""
    unet = {f"lora_unet_{x}" for pair in unet_layers(family).items() for x in pair}
    texts = [text_layers(family, prefix) for prefix in TEXT_LAYERS[family]]
    return frozenset(unet.union(*texts))


def a1111_unet_name(name: str) -> str:
    """A1111 turns diffusers' names into LDM's by SD 1's numbering, whatever the family."""
    rules = (
        (r"down_blocks_(\d)_resnets_(\d)_(.+)", lambda a, b: f"input_blocks_{1 + 3 * a + b}_0"),
        (r"down_blocks_(\d)_attentions_(\d)_(.+)", lambda a, b: f"input_blocks_{1 + 3 * a + b}_1"),
        (r"up_blocks_(\d)_resnets_(\d)_(.+)", lambda a, b: f"output_blocks_{3 * a + b}_0"),
        (r"up_blocks_(\d)_attentions_(\d)_(.+)", lambda a, b: f"output_blocks_{3 * a + b}_1"),
        (r"mid_block_(resnets)_(\d)_(.+)", lambda _, b: f"middle_block_{2 * b}"),
        (r"mid_block_(attentions)_(\d)_(.+)", lambda *_: "middle_block_1"),
    )
    suffixes = {
        "conv1": "in_layers_2",
        "conv2": "out_layers_3",
        "time_emb_proj": "emb_layers_1",
        "conv_shortcut": "skip_connection",
    }
    if found := re.fullmatch(r"down_blocks_(\d)_downsamplers_0_conv", name):
        return f"input_blocks_{3 + 3 * int(found[1])}_0_op"
    if found := re.fullmatch(r"up_blocks_(\d)_upsamplers_0_conv", name):
        level = int(found[1])
        return f"output_blocks_{2 + 3 * level}_{2 if level > 0 else 1}_conv"
    for pattern, place in rules:
        if found := re.fullmatch(pattern, name):
            numbers = [int(x) if x.isdigit() else 0 for x in found.groups()[:2]]
            return f"{place(*numbers)}_{suffixes.get(found[3], found[3])}"
    return name


def _module(key: str) -> str:
    return key.partition(".")[0]


def _plain(key: str) -> bool:
    return key.partition(".")[2] in PARTS


def _unmatched(family: str, keys: set[str]) -> set[str]:
    return {k for k in keys if not (_plain(k) and _module(k) in known_names(family))}


def _forge(family: str, keys: set[str]) -> set[str]:
    unmatched = _unmatched(family, keys)
    return keys if len(unmatched) > FORGE_LIMIT else unmatched


def _a1111(family: str, keys: set[str]) -> set[str]:
    modules = {_module(key) for key in keys if _plain(key)}
    in_model = set(unet_layers(family).values())
    taken = {
        name
        for name in modules
        if name.startswith("lora_unet_")
        and a1111_unet_name(name.removeprefix("lora_unet_")) in in_model
    }
    for prefix in A1111_TEXT[family]:
        here = modules & text_layers(family, prefix)
        if prefix in OPENCLIP[family]:
            here = {
                name
                for name in here
                if "_mlp_" in name
                or all(name[: name.index("self_attn")] + x in here for x in ATTENTION)
            }
        taken |= here
    return {key for key in keys if _module(key) not in taken or not _plain(key)}


def _diffusers(family: str, keys: set[str]) -> set[str]:
    modules = {_module(key) for key in keys}
    prefixes = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
    ldm = {name for name in modules if LDM_STYLE.match(name)}
    refused = (
        not all(name.startswith(prefixes) for name in modules)
        or not all(_plain(key) for key in keys)
        or (ldm and family != "sdxl")
        # `text_model_` may be missing for the first encoder alone; diffusers 0.42 ends with an
        # IndexError here.
        or any(name.startswith("lora_te2_encoder_") for name in modules)
    )
    if refused:
        return keys
    # Beside diffusers' names, LDM's are deleted without a word.
    deleted = ldm if any(DIFFUSERS_STYLE.match(name) for name in modules) else set()
    texts = {x for prefix in TEXT_LAYERS[family] for x in text_layers(family, prefix)}
    known = known_names(family) | {name.replace("_text_model_", "_", 1) for name in texts}
    return {key for key in keys if _module(key) in deleted or _module(key) not in known}


def not_applied(loader: str, family: str, keys: Iterable[str]) -> set[str]:
    """The tensors that a program leaves out of a file with these; all if it refuses the file."""
    rule = {"comfyui": _unmatched, "forge": _forge, "a1111": _a1111, "diffusers": _diffusers}
    return rule[loader](family, set(keys))
