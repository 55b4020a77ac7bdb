"""Frozen weights in eight or four bits: what is lost, what flows through them, and what is kept."""

from __future__ import annotations

import copy
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.learners import Recipe, load_backbone, make_learner, make_plan, vae_of
from tests.models import small_components
from tests.tiny import save_tiny_sdxl
from trainer.adapters.lora import LoRALayer
from trainer.adapters.targets import select_layers
from trainer.families import nf4, quantize
from trainer.families.quantize import PackedConv2d, PackedLinear, pack, pack_weights, unpack
from trainer.families.streaming import blocks_of, stream
from trainer.training.loop import train
from trainer.training.state import newest_checkpoint, restore, save_checkpoint

CPU = torch.device("cpu")
FORMATS = sorted(quantize.FORMATS)
BY_ROW = [name for name in FORMATS if name != "nf4"]


def packed_and_back(weight: Tensor, weights: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return unpack(*pack(weight, weights), weight.shape, dtype)


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
    back = unpack(codes, scales, weight.shape, torch.float32)
    assert ((back - numbers).abs() <= largest / 252).all()
    codes, scales = pack(weight, "fp8")
    assert (codes.dtype, codes.shape) == (torch.float8_e4m3fn, weight.shape)
    # fp8 (e4m3): three bits after the point, and steps of 2^-9 below 2^-6, of a largest 448.
    limit = (numbers.abs() / 15.9).maximum(largest / 448 * 2**-9.9)
    back = unpack(codes, scales, weight.shape, torch.float32)
    assert ((back - numbers).abs() <= limit).all()


@pytest.mark.parametrize("weights", BY_ROW)
def test_the_largest_number_of_a_row_is_kept_and_zeros_stay_zeros(weights: str) -> None:
    weight = torch.tensor([[0.0, 0.0], [-3.0, 1.0], [1e-20, 0.0]])
    back = packed_and_back(weight, weights)
    assert torch.equal(back[0], weight[0])
    assert back[1, 0] == pytest.approx(-3.0, rel=1e-6)
    assert back[2].tolist() == pytest.approx([1e-20, 0.0], rel=1e-6)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unpacking_rounds_once(weights: str, dtype: torch.dtype) -> None:
    weight = torch.randn(40, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, scales = pack(weight, weights)
    assert scales.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    exact = unpack(codes, scales, weight.shape, torch.float32)
    assert torch.equal(unpack(codes, scales, weight.shape, dtype), exact.to(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("weights", BY_ROW)
def test_the_numbers_are_those_of_torchao(weights: str) -> None:
    """An implementation of its own that packs rows of linear layers alike."""
    torchao = pytest.importorskip("torchao.quantization")
    config = {
        "int8": torchao.Int8WeightOnlyConfig,
        "fp8": torchao.Float8WeightOnlyConfig,
    }[weights]()
    torch.manual_seed(0)
    layer = nn.Linear(64, 48).requires_grad_(False)
    ours = packed_and_back(layer.weight, weights)
    torchao.quantize_(layer, config)
    theirs = layer.weight.dequantize()
    # It divides by half of 255 where we divide by 127: a code may be the next one.
    step = ours.abs().amax(1, keepdim=True) / (100 if weights == "int8" else 14)
    assert ((ours - theirs).abs() <= step).all()
    assert (ours - theirs).norm() < 0.02 * ours.norm()


# --- four bits

# The paper's appendix E.
PUBLISHED = """
    -1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
    -0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725
    0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941
    0.7229568362236023 1.0
"""


def test_the_levels_are_the_published_ones() -> None:
    published = torch.tensor([float(word) for word in PUBLISHED.split()])
    assert torch.equal(nf4.levels(), published.bfloat16().float())


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(1, 12), min_size=2, max_size=4).map(tuple),
    exponent=st.integers(-12, 12),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_each_number_has_the_nearest_level_of_its_block(
    shape: tuple[int, ...], exponent: int, seed: int, dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=draw).to(dtype) * 2.0**exponent
    codes, scales = pack(weight, "nf4")
    count = math.ceil(weight.numel() / 64)
    assert (codes.dtype, codes.shape, scales.shape) == (torch.uint8, (count, 32), (count, 1))
    back = unpack(codes, scales, weight.shape, torch.float32)
    assert back.shape == weight.shape
    scale = scales.float().expand(-1, 64).flatten()[: weight.numel()]
    numbers = weight.float().flatten()
    nearest = (numbers[:, None] - scale[:, None] * nf4.levels()).abs().amin(1)
    assert ((back.flatten() - numbers).abs() <= nearest + 1e-6 * scale).all()
    for block, found in zip(numbers.split(64), back.flatten().split(64), strict=True):
        largest = block.abs().argmax()
        assert found[largest] == pytest.approx(block[largest].item(), rel=2**-8)


def test_looking_up_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    whole = packed_and_back(weight, "nf4")
    monkeypatch.setattr(nf4, "_AT_ONCE", 24)  # no divisor of the number of bytes
    assert torch.equal(packed_and_back(weight, "nf4"), whole)


def test_zeros_stay_zeros_in_four_bits() -> None:
    weight = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    weight[1:3] = 0
    weight[:, ::7] = 0
    back = packed_and_back(weight, "nf4")
    assert torch.equal(back[weight == 0], torch.zeros(int((weight == 0).sum())))
    assert torch.equal(packed_and_back(torch.zeros(3, 70), "nf4"), torch.zeros(3, 70))


def expected_error(levels: Tensor) -> float:
    """What 64 normal numbers in a block are off by, as a share of them: the root of a mean square.

    The largest of them, M, is exact. The others are normal numbers between -M and M, each off by
    its distance from the nearest level; and M is the largest of 64.
    """
    levels = levels.double()
    normal = torch.distributions.Normal(*torch.tensor([0.0, 1.0]).double())
    largest = torch.linspace(1, 6.5, 500, dtype=torch.float64)
    share = (torch.arange(2000, dtype=torch.float64) + 0.5) / 1000 - 1
    apart = (share[:, None] - levels).abs().amin(1)
    numbers = largest[:, None] * share
    squares = (largest[:, None] * apart).square() * normal.log_prob(numbers).exp()
    within = 2 * normal.cdf(largest) - 1
    of_others = squares.mean(1) * 2 * largest / within
    likely = 64 * within**63 * 2 * normal.log_prob(largest).exp()
    return math.sqrt(63 / 64 * torch.trapezoid(likely * of_others, largest).item())


def test_the_error_is_the_expected_one_of_normal_numbers() -> None:
    weight = torch.randn(1024, 640, generator=torch.Generator().manual_seed(0))
    error = {
        n: float((packed_and_back(weight, n) - weight).norm() / weight.norm()) for n in FORMATS
    }
    expected = expected_error(nf4.levels())
    assert expected == pytest.approx(0.092, abs=5e-4)
    assert error["nf4"] == pytest.approx(expected, rel=5e-3)
    # Codes of int8 are a scale apart: off by the root of a twelfth of it.
    scales = pack(weight, "int8")[1]
    assert error["int8"] == pytest.approx(float(scales.square().mean().div(12).sqrt()), rel=1e-2)
    assert 10 * error["int8"] < error["nf4"]
    # As many levels at even distances, of which zero and the largest are ones, are worse.
    assert expected_error(torch.linspace(-1, 1, 15)) > 1.15 * expected


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.bfloat16, 4.25), (torch.float16, 4.5), (torch.float32, 4.5)]
)
def test_the_bytes_that_are_held(dtype: torch.dtype, bits: float) -> None:
    for layer in (nn.Linear(320, 640), nn.Conv2d(64, 32, 3)):
        held: Any = packed(layer.to(dtype), "nf4")
        size = held.weight.nbytes + held.scales.nbytes
        assert size * 8 == bits * layer.weight.numel()
    odd: Any = packed(nn.Linear(7, 10).to(dtype), "nf4")  # 70 numbers: two blocks
    assert odd.weight.nbytes + odd.scales.nbytes == bits * 128 / 8


# --- layers

LAYERS = {
    "linear": (lambda: nn.Linear(12, 20), (2, 5, 12)),
    "whole blocks": (lambda: nn.Linear(64, 12), (5, 64)),
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
    assert other.shape == plain.weight.shape
    before = plain.weight.clone()
    plain.weight.copy_(unpack(other.weight, other.scales, other.shape, dtype))
    assert not torch.equal(plain.weight, before)
    x = torch.randn(shape).to(dtype).requires_grad_()
    expected, found = plain(x), other(x)
    assert torch.equal(found, expected)
    grad = torch.randn_like(found)
    (wanted,) = torch.autograd.grad(expected, x, grad)
    (given,) = torch.autograd.grad(found, x, grad)
    torch.testing.assert_close(given, wanted)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_nothing_but_codes_is_kept_for_the_backward_pass(
    name: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unpacked weights of all layers would take more memory than packing them saves."""
    make, shape = LAYERS[name]
    layer = packed(make(), weights)
    made: list[weakref.ref[Tensor]] = []

    def watched(*given: Any) -> Tensor:
        weight = unpack(*given)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(quantize, "unpack", watched)
    result = layer(torch.randn(shape, requires_grad=True)).sum()
    assert [weight() for weight in made] == [None]
    result.backward()
    assert [weight() for weight in made] == [None, None]


@pytest.mark.parametrize("weights", FORMATS)
def test_a_lora_layer_on_a_packed_one_gets_the_gradients_of_one_on_the_unpacked(
    weights: str,
) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(12, 20).requires_grad_(False)
    base = packed(plain, weights)
    assert isinstance(base, PackedLinear)
    plain.weight.copy_(base.unpacked(torch.float32))
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


@pytest.mark.parametrize("weights", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_blocks_are_packed_and_what_is_trained_is_found_as_before(
    family: str, weights: str
) -> None:
    for name, model in small_components(family).items():
        targets = "all" if name == "unet" else "attention+mlp"
        before = select_layers(model, name, targets)
        shapes = {path: weight.shape for path, weight in model.named_parameters()}
        layers = {p for p, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        pack_weights(model.requires_grad_(False), weights, CPU)
        codes: dict[str, Any] = {
            p: m for p, m in model.named_modules() if isinstance(m, PackedLinear | PackedConv2d)
        }
        assert select_layers(model, name, targets) == before
        after = {path: weight.shape for path, weight in model.named_parameters()}
        after |= {f"{path}.weight": layer.shape for path, layer in codes.items()}
        assert after == shapes
        left = {path.split(".")[0] for path in layers - codes.keys()}
        if name == "unet":
            assert left - {"add_embedding"} == {"conv_in", "time_embedding", "conv_out"}
        else:
            assert left <= {"text_projection"}
        assert set(before) <= codes.keys()


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
    vae = vae_of(backbone)
    assert {p.dtype for p in vae.parameters()} == {torch.bfloat16}
    plain = load_backbone(base, dtype=torch.bfloat16)
    with torch.no_grad():
        found, wanted = (
            each.predict(torch.ones(1, 4, 8, 8), torch.tensor([500]), each.encode_prompts(["a"]))
            for each in (backbone, plain)
        )
    # Weights are off by 2.5 %, and all layers of a random UNet of 16 channels add to it.
    assert 0 < (found - wanted).norm() < 0.25 * wanted.norm()


@pytest.mark.parametrize("weights", FORMATS)
def test_codes_and_scales_are_streamed(weights: str) -> None:
    unet = small_components("sd1")["unet"].requires_grad_(False)
    pack_weights(unet, weights, CPU)
    streamer = stream(unet, CPU)
    homes = [block.home for block in streamer._blocks]
    spans = [(home.data_ptr(), home.data_ptr() + home.nbytes) for home in homes]
    layers: list[Any] = [
        layer
        for block in blocks_of(unet)
        for layer in block.modules()
        if isinstance(layer, PackedLinear | PackedConv2d)
    ]
    assert len(layers) > 20
    for tensor in (tensor for layer in layers for tensor in (layer.weight, layer.scales)):
        assert any(first <= tensor.data_ptr() < end for first, end in spans)


@pytest.mark.parametrize(("weights", "tolerance"), [("int8", 1e-3), ("nf4", 2e-2)])
def test_training_goes_near_the_plain_path_and_on_as_if_it_had_not_stopped(
    weights: str, tolerance: float, base: Path, tmp_path: Path
) -> None:
    plan = make_plan(8)

    def learner(weights: str) -> Any:
        return make_learner(load_backbone(base, weights=weights), Recipe(batch_size=4))

    plain, whole, begun, resumed = (learner(each) for each in ("same", *[weights] * 3))
    wanted = [done.loss for done in train(plain, plan, 0)]
    found = [done.loss for done in train(whole, plan, 0)]
    assert found == pytest.approx(wanted, rel=tolerance)
    assert found != wanted
    list(train(begun, make_plan(8, last=3), 0))
    save_checkpoint(tmp_path, begun, 3, {}, keep=1)
    checkpoint, _ = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    restore(resumed, checkpoint)
    assert [done.loss for done in train(resumed, plan, 3)] == found[3:]
    for ours, theirs in zip(resumed.parameters, whole.parameters, strict=True):
        assert torch.equal(ours, theirs)


def test_what_does_not_work_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for weights in FORMATS:
        assert quantize.why_not(weights, CPU, torch.bfloat16) == ""

    def fails(*_: object) -> Tensor:
        raise TypeError("Trying to convert Float8_e4m3fn to the MPS backend.\nMore.")

    monkeypatch.setattr(quantize, "unpack", fails)
    reason = quantize.why_not("fp8", CPU, torch.float32)
    assert reason == "Trying to convert Float8_e4m3fn to the MPS backend."
