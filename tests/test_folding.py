"""Ranks and alphas that differ: the file gives the same update, and diffusers applies it."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.models import namings_of, small_components
from trainer.adapters.attach import Attached, attach
from trainer.adapters.folding import WrittenForm, without_filling, written_forms
from trainer.adapters.naming import (
    KeyNaming,
    expected_shapes,
    from_kohya,
    kohya_tensors,
    names_in,
)
from trainer.adapters.plans import BlockRule
from trainer.adapters.targets import select_layers

NAMING = KeyNaming("lora_unet")
LAYERS = ("attn.to_q", "attn.to_k", "proj_in", "conv1", "conv2")


class Block(nn.Module):
    """Two linear layers, a 1x1 and two 3x3 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"to_q": nn.Linear(6, 8), "to_k": nn.Linear(6, 8)})
        self.proj_in = nn.Conv2d(4, 6, 1)
        self.conv1 = nn.Conv2d(4, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 4, (3, 1), stride=2)


def randomized(attached: Attached) -> Attached:
    draw = torch.Generator().manual_seed(7)
    state = attached.state()
    attached.load_state({k: torch.randn(v.shape, generator=draw) for k, v in state.items()})
    return attached


def block(rules: list[BlockRule], names: tuple[str, ...] = LAYERS) -> Attached:
    torch.manual_seed(3)
    return randomized(attach(Block(), names, rank=4, alpha=2.0, seed=0, rules=rules))


def written_delta(tensors: dict[str, Tensor], name: str) -> Tensor:
    """alpha / rank * up @ down of a file, as kohya's trainer defines it."""
    down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
    scale = tensors[f"{name}.alpha"].item() / down.shape[0]
    return scale * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


class TestForms:
    def test_layers_that_are_alike_are_written_as_they_are(self) -> None:
        attached = block([BlockRule("attn.*", rank=4, alpha=2.0, rate=0.1)])
        tensors, state = kohya_tensors(attached, NAMING), attached.state()
        for path in LAYERS:
            name = NAMING.module_name(path)
            assert torch.equal(tensors[f"{name}.lora_down.weight"], state[f"{path}.down"])
            assert torch.equal(tensors[f"{name}.lora_up.weight"], state[f"{path}.up"])
            assert tensors[f"{name}.alpha"].item() == 2.0

    def test_only_alphas_differ(self) -> None:
        attached = block([BlockRule("proj_in", alpha=8.0)])
        assert set(written_forms(attached.layers).values()) == {WrittenForm(4, 4.0)}

    def test_wide_convolutions_keep_their_rank_while_they_are_few(self) -> None:
        rules = [BlockRule("attn.to_q", rank=8), BlockRule("conv?", rank=2, alpha=1.0)]
        forms = written_forms(block(rules).layers)
        assert [forms[path].rank for path in LAYERS] == [8, 8, 8, 2, 2]
        assert all(form.alpha == form.rank for form in forms.values())

    def test_wide_convolutions_are_filled_where_they_would_set_the_rank(self) -> None:
        rules = [BlockRule("conv?", rank=2)]
        forms = written_forms(block(rules, ("attn.to_q", "conv1", "conv2")).layers)
        assert {form.rank for form in forms.values()} == {4}

    def test_wide_convolutions_alone_keep_their_ranks(self) -> None:
        forms = written_forms(block([BlockRule("conv2", rank=2)], ("conv1", "conv2")).layers)
        assert [form.rank for form in forms.values()] == [4, 2]


@given(
    ranks=st.lists(st.integers(1, 6), min_size=5, max_size=5),
    alphas=st.lists(st.floats(0.25, 32.0), min_size=5, max_size=5),
)
@settings(max_examples=30, deadline=None)
def test_the_file_gives_the_same_update(ranks: list[int], alphas: list[float]) -> None:
    rules = [
        BlockRule(path, rank=rank, alpha=alpha)
        for path, rank, alpha in zip(LAYERS, ranks, alphas, strict=True)
    ]
    attached = block(rules)
    tensors = kohya_tensors(attached, NAMING)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    assert shapes == expected_shapes(attached, NAMING)
    for path, layer in attached.layers.items():
        delta, expected = written_delta(tensors, NAMING.module_name(path)), layer.delta()
        # Numbers near zero are differences of large ones: what is rounded is a share of those.
        largest = expected.abs().max().item()
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-5 * largest)
    # And the same layers take it back.
    again = block(rules)
    again.load_state(from_kohya(tensors, again, NAMING))
    for path, layer in attached.layers.items():
        expected = layer.delta()
        largest = expected.abs().max().item()
        torch.testing.assert_close(
            again.layers[path].delta(), expected, rtol=1e-5, atol=1e-5 * largest
        )


def test_a_rank_that_is_really_larger_is_not_cut() -> None:
    down, up = torch.ones(3, 2), torch.ones(4, 3)
    assert without_filling(down, up, 2)[0].shape == (3, 2)
    down[2], up[:, 2] = 0, 0
    cut_down, cut_up = without_filling(down, up, 2)
    assert (cut_down.shape, cut_up.shape) == ((2, 2), (4, 2))
    assert cut_down.all()
    assert cut_up.all()


# --- what diffusers makes of it


MIXED = {
    "unet": [
        BlockRule("*.attn2.*", rank=2, alpha=4.0),
        BlockRule("mid_block.*", rank=6),
        BlockRule("*.ff.*", alpha=0.5),
        BlockRule("*.resnets.*", rank=3, alpha=1.0),
    ],
    "text_encoder": [BlockRule("*.mlp.*", rank=2, alpha=1.0)],
    "text_encoder_2": [BlockRule("*.layers.1.*", rank=7, alpha=3.0)],
}


def applied_by_diffusers(
    family: str, models: dict[str, nn.Module], tensors: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """{component: {path: update of the weight}} after diffusers has loaded a file's tensors."""
    unet = models["unet"]
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    state, alphas = kind.lora_state_dict(dict(tensors), unet_config=unet.config)
    kind.load_lora_into_unet(state, network_alphas=alphas, unet=unet)
    for component in models.keys() - {"unet"}:
        kind.load_lora_into_text_encoder(
            state, network_alphas=alphas, text_encoder=models[component], prefix=component
        )
    updates: dict[str, dict[str, Tensor]] = {}
    for component, model in models.items():
        updates[component] = {}
        for path, module in model.named_modules():
            if hasattr(module, "lora_A") and len(module.lora_A):
                (adapter,) = module.lora_A
                down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                delta = module.scaling[adapter] * (up.flatten(1) @ down.flatten(1))
                updates[component][path] = delta.unflatten(1, down.shape[1:]).detach()
    return updates


def trained_file(
    family: str, models: dict[str, nn.Module], rules: dict[str, list[BlockRule]], strength: float
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The tensors of a file, and {component: {path: update}} of what they were made from."""
    tensors: dict[str, Tensor] = {}
    updates: dict[str, dict[str, Tensor]] = {}
    namings = namings_of(family, models)
    for component, model in models.items():
        targets = "all" if component == "unet" else "attention+mlp"
        paths = select_layers(model, component, targets)
        attached = attach(model, paths, rank=4, alpha=2.0, seed=0, rules=rules.get(component, ()))
        randomized(attached)
        tensors |= kohya_tensors(attached, namings[component], strength)
        updates[component] = {path: strength * x.delta() for path, x in attached.layers.items()}
        attached.detach()
    return tensors, updates


@pytest.mark.parametrize(
    ("family", "mixed", "strength"),
    [("sd1", True, 0.75), ("sd2", True, 1.0), ("sdxl", False, 0.75), ("sdxl", True, 1.0)],
)
def test_diffusers_applies_the_same_update(family: str, mixed: bool, strength: float) -> None:
    models = small_components(family)
    tensors, wanted = trained_file(family, models, MIXED if mixed else {}, strength)
    for component, model in models.items():
        held = names_in(tensors, wanted[component], namings_of(family, models)[component])
        assert held.keys() == wanted[component].keys(), type(model)
    found = applied_by_diffusers(family, models, tensors)
    for component, updates in wanted.items():
        assert found[component].keys() == updates.keys()
        for path, update in updates.items():
            torch.testing.assert_close(
                found[component][path], update, rtol=1e-5, atol=1e-6, msg=path
            )
