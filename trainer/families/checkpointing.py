"""Which blocks of a UNet compute their activations again in the backward pass, and keep them not.

Checkpointing all of them (Chen et al., arXiv 1604.06174) takes a third more computing. Where memory
is short by less than that saves, some of them are enough: first those that save most for the least
work. Which come first follows from the UNet's shape alone, neither from the pictures nor from the
memory that is free, so that a run that goes on elsewhere computes the same.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Numbers that a transformer block keeps of each token, in widths of the block: what goes into its
# three norms and comes out of two, queries and result of two attentions, keys and values of one,
# and the feed-forward layer's projection.
_KEPT_WIDTHS = 3 + 2 + 2 * 2 + 2 + 8


def checkpoint_blocks(unet: Any, share: float = 1.0) -> int:
    """Let a share of a UNet's blocks, 0 to 1, keep their input alone; returns how many do.

    The results are the same, bit for bit. Adapters, frozen layers and lean blocks may come onto it
    before or after.
    """
    blocks = checkpointable(unet)
    chosen = blocks[: round(share * len(blocks))]
    # Not the blocks themselves: they hold on to the function below.
    identities = {id(block) for block in chosen}

    def compute(block: nn.Module, *given: Any) -> Tensor:
        if id(block) not in identities:
            result: Tensor = block(*given)
            return result
        # There is no dropout: no state of random numbers has to be put back.
        again: Tensor = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
        return again

    if chosen:
        unet.enable_gradient_checkpointing(compute)
    return len(chosen)


def checkpointable(unet: Any) -> list[nn.Module]:
    """The blocks that diffusers can checkpoint, those first that save the most for their work; of
    equal ones those with more pixels, then the earlier ones."""
    found = [
        (_kept(block) / _weights(block), -_halvings(path, len(unet.down_blocks)), block)
        for path, block in unet.named_modules()
        # The middle's first block is always kept.
        if _kept(block) and path != "mid_block.resnets.0"
    ]
    return [block for _, _, block in sorted(found, key=lambda entry: entry[:2], reverse=True)]


def _kept(block: Any) -> int:
    """Numbers that a block keeps of each pixel or token; 0: it is none that is checkpointed."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    if isinstance(block, BasicTransformerBlock):
        return _KEPT_WIDTHS * int(block.dim)
    if isinstance(block, ResnetBlock2D):
        return int(block.in_channels + block.out_channels)
    return 0


def _weights(block: nn.Module) -> int:
    """How much a block computes with each pixel or token: with each weight, about once."""
    return sum(weight.numel() for weight in block.parameters())


def _halvings(path: str, levels: int) -> int:
    """How often the picture's sides were halved where a block is, by its path."""
    kind, number, *_ = path.split(".")
    if kind == "down_blocks":
        return int(number)
    return levels - 1 - int(number) if kind == "up_blocks" else levels - 1
