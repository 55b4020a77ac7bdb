"""Blocks that do no more than they have to: the same numbers, each block bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from tests.learners import load_backbone, make_learner
from tests.test_fast import EVERY_FAMILY
from tests.test_lean import gradients, residual_blocks
from tests.tiny import TINY_BASES, save_tiny
from trainer.families.direct import (
    DirectAttention,
    DirectGEGLU,
    DirectQuickGELU,
    DirectResnet,
    DirectTransformer,
    SdpaProcessor,
    go_direct,
    go_direct_in_text,
)
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
    torch.testing.assert_close(direct.loss(0), plain.loss(0), rtol=1e-6, atol=0)
    theirs, ours = (gradients(folders[name], "all", blocks=way) for way in ways)
    assert len(ours) == len(theirs) > 0
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-6)


@EVERY_FAMILY
def test_every_block_of_a_unet_is_direct_and_keeps_its_name(
    name: str, folders: dict[str, Path]
) -> None:
    plain, direct = (
        load_backbone(folders[name], blocks=how).components["unet"] for how in ("plain", "direct")
    )
    kinds = {type(module) for module in direct.modules()}
    assert kinds >= {DirectAttention, DirectResnet, DirectTransformer, DirectGEGLU}
    assert not kinds & {Attention, ResnetBlock2D, Transformer2DModel, GEGLU}
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


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_a_transformer_gives_the_same_as_its_convolutions_lie(
    linear: bool, order: torch.memory_format
) -> None:
    torch.manual_seed(0)
    plain = Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=8,
        norm_num_groups=2,
        cross_attention_dim=6,
        use_linear_projection=linear,
    )
    direct = copy.deepcopy(plain)
    go_direct(nn.Sequential(direct))
    assert type(direct) is DirectTransformer
    words = torch.randn(2, 5, 6)
    found = []
    for model in (plain, direct):
        x = torch.randn(2, 8, 6, 4, generator=torch.Generator().manual_seed(1))
        x = x.contiguous(memory_format=order).requires_grad_(True)
        y = model(x, words, return_dict=False)[0]
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    # As a processor's convolutions leave it, whatever came in.
    assert found[1][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_computes_what_it_did(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = GEGLU(6, 10).to(dtype)
    direct = copy.deepcopy(plain)
    go_direct(nn.Sequential(direct))
    assert type(direct) is DirectGEGLU
    x = torch.randn(2, 5, 6, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 5, 10, dtype=dtype)
    ours, theirs = direct(x), plain(x)
    assert torch.equal(ours, theirs)
    wanted = torch.autograd.grad(theirs, (x, plain.proj.weight), grad)
    for _ in range(2):  # twice, as those do who look for what went wrong
        found = torch.autograd.grad(ours, (x, direct.proj.weight), grad, retain_graph=True)
        assert all(map(torch.equal, found, wanted))


def test_the_text_encoders_gelu_computes_what_it_did() -> None:
    from transformers.activations import ACT2FN

    model = nn.Sequential(ACT2FN["quick_gelu"], nn.GELU())
    x = torch.linspace(-30, 30, 999, dtype=torch.float64, requires_grad=True)
    theirs = model[0](x)
    (wanted,) = torch.autograd.grad(theirs.sum(), x)
    go_direct_in_text(model)
    assert type(model[0]) is DirectQuickGELU
    assert type(model[1]) is nn.GELU
    ours = model[0](x)
    torch.testing.assert_close(ours, theirs)
    for _ in range(2):
        (found,) = torch.autograd.grad(ours.sum(), x, retain_graph=True)
        torch.testing.assert_close(found, wanted)
    large = torch.tensor([-60_000.0, 60_000.0], dtype=torch.float16)
    assert torch.equal(model[0](large), torch.tensor([0.0, 60_000.0], dtype=torch.float16))


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
