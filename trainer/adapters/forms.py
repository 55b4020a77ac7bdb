"""A LoRA's layers as kohya's trainer, diffusers and peft write them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.adapters.factors import alpha_of, as_declared, dora_column, plain_factors
from trainer.adapters.foreign import Layer, unet_layers_per_block
from trainer.adapters.foreign_names import kohya_name
from trainer.adapters.outside import CONFIG_NAME, peft_config

Form = Literal["kohya", "diffusers", "peft"]
FORMS: tuple[Form, ...] = ("kohya", "diffusers", "peft")

_KOHYA_PARTS = {
    "down": "lora_down.weight",
    "up": "lora_up.weight",
    "mid": "lora_mid.weight",
    "dora": "dora_scale",
}
# What a file without metadata needs so that A1111 and Forge know its family.
_KOHYA_METADATA = {
    "sd1": {"ss_base_model_version": "sd_v1", "ss_v2": "False"},
    "sd2": {"ss_base_model_version": "sd_v2", "ss_v2": "True"},
    "sdxl": {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"},
}
# Written anew, or true of the old form only.
_NOT_KEPT = (
    "sshs_model_hash",
    "sshs_legacy_hash",
    "modelspec.hash_sha256",
    "lora_adapter_metadata",
)


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """What is converted: layers with the tensors they are made of, by tensor name."""

    path: Path
    layers: tuple[Layer, ...]
    embeddings: tuple[str, ...]
    tensors: Mapping[Layer, Mapping[str, Tensor]]
    loose: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    family: str


def problem(layer: Layer, to: Form) -> str:
    """Why a layer cannot be said in a form; empty if it can."""
    if layer.flaw:
        return layer.flaw
    if layer.style == "kohya-oft" or "scale" in layer.parts:
        return "a kind of its own (OFT of kohya, or 'scale')"
    if layer.style == "peft" and layer.alpha is None:
        return f"no alpha: {CONFIG_NAME} is missing beside the file"
    if to == "kohya":
        return ""
    if layer.kind != "lora":
        return f"{layer.kind}, which {to} cannot load as a LoRA"
    if "dora" in layer.parts:
        shape = layer.shapes["dora"]
        rows = layer.shapes["up"][0]
        if to == "diffusers":
            return "DoRA, whose magnitudes diffusers leaves out"
        if not (shape[:1] == (rows,) or layer.style == "peft"):
            return "DoRA by input columns, which peft does not know"
    return ""


def kohya_form(source: Source) -> dict[str, Tensor]:
    """The tensors of a file of kohya's trainer; every LoRA layer has an alpha."""
    tensors: dict[str, Tensor] = dict(source.loose)
    per_block = unet_layers_per_block(source.layers)
    for layer, parts in source.tensors.items():
        name = kohya_name(layer.component, layer.path, source.family, per_block)
        parts = dict(parts)
        if layer.kind == "lora":
            # Always written: programs disagree on what a missing alpha means.
            parts["alpha"] = torch.tensor(alpha_of(layer))
            for part in ("down", "up"):
                if "mid" not in parts:
                    parts[part] = as_declared(parts[part], layer, source.family)
            if "dora" in parts and layer.style == "peft":
                parts["dora"] = dora_column(parts["dora"], parts["up"])
        for part, tensor in parts.items():
            tensors[f"{name}.{_KOHYA_PARTS.get(part, part)}"] = tensor
    return tensors


def diffusers_form(source: Source) -> dict[str, Tensor]:
    """The tensors of a file of diffusers, with alpha multiplied into `up` (`lora_B`)."""
    tensors: dict[str, Tensor] = {}
    for layer, parts in source.tensors.items():
        down, up = plain_factors(layer, parts, source.family)
        scale = alpha_of(layer) / down.shape[0]
        tensors[f"{layer.component}.{layer.path}.lora_A.weight"] = down
        tensors[f"{layer.component}.{layer.path}.lora_B.weight"] = up if scale == 1 else up * scale
    return tensors


def peft_form(source: Source, component: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration of one model's folder."""
    tensors: dict[str, Tensor] = {}
    rows: list[tuple[str, int, float]] = []
    dora = False
    for layer, parts in source.tensors.items():
        if layer.component != component:
            continue
        down, up = plain_factors(layer, parts, source.family)
        path = _peft_path(layer)
        name = f"base_model.model.{path}"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down, up
        if "dora" in parts:
            dora = True
            magnitude = parts["dora"].float().flatten()
            is_wide = up.ndim == 4
            tensors[f"{name}.lora_magnitude_vector"] = (
                magnitude[None, :, None, None] if is_wide else magnitude
            )
        rows.append((path, down.shape[0], alpha_of(layer)))
    return tensors, peft_config(rows, dora=dora)


def _peft_path(layer: Layer) -> str:
    """The path in the modules of transformers 5, whose `CLIPTextModel` has no `text_model.`."""
    flat = layer.component == "text_encoder"
    return layer.path.removeprefix("text_model.") if flat else layer.path


def form_metadata(source: Source, to: Form) -> dict[str, str]:
    """The source's metadata, with what a form needs where it lacks it."""
    kept = {key: value for key, value in source.metadata.items() if key not in _NOT_KEPT}
    if to != "kohya":
        return {**kept, "format": "pt"}
    ranks = Counter(layer.rank for layer in source.layers).most_common(1)
    alphas = Counter(alpha_of(layer) for layer in source.layers).most_common(1)
    network = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks[0][0]),
        "ss_network_alpha": str(alphas[0][0]),
    }
    return {**_KOHYA_METADATA[source.family], **network, **kept}
