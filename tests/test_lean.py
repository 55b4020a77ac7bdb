"""Blocks that keep less, and blocks that are computed again: the same results, in less memory."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from benchmarks.random_bases import config_of
from benchmarks.saved_bytes import SIZES, WAYS, Way, counting, kept_bytes
from tests.learners import Recipe, load_backbone, make_learner
from tests.test_fast import (
    EVERY_FAMILY,
    are_near_the_plain_path_in_bfloat16,
    goes_on_bit_for_bit,
    have_the_losses_of_the_plain_path,
    random_like,
)
from tests.tiny import TINY_BASES, save_tiny
from trainer.adapters.frozen import quicken
from trainer.adapters.lora import LoRALayer
from trainer.families.checkpointing import checkpoint_blocks, checkpointable
from trainer.families.lean import LeanGEGLU, LeanResnet, gate, gated, keep_less, norm_silu
from trainer.training.learner import AdapterPlan, Learner, attach_adapters


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("lean")
    return {name: save_tiny(home / name, name) for name in TINY_BASES}


def unet_of(folder: Path, **options: Any) -> Any:
    return load_backbone(folder, **options).components["unet"]


def lean_learner(folder: Path, recipe: Recipe, **options: Any) -> Learner:
    backbone = load_backbone(folder, blocks="lean", **options)
    for component in backbone.components.values():
        quicken(component, pack=False)
    return make_learner(backbone, recipe)


def frozen_norm(channels: int, dtype: torch.dtype) -> nn.GroupNorm:
    norm = nn.GroupNorm(2, channels).to(dtype)
    random_like([norm.weight, norm.bias], 3)
    return norm.requires_grad_(False)


def plain_gate(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


class Whole(nn.Module):
    """A layer after a gate, as a module that takes its factors from outside."""

    def __init__(self, layer: LoRALayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, given: Tensor) -> Tensor:
        return self.layer.forward_of(gate, given, gated)


# --- single functions


def test_norm_and_gate_have_the_gradients_of_their_formulas() -> None:
    torch.manual_seed(0)
    norm = frozen_norm(4, torch.float64)
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: norm_silu(x, norm), (x,))
    projected = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gated, (projected,))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_they_compute_what_plain_layers_do(
    device: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    norm = frozen_norm(8, dtype).to(device)
    image = torch.randn(2, 8, 5, 3).to(device, dtype).contiguous(memory_format=layout)
    pairs: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]] = [
        (lambda x: norm_silu(x, norm), lambda x: F.silu(norm(x)), image),
        (gated, plain_gate, torch.randn(2, 5, 16).to(device, dtype)),
    ]
    for ours, plain, x in pairs:
        inputs = [x.clone().requires_grad_(True) for _ in range(2)]
        results = [compute(x) for compute, x in zip((ours, plain), inputs, strict=True)]
        assert results[0].dtype == dtype
        torch.testing.assert_close(results[0], results[1])
        for result in results:
            slopes = torch.linspace(-1, 1, result.numel()).view(result.shape)
            result.backward(slopes.to(device, dtype))
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


def test_they_keep_their_input_alone() -> None:
    norm = frozen_norm(8, torch.float32)
    x = torch.randn(1, 8, 16, 16, requires_grad=True)
    projected = torch.randn(1, 9, 16, requires_grad=True)
    for compute, given in ((lambda x: norm_silu(x, norm), x), (gated, projected)):
        with counting([]) as found:
            result = compute(given)
        assert result.requires_grad
        assert found == [given.nbytes]


def adapted(dtype: torch.dtype) -> LoRALayer:
    model = nn.Sequential(nn.Linear(4, 5, dtype=dtype)).requires_grad_(False)
    quicken(model, pack=False)
    base = model[0]
    assert isinstance(base, nn.Linear)
    layer = LoRALayer(base, rank=2, alpha=3.0, generator=torch.Generator().manual_seed(0))
    random_like([layer.down, layer.up], 1)
    return layer.to(dtype)


def test_an_adapter_of_what_is_made_has_the_gradients_of_its_formula() -> None:
    torch.manual_seed(0)
    layer = adapted(torch.float64)
    given = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)

    def compute(given: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return torch.func.functional_call(
            Whole(layer), {"layer.down": down, "layer.up": up}, (given,)
        )

    assert torch.autograd.gradcheck(compute, (given, layer.down, layer.up))
    assert torch.equal(layer.forward_of(gate, given, gated), layer(gated(given)))
    layer.multiplier = 0.0
    assert torch.equal(layer.forward_of(gate, given, gated), layer.base(gated(given)))


def test_an_adapter_keeps_what_its_input_is_made_of() -> None:
    layer, given = adapted(torch.float32), torch.randn(1, 9, 8, requires_grad=True)
    with counting([]) as found:
        result = layer.forward_of(gate, given, gated)
    assert result.requires_grad
    middle_and_factors = [4 * 9 * 2, 4 * 2 * 5]
    # Its factors in the input's number format are those themselves where it is the same.
    assert found == [given.nbytes, middle_and_factors[0], layer.down.nbytes, middle_and_factors[1]]


def test_a_norm_that_is_trained_is_computed_plainly() -> None:
    norm = nn.GroupNorm(2, 4)
    norm_silu(torch.randn(1, 4, 3, 3), norm).sum().backward()
    assert norm.weight.grad is not None


# --- blocks


def residual_blocks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    same = {"temb_channels": 6, "groups": 2}
    blocks = {
        "same width": ResnetBlock2D(in_channels=8, **same),
        "other width": ResnetBlock2D(in_channels=8, out_channels=4, **same),
        "scaled": ResnetBlock2D(in_channels=8, output_scale_factor=2.0, **same),
        "without time": ResnetBlock2D(in_channels=8, temb_channels=None, groups=2),
        "not ours": ResnetBlock2D(in_channels=8, time_embedding_norm="scale_shift", **same),
        "upward": ResnetBlock2D(in_channels=8, up=True, **same),
    }
    return {name: block.eval().requires_grad_(False) for name, block in blocks.items()}


@pytest.mark.parametrize("kind", residual_blocks())
def test_a_residual_block_computes_what_it_did(kind: str) -> None:
    plain = residual_blocks()[kind]
    lean = copy.deepcopy(plain)
    keep_less(nn.Sequential(lean))
    assert isinstance(lean, LeanResnet) == (kind not in ("not ours", "upward"))
    assert list(lean.state_dict()) == list(plain.state_dict())
    temb = None if kind == "without time" else torch.randn(2, 6)
    inputs = [torch.linspace(-2, 2, 2 * 8 * 6 * 4).view(2, 8, 6, 4) for _ in range(2)]
    results = []
    for block, x in zip((plain, lean), inputs, strict=True):
        result = block(x.requires_grad_(True), temb)
        result.square().sum().backward()
        results.append(result)
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)


@pytest.mark.parametrize("name", TINY_BASES)
def test_a_unet_keeps_its_names_and_predicts_the_same(name: str, folders: dict[str, Path]) -> None:
    plain, lean = (unet_of(folders[name], blocks=how) for how in ("plain", "lean"))
    kinds = [type(module) for module in lean.modules()]
    assert GEGLU not in kinds
    assert ResnetBlock2D not in kinds
    assert LeanGEGLU in kinds
    assert [path for path, _ in lean.named_modules()] == [path for path, _ in plain.named_modules()]
    assert list(lean.state_dict()) == list(plain.state_dict())
    words = torch.ones(1, 77, plain.config.cross_attention_dim)
    pooled = torch.ones(1, plain.config.get("projection_class_embeddings_input_dim") or 1)
    sizes = 6 * (plain.config.addition_time_embed_dim or 0)
    added = {"text_embeds": pooled[:, sizes:], "time_ids": torch.ones(1, 6)}
    with torch.no_grad():
        predicted = [
            unet(torch.ones(1, 4, 8, 8), 5, words, added_cond_kwargs=added, return_dict=False)[0]
            for unet in (plain, lean)
        ]
    # In the last digits only: on a processor the pictures lie otherwise in memory.
    torch.testing.assert_close(*predicted, rtol=1e-5, atol=1e-6)


def test_a_text_encoder_is_left_as_it_is(folders: dict[str, Path]) -> None:
    encoder = load_backbone(folders["sd1"]).components["text_encoder"]
    before = [type(module) for module in encoder.modules()]
    keep_less(encoder)
    assert [type(module) for module in encoder.modules()] == before


# --- whole trainings


@EVERY_FAMILY
def test_twenty_steps_have_the_losses_of_the_plain_path(
    name: str, folders: dict[str, Path]
) -> None:
    have_the_losses_of_the_plain_path(lean_learner, folders[name])


@pytest.mark.slow
def test_twenty_steps_in_bfloat16_are_near_the_plain_path(folders: dict[str, Path]) -> None:
    are_near_the_plain_path_in_bfloat16(lean_learner, folders["sd1"])


def gradients(folder: Path, targets: str, **options: Any) -> list[Tensor]:
    """Those of adapters that are no zeros, in one batch."""
    backbone = load_backbone(folder, **options)
    if options.get("blocks") == "lean":
        quicken(backbone.components["unet"], pack=False)
    learner = make_learner(backbone, Recipe(text_encoder=False))
    learner.adapters["unet"].detach()
    adapters = attach_adapters(backbone, AdapterPlan("lora", 2, 3.0, targets, False, 0))
    random_like(adapters["unet"].parameters(), 0)
    learner.loss(0).backward()
    return [p.grad for p in adapters["unet"].parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("targets", "weights"), [("attention+ff", "same"), ("all", "same"), ("attention+ff", "int8")]
)
def test_gradients_are_those_of_the_plain_path(
    targets: str, weights: str, folders: dict[str, Path]
) -> None:
    options = {"weights": weights}
    plain, lean = (
        gradients(folders["sd1"], targets, blocks=how, **options) for how in ("plain", "lean")
    )
    assert len(plain) == len(lean) > 0
    largest = max(float(grad.abs().max()) for grad in plain)
    for ours, theirs in zip(lean, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * largest)


# --- checkpointing


@pytest.mark.parametrize("blocks", ["plain", "direct", "lean"])
def test_a_share_of_checkpointed_blocks_changes_no_bit(
    blocks: str, folders: dict[str, Path]
) -> None:
    kept = gradients(folders["sd1"], "attention", blocks=blocks)
    for share in (0.0, 0.4, 1.0):
        options = {"blocks": blocks, "checkpointing": True, "checkpoint_share": share}
        again = gradients(folders["sd1"], "attention", **options)
        assert all(map(torch.equal, again, kept))


def test_a_resumed_run_is_bit_exact(folders: dict[str, Path], tmp_path: Path) -> None:
    options = {"checkpointing": True, "checkpoint_share": 0.5}
    recipe = Recipe(sizes=((8, 8), (8, 16)))
    goes_on_bit_for_bit(lambda: lean_learner(folders["sd1"], recipe, **options), tmp_path)


def test_so_many_blocks_are_computed_twice(folders: dict[str, Path]) -> None:
    unet = unet_of(folders["sd1"])
    blocks = checkpointable(unet)
    assert checkpoint_blocks(unet, 0.5) == round(len(blocks) / 2)
    calls = dict.fromkeys(blocks, 0)

    def count(block: nn.Module, *_: Any) -> None:
        calls[block] += 1

    for block in blocks:
        block.register_forward_pre_hook(count)
    picture = torch.ones(1, 4, 8, 8, requires_grad=True)
    words = torch.ones(1, 77, unet.config.cross_attention_dim)
    predicted: Tensor = unet(picture, 5, words, return_dict=False)[0]
    predicted.sum().backward()
    half = round(len(blocks) / 2)
    assert list(calls.values()) == [2] * half + [1] * (len(blocks) - half)


def test_no_block_is_checkpointed_with_a_share_of_nothing(folders: dict[str, Path]) -> None:
    unet = unet_of(folders["sd1"])
    assert checkpoint_blocks(unet, 0.0) == 0
    assert not unet.is_gradient_checkpointing


def test_blocks_that_save_most_for_their_work_come_first() -> None:
    """Transformer blocks before residual ones, and narrow ones, where the pixels are, before wide
    ones: all of the published SD 1.5."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config_of("sd15", "unet"))
    blocks: list[Any] = checkpointable(unet)
    transformers = [block for block in blocks if isinstance(block, BasicTransformerBlock)]
    assert len(transformers) == 16
    assert blocks[:16] == transformers
    assert len(blocks) == 16 + 21
    assert [block.dim for block in transformers] == [320] * 5 + [640] * 5 + [1280] * 6
    middle = unet.mid_block.attentions[0].transformer_blocks[0]
    assert transformers[-1] is middle, "the fewest pixels last"


# --- what is kept


def test_each_part_keeps_less_than_was_asked() -> None:
    """GiB per picture of SD 1.5 at 512 px, in bfloat16; exact, so that it may not grow unseen."""
    kept = {
        name: kept_bytes("sd15", 512, "attention", way) / 2**30
        for name, way in WAYS.items()
        if name in ("off", "on, lean", "checkpointed 50 %")
    }
    assert kept["off"] == pytest.approx(0.753, abs=1e-3)
    assert kept["on, lean"] <= 0.501
    assert kept["checkpointed 50 %"] <= 0.1
    assert Way() == WAYS["on, lean"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "targets", "most"),
    [
        ("sd15", "attention+ff", 0.578),
        ("sd21", "attention", 1.113),
        ("sd21", "attention+ff", 1.277),
        ("sdxl", "attention", 4.044),
        ("sdxl", "attention+ff", 4.366),
    ],
)
def test_full_size_models_keep_no_more(base: str, targets: str, most: float) -> None:
    assert kept_bytes(base, SIZES[base], targets, WAYS["on, lean"]) / 2**30 <= most


@pytest.mark.slow
def test_a_larger_share_never_keeps_more() -> None:
    shares = (0.0, 0.2, 0.6, 1.0)
    kept = [kept_bytes("sd15", 256, "attention", Way(share=share)) for share in shares]
    assert all(more > less for more, less in itertools.pairwise(kept))
