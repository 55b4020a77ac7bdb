"""Frozen weights in eight bits: what is lost, what flows through them, and what is kept."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.learners import load_backbone
from tests.models import small_components
from tests.tiny import save_tiny_sdxl
from trainer.adapters.lora import LoRALayer
from trainer.adapters.targets import select_layers
from trainer.families import quantize
from trainer.families.quantize import PackedConv2d, PackedLinear, pack, pack_weights, unpack

CPU = torch.device("cpu")
FORMATS = sorted(quantize.FORMATS)


# --- the numbers


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 9),
    exponent=st.integers(-12, 12),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_no_number_is_further_off_than_the_codes_are_apart(
    rows: int, columns: int, exponent: int, seed: int, dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw).to(dtype) * 2.0**exponent
    numbers = weight.float()
    largest = numbers.abs().amax(1, keepdim=True)
    codes, scales = pack(weight, "int8")
    assert (codes.dtype, codes.shape, scales.shape) == (torch.int8, weight.shape, (rows, 1))
    # int8: codes are largest / 127 apart, or a little more or less where the scale was rounded.
    assert ((unpack(codes, scales, torch.float32) - numbers).abs() <= largest / 252).all()
    codes, scales = pack(weight, "fp8")
    assert (codes.dtype, codes.shape) == (torch.float8_e4m3fn, weight.shape)
    # fp8 (e4m3): three bits after the point, and steps of 2^-9 below 2^-6, of a largest 448.
    limit = (numbers.abs() / 15.9).maximum(largest / 448 * 2**-9.9)
    assert ((unpack(codes, scales, torch.float32) - numbers).abs() <= limit).all()


@pytest.mark.parametrize("weights", FORMATS)
def test_the_largest_number_of_a_row_is_kept_and_zeros_stay_zeros(weights: str) -> None:
    weight = torch.tensor([[0.0, 0.0], [-3.0, 1.0], [1e-20, 0.0]])
    back = unpack(*pack(weight, weights), torch.float32)
    assert torch.equal(back[0], weight[0])
    assert back[1, 0] == pytest.approx(-3.0, rel=1e-6)
    assert back[2].tolist() == pytest.approx([1e-20, 0.0], rel=1e-6)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unpacking_rounds_once(weights: str, dtype: torch.dtype) -> None:
    weight = torch.randn(40, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, scales = pack(weight, weights)
    assert scales.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    assert torch.equal(unpack(codes, scales, dtype), unpack(codes, scales, torch.float32).to(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("weights", FORMATS)
def test_the_numbers_are_those_of_torchao(weights: str) -> None:
    """An implementation of its own that packs rows of linear layers alike."""
    torchao = pytest.importorskip("torchao.quantization")
    config = {
        "int8": torchao.Int8WeightOnlyConfig,
        "fp8": torchao.Float8WeightOnlyConfig,
    }[weights]()
    torch.manual_seed(0)
    layer = nn.Linear(64, 48).requires_grad_(False)
    ours = unpack(*pack(layer.weight, weights), torch.float32)
    torchao.quantize_(layer, config)
    theirs = layer.weight.dequantize()
    # It divides by half of 255 where we divide by 127: a code may be the next one.
    step = ours.abs().amax(1, keepdim=True) / (100 if weights == "int8" else 14)
    assert ((ours - theirs).abs() <= step).all()
    assert (ours - theirs).norm() < 0.02 * ours.norm()


# --- layers

LAYERS = {
    "linear": (lambda: nn.Linear(12, 20), (2, 5, 12)),
    "linear without bias": (lambda: nn.Linear(12, 20, bias=False), (3, 12)),
    "convolution": (lambda: nn.Conv2d(6, 10, 3, padding=1), (2, 6, 7, 5)),
    "1x1": (lambda: nn.Conv2d(6, 10, 1, bias=False), (1, 6, 4, 4)),
    "stride, dilation and groups": (
        lambda: nn.Conv2d(6, 8, 3, stride=2, padding=2, dilation=2, groups=2),
        (2, 6, 9, 8),
    ),
}


def packed(layer: nn.Module, weights: str) -> nn.Module:
    """The layer as it comes out of a model's block."""
    model = nn.ModuleDict({"mid_block": nn.Sequential(copy.deepcopy(layer))})
    pack_weights(model.requires_grad_(False), weights, CPU)
    return model.get_submodule("mid_block.0")


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_a_packed_layer_is_the_layer_with_its_weight_unpacked(
    name: str, dtype: torch.dtype, weights: str
) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    plain: Any = make().to(dtype).requires_grad_(False)
    other: Any = packed(plain, weights)
    assert type(other) in (PackedLinear, PackedConv2d)
    assert other.weight.shape == plain.weight.shape
    plain.weight.copy_(unpack(other.weight, other.scales, dtype))
    x = torch.randn(shape).to(dtype).requires_grad_()
    expected, found = plain(x), other(x)
    assert torch.equal(found, expected)
    grad = torch.randn_like(found)
    (wanted,) = torch.autograd.grad(expected, x, grad)
    (given,) = torch.autograd.grad(found, x, grad)
    torch.testing.assert_close(given, wanted)


@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_nothing_but_codes_is_kept_for_the_backward_pass(name: str) -> None:
    """Unpacked weights of all layers would take more memory than packing them saves."""
    make, shape = LAYERS[name]
    layer = packed(make(), "int8")
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(shape, requires_grad=True)).sum()
    assert {tensor.dtype for tensor in kept if tensor.numel() > 20} == {torch.int8}


def test_a_lora_layer_on_a_packed_one_gets_the_gradients_of_one_on_the_unpacked() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(12, 20).requires_grad_(False)
    base = packed(plain, "int8")
    assert isinstance(base, PackedLinear)
    plain.weight.copy_(unpack(base.weight, base.scales, torch.float32))
    gradients = []
    for layer in (plain, base):
        draw = torch.Generator().manual_seed(1)
        lora = LoRALayer(layer, rank=3, alpha=2.0, generator=draw)
        torch.nn.init.normal_(lora.up, generator=draw)
        below = nn.Linear(12, 12, bias=False)
        with torch.no_grad():
            below.weight.copy_(torch.eye(12))
        lora(below(torch.linspace(-1, 1, 24).view(2, 12))).square().sum().backward()
        gradients.append([lora.down.grad, lora.up.grad, below.weight.grad])
    for wanted, found in zip(*gradients, strict=True):
        assert wanted is not None
        torch.testing.assert_close(found, wanted)


# --- models


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_blocks_are_packed_and_what_is_trained_is_found_as_before(family: str) -> None:
    for name, model in small_components(family).items():
        targets = "all" if name == "unet" else "attention+mlp"
        before = select_layers(model, name, targets)
        shapes = {path: tuple(weight.shape) for path, weight in model.named_parameters()}
        layers = {p for p, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        pack_weights(model.requires_grad_(False), "int8", CPU)
        codes = {p for p, m in model.named_modules() if isinstance(m, PackedLinear | PackedConv2d)}
        assert select_layers(model, name, targets) == before
        assert {path: tuple(w.shape) for path, w in model.named_parameters()} == shapes
        left = {path.split(".")[0] for path in layers - codes}
        if name == "unet":
            assert left - {"add_embedding"} == {"conv_in", "time_embedding", "conv_out"}
        else:
            assert left <= {"text_projection"}
        assert set(before) <= codes


def test_weights_are_packed_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than one layer is ever there twice."""
    model = small_components("sd1")["unet"].requires_grad_(False)
    layers = [weakref.ref(m) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    total, done = len(layers), 0

    def watched(weight: Tensor, weights: str) -> tuple[Tensor, Tensor]:
        nonlocal done
        assert sum(layer() is not None for layer in layers) <= total - done + 1
        done += 1
        return pack(weight, weights)

    monkeypatch.setattr(quantize, "pack", watched)
    pack_weights(model, "int8", CPU)
    assert done > 20


def test_a_base_with_packed_weights_draws_and_keeps_its_types(tmp_path: Path) -> None:
    base = save_tiny_sdxl(tmp_path / "base")
    backbone = load_backbone(base, weights="fp8", dtype=torch.bfloat16)
    unet = backbone.components["unet"]
    assert unet.dtype == torch.bfloat16
    counts = {p.dtype for p in unet.parameters()}
    assert counts == {torch.float8_e4m3fn, torch.bfloat16}
    encoder = backbone.components["text_encoder_2"]
    assert torch.float8_e4m3fn in {p.dtype for p in encoder.parameters()}
    vae = backbone.pipeline().vae
    assert {p.dtype for p in vae.parameters()} == {torch.bfloat16}
    plain = load_backbone(base, dtype=torch.bfloat16)
    with torch.no_grad():
        found, wanted = (
            each.predict(torch.ones(1, 4, 8, 8), torch.tensor([500]), each.encode_prompts(["a"]))
            for each in (backbone, plain)
        )
    # Weights are off by 2.5 %, and all layers of a random UNet of 16 channels add to it.
    assert 0 < (found - wanted).norm() < 0.25 * wanted.norm()


def test_what_does_not_work_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for weights in FORMATS:
        assert quantize.why_not(weights, CPU, torch.bfloat16) == ""

    def fails(*_: object) -> Tensor:
        raise TypeError("Trying to convert Float8_e4m3fn to the MPS backend.\nMore.")

    monkeypatch.setattr(quantize, "unpack", fails)
    reason = quantize.why_not("fp8", CPU, torch.float32)
    assert reason == "Trying to convert Float8_e4m3fn to the MPS backend."
