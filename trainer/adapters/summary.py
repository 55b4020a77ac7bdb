"""What is in a LoRA file of any program: whose naming, for which base, which layers, how strong.

Everything is told from tensor names and shapes; metadata may be missing or wrong.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from trainer.adapters.file import LoraFile
from trainer.adapters.foreign import FAMILY_BY_CROSS_WIDTH, Foreign, Layer, family_of, read_names

# What the styles of names are summed up as.
_NAMINGS = {"kohya-ldm": "kohya", "kohya-oft": "kohya", "diffusers-old": "diffusers"}

_PLAIN_PARTS = ("down", "up", "alpha")

# Kind of layer by its path (with "_" for "."); the first that is found counts.
_KINDS = (
    ("UNet attention", re.compile(r"_attn[12]_")),
    ("UNet feed-forward", re.compile(r"_ff_net_")),
    ("UNet projection", re.compile(r"_proj_(?:in|out)$")),
    ("UNet convolution block", re.compile(r"resnets_|samplers_|_conv")),
    ("text encoder attention", re.compile(r"_self_attn_")),
    ("text encoder MLP", re.compile(r"_mlp_")),
)

_FITS = {
    "sd1": "Stable Diffusion 1.x: SD 1.4, SD 1.5 and the models made from them",
    "sd2": "Stable Diffusion 2.x: SD 2.0, SD 2.1 and the models made from them",
    "sdxl": "Stable Diffusion XL and the models made from it",
    "unknown": "it cannot be told from the file which base it fits",
}


@dataclass(frozen=True, slots=True)
class LoraSummary:
    """What `summarize` found.

    naming: "kohya", "diffusers", "peft", "onetrainer", "mixed" or "unknown". styles: how many
        layers are named in which of its styles. kinds: how many layers are of which kind.
    family: "sd1", "sd2", "sdxl" or "unknown".
    fits: which base models it can be used with, in words.
    modules: how many layers are adapted; parameters: how many numbers in their factors.
    ranks, alphas, targets, dtypes: how often each occurs, as text; a rank of "none" is that of a
        layer in a form without one, an alpha of "none" is usually taken as the rank.
    cross_attention_width: width of the prompt embeddings it was trained with, where it shows.
    coverage: for a Stable Diffusion 1 file in kohya's naming, how many of the layers that kohya's
        trainer would adapt are there: {"UNet attention": (128, 128), ...}.
    other_parts: tensors that belong to no plain LoRA (LoHa, LoKr, DoRA, ...), by kind.
    """

    naming: str
    styles: dict[str, int]
    kinds: dict[str, int]
    family: str
    fits: str
    modules: int
    parameters: int
    ranks: dict[str, int]
    alphas: dict[str, int]
    targets: dict[str, int]
    dtypes: dict[str, int]
    cross_attention_width: int | None
    coverage: dict[str, tuple[int, int]]
    other_parts: dict[str, int]


def summarize(file: LoraFile, foreign: Foreign | None = None) -> LoraSummary:
    """Tell what a LoRA file holds; works on every file that `read_lora` could read.

    Args:
        file: its larger tensors may be on the meta device.
        foreign: its names, where they were read already.
    """
    names = foreign or read_names(file)
    layers = names.layers
    cross_width = _width(layers, "unet", (".attn2.to_k", ".attn2.to_v"))
    family = family_of(names)
    naming = _naming(names)
    kohya_sd1 = naming == "kohya" and family == "sd1"
    alphas = {key for layer in layers for part, key in layer.parts.items() if part == "alpha"}
    return LoraSummary(
        naming=naming,
        styles=names.styles,
        kinds=_counted(_kind(layer) for layer in layers),
        family=family,
        fits=_fits(layers, family, cross_width),
        modules=len(layers),
        parameters=sum(t.numel() for key, t in file.tensors.items() if key not in alphas),
        ranks=_counted("none" if x.rank is None else str(x.rank) for x in layers),
        alphas=_counted("none" if x.alpha is None else f"{x.alpha:g}" for x in layers),
        targets=_counted(_target(x) for x in layers),
        dtypes=_counted(str(t.dtype).removeprefix("torch.") for t in file.tensors.values()),
        cross_attention_width=cross_width,
        coverage=_coverage({x.name for x in layers}) if kohya_sd1 else {},
        other_parts=_counted(_other_parts(names)),
    )


def _naming(names: Foreign) -> str:
    found = {_NAMINGS.get(style, style) for style in names.styles}
    if not found:
        return "unknown"
    return found.pop() if len(found) == 1 else "mixed"


def _kind(layer: Layer) -> str:
    kind = "alpha alone" if layer.kind == "none" else layer.kind
    if "mid" in layer.parts:
        kind += " with a middle factor"
    return f"{kind} with DoRA" if "dora" in layer.parts else kind


def _other_parts(names: Foreign) -> Iterable[str]:
    """The parts that no plain LoRA has, and the names of what is no layer."""
    for layer in names.layers:
        yield from (part for part in layer.parts if part not in _PLAIN_PARTS)
    for key in (*names.embeddings, *names.unknown):
        yield key.partition(".")[2] or key


def _width(layers: Iterable[Layer], component: str, ends: tuple[str, ...]) -> int | None:
    """The largest input width among a component's layers whose path ends so."""
    widths = (
        shape[1]
        for layer in layers
        if layer.component == component and layer.path.endswith(ends)
        for shape in (layer.shapes.get("down") or layer.shapes.get("hada_w1_b", ()),)
        if len(shape) >= 2
    )
    return max(widths, default=None)


def _fits(layers: Sequence[Layer], family: str, cross_width: int | None) -> str:
    text_width = _width(layers, "text_encoder", (".self_attn.q_proj",))
    if family != "unknown" or (cross_width is None and text_width is None):
        return _FITS[family]
    kind, width = "cross-attention", cross_width
    if width is None:
        kind, width = "text encoder", text_width
    if cross_width is None and text_width in FAMILY_BY_CROSS_WIDTH:
        return _FITS["unknown"]
    small = "small " if width is not None and width < min(FAMILY_BY_CROSS_WIDTH) else ""
    return f"a {small}base of its own ({kind} width {width}): fits no real SD 1.5, SD 2.x or SDXL"


def _target(layer: Layer) -> str:
    name = f"_{layer.path.replace('.', '_')}"
    kind = next((kind for kind, pattern in _KINDS if pattern.search(name)), "other layers")
    return f"second {kind}" if layer.component == "text_encoder_2" else kind


def _coverage(names: set[str]) -> dict[str, tuple[int, int]]:
    """How many of the layers that kohya's trainer adapts in Stable Diffusion 1 are in `names`."""
    blocks = [f"down_blocks_{i}_attentions_{j}" for i, j in product(range(3), range(2))]
    blocks += ["mid_block_attentions_0"]
    blocks += [f"up_blocks_{i}_attentions_{j}" for i, j in product(range(1, 4), range(3))]
    attention = {
        f"lora_unet_{block}_transformer_blocks_0_{which}_{layer}"
        for block, which, layer in product(
            blocks, ("attn1", "attn2"), ("to_q", "to_k", "to_v", "to_out_0")
        )
    }
    unet = attention | {
        f"lora_unet_{block}_{layer}"
        for block, layer in product(
            blocks,
            (
                "transformer_blocks_0_ff_net_0_proj",
                "transformer_blocks_0_ff_net_2",
                "proj_in",
                "proj_out",
            ),
        )
    }
    text = {
        f"lora_te_text_model_encoder_layers_{i}_{layer}"
        for i, layer in product(
            range(12),
            (*(f"self_attn_{x}_proj" for x in ("q", "k", "v", "out")), "mlp_fc1", "mlp_fc2"),
        )
    }
    groups = {
        "UNet attention": attention,
        "UNet": unet,
        "text encoder": text,
        "all kinds": unet | text,
    }
    return {group: (len(names & wanted), len(wanted)) for group, wanted in groups.items()}


def _counted(values: Iterable[str]) -> dict[str, int]:
    """{value: how often}, the most frequent first."""
    return dict(Counter(values).most_common())
