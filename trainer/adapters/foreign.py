"""LoRA files of any program in one neutral form: which layer of which model, in which shape.

Every name is split into the layer it belongs to and the part of that layer's update it is; names
that are not understood are listed as unknown.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.adapters.file import LoraFile
from trainer.adapters.foreign_names import (
    Name,
    canonical,
    layers_per_block,
    taken_apart,
    unet_blocks,
)
from trainer.adapters.ldm_names import BlockNames

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
# The prefix of the weights of a pivotal tuning that travel in a LoRA file (OneTrainer, A1111).
EMBEDDING_PREFIX = "bundle_emb."

# Widths of SDXL's second text encoder, which tell it from the first in peft's files.
_SECOND_WIDTHS = (1280, 5120)
_UNET_INPUTS = (".attn1.to_q", ".attn1.to_k", ".attn1.to_v", ".attn2.to_q")
_TEXT_INPUTS = (".q_proj", ".k_proj", ".v_proj", ".fc1")
FAMILY_BY_CROSS_WIDTH = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
# The block widths of every real Stable Diffusion 1, 2 and XL UNet.
REAL_UNET_WIDTHS = frozenset({320, 640, 1280})
_SD1_PREFIXES = frozenset({"lora_te", "lora_unet", "oft_unet", "unet", "text_encoder", ""})
_STATED = (
    ("sd1", "sd_v1", "stable-diffusion-v1/"),
    ("sd2", "sd_v2", "stable-diffusion-v2-"),
    ("sdxl", "sdxl_", "stable-diffusion-xl-v1-"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One adapted layer of a file.

    name: as in the file, without the part. prefix: what it begins with ("lora_te1").
    style: "kohya", "kohya-ldm", "kohya-oft", "diffusers", "diffusers-old", "onetrainer", "peft".
    component: of `COMPONENTS`. path: dotted, as diffusers and transformers 4 name the module.
    parts: from "down", "up", "mid", "alpha", "dora", "hada_w1_a", ... to the tensor's name.
    shapes: of the parts. alpha: None where none is stated.
    without_text_model: "text_model" is left out of the name, which most programs do not know.
    """

    name: str
    prefix: str
    style: str
    component: str
    path: str
    parts: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    alpha: float | None
    without_text_model: bool

    @property
    def kind(self) -> str:
        """ "lora", "loha", "lokr", "oft", "norm", "diff", "glora", or "none" (an alpha alone)."""
        kinds = (
            ("lora", ("down", "up", "mid")),
            ("loha", ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
            ("lokr", ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w2_a")),
            ("oft", ("oft_blocks",)),
            ("norm", ("w_norm", "b_norm")),
            ("diff", ("diff", "diff_b", "set_weight")),
            ("glora", ("a1.weight", "b1.weight")),
        )
        return next((kind for kind, parts in kinds if any(p in self.parts for p in parts)), "none")

    @property
    def rank(self) -> int | None:
        """The inner dimension of the update; None for kinds without one."""
        for part in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            shape = self.shapes.get(part, ())
            if len(shape) >= 2:
                return shape[0]
        return None

    @property
    def flaw(self) -> str:
        """What is wrong with a LoRA layer, in words; empty if nothing is."""
        if self.kind != "lora":
            return ""
        for part, other in (("down", "up"), ("up", "down")):
            if part not in self.parts:
                return f"{other} without {part}"
        down, up = self.shapes["down"], self.shapes["up"]
        if len(down) < 2 or len(up) < 2 or down[0] == 0:
            return "factors that are no matrices"
        return "" if up[1] == down[0] else "factors that do not fit each other"


@dataclass(frozen=True, slots=True)
class Foreign:
    """All names of a file: its layers, the names of embeddings in it, and unknown names."""

    layers: tuple[Layer, ...]
    embeddings: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def styles(self) -> dict[str, int]:
        """{style: how many layers}, the most frequent first."""
        return dict(Counter(layer.style for layer in self.layers).most_common())


def read_names(file: LoraFile) -> Foreign:
    """Take all names of a file apart; values are read of alphas only.

    Args:
        file: its larger tensors may be on the meta device.
    """
    embeddings, unknown = [], []
    names: dict[str, dict[str, Name]] = {}
    for key in file.tensors:
        name = taken_apart(key)
        if key.startswith(EMBEDDING_PREFIX):
            embeddings.append(key)
        elif name is None:
            unknown.append(key)
        else:
            names.setdefault(name.layer, {})[key] = name
    per_block = layers_per_block(n.path for keys in names.values() for n in keys.values())
    blocks = unet_blocks(per_block)
    layers = []
    for keys in names.values():
        layer = _layer(file, keys, blocks)
        if layer is None:
            unknown += keys
        else:
            layers.append(layer)
    return Foreign(tuple(layers), tuple(embeddings), tuple(unknown))


def _layer(file: LoraFile, keys: Mapping[str, Name], blocks: BlockNames) -> Layer | None:
    """The layer that some tensors make up; None if no Stable Diffusion model has it."""
    first = next(iter(keys.values()))
    path, model, is_ldm = canonical(first.path, blocks)
    shapes = {n.part: tuple(file.tensors[key].shape) for key, n in keys.items()}
    component = first.component or _component(file.path, model, shapes)
    if not model or (component == "unet") != (model == "unet"):
        return None
    stated = [file.tensors[key] for key, n in keys.items() if n.part == "alpha"]
    readable = [float(alpha) for alpha in stated if alpha.numel() == 1 and not alpha.is_meta]
    return Layer(
        name=first.layer,
        prefix=first.prefix,
        style="kohya-ldm" if is_ldm and first.style == "kohya" else first.style,
        component=component,
        path=path,
        parts={n.part: key for key, n in keys.items()},
        shapes=shapes,
        alpha=next(iter(readable), None),
        without_text_model=model == "text" and "text_model" not in first.path,
    )


def _component(path: Path, model: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Which model a peft file is for: its folder says, else what is adapted."""
    if model == "unet":
        return "unet"
    if path.parent.name in COMPONENTS[1:]:
        return path.parent.name
    down = shapes.get("down", ())
    return COMPONENTS[2 if len(down) == 2 and down[1] in _SECOND_WIDTHS else 1]


def unet_layers_per_block(layers: Iterable[Layer]) -> int:
    """How many attentions or residual blocks a level has on the way down, told from the paths.

    It is 2 in every released model; a file for one may hold some of its layers only.
    """
    unet = [layer for layer in layers if layer.component == "unet"]
    own = _widths(unet, "unet", _UNET_INPUTS)
    counts = [
        int(match[2]) + (match[1] == "down")
        for layer in unet
        if (match := re.match(r"(down|up)_blocks\.\d\.(?:attentions|resnets)\.(\d)", layer.path))
    ]
    return max(counts, default=2) if own and not own <= REAL_UNET_WIDTHS else 2


def family_of(foreign: Foreign, metadata: Mapping[str, str] | None = None) -> str:
    """ "sd1", "sd2", "sdxl" or "unknown": told from widths, else from what metadata is given.

    The width of the prompt embeddings tells the families apart (768, 1024, 2048), but only where
    the UNet has the width of the released models; small models of their own have any.
    """
    cross = _widths(foreign.layers, "unet", (".attn2.to_k", ".attn2.to_v"))
    own = _widths(foreign.layers, "unet", _UNET_INPUTS)
    text = _widths(foreign.layers, "text_encoder", _TEXT_INPUTS)
    by_cross = {FAMILY_BY_CROSS_WIDTH.get(width, "") for width in cross}
    real = own <= REAL_UNET_WIDTHS
    if len(by_cross) == 1 and real and (family := by_cross.pop()):
        return family
    if not cross and _widths(foreign.layers, "text_encoder_2", _TEXT_INPUTS) == {1280}:
        return "sdxl"
    if not cross and text == {1024}:
        return "sd2"
    # SDXL's first text encoder is that of SD 1; only the prefix of its own tells.
    if not cross and text == {768} and {x.prefix for x in foreign.layers} <= _SD1_PREFIXES:
        return "sd1"
    return _stated_family(metadata or {})


def _widths(layers: Iterable[Layer], component: str, ends: tuple[str, ...]) -> set[int]:
    """Input widths of the layers of a component whose path ends so."""
    shapes = (
        layer.shapes.get("down") or layer.shapes.get("hada_w1_b", ())
        for layer in layers
        if layer.component == component and layer.path.endswith(ends)
    )
    return {shape[1] for shape in shapes if len(shape) >= 2}


def _stated_family(metadata: Mapping[str, str]) -> str:
    """What the metadata says, in the words of kohya's trainer or of ModelSpec."""
    version = metadata.get("ss_base_model_version", "")
    architecture = metadata.get("modelspec.architecture", "")
    for family, ours, theirs in _STATED:
        if version.startswith(ours) or architecture.startswith(theirs):
            return family
    return "unknown"
