"""Names of single files in diffusers' and transformers' words.

Single files keep the module names of the programs that the models were first trained with (latent
diffusion, OpenCLIP); the libraries that run them here have their own. Every function takes the
names in a file and returns, for each name in our module, where its tensor comes from. Names of
text encoders are given without `text_model.`, which some versions of transformers put in front.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
# For each text encoder in its place in a file: how its names begin, and whether it is OpenCLIP.
TEXT_PREFIXES = {
    "cond_stage_model.transformer.": ("text_encoder", False),
    "cond_stage_model.model.": ("text_encoder", True),
    "conditioner.embedders.0.transformer.": ("text_encoder", False),
    "conditioner.embedders.1.model.": ("text_encoder_2", True),
}


@dataclass(frozen=True, slots=True)
class Source:
    """Where a tensor comes from: its name in the file, and what part of it.

    third: 0, 1 or 2 where queries, keys and values lie in one tensor, one below the other.
    transposed: rows and columns are swapped. squeezed: a 1x1 convolution stands for a linear layer.
    """

    name: str
    third: int | None = None
    transposed: bool = False
    squeezed: bool = False

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what is taken of a tensor with the given shape."""
        if self.third is not None:
            shape = (shape[0] // 3, *shape[1:])
        if self.squeezed:
            shape = shape[:2]
        return shape[::-1] if self.transposed else shape


_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}


def with_prefix(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Names that begin with a prefix: what follows it -> the whole name."""
    return {name[len(prefix) :]: name for name in names if name.startswith(prefix)}


def unet_sources(names: Iterable[str], prefix: str = UNET_PREFIX) -> dict[str, Source]:
    """The UNet of a single file."""
    inner = with_prefix(names, prefix)
    layers = _layers_per_block(inner)
    return {_unet_name(name, layers): Source(full) for name, full in inner.items()}


def _layers_per_block(names: Mapping[str, str]) -> int:
    """Residual blocks of a level: those between the input and the first down-sampling."""
    found = [re.match(r"input_blocks\.(\d\d?)\.0\.(op\.)?", name) for name in names]
    numbers = [(int(match[1]), bool(match[2])) for match in found if match]
    first = [number for number, samples in numbers if samples]
    if first:
        return max(min(first) - 1, 1)
    return max((number for number, _ in numbers), default=1)


def _unet_name(name: str, layers: int) -> str:
    for old, new in _UNET_ENDS.items():
        if name.startswith(f"{old}."):
            return new + name[len(old) :]
    parts = name.split(".", 3)
    if len(parts) < 3:
        return name
    if parts[0] == "middle_block":
        place, rest = _MIDDLE.get(parts[1], parts[1]), name.split(".", 2)[2]
        return f"mid_block.{place}.{_residual(rest)}"
    if parts[0] not in ("input_blocks", "output_blocks") or len(parts) < 4:
        return name
    if not re.fullmatch(r"\d\d?", parts[1]):
        return name
    down = parts[0] == "input_blocks"
    # The first input block is the convolution before all levels.
    level, layer = divmod(int(parts[1]) - down, layers + 1)
    block = f"{'down' if down else 'up'}_blocks.{level}"
    if parts[3].startswith("op."):
        return f"{block}.downsamplers.0.conv.{parts[3][3:]}"
    if parts[2] in ("1", "2") and parts[3].startswith("conv."):
        return f"{block}.upsamplers.0.{parts[3]}"
    kind = "resnets" if parts[2] == "0" else "attentions"
    return f"{block}.{kind}.{layer}.{_residual(parts[3])}"


def _residual(rest: str) -> str:
    """A residual block's part; those of attentions have the same names in both worlds."""
    for old, new in _RESIDUAL.items():
        if rest.startswith(f"{old}."):
            return new + rest[len(old) :]
    return rest


# Attention of the VAE: first in single files, then as early versions of diffusers saved it.
_VAE_ATTENTION = {
    **{"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"},
    **{"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"},
}


def vae_sources(names: Iterable[str], prefix: str = VAE_PREFIX) -> dict[str, Source]:
    """The VAE of a single file, or of a file of its own (`prefix` is "" then)."""
    inner = with_prefix(names, prefix)
    ups = {int(m[1]) for m in (re.match(r"decoder\.up\.(\d)\.", n) for n in inner) if m}
    sources = {}
    for name, full in inner.items():
        new = _vae_name(name, len(ups))
        linear = re.search(r"attentions\.0\.to_[a-z.0]+\.weight$", new) is not None
        sources[new] = Source(full, squeezed=linear)
    return sources


def _vae_name(name: str, levels: int) -> str:
    name = re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", name)
    name = re.sub(r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
    name = name.replace(".mid.attn_1.", ".mid_block.attentions.0.")
    name = name.replace(".nin_shortcut.", ".conv_shortcut.")
    name = re.sub(r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets.", name)
    name = re.sub(r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0.", name)
    match = re.match(r"decoder\.up\.(\d)\.(block|upsample)\.(.*)", name)
    if match:
        kind = "resnets" if match[2] == "block" else "upsamplers.0"
        return f"decoder.up_blocks.{levels - 1 - int(match[1])}.{kind}.{match[3]}"
    match = re.match(r"(.*\.mid_block\.attentions\.0)\.([a-z_]+)\.(weight|bias)$", name)
    if match and match[2] in _VAE_ATTENTION:
        return f"{match[1]}.{_VAE_ATTENTION[match[2]]}.{match[3]}"
    return name


_OPEN_CLIP = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def text_sources(names: Iterable[str], prefix: str, *, open_clip: bool) -> dict[str, Source]:
    """A text encoder of a single file."""
    inner = with_prefix(names, prefix)
    if not open_clip:
        return {name.removeprefix("text_model."): Source(full) for name, full in inner.items()}
    sources: dict[str, Source] = {}
    for name, full in inner.items():
        sources |= _open_clip(name, full)
    return sources


def _open_clip(name: str, full: str) -> dict[str, Source]:
    if name == "text_projection":
        return {"text_projection.weight": Source(full, transposed=True)}
    match = re.match(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)$", name)
    if not match:
        return {_OPEN_CLIP.get(name, name): Source(full)}
    layer, part, end = f"encoder.layers.{match[1]}", match[2], match[3]
    if part == "attn.in_proj":
        return {
            f"{layer}.self_attn.{letter}_proj.{end}": Source(full, third=third)
            for third, letter in enumerate("qkv")
        }
    return {f"{layer}.{_OPEN_CLIP_LAYER.get(part, part)}.{end}": Source(full)}
