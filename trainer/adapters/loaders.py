"""Which tensors of a LoRA file each program takes, which it leaves out, and which files it refuses.

What is written here was read and run in ComfyUI (October 2025), Forge, A1111 1.8 to 1.10,
diffusers 0.42 and kohya's sd-scripts; other releases may differ. Only names and shapes count: no
program of them looks at metadata when it applies a file.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from trainer.adapters.file import LoraFile
from trainer.adapters.foreign import Foreign, Layer, family_of, read_names

Outcome = Literal["all", "partly", "refused"]

# Forge takes a file with more unmatched tensors for one of another model.
_FORGE_LIMIT = 12
_ATTENTION = re.compile(r"\.attn[12]\.to_")
_FUSED_ATTENTION = re.compile(r"(.+\.self_attn)\.[a-z]+_proj")
_SAMPLER = "up_blocks.0.upsamplers.0.conv"
# What sd-scripts never makes a module for.
_NOT_KOHYAS = re.compile(
    r"conv_(?:in|out|norm_out)|.*_embedding\.linear_.|.*norm.?|text_projection"
)
# Names of kohya's form that diffusers converts without asking whether there is such a layer.
_KOHYA_FORM = re.compile(r"lora_(?:unet|te[12]?)_[^.]+\.(?:lora_(?:down|up)\.weight|alpha)")
_NO_TEXT_MODEL = "text encoder names lack 'text_model'"
_BROKEN = "broken layers"

# Why a program leaves out a layer, or "" when it takes it.
Rule = Callable[[Layer, str], str]


@dataclass(frozen=True, slots=True)
class LoaderVerdict:
    """What one program makes of a file.

    taken, dropped: names of tensors. reason: why some are dropped, why the file is refused, or what
    comes out differently although everything is taken; empty if there is nothing to say.
    """

    loader: str
    outcome: Outcome
    taken: tuple[str, ...]
    dropped: tuple[str, ...]
    reason: str


def verdicts(
    file: LoraFile, foreign: Foreign | None = None, family: str = ""
) -> tuple[LoaderVerdict, ...]:
    """One verdict for each of ComfyUI, Forge, A1111, diffusers and sd-scripts.

    Args:
        file: its tensors may be on the meta device.
        foreign: its names, where they were read already.
        family: of the base it is for, where it is known; else it is told from the file.
    """
    names = foreign or read_names(file)
    base = family or family_of(names, file.metadata)
    return (
        _comfyui(file, names, base),
        _forge(file, names, base),
        _a1111(file, names, base),
        _diffusers(file, names, base),
        _sd_scripts(file, names, base),
    )


def _comfyui(file: LoraFile, names: Foreign, family: str) -> LoaderVerdict:
    refusal = _lonely(names, "up without down")
    return _verdict("ComfyUI", file, _dropped(names, family, _comfy_rule), refusal)


def _comfy_rule(layer: Layer, family: str) -> str:
    """Names that ComfyUI has no module for."""
    if layer.flaw:
        return _BROKEN
    if layer.without_text_model:
        return _NO_TEXT_MODEL
    if layer.style == "kohya-oft":
        return "'oft_unet' names are not known"
    if layer.style in ("peft", "onetrainer"):
        return f"{layer.style} names are not known"
    if layer.style == "diffusers" and _ATTENTION.search(layer.path):
        return "attention is looked up by diffusers' old names"
    return ""


def _forge(file: LoraFile, names: Foreign, family: str) -> LoaderVerdict:
    dropped = _dropped(names, family, _forge_rule)
    count = sum(len(keys) for keys in dropped.values())
    refusal = _lonely(names, "up without down") or _lonely(names, "factors")
    if count > _FORGE_LIMIT and not refusal:
        refusal = f"{count} tensors are not matched, more than {_FORGE_LIMIT}: {_main(dropped)}"
    return _verdict("Forge", file, dropped, refusal)


def _forge_rule(layer: Layer, family: str) -> str:
    if layer.style in ("diffusers", "diffusers-old"):
        return "diffusers' names are not known"
    return _comfy_rule(layer, family)


def _a1111(file: LoraFile, names: Foreign, family: str) -> LoaderVerdict:
    dropped = _dropped(names, family, _a1111_rule, embeddings=False)
    # Its OpenCLIP fuses the four layers of an attention: all of them or none.
    fused = "text_encoder_2" if family == "sdxl" else "text_encoder" if family == "sd2" else ""
    attentions: dict[str, list[Layer]] = defaultdict(list)
    taken = set(file.tensors) - {key for keys in dropped.values() for key in keys}
    for layer in names.layers:
        match = _FUSED_ATTENTION.fullmatch(layer.path)
        if layer.component == fused and match and taken & set(layer.parts.values()):
            attentions[match[1]].append(layer)
    for layers in attentions.values():
        if len({layer.path for layer in layers}) < 4:
            for layer in layers:
                dropped["attention of OpenCLIP needs q, k, v and out together"] += (
                    layer.parts.values()
                )
    return _verdict("A1111", file, dropped, _lonely(names, "without"))


def _a1111_rule(layer: Layer, family: str) -> str:
    if layer.flaw:
        return _BROKEN
    if not layer.style.startswith("kohya"):
        return "only kohya's names are known"
    if layer.without_text_model:
        return _NO_TEXT_MODEL
    if family == "sd2" and layer.prefix == "lora_te1":
        return "'lora_te1' names are not known for SD 2"
    if family == "sdxl" and layer.style == "kohya" and layer.path == _SAMPLER:
        return "diffusers' name of this layer is not known for SDXL"
    if layer.kind == "norm" and not {"w_norm", "b_norm"} <= layer.parts.keys():
        return "a norm needs both w_norm and b_norm"
    return ""


def _diffusers(file: LoraFile, names: Foreign, family: str) -> LoaderVerdict:
    dropped: dict[str, list[str]] = defaultdict(list)
    unet_styles = {layer.style for layer in names.layers if layer.component == "unet"}
    for layer in names.layers:
        if layer.style == "kohya-ldm" and "kohya" in unet_styles:
            dropped["LDM's names are dropped where diffusers' are, too"] += layer.parts.values()
        elif "dora" in layer.parts and layer.style.startswith("kohya"):
            dropped["dora_scale is left out: the result is wrong"].append(layer.parts["dora"])
    for layers in _without_out_projection(names):
        keys = (key for layer in layers for key in layer.parts.values())
        dropped["text attention without out_proj is not recognised"] += keys
    for key in filter(_KOHYA_FORM.fullmatch, names.unknown):
        dropped["names of no layer"].append(key)
    refusal = _diffusers_refusal(names, family, unet_styles)
    different = "" if refusal else _diffusers_differences(names)
    return _verdict("diffusers", file, dropped, refusal, different)


def _diffusers_refusal(names: Foreign, family: str, unet_styles: set[str]) -> str:
    """Why diffusers raises an error."""
    kohya = [layer.style.startswith("kohya") for layer in names.layers]
    stray = [*names.embeddings, *(k for k in names.unknown if not _KOHYA_FORM.fullmatch(k))]
    if any(kohya) and not all(kohya):
        return "kohya's and other names in one file"
    # In other namings every name must hold "lora"; in kohya's every tensor must be understood.
    if stray and (all(kohya) or not all("lora" in key for key in stray)):
        return f"names that it cannot convert, such as {stray[0][:60]}"
    if any(layer.style == "peft" for layer in names.layers):
        return "a file of peft: load it with peft, or convert it"
    if any(layer.style == "onetrainer" for layer in names.layers):
        return "OneTrainer's names are not known"
    if "kohya-ldm" in unet_styles and family in ("sd1", "sd2"):
        return "LDM's block names are known for SDXL only"
    return _diffusers_layers(names, all(kohya)) or _diffusers_text(names) or _unequal_ranks(names)


def _diffusers_layers(names: Foreign, kohya: bool) -> str:
    """Layers of a form for which diffusers raises an error."""
    if any(layer.kind != "lora" for layer in names.layers):
        return "it knows plain LoRA only"
    if flaw := _lonely(names, ""):
        return flaw
    if any("mid" in layer.parts for layer in names.layers):
        return "lora_mid is not known"
    if not kohya and any("alpha" in layer.parts for layer in names.layers):
        return "alpha under diffusers' names is not understood"
    return ""


def _diffusers_text(names: Foreign) -> str:
    """Names of text encoders for which diffusers raises an error."""
    # The second encoder has "text_model" in its own paths; the first lost it in transformers 5.
    if any(x.without_text_model and x.component == "text_encoder_2" for x in names.layers):
        return _NO_TEXT_MODEL
    for layers in _without_out_projection(names):
        component = layers[0].component
        if not any(x.component == component and ".mlp." in x.path for x in names.layers):
            return "the names of a text encoder are only recognised with out_proj or an MLP"
    return ""


def _without_out_projection(names: Foreign) -> Iterator[list[Layer]]:
    """The attention layers of each text encoder that has none called out_proj, in kohya's names:
    by those diffusers recognises how the others are written."""
    for component in ("text_encoder", "text_encoder_2"):
        layers = [
            layer
            for layer in names.layers
            if layer.component == component
            and layer.style.startswith("kohya")
            and ".self_attn." in layer.path
        ]
        if layers and not any(layer.path.endswith("out_proj") for layer in layers):
            yield layers


def _unequal_ranks(names: Foreign) -> str:
    ranks = Counter(layer.rank for layer in _unet(names))
    usual = ranks.most_common(1)[0][0] if ranks else None
    kohya_attention = [
        layer
        for layer in _unet(names)
        if _ATTENTION.search(layer.path) and layer.style.startswith("kohya")
    ]
    if any(layer.rank != usual for layer in kohya_attention):
        return "attention layers of different ranks"
    return ""


def _diffusers_differences(names: Foreign) -> str:
    """What is applied otherwise than the file says, without an error."""
    other = 0
    for component in ("unet", "text_encoder", "text_encoder_2"):
        layers = [x for x in names.layers if x.component == component and "kohya" in x.style]
        alphas = Counter(layer.alpha for layer in layers if layer.alpha is not None)
        usual = alphas.most_common(1)[0][0] if alphas else None
        for layer in layers:
            pattern = component == "unet" and not _ATTENTION.search(layer.path)
            honoured = layer.alpha == usual or (pattern and layer.alpha is not None)
            other += usual is not None and not honoured
    if other:
        return f"{other} layers get another strength than the file says: alphas differ"
    return ""


def _sd_scripts(file: LoraFile, names: Foreign, family: str) -> LoaderVerdict:
    dropped = _dropped(names, family, _sd_scripts_rule)
    for layer in names.layers:
        if not _sd_scripts_rule(layer, family):
            dropped["dora_scale and lora_mid are not known"] += [
                key for part, key in layer.parts.items() if part in ("dora", "mid", "scale")
            ]
    return _verdict("sd-scripts", file, dropped, _lonely(names, "factors"))


def _sd_scripts_rule(layer: Layer, family: str) -> str:
    if not layer.style.startswith("kohya"):
        return "only kohya's names are known"
    if layer.without_text_model:
        return _NO_TEXT_MODEL
    if layer.kind not in ("lora", "none") and layer.style != "kohya-oft":
        return f"{layer.kind} needs the LyCORIS package"
    if family in ("sd1", "sd2") and layer.style == "kohya-ldm":
        return "LDM's block names are known for SDXL only"
    if family in ("sd1", "sd2") and layer.prefix in ("lora_te1", "lora_te2"):
        return f"'{layer.prefix}' names are known for SDXL only"
    if family == "sdxl" and layer.prefix == "lora_te":
        return "'lora_te' names are not known for SDXL"
    return "layers that it never trains" if _NOT_KOHYAS.fullmatch(layer.path) else ""


def _dropped(
    names: Foreign, family: str, rule: Rule, *, embeddings: bool = True
) -> dict[str, list[str]]:
    """{reason: names of tensors} by a rule for layers; names that nobody knows are among them."""
    dropped: dict[str, list[str]] = defaultdict(list)
    for layer in names.layers:
        if reason := rule(layer, family):
            dropped[reason] += layer.parts.values()
    if embeddings and names.embeddings:
        dropped["embeddings in a LoRA file are not read"] += names.embeddings
    if names.unknown:
        dropped["names that are not understood"] += names.unknown
    return dropped


def _lonely(names: Foreign, flaw: str) -> str:
    """The first flaw that holds the given words, with the layer's name; "" if there is none."""
    found = (x for x in names.layers if x.flaw and flaw in x.flaw)
    layer = next(found, None)
    return f"{layer.flaw} ({layer.name[:80]})" if layer else ""


def _unet(names: Foreign) -> Iterable[Layer]:
    return (layer for layer in names.layers if layer.component == "unet")


def _main(dropped: Mapping[str, list[str]]) -> str:
    """The reasons with how many tensors each, the most frequent first."""
    counted = sorted(dropped.items(), key=lambda item: -len(item[1]))
    return "; ".join(f"{reason} ({len(keys)})" for reason, keys in counted if keys)


def _verdict(
    loader: str, file: LoraFile, dropped: Mapping[str, list[str]], refusal: str, different: str = ""
) -> LoaderVerdict:
    gone = {key for keys in dropped.values() for key in keys}
    taken = () if refusal else tuple(key for key in file.tensors if key not in gone)
    left = tuple(file.tensors) if refusal else tuple(k for k in file.tensors if k in gone)
    reasons = [refusal] if refusal else [_main(dropped), different]
    outcome: Outcome = "refused" if not taken else "partly" if left else "all"
    return LoaderVerdict(loader, outcome, taken, left, "; ".join(filter(None, reasons)))
