"""What a training step keeps for its backward pass, counted without computing it.

The full-size UNets stand on the meta device, which knows shapes and no numbers: so this runs
anywhere, in seconds, and its figures are exact. `python -m benchmarks.saved_bytes` prints GiB per
picture in bfloat16, LoRA of rank 16, for each way of computing. Each piece of memory counts once,
however many functions keep it; the model's own weights are not counted, copies of the adapters' in
bfloat16 are. Attention is a stand-in that keeps what flash attention keeps: queries, keys, values,
the result and one float32 number per row. What is there for a moment while something computes is
not counted.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from benchmarks.random_bases import config_of
from trainer.adapters.attach import attach
from trainer.adapters.frozen import quicken
from trainer.adapters.targets import select_layers
from trainer.families.checkpointing import checkpoint_blocks
from trainer.families.lean import keep_less_of_gates, keep_less_of_norms

RANK = 16
TOKENS = 77
SIZES = {"sd15": 512, "sd21": 768, "sdxl": 1024}
TARGETS = ("attention", "attention+ff")


@dataclass(frozen=True, slots=True)
class Way:
    """How a UNet computes. share: of its blocks that are checkpointed."""

    frozen: bool = True
    norms: bool = True
    gates: bool = True
    share: float = 0.0


WAYS = {
    "off": Way(frozen=False, norms=False, gates=False),
    "frozen layers": Way(norms=False, gates=False),
    "+ norms": Way(gates=False),
    "+ gates": Way(norms=False),
    "on, lean": Way(),
    "checkpointed 25 %": Way(share=0.25),
    "checkpointed 50 %": Way(share=0.5),
    "checkpointed 75 %": Way(share=0.75),
    "checkpointed 100 %": Way(share=1.0),
    "off, checkpointed 100 %": Way(frozen=False, norms=False, gates=False, share=1.0),
}


def kept_bytes(name: str, side: int, targets: str, way: Way, rank: int = RANK) -> int:
    """Bytes kept for the backward pass of one picture of `side` px. name: as in `SIZES`."""
    unet = _unet(name, way)
    chosen = select_layers(unet, "unet", targets)
    attached = attach(unet, chosen, rank=rank, alpha=rank, seed=0)
    weights = itertools.chain(unet.parameters(), attached.parameters())
    with counting([weight.untyped_storage() for weight in weights]) as found, _flash_stand_in():
        _predict(unet, side // 8)
    return sum(found)


def _unet(name: str, way: Way) -> Any:
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config_of(name, "unet"))
    nn.Module.to(unet, torch.bfloat16)  # past a word of warning that is none here
    unet.eval().requires_grad_(False)
    unet.set_attn_processor(AttnProcessor2_0())
    if way.share:
        checkpoint_blocks(unet, way.share)
    if way.frozen:
        quicken(unet, pack=False)
    if way.norms:
        keep_less_of_norms(unet)
    if way.gates:
        keep_less_of_gates(unet)
    return unet


def _predict(unet: Any, side: int) -> Tensor:
    def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    added = None
    if unet.config.addition_embed_type:
        added = {"text_embeds": numbers(1, 1280), "time_ids": numbers(1, 6, dtype=torch.float32)}
    words = numbers(1, TOKENS, unet.config.cross_attention_dim)
    steps = numbers(1, dtype=torch.int64)
    picture = numbers(1, 4, side, side)
    predicted: Tensor = unet(picture, steps, words, added_cond_kwargs=added, return_dict=False)[0]
    return predicted


@contextmanager
def counting(weights: Sequence[Any]) -> Iterator[list[int]]:
    """Bytes of each piece of memory that is kept inside the block, but for the weights."""
    # Pieces are held, so that none is taken for another that lies where it lay.
    seen = {storage._cdata: storage for storage in weights}
    found: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage
            found.append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


class _Flash(torch.autograd.Function):
    """The shapes of flash attention: only what is kept is right, nothing is computed."""

    @staticmethod
    def forward(ctx: Any, q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor) -> Tensor:
        # As the kernels give it: the heads beside each other.
        mixed = torch.empty_like(q_BHTE.transpose(1, 2).contiguous()).transpose(1, 2)
        sums_BHT = torch.empty(q_BHTE.shape[:-1], dtype=torch.float32, device=q_BHTE.device)
        ctx.save_for_backward(q_BHTE, k_BHSE, v_BHSE, mixed, sums_BHT)
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("it only stands in for what the forward pass keeps")


@contextmanager
def _flash_stand_in() -> Iterator[None]:
    def attend(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        mixed: Tensor = _Flash.apply(q, k, v)
        return mixed

    with ExitStack() as stack:
        stack.enter_context(
            mock.patch.object(nn.functional, "scaled_dot_product_attention", attend)
        )
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description="Count what a training step keeps.")
    parser.add_argument("--bases", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rank", type=int, default=RANK)
    given = parser.parse_args()
    print(f"| GiB kept per picture, bf16, rank {given.rank} | {' | '.join(WAYS)} |")
    print("| --- |" + " ---: |" * len(WAYS))
    for name, targets in itertools.product(given.bases, TARGETS):
        cells = [
            f"{kept_bytes(name, SIZES[name], targets, way, given.rank) / 2**30:.3f}"
            for way in WAYS.values()
        ]
        print(f"| {name} {SIZES[name]} px, {targets} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
