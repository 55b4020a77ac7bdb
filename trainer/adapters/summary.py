"""What is in a LoRA file of any program: whose naming, for which base, which layers, how strong.

Everything is told from tensor names and shapes; metadata may be missing or wrong.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from torch import Tensor

from trainer.adapters.file import LoraFile

# A tensor's name is a layer's name and one of these parts; ".default" is peft's adapter name.
_PART = re.compile(
    r"(?P<layer>.+?)[._](?P<part>lora_(?:A|B|down|up|mid|magnitude_vector)|lora\.(?:down|up)"
    r"|lora_linear_layer\.(?:down|up)|hada_\w+|lokr_\w+|oft_\w+|dora_scale|w_norm|b_norm"
    r"|diff|diff_b|alpha)(?:\.default)?(?:\.weight)?"
)
_DOWN_PARTS = ("lora_down", "lora_A", "lora.down", "lora_linear_layer.down", "hada_w1_b")
_UP_PARTS = ("lora_up", "lora_B", "lora.up", "lora_linear_layer.up")
_PLAIN_PARTS = frozenset({*_DOWN_PARTS[:-1], *_UP_PARTS, "alpha"})

# How the names of each naming begin; the first that fits all layers counts.
_NAMINGS = (
    ("kohya", re.compile(r"lora_(?:unet|te\d?)_[^.]+")),
    ("diffusers", re.compile(r"(?:unet|text_encoder|text_encoder_2)\..+")),
    ("peft", re.compile(r"base_model\.model\..+")),
)

# Kind of layer by its name (with "_" for "."); the first that is found counts.
_KINDS = (
    ("UNet attention", re.compile(r"_attn[12]_")),
    ("UNet feed-forward", re.compile(r"_ff_net_")),
    ("UNet projection", re.compile(r"_proj_(?:in|out)$")),
    (
        "UNet convolution block",
        re.compile(r"resnets_|samplers_|_conv|_(?:in|out|emb)_layers_|_skip_connection|_op$"),
    ),
    ("text encoder attention", re.compile(r"_self_attn_")),
    ("text encoder MLP", re.compile(r"_mlp_")),
)

_FAMILY_BY_CROSS_WIDTH = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_FAMILY_BY_TEXT_WIDTH = {768: "sd1", 1024: "sd2"}
# The block widths of every real Stable Diffusion 1, 2 and XL UNet.
_REAL_UNET_WIDTHS = frozenset({320, 640, 1280})
_FITS = {
    "sd1": "Stable Diffusion 1.x: SD 1.4, SD 1.5 and the models made from them",
    "sd2": "Stable Diffusion 2.x: SD 2.0, SD 2.1 and the models made from them",
    "sdxl": "Stable Diffusion XL and the models made from it",
    "unknown": "it cannot be told from the file which base it fits",
}


@dataclass(frozen=True, slots=True)
class LoraSummary:
    """What `summarize` found.

    naming: "kohya", "diffusers", "peft" or "unknown". family: "sd1", "sd2", "sdxl" or "unknown".
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


@dataclass(frozen=True, slots=True)
class _Layer:
    """One adapted layer: its name with "_" for ".", the shape of its down factor, its alpha."""

    name: str
    down: tuple[int, ...] | None
    alpha: float | None


def summarize(file: LoraFile) -> LoraSummary:
    """Tell what a LoRA file holds; works on every file that `read_lora` could read."""
    parts, other = _parts(file.tensors)
    layers = [_layer(name, tensors) for name, tensors in parts.items()]
    naming = _naming(parts)
    cross_width = _width(layers, "_attn2_to_k", "_attn2_to_v")
    family = _family(layers, cross_width)
    kohya_sd1 = naming == "kohya" and family == "sd1"
    return LoraSummary(
        naming=naming,
        family=family,
        fits=_fits(layers, family, cross_width),
        modules=len(layers),
        parameters=sum(t.numel() for key, t in file.tensors.items() if not key.endswith("alpha")),
        ranks=_counted("none" if x.down is None else str(x.down[0]) for x in layers),
        alphas=_counted("none" if x.alpha is None else f"{x.alpha:g}" for x in layers),
        targets=_counted(_kind(x.name) for x in layers),
        dtypes=_counted(str(t.dtype).removeprefix("torch.") for t in file.tensors.values()),
        cross_attention_width=cross_width,
        coverage=_coverage({x.name for x in layers}) if kohya_sd1 else {},
        other_parts=_counted(other),
    )


def _parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """{layer name as in the file: {part: tensor}}, and the kinds of parts no plain LoRA has."""
    parts: dict[str, dict[str, Tensor]] = {}
    other: list[str] = []
    for key, tensor in tensors.items():
        match = _PART.fullmatch(key)
        if match:
            parts.setdefault(match["layer"], {})[match["part"]] = tensor
            if match["part"] not in _PLAIN_PARTS:
                other.append(match["part"])
        else:
            other.append(key.partition(".")[2] or key)
    return parts, other


def _layer(name: str, parts: Mapping[str, Tensor]) -> _Layer:
    down = next((parts[p] for p in _DOWN_PARTS if p in parts and parts[p].ndim >= 2), None)
    alpha = parts.get("alpha")
    return _Layer(
        # Old diffusers files name the attention processor as if it were a layer.
        name=name.replace(".processor.", ".").replace(".", "_"),
        down=None if down is None else tuple(down.shape),
        alpha=float(alpha) if alpha is not None and alpha.numel() == 1 else None,
    )


def _naming(names: Iterable[str]) -> str:
    for naming, pattern in _NAMINGS:
        if names and all(pattern.fullmatch(name) for name in names):
            return naming
    return "unknown"


def _width(layers: Iterable[_Layer], *endings: str) -> int | None:
    """The largest input width among layers whose name ends so."""
    widths = [x.down[1] for x in layers if x.down is not None and x.name.endswith(endings)]
    return max(widths, default=None)


def _family(layers: Sequence[_Layer], cross_width: int | None) -> str:
    if cross_width is not None:
        widths = {x.down[1] for x in layers if x.down and x.name.endswith("_attn1_to_q")}
        if not widths <= _REAL_UNET_WIDTHS:
            return "unknown"
        return _FAMILY_BY_CROSS_WIDTH.get(cross_width, "unknown")
    if any(_is_second_text_encoder(x.name) for x in layers):
        return "sdxl"
    return _FAMILY_BY_TEXT_WIDTH.get(_width(layers, "_self_attn_q_proj") or 0, "unknown")


def _fits(layers: Sequence[_Layer], family: str, cross_width: int | None) -> str:
    text_width = _width(layers, "_self_attn_q_proj")
    if family != "unknown" or (cross_width is None and text_width is None):
        return _FITS[family]
    kind, width = "cross-attention", cross_width
    if width is None:
        kind, width = "text encoder", text_width
    small = "small " if width is not None and width < min(_FAMILY_BY_CROSS_WIDTH) else ""
    return f"a {small}base of its own ({kind} width {width}): fits no real SD 1.5, SD 2.x or SDXL"


def _kind(name: str) -> str:
    kind = next((kind for kind, pattern in _KINDS if pattern.search(name)), "other layers")
    return f"second {kind}" if _is_second_text_encoder(name) else kind


def _is_second_text_encoder(name: str) -> bool:
    return name.startswith(("lora_te2_", "text_encoder_2_"))


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
