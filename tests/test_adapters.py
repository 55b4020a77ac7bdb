"""Adapter layers: one battery for every entry of `ADAPTERS`, then attaching."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainer.adapters import ADAPTERS
from trainer.adapters.attach import Attached, attach
from trainer.adapters.lora import LoRALayer
from trainer.adapters.plans import BlockRule
from trainer.errors import ConfigError, FileFormatError, ModelError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_linear() -> tuple[nn.Module, Tensor]:
    return nn.Linear(6, 9), torch.randn(2, 5, 6)


def make_linear_without_bias() -> tuple[nn.Module, Tensor]:
    return nn.Linear(9, 4, bias=False), torch.randn(3, 9)


def make_conv1x1() -> tuple[nn.Module, Tensor]:
    return nn.Conv2d(4, 6, 1), torch.randn(2, 4, 5, 7)


def make_conv3x3() -> tuple[nn.Module, Tensor]:
    return nn.Conv2d(3, 5, 3, stride=2, padding=1, dilation=1), torch.randn(2, 3, 8, 6)


def make_conv_of_all_kinds() -> tuple[nn.Module, Tensor]:
    conv = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(2, 3), bias=False)
    return conv, torch.randn(2, 3, 9, 7)


def make_conv_same() -> tuple[nn.Module, Tensor]:
    return nn.Conv2d(3, 4, 3, padding="same"), torch.randn(1, 3, 4, 5)


BASES = [
    make_linear,
    make_linear_without_bias,
    make_conv1x1,
    make_conv3x3,
    make_conv_of_all_kinds,
    make_conv_same,
]
MakeBase = Callable[[], tuple[nn.Module, Tensor]]


@pytest.fixture(params=list(ADAPTERS))
def adapter(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=BASES, ids=lambda make: make.__name__)
def make_base(request: pytest.FixtureRequest) -> MakeBase:
    make: MakeBase = request.param
    return make


def build(
    adapter: str, make_base: MakeBase, *, rank: int = 3, alpha: float = 6.0, random_up: bool = True
) -> tuple[nn.Module, LoRALayer, Tensor]:
    """A base layer, the adapter layer around it, and an input."""
    torch.manual_seed(1)
    base, x = make_base()
    layer = ADAPTERS.load(adapter)(base, rank=rank, alpha=alpha, generator=generator())
    if random_up:
        with torch.no_grad():
            layer.up.copy_(torch.randn(layer.up.shape, generator=generator(2)))
    return base, layer, x


class TestEveryAdapter:
    def test_fresh_layer_changes_nothing_bit_for_bit(
        self, adapter: str, make_base: MakeBase
    ) -> None:
        base, layer, x = build(adapter, make_base, random_up=False)
        assert torch.equal(layer(x), base(x))

    def test_multiplier_zero_is_the_base_bit_for_bit(
        self, adapter: str, make_base: MakeBase
    ) -> None:
        base, layer, x = build(adapter, make_base)
        with torch.no_grad():
            layer.up.fill_(float("inf"))  # inf * 0 would be NaN: the branch must not run
        layer.multiplier = 0.0
        assert torch.equal(layer(x), base(x))

    def test_delta_is_what_the_forward_adds(self, adapter: str, make_base: MakeBase) -> None:
        base, layer, x = build(adapter, make_base)
        delta = layer.delta()
        assert delta.shape == base.weight.shape
        assert delta.dtype == torch.float32
        if isinstance(base, nn.Conv2d):
            added = F.conv2d(x, delta, None, base.stride, base.padding, base.dilation)
        else:
            added = F.linear(x, delta)
        assert added.abs().max() > 0.1
        torch.testing.assert_close(layer(x) - base(x), added, rtol=1e-4, atol=1e-5)

    def test_merged_into_the_base_it_gives_the_same(
        self, adapter: str, make_base: MakeBase
    ) -> None:
        base, layer, x = build(adapter, make_base)
        adapted = layer(x).detach()
        with torch.no_grad():
            base.get_parameter("weight").add_(layer.delta())
        torch.testing.assert_close(base(x), adapted, rtol=1e-4, atol=1e-5)

    def test_alpha_doubling_doubles_the_delta(self, adapter: str, make_base: MakeBase) -> None:
        _, once, _ = build(adapter, make_base, alpha=3.0)
        _, twice, _ = build(adapter, make_base, alpha=6.0)
        assert torch.equal(2 * once.delta(), twice.delta())

    def test_multiplier_is_linear(self, adapter: str, make_base: MakeBase) -> None:
        base, layer, x = build(adapter, make_base)
        full = layer(x) - base(x)
        layer.multiplier = -0.5
        torch.testing.assert_close(layer(x) - base(x), -0.5 * full, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_base_gives_float32_gradients(
        self, adapter: str, make_base: MakeBase, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(1)
        base, x = make_base()
        base.to(dtype)
        layer = ADAPTERS.load(adapter)(base, rank=2, alpha=2.0, generator=generator())
        y = layer(x.to(dtype))
        assert y.dtype == dtype
        y.float().square().sum().backward()
        assert layer.up.dtype == layer.down.dtype == torch.float32
        assert layer.up.grad is not None
        assert layer.up.grad.dtype == torch.float32
        assert layer.up.grad.abs().sum() > 0
        assert layer.down.grad is not None
        assert layer.down.grad.dtype == torch.float32

    def test_start_is_a_pure_function_of_the_generator(
        self, adapter: str, make_base: MakeBase
    ) -> None:
        base, _ = make_base()
        make = ADAPTERS.load(adapter)
        first, again, other = (
            make(base, rank=2, alpha=1.0, generator=generator(seed)) for seed in (5, 5, 6)
        )
        torch.manual_seed(99)
        assert torch.equal(first.down, again.down)
        assert not torch.equal(first.down, other.down)
        assert not first.up.any()

    def test_attach_load_detach(self, adapter: str, make_base: MakeBase) -> None:
        torch.manual_seed(1)
        base, x = make_base()
        model = nn.Sequential(base)
        before = model(x)
        attached = attach(model, ["0"], adapter=adapter, rank=2, alpha=1.0, seed=0)
        state = {key: torch.randn(tensor.shape) for key, tensor in attached.state().items()}
        attached.load_state(state)
        assert not torch.equal(model(x), before)
        assert {k: v.tolist() for k, v in attached.state().items()} == {
            k: v.tolist() for k, v in state.items()
        }
        attached.detach()
        assert model[0] is base
        assert torch.equal(model(x), before)


class Model(nn.Module):
    """Names and nesting as in a UNet: a list inside a submodule, a norm, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 6)
        self.norm = nn.LayerNorm(6)
        self.attn = nn.Module()
        self.attn.to_q = nn.Linear(6, 8, bias=False)
        self.attn.to_k = nn.Linear(6, 8, bias=False)
        self.attn.to_out = nn.ModuleList([nn.Linear(8, 6), nn.Dropout(0.0)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids))
        x = self.attn.get_submodule("to_q")(x) * self.attn.get_submodule("to_k")(x).sigmoid()
        out: Tensor = self.attn.get_submodule("to_out.0")(x)
        return out


NAMES = ["attn.to_q", "attn.to_k", "attn.to_out.0"]
IDS = torch.tensor([[0, 3, 1]])


def attached_model(seed: int = 0, names: list[str] = NAMES) -> tuple[Model, Attached]:
    torch.manual_seed(3)
    model = Model()
    return model, attach(model, names, rank=2, alpha=4.0, seed=seed)


def randomize(attached: Attached) -> None:
    state = attached.state()
    draw = generator(7)
    attached.load_state({k: torch.randn(v.shape, generator=draw) for k, v in state.items()})


class TestAttach:
    def test_only_factors_are_trained(self) -> None:
        model, attached = attached_model()
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert trained == {id(p) for p in attached.parameters()}
        assert list(attached.layers) == NAMES
        assert list(attached.state()) == [f"{n}.{f}" for n in NAMES for f in ("down", "up")]

    def test_state_is_a_copy(self) -> None:
        _, attached = attached_model()
        attached.state()["attn.to_q.up"].fill_(5)
        assert not attached.layers["attn.to_q"].up.any()

    def test_detach_restores_objects_outputs_flags_and_is_idempotent(self) -> None:
        torch.manual_seed(3)
        model = Model()
        model.norm.requires_grad_(False)
        modules, flags = dict(model.named_modules()), [p.requires_grad for p in model.parameters()]
        before = model(IDS)
        attached = attach(model, NAMES, rank=2, alpha=4.0, seed=0)
        randomize(attached)
        attached.detach()
        attached.detach()
        assert dict(model.named_modules()) == modules
        assert [p.requires_grad for p in model.parameters()] == flags
        assert torch.equal(model(IDS), before)
        # A second detach does not disturb a new adapter.
        attach(model, NAMES, rank=2, alpha=4.0, seed=1)
        attached.detach()
        assert isinstance(model.attn.to_q, LoRALayer)

    def test_disabled_is_the_base_and_comes_back(self) -> None:
        torch.manual_seed(3)
        before = Model()(IDS)
        model, attached = attached_model()
        randomize(attached)
        attached.set_multiplier(0.5)
        adapted = model(IDS)
        with attached.disabled():
            assert torch.equal(model(IDS), before)
        assert torch.equal(model(IDS), adapted)
        with contextlib.suppress(KeyboardInterrupt), attached.disabled():
            raise KeyboardInterrupt
        assert torch.equal(model(IDS), adapted)
        assert not torch.equal(adapted, before)

    @given(order=st.permutations(NAMES), count=st.integers(1, 3))
    @settings(max_examples=10, deadline=None)
    def test_start_of_a_layer_depends_on_seed_and_name_alone(
        self, order: list[str], count: int
    ) -> None:
        _, whole = attached_model()
        _, some = attached_model(names=order[:count])
        for name in order[:count]:
            assert torch.equal(some.layers[name].down, whole.layers[name].down)

    def test_layers_and_seeds_start_differently(self) -> None:
        _, attached = attached_model()
        _, other = attached_model(seed=1)
        q, k = attached.layers["attn.to_q"], attached.layers["attn.to_k"]
        assert not torch.equal(q.down, k.down)
        assert not torch.equal(q.down, other.layers["attn.to_q"].down)
        bound = 1 / math.sqrt(6)  # Kaiming-uniform with a = sqrt(5) is +-1/sqrt(inputs)
        assert bound / 2 < q.down.abs().max() <= bound

    def test_unknown_layer_is_refused_with_near_names_and_nothing_changed(self) -> None:
        model = Model()
        with pytest.raises(ModelError, match="does not exist in Model") as caught:
            attach(model, ["attn.to_q", "attn.to_kk"], rank=2, alpha=1.0, seed=0)
        assert "attn.to_k" in caught.value.where.splitlines()
        assert isinstance(model.attn.to_q, nn.Linear)
        assert all(p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize(
        ("name", "message"),
        [("norm", "is a LayerNorm"), ("attn", "is a Module"), ("", "is a Model")],
    )
    def test_layer_of_another_kind_is_refused(self, name: str, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            attach(Model(), [name], rank=2, alpha=1.0, seed=0)

    def test_second_adapter_and_no_layers_are_refused(self) -> None:
        model, _ = attached_model()
        with pytest.raises(ModelError, match="has an adapter already"):
            attach(model, ["attn.to_q"], rank=2, alpha=1.0, seed=0)
        with pytest.raises(ModelError, match="no layer to adapt"):
            attach(Model(), [], rank=2, alpha=1.0, seed=0)

    def test_unknown_adapter_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="Did you mean 'lora'"):
            attach(Model(), NAMES, adapter="lore", rank=2, alpha=1.0, seed=0)

    def test_grouped_convolution_is_refused(self) -> None:
        with pytest.raises(ModelError, match="groups"):
            attach(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), ["0"], rank=1, alpha=1.0, seed=0)

    @pytest.mark.parametrize(
        ("rank", "alpha"), [(0, 1.0), (-1, 1.0), (2, 0.0), (2, math.nan), (2, math.inf)]
    )
    def test_rank_and_alpha_must_be_positive(self, rank: int, alpha: float) -> None:
        with pytest.raises(ValueError, match="rank must be >= 1"):
            attach(Model(), NAMES, rank=rank, alpha=alpha, seed=0)


class TestRules:
    def test_rank_alpha_and_rate_of_some_layers(self) -> None:
        rules = [BlockRule("attn.*", rank=3, rate=0.5), BlockRule("*.to_q", alpha=1.0, rate=2.0)]
        attached = attach(Model(), NAMES, rank=2, alpha=4.0, seed=0, rules=rules)
        found = {path: (x.rank, x.alpha) for path, x in attached.layers.items()}
        assert found == {NAMES[0]: (3, 1.0), NAMES[1]: (3, 4.0), NAMES[2]: (3, 4.0)}
        assert attached.rates == {NAMES[0]: 2.0, NAMES[1]: 0.5, NAMES[2]: 0.5}

    def test_parameters_by_rate(self) -> None:
        rules = [BlockRule("attn.to_k", rate=0.5)]
        attached = attach(Model(), NAMES, rank=2, alpha=4.0, seed=0, rules=rules)
        q, k, out = (attached.layers[name] for name in NAMES)
        found = [(rate, [id(p) for p in group]) for rate, group in attached.parameter_groups()]
        assert found == [
            (1.0, [id(p) for p in (q.down, q.up, out.down, out.up)]),
            (0.5, [id(k.down), id(k.up)]),
        ]

    def test_without_rules_there_is_one_group(self) -> None:
        _, attached = attached_model()
        ((rate, group),) = attached.parameter_groups()
        assert rate == 1.0
        assert [id(p) for p in group] == [id(p) for p in attached.parameters()]

    def test_layers_that_no_rule_changes_start_as_without_it(self) -> None:
        _, plain = attached_model()
        rules = [BlockRule("attn.to_k", rank=5)]
        attached = attach(Model(), NAMES, rank=2, alpha=4.0, seed=0, rules=rules)
        for name in (NAMES[0], NAMES[2]):
            assert torch.equal(attached.layers[name].down, plain.layers[name].down)

    def test_a_pattern_without_layers_is_refused_and_nothing_changed(self) -> None:
        model = Model()
        with pytest.raises(ConfigError, match=r"'down\.\*' fits none of the 3 layers"):
            attach(model, NAMES, rank=2, alpha=4.0, seed=0, rules=[BlockRule("down.*", rank=1)])
        assert isinstance(model.attn.to_q, nn.Linear)

    @pytest.mark.parametrize(
        "values", [{"rank": 0}, {"alpha": 0.0}, {"rate": -1.0}, {"rate": math.nan}]
    )
    def test_impossible_values_are_refused(self, values: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(values))):
            BlockRule("*", **values)


class TestLoadState:
    def test_shapes_are_refused_by_name_with_both_shapes(self) -> None:
        _, attached = attached_model()
        before = attached.state()
        state = {k: v + 1 for k, v in attached.state().items()}
        state["attn.to_out.0.down"] = torch.zeros(8, 3)
        with pytest.raises(FileFormatError) as caught:
            attached.load_state(state)
        assert caught.value.where == (
            "layer attn.to_out.0: file has rank 8 (down 8x3, up 6x2), "
            "the model expects rank 2 input width 8 (down 2x8, up 6x2)"
        )
        assert all(torch.equal(v, before[k]) for k, v in attached.state().items())

    def test_missing_and_unknown_layers_are_named(self) -> None:
        _, attached = attached_model()
        state = attached.state()
        state["attn.to_x.up"] = state.pop("attn.to_q.up")
        with pytest.raises(FileFormatError) as caught:
            attached.load_state(state)
        assert caught.value.where.splitlines() == [
            "layer attn.to_q.up: is not in the file",
            "layer attn.to_x.up: is not in the model",
        ]

    def test_long_lists_are_cut_and_counted(self) -> None:
        _, attached = attached_model()
        with pytest.raises(FileFormatError) as caught:
            attached.load_state({})
        assert caught.value.where.splitlines()[-1] == "and 1 more"
