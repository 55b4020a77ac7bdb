"""Which layers of a model a target set stands for: one table for every Stable Diffusion family.

Stable Diffusion 1, 2 and XL are built of the same modules with the same names in diffusers and
transformers, so that a layer is known by the end of its dotted path and by its type; what differs
between the families is only how many there are.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from trainer.errors import ConfigError

# Ends of dotted paths. The dot in front keeps `proj_in` from matching a longer name.
_ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
_FEED_FORWARD = (".ff.net.0.proj", ".ff.net.2", ".proj_in", ".proj_out")
_CONVOLUTION = (
    ".conv1",
    ".conv2",
    ".time_emb_proj",
    ".conv_shortcut",
    ".downsamplers.0.conv",
    ".upsamplers.0.conv",
)
UNET_TARGETS: Mapping[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    # What kohya's trainer adapts by default: all of the transformer blocks.
    "attention+ff": _ATTENTION + _FEED_FORWARD,
    # And the residual, down- and up-sampling blocks, with their 3x3 convolutions.
    "all": _ATTENTION + _FEED_FORWARD + _CONVOLUTION,
    # attn2 is the attention from the picture to the prompt; keys and values are all that it takes
    # from the prompt (Custom Diffusion, arXiv 2212.04488, section 3.1).
    "cross-attention": tuple(f".attn2{end}" for end in _ATTENTION),
    "cross-kv": (".attn2.to_k", ".attn2.to_v"),
}

_TEXT_ATTENTION = (".q_proj", ".k_proj", ".v_proj", ".out_proj")
TEXT_TARGETS: Mapping[str, tuple[str, ...]] = {
    "attention": _TEXT_ATTENTION,
    "attention+mlp": (*_TEXT_ATTENTION, ".fc1", ".fc2"),
}


def select_layers(
    module: nn.Module,
    component: str,
    targets: str,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> tuple[str, ...]:
    """Dotted paths of the layers to adapt, in the order of the model.

    Args:
        module: a UNet of diffusers or a CLIP text encoder of transformers.
        component: "unet", "text_encoder" or "text_encoder_2".
        targets: a name in `UNET_TARGETS`, or in `TEXT_TARGETS` for a text encoder.
        include: glob patterns (`*` stands for dots too); of the set, only layers that fit one of
            them are taken. None: the whole set.
        exclude: glob patterns of layers to leave out.

    Raises:
        ConfigError: there is no such set, a pattern fits no layer of it, nothing is left, or what
            is left of a text encoder's attention would not be loaded by A1111.
    """
    table = UNET_TARGETS if component == "unet" else TEXT_TARGETS
    if targets not in table:
        raise ConfigError(
            f"There is no target set '{targets}' for the {component}.",
            fix=f"Choose one of: {', '.join(table)}.",
        )
    whole = tuple(
        path
        for path, layer in module.named_modules()
        if path.endswith(table[targets]) and isinstance(layer, nn.Linear | nn.Conv2d)
    )
    # Every pattern is looked up in the whole set, so that a mistyped one is named.
    included = {path for pattern in include for path in matching(pattern, whole)}
    excluded = {path for pattern in exclude for path in matching(pattern, whole)}
    chosen = tuple(
        path for path in whole if path not in excluded and (path in included or not include)
    )
    if not chosen:
        raise ConfigError(
            f"No layer of the {component} is left to train.",
            where=_listed(include, exclude),
            fix="Change the include and exclude patterns.",
        )
    if component != "unet":
        _require_whole_attention(chosen)
    return chosen


def matching(pattern: str, paths: Sequence[str]) -> tuple[str, ...]:
    """The paths that fit a glob pattern; `*` stands for dots too.

    Raises:
        ConfigError: none does.
    """
    found = tuple(path for path in paths if fnmatchcase(path, pattern))
    if not found:
        near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
        raise ConfigError(
            f"The pattern '{pattern}' fits none of the {len(paths)} layers.",
            where="\n".join(near),
            fix="Layers are called as above; * stands for anything, as in *.attn2.* or "
            "down_blocks.1.*",
        )
    return found


def _listed(include: Iterable[str], exclude: Iterable[str]) -> str:
    lines = [f"include {pattern}" for pattern in include]
    return "\n".join([*lines, *(f"exclude {pattern}" for pattern in exclude)])


def _require_whole_attention(paths: Sequence[str]) -> None:
    """A1111 fuses q, k, v and out of OpenCLIP encoders, and drops an attention without all four."""
    chosen = set(paths)
    for path in paths:
        parent, _, layer = path.rpartition(".")
        if f".{layer}" not in _TEXT_ATTENTION:
            continue
        missing = [end for end in _TEXT_ATTENTION if parent + end not in chosen]
        if missing:
            raise ConfigError(
                "Of a text encoder's attention, q_proj, k_proj, v_proj and out_proj can only be "
                "trained together: A1111 leaves out an attention that lacks one.",
                where="\n".join(f"left out: {parent}{end}" for end in missing),
                fix="Write the patterns for whole layers, as in encoder.layers.1?.*",
            )
