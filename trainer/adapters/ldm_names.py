"""The two names of a UNet's layers: diffusers' and those of the original code (LDM, later sgm).

Both number the same modules. diffusers counts levels, and within a level residual blocks,
attentions and samplers; LDM counts through everything on the way down (`input_blocks`) and on the
way up (`output_blocks`). Released checkpoints and kohya's SDXL files use LDM's names.

    down_blocks.1.attentions.0.proj_in   input_blocks.4.1.proj_in
    up_blocks.0.upsamplers.0.conv        output_blocks.2.2.conv
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Pairs of (diffusers, LDM) dotted paths of blocks or single layers.
BlockNames = tuple[tuple[str, str], ...]

_RESIDUAL_LAYERS = (
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)


def ldm_blocks(config: Mapping[str, Any]) -> BlockNames:
    """The table of a UNet's blocks, for `to_ldm` and `to_diffusers`.

    Args:
        config: of diffusers' `UNet2DConditionModel`; `down_block_types`, `up_block_types` and
            `layers_per_block` (a number or one for each level) are read.
    """
    down = [_has_attention(kind) for kind in config["down_block_types"]]
    up = [_has_attention(kind) for kind in config["up_block_types"]]
    layers = config["layers_per_block"]
    counts = [layers] * len(down) if isinstance(layers, int) else list(layers)
    return (*_way_down(down, counts), *_middle(), *_way_up(up, counts[::-1]))


def to_ldm(path: str, blocks: BlockNames, separator: str = ".") -> str:
    """LDM's name of a layer from diffusers'; as it is when it is in no block of the table.

    Args:
        path: dotted, or with another separator: "_" is that of names in LoRA files.
        blocks: see `ldm_blocks`.
    """
    return _translated(path, blocks, separator)


def to_diffusers(path: str, blocks: BlockNames, separator: str = ".") -> str:
    """diffusers' name of a layer from LDM's: the inverse of `to_ldm`."""
    return _translated(path, tuple((ldm, diffusers) for diffusers, ldm in blocks), separator)


def _translated(path: str, pairs: BlockNames, separator: str) -> str:
    for source, target in pairs:
        start = source.replace(".", separator)
        # The separator behind it keeps block 1 from matching block 10.
        if path == start or path.startswith(start + separator):
            return target.replace(".", separator) + path[len(start) :]
    return path


def _has_attention(kind: str) -> bool:
    return "CrossAttn" in kind


def _residual(diffusers: str, ldm: str) -> Iterator[tuple[str, str]]:
    for ours, theirs in _RESIDUAL_LAYERS:
        yield f"{diffusers}.{ours}", f"{ldm}.{theirs}"


def _way_down(attention: Sequence[bool], counts: Sequence[int]) -> Iterator[tuple[str, str]]:
    place = 1  # input_blocks.0 is the first convolution
    for level, count in enumerate(counts):
        block = f"down_blocks.{level}"
        for i in range(count):
            yield from _residual(f"{block}.resnets.{i}", f"input_blocks.{place}.0")
            if attention[level]:
                yield f"{block}.attentions.{i}", f"input_blocks.{place}.1"
            place += 1
        if level < len(counts) - 1:
            yield f"{block}.downsamplers.0.conv", f"input_blocks.{place}.0.op"
            place += 1


def _middle() -> Iterator[tuple[str, str]]:
    yield from _residual("mid_block.resnets.0", "middle_block.0")
    yield "mid_block.attentions.0", "middle_block.1"
    yield from _residual("mid_block.resnets.1", "middle_block.2")


def _way_up(attention: Sequence[bool], counts: Sequence[int]) -> Iterator[tuple[str, str]]:
    place = 0
    for level, count in enumerate(counts):
        block = f"up_blocks.{level}"
        # One more than on the way down: each takes the output of one input block.
        for i in range(count + 1):
            yield from _residual(f"{block}.resnets.{i}", f"output_blocks.{place}.0")
            if attention[level]:
                yield f"{block}.attentions.{i}", f"output_blocks.{place}.1"
            place += 1
        if level < len(counts) - 1:
            # The sampler stands behind what else is in the level's last output block.
            inside = 2 if attention[level] else 1
            yield f"{block}.upsamplers.0.conv", f"output_blocks.{place - 1}.{inside}.conv"
