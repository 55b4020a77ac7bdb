"""Blocks that do no more than they have to: the same numbers, bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from tests.learners import load_backbone, make_learner
from tests.test_fast import EVERY_FAMILY
from tests.test_lean import gradients, residual_blocks
from tests.tiny import TINY_BASES, save_tiny
from trainer.families.direct import DirectAttention, DirectResnet, SdpaProcessor, go_direct
from trainer.training.device import blocks_for


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("direct")
    return {name: save_tiny(home / name, name) for name in TINY_BASES}


@EVERY_FAMILY
def test_a_unet_has_the_losses_and_gradients_of_diffusers_blocks(
    name: str, folders: dict[str, Path]
) -> None:
    ways = ("plain", "direct")
    plain, direct = (make_learner(load_backbone(folders[name], blocks=way)) for way in ways)
    assert torch.equal(direct.loss(0), plain.loss(0))
    theirs, ours = (gradients(folders[name], "all", blocks=way) for way in ways)
    assert len(ours) == len(theirs) > 0
    assert all(map(torch.equal, ours, theirs))


@EVERY_FAMILY
def test_every_block_of_a_unet_is_direct_and_keeps_its_name(
    name: str, folders: dict[str, Path]
) -> None:
    plain, direct = (
        load_backbone(folders[name], blocks=how).components["unet"] for how in ("plain", "direct")
    )
    kinds = {type(module) for module in direct.modules()}
    assert kinds >= {DirectAttention, DirectResnet}
    assert not kinds & {Attention, ResnetBlock2D}
    assert [path for path, _ in direct.named_modules()] == [
        path for path, _ in plain.named_modules()
    ]
    assert list(direct.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("kind", residual_blocks())
def test_a_residual_block_computes_what_it_did(kind: str) -> None:
    plain = residual_blocks()[kind]
    direct = copy.deepcopy(plain)
    go_direct(nn.Sequential(direct))
    assert isinstance(direct, DirectResnet) == (kind not in ("not ours", "upward"))
    x, temb = torch.randn(2, 8, 6, 4), None if kind == "without time" else torch.randn(2, 6)
    assert torch.equal(direct(x, temb), plain(x, temb))


ATTENTIONS: dict[str, dict[str, Any]] = {
    "to itself": {},
    "to a context": {"cross_attention_dim": 6},
    "upcast": {"upcast_attention": True},
    "normed": {"qk_norm": "layer_norm"},
    "with a norm of the context": {"cross_attention_dim": 6, "cross_attention_norm": "layer_norm"},
    "with a norm of pictures": {"norm_num_groups": 2},
    "scaled": {"rescale_output_factor": 2.0},
    "added to what came": {"residual_connection": True},
}


def attention(kind: str) -> Attention:
    torch.manual_seed(0)
    layer = Attention(query_dim=8, heads=2, dim_head=4, **ATTENTIONS[kind])
    layer.set_processor(SdpaProcessor())
    return layer.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_an_attention_layer_computes_what_it_did(kind: str) -> None:
    direct, plain = attention(kind), attention(kind)
    plain.set_processor(AttnProcessor2_0())
    go_direct(nn.Sequential(direct))
    simple = kind in ("to itself", "to a context", "upcast")
    assert isinstance(direct, DirectAttention) == simple
    x_BTC = torch.randn(3, 5, 8)
    context_BSD = torch.randn(3, 7, 6) if "cross_attention_dim" in ATTENTIONS[kind] else None
    assert torch.equal(direct(x_BTC, context_BSD), plain(x_BTC, context_BSD))


def test_what_stable_diffusion_has_no_use_for_is_left_to_diffusers() -> None:
    direct, plain = attention("to a context"), attention("to a context")
    plain.set_processor(AttnProcessor2_0())
    go_direct(nn.Sequential(direct))
    x_BTC, context_BSD = torch.randn(3, 5, 8), torch.randn(3, 7, 6)
    mask_BTS = torch.zeros(3, 1, 7)
    mask_BTS[:, :, 4:] = -10_000.0
    masked = direct(x_BTC, context_BSD, mask_BTS)
    assert torch.equal(masked, plain(x_BTC, context_BSD, mask_BTS))
    assert not torch.equal(masked, direct(x_BTC, context_BSD))
    others = {"temb": torch.randn(3, 6)}
    assert torch.equal(direct(x_BTC, context_BSD, **others), plain(x_BTC, context_BSD, **others))


@pytest.mark.parametrize(
    ("fast", "device", "blocks"),
    [
        ("off", "cpu", "plain"),
        ("off", "cuda", "plain"),
        ("on", "cpu", "direct"),
        ("on", "cuda", "lean"),
        ("lean", "cpu", "lean"),
    ],
)
def test_the_setting_chooses_the_blocks(fast: str, device: str, blocks: str) -> None:
    assert blocks_for(fast, torch.device(device)) == blocks
