"""Frozen layers computed the fast way: the same results as the plain ones, and less is kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.learners import Recipe, load_backbone, make_learner, make_plan
from tests.runs import same_tensors
from tests.test_training import run
from tests.tiny import TINY_BASES, save_tiny
from trainer.adapters import frozen as frozen_module
from trainer.adapters import lora as lora_module
from trainer.adapters.attach import attach
from trainer.adapters.frozen import FrozenConv2d, FrozenLinear, quicken
from trainer.adapters.lora import LoRALayer
from trainer.adapters.products import matmul, onednn_computes
from trainer.families import Backbone
from trainer.training.learner import Learner
from trainer.training.state import newest_checkpoint, restore, save_checkpoint

STEPS = 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("fast")
    return {name: save_tiny(home / name, name) for name in TINY_BASES}


def fast_learner(
    folder: Path,
    recipe: Recipe,
    *,
    pack: bool = True,
    onednn: bool = True,
    widen: bool = False,
    **options: object,
) -> Learner:
    backbone = quick(load_backbone(folder, **options), pack=pack, onednn=onednn, widen=widen)
    return make_learner(backbone, recipe)


def quick(
    backbone: Backbone, *, pack: bool = True, onednn: bool = True, widen: bool = False
) -> Backbone:
    for component in backbone.components.values():
        quicken(component, pack=pack, onednn=onednn, widen=widen)
    return backbone


def frozen(layer: nn.Module, *, pack: bool, onednn: bool = True) -> nn.Module:
    model = nn.Sequential(layer).requires_grad_(False)
    quicken(model, pack=pack, onednn=onednn)
    return model[0]


def random_like(parameters: list[nn.Parameter], seed: int) -> None:
    """Factors that are no zeros, so that every gradient is something."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))


# --- single layers

CONVOLUTIONS: dict[str, Callable[[], nn.Conv2d]] = {
    "3x3": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "without bias": lambda: nn.Conv2d(8, 12, 3, padding=1, bias=False),
    "1x1": lambda: nn.Conv2d(8, 12, 1),
    "no padding": lambda: nn.Conv2d(8, 12, 3),
    "uneven": lambda: nn.Conv2d(8, 12, (1, 3), padding=(0, 2)),
    "stride 2": lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1),
}


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_frozen_convolution_computes_what_the_plain_one_does(kind: str, pack: bool) -> None:
    torch.manual_seed(0)
    plain = CONVOLUTIONS[kind]().requires_grad_(False)
    weight = plain.weight.clone()
    x = torch.randn(2, 8, 9, 7)
    with torch.no_grad():
        wanted = plain(x)
    grad = torch.randn(wanted.shape)
    wanted_x = x.clone().requires_grad_(True)
    plain(wanted_x).backward(grad)

    layer = frozen(plain, pack=pack)
    assert isinstance(layer, FrozenConv2d)
    for size in (x, torch.cat([x, x], dim=3), x):  # another size in between
        layer(size.clone().requires_grad_(True)).sum().backward()
    ours_x = x.clone().requires_grad_(True)
    ours = layer(ours_x)
    ours.backward(grad)
    torch.testing.assert_close(ours.detach(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours_x.grad, wanted_x.grad, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.weight, weight), "whoever asks for the weight gets it"


@pytest.mark.parametrize("onednn", [True, False])
def test_a_frozen_linear_layer_computes_what_the_plain_one_does(onednn: bool) -> None:
    torch.manual_seed(0)
    for bias in (True, False):
        plain = nn.Linear(6, 10, bias=bias).requires_grad_(False)
        x = torch.randn(2, 3, 6, requires_grad=True)
        wanted = plain(x)
        (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), x)
        layer = frozen(plain, pack=False, onednn=onednn)
        assert isinstance(layer, FrozenLinear)
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, wanted_grad, rtol=1e-5, atol=1e-5)


def test_gradients_of_the_update_are_those_of_its_formula() -> None:
    torch.manual_seed(0)
    base = frozen(nn.Linear(5, 7), pack=False).double()
    assert isinstance(base, FrozenLinear)
    layer = LoRALayer(base, rank=2, alpha=3.0, generator=torch.Generator().manual_seed(0)).double()
    random_like([layer.down, layer.up], 1)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def compute(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        state = {"down": down, "up": up}
        return torch.func.functional_call(layer, state, (x,))

    assert torch.autograd.gradcheck(compute, (x, layer.down, layer.up))
    plain = x @ (base.weight + layer.delta()).T + base.bias
    torch.testing.assert_close(layer(x), plain.to(torch.float64))


@pytest.mark.parametrize("onednn", [True, False])
def test_products_are_those_of_the_library_that_was_chosen(
    onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def watched(x: Tensor, weight: Tensor, *bias: Tensor, onednn: bool = True) -> Tensor:
        asked.append(onednn)
        return matmul(x, weight, *bias, onednn=onednn)

    for module in (frozen_module, lora_module):
        monkeypatch.setattr(module, "matmul", watched)
    base = frozen(nn.Linear(5, 7), pack=False, onednn=onednn)
    assert isinstance(base, FrozenLinear)
    layer = LoRALayer(base, rank=2, alpha=2.0, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 5, requires_grad=True)
    layer(x).sum().backward()
    base(x).sum().backward()
    assert asked.count(onednn) == len(asked) > 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_an_adapted_convolution_computes_what_the_plain_one_does(
    kind: str, order: torch.memory_format, onednn: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    plain = CONVOLUTIONS[kind]().requires_grad_(False).to(dtype)
    fast = frozen(copy.deepcopy(plain), pack=True, onednn=onednn)
    assert isinstance(fast, FrozenConv2d)
    layers = [
        LoRALayer(base, rank=2, alpha=3.0, generator=torch.Generator().manual_seed(0))
        for base in (plain, fast)
    ]
    x = torch.randn(2, 8, 9, 7).to(dtype).contiguous(memory_format=order)
    found = []
    for layer in layers:
        random_like([layer.down, layer.up], 1)
        given = x.clone(memory_format=torch.preserve_format).requires_grad_(True)
        y = layer(given)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        for _ in range(2):  # twice, as those do who look for what went wrong
            of = torch.autograd.grad(y, (given, layer.down, layer.up), grad, retain_graph=True)
        (alone,) = torch.autograd.grad(layer(x), (layer.down,), grad)  # nobody asks for x's
        found.append((y.detach(), *of, alone))
    off = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found[1], found[0], rtol=off, atol=10 * off)
    assert [g.dtype for g in found[1]] == [g.dtype for g in found[0]]


def test_gradients_of_an_adapted_convolution_are_those_of_its_formula() -> None:
    torch.manual_seed(0)
    for kernel, stride, padding in ((3, 1, 1), (3, 2, 1), (1, 1, 0), (1, 2, 0)):
        base = frozen(nn.Conv2d(2, 3, kernel, stride, padding).double(), pack=True)
        assert isinstance(base, FrozenConv2d)
        draw = torch.Generator().manual_seed(0)
        layer = LoRALayer(base, rank=2, alpha=3.0, generator=draw).double()
        random_like([layer.down, layer.up], 1)
        x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)

        def compute(x: Tensor, down: Tensor, up: Tensor, layer: LoRALayer = layer) -> Tensor:
            return torch.func.functional_call(layer, {"down": down, "up": up}, (x,))

        assert torch.autograd.gradcheck(compute, (x, layer.down, layer.up))


def test_a_convolution_in_float64_has_the_gradients_of_its_formula() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    for stride in (1, 2):
        layer = frozen(nn.Conv2d(2, 3, 3, stride, padding=1).double(), pack=True)
        assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize("kind", [*CONVOLUTIONS, "linear"])
def test_a_layer_in_bfloat16_may_compute_in_float32(kind: str, many: bool) -> None:
    """Its products are then those of float32, of the numbers that bfloat16 has, and all that it is
    asked for is as it was."""
    torch.manual_seed(0)
    plain = (CONVOLUTIONS[kind]() if kind != "linear" else nn.Linear(8, 12)).requires_grad_(False)
    plain = plain.to(torch.bfloat16)
    weight = plain.weight.clone()
    side = 20 if many else 3
    x = torch.randn(side * side, 8) if kind == "linear" else torch.randn(1, 8, side, side)
    x = x.to(torch.bfloat16)
    single = copy.deepcopy(plain).float()
    model = nn.Sequential(plain).requires_grad_(False)
    quicken(model, pack=True, onednn=False, widen=True)
    layer = model[0]
    assert isinstance(layer, FrozenLinear | FrozenConv2d)
    given, wide = x.clone().requires_grad_(True), x.float().requires_grad_(True)
    y, wanted = layer(given), single(wide)
    grad = torch.randn(y.shape).to(torch.bfloat16)
    (of_x,) = torch.autograd.grad(y, given, grad)
    (wanted_x,) = torch.autograd.grad(wanted, wide, grad.float())
    assert (y.dtype, of_x.dtype) == (torch.bfloat16, torch.bfloat16)
    off = 2**-8 if many else 2**-5  # one rounding, or those of every step of a sum
    torch.testing.assert_close(y.float(), wanted, rtol=off, atol=off / 4)
    torch.testing.assert_close(of_x.float(), wanted_x, rtol=off, atol=off / 4)
    assert torch.equal(layer.weight, weight)
    assert len(list(model.modules())) == 2
    kept = [
        t for t in (layer._wide, *(t.weight for t in getattr(layer, "_twin", ()))) if t is not None
    ]
    assert [t.dtype for t in kept] == ([torch.float32] if many else [])
    # With few rows again it computes as if it had never seen many.
    few = x[:3] if kind == "linear" else x[..., :3, :3]
    fresh = frozen(copy.deepcopy(single).to(torch.bfloat16), pack=True, onednn=False)
    assert torch.equal(layer(few), fresh(few))


def test_a_run_that_computes_in_float32_goes_on_bit_for_bit(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Widened layers compute as a function of their input alone, whatever came before."""
    monkeypatch.setattr(frozen_module, "_MANY_ROWS", 8)
    monkeypatch.setattr(frozen_module, "_MANY_POINTS", 16)

    made: list[Backbone] = []

    def wide() -> Learner:
        backbone = load_backbone(folders["sd1"], dtype=torch.bfloat16)
        made.append(quick(backbone, onednn=False, widen=True))
        return make_learner(backbone, Recipe(sizes=((8, 8), (8, 8), (8, 16))))

    goes_on_bit_for_bit(wide, tmp_path)
    layers = [*made[-1].components["unet"].modules()]
    assert sum(getattr(layer, "_wide", None) is not None for layer in layers) > 10
    assert sum(bool(getattr(layer, "_twin", ())) for layer in layers) > 5


@pytest.mark.skipif(not onednn_computes(torch.bfloat16), reason="no bfloat16 in oneDNN here")
def test_bfloat16_is_as_near_to_float32_as_the_plain_layers_are() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 8, 8)
    exact, plain = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
    plain.load_state_dict(exact.state_dict())
    plain.to(torch.bfloat16).requires_grad_(False)
    with torch.no_grad():
        wanted = exact(x)
        plain_error = (plain(x.bfloat16()).float() - wanted).abs().max()
        ours = frozen(plain, pack=True)(x.bfloat16())
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - wanted).abs().max() <= 2 * plain_error


@contextmanager
def kept_bytes(found: list[int]) -> Iterator[None]:
    """What is kept for the backward pass inside the block, each storage once."""
    seen: dict[int, int] = {}  # by address: the block must hold on to its results

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    found.append(sum(seen.values()))


def test_a_frozen_convolution_keeps_nothing() -> None:
    found: list[int] = []
    plain = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
    for layer in (plain, frozen(nn.Conv2d(8, 8, 3, padding=1), pack=True)):
        with kept_bytes(found):
            layer(torch.randn(1, 8, 16, 16, requires_grad=True))
    assert found[0] > 0
    assert found[1] == 0


def test_queries_keys_and_values_keep_their_input_once() -> None:
    model = nn.ModuleDict({name: nn.Linear(32, 32) for name in "qkv"})
    quicken(model.requires_grad_(False), pack=False)
    attached = attach(model, list("qkv"), rank=2, alpha=2.0, seed=0)
    x = torch.randn(1, 100, 32, requires_grad=True)
    found: list[int] = []
    with kept_bytes(found):
        # Held until they are counted: the memory of a dropped one may be given to the next.
        results = [layer(x) for layer in attached.layers.values()]
    assert len(results) == 3
    middle_and_factors = 3 * 4 * (100 * 2 + 2 * 32 + 32 * 2)
    assert found[0] == 4 * 100 * 32 + middle_and_factors


# --- what is left alone


def test_other_layers_and_trained_ones_are_left_as_they_are() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(
        Own(4, 4), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding="same"), nn.Linear(4, 4)
    )
    quicken(model, pack=True)
    assert [type(layer) for layer in model] == [Own, nn.Conv2d, nn.Conv2d, FrozenLinear]
    model[3](torch.ones(1, 4)).sum().backward()
    assert model[3].weight.grad is not None, "a layer that is trained after all is computed plainly"


def test_adapters_come_off_and_a_strength_of_zero_is_the_base(folders: dict[str, Path]) -> None:
    unet = quick(load_backbone(folders["sd1"])).components["unet"]
    prompt = torch.ones(1, 77, 16)

    def predicted() -> Tensor:
        with torch.no_grad():
            result: Tensor = unet(torch.ones(1, 4, 8, 8), 5, prompt, return_dict=False)[0]
        return result

    before = predicted()
    names = [n for n, m in unet.named_modules() if isinstance(m, FrozenLinear | FrozenConv2d)]
    attached = attach(unet, names, rank=2, alpha=2.0, seed=0)
    random_like(attached.parameters(), 0)
    assert not torch.equal(predicted(), before)
    with attached.disabled():
        assert torch.equal(predicted(), before)
    attached.detach()
    assert torch.equal(predicted(), before)
    assert not any(isinstance(module, LoRALayer) for module in unet.modules())


# --- whole trainings


EVERY_FAMILY = pytest.mark.parametrize(
    "name", ["sd1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd2", "sdxl"))]
)


def have_the_losses_of_the_plain_path(make: Callable[..., Learner], folder: Path) -> None:
    """Twenty steps of the learners that `make` makes, in fp32."""
    recipe = Recipe(rate=1e-3, sizes=((8, 8), (8, 8), (8, 16)))
    plain = run(make_learner(folder, recipe), make_plan(STEPS))
    assert run(make(folder, recipe), make_plan(STEPS)) == pytest.approx(plain, rel=1e-5)


def are_near_the_plain_path_in_bfloat16(make: Callable[..., Learner], folder: Path) -> None:
    """The same in bfloat16, which has three digits."""
    recipe = Recipe(rate=1e-3, text_encoder=False)
    options = {"dtype": torch.bfloat16}
    plain = make_learner(load_backbone(folder, **options), recipe)
    wanted = run(plain, make_plan(STEPS))
    ours = make(folder, recipe, **options)
    assert run(ours, make_plan(STEPS)) == pytest.approx(wanted, rel=2e-2)


@EVERY_FAMILY
def test_twenty_steps_have_the_losses_of_the_plain_path(
    name: str, folders: dict[str, Path]
) -> None:
    have_the_losses_of_the_plain_path(fast_learner, folders[name])


def test_twenty_steps_by_the_other_library_have_them_too(folders: dict[str, Path]) -> None:
    have_the_losses_of_the_plain_path(partial(fast_learner, onednn=False), folders["sd1"])


@pytest.mark.slow
@pytest.mark.skipif(not onednn_computes(torch.bfloat16), reason="no bfloat16 in oneDNN here")
def test_twenty_steps_in_bfloat16_are_near_the_plain_path(folders: dict[str, Path]) -> None:
    are_near_the_plain_path_in_bfloat16(fast_learner, folders["sd1"])


@pytest.mark.slow
@pytest.mark.skipif(not onednn_computes(torch.bfloat16), reason="no bfloat16 in oneDNN here")
def test_twenty_steps_in_bfloat16_that_compute_in_float32_are_near_the_plain_path(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_module, "_MANY_ROWS", 8)
    monkeypatch.setattr(frozen_module, "_MANY_POINTS", 16)
    wide = partial(fast_learner, onednn=False, widen=True, attention="sdpa-fp32")
    are_near_the_plain_path_in_bfloat16(wide, folders["sd1"])


@pytest.mark.parametrize("targets", ["attention+ff", "all"])
def test_gradients_are_those_of_the_plain_path(targets: str, folders: dict[str, Path]) -> None:
    from trainer.training.learner import AdapterPlan, attach_adapters

    grads: list[list[Tensor]] = []
    for fast in (False, True):
        backbone = load_backbone(folders["sd1"])
        if fast:
            quick(backbone)
        learner = make_learner(backbone, Recipe(text_encoder=False))
        learner.adapters["unet"].detach()
        adapters = attach_adapters(backbone, AdapterPlan("lora", 2, 3.0, targets, False, 0))
        random_like(adapters["unet"].parameters(), 0)
        learner.loss(0).backward()
        grads.append([p.grad for p in adapters["unet"].parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0
    largest = max(float(grad.abs().max()) for grad in grads[0])
    for ours, plain in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5 * largest)


def test_checkpointing_changes_nothing(folders: dict[str, Path]) -> None:
    recipe = Recipe(rate=1e-3)
    kept = run(fast_learner(folders["sd1"], recipe), make_plan(4))
    again = run(fast_learner(folders["sd1"], recipe, checkpointing=True), make_plan(4))
    assert again == pytest.approx(kept, rel=1e-6)


def goes_on_bit_for_bit(
    make: Callable[[], Learner], folder: Path, between: Callable[[], object] = lambda: None
) -> None:
    """Three steps and three more are six. between: called before the second half's learner is made,
    for what a new process has not."""
    whole, first = make(), make()
    losses = run(whole, make_plan(6))
    assert all(math.isfinite(loss) for loss in losses)
    run(first, make_plan(6, last=3))
    save_checkpoint(folder, first, 3, {}, keep=1)
    between()
    second = make()
    checkpoint, _ = newest_checkpoint(folder)
    assert checkpoint is not None
    restore(second, checkpoint)
    assert run(second, make_plan(6), 3) == losses[3:]
    for component, attached in whole.adapters.items():
        assert same_tensors(attached.state(), second.adapters[component].state())


def test_a_resumed_run_is_bit_exact(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = Recipe(sizes=((8, 8), (8, 8), (8, 16)))
    goes_on_bit_for_bit(lambda: fast_learner(folders["sd1"], recipe), tmp_path)
