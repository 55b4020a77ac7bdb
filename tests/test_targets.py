"""Which layers a target set stands for, and patterns that narrow it."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from tests.models import components_of, small_unet
from trainer.adapters.attach import attach
from trainer.adapters.targets import TEXT_TARGETS, UNET_TARGETS, select_layers
from trainer.errors import ConfigError


def unet_layers(targets: str, **patterns: list[str]) -> tuple[str, ...]:
    return select_layers(components_of("sd1")["unet"], "unet", targets, **patterns)


def text_layers(targets: str, **patterns: list[str]) -> tuple[str, ...]:
    model = components_of("sd1")["text_encoder"]
    return select_layers(model, "text_encoder", targets, **patterns)


class TestSets:
    def test_each_holds_the_smaller_ones(self) -> None:
        sets = {name: set(unet_layers(name)) for name in UNET_TARGETS}
        assert sets["cross-kv"] < sets["cross-attention"] < sets["attention"]
        assert sets["attention"] < sets["attention+ff"] < sets["all"]
        assert set(text_layers("attention")) < set(text_layers("attention+mlp"))
        assert (len(sets["cross-kv"]), len(sets["cross-attention"])) == (32, 64)

    @pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
    def test_all_leaves_nothing_but_what_stands_outside_of_blocks(self, family: str) -> None:
        unet = components_of(family)["unet"]
        layers = {n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        rest = layers - set(select_layers(unet, "unet", "all"))
        xl = {"add_embedding.linear_1", "add_embedding.linear_2"} if family == "sdxl" else set()
        assert rest == {
            "conv_in",
            "conv_out",
            "time_embedding.linear_1",
            "time_embedding.linear_2",
            *xl,
        }

    def test_both_layouts_of_a_text_encoder(self) -> None:
        models = components_of("sdxl")
        flat = select_layers(models["text_encoder"], "text_encoder", "attention")
        nested = select_layers(models["text_encoder_2"], "text_encoder_2", "attention")
        assert flat[0] == "encoder.layers.0.self_attn.k_proj"
        assert nested[0] == "text_model.encoder.layers.0.self_attn.k_proj"
        assert (len(flat), len(nested)) == (48, 128)

    @pytest.mark.parametrize(
        ("component", "targets", "choice"),
        [("unet", "attention+mlp", UNET_TARGETS), ("text_encoder", "attention+ff", TEXT_TARGETS)],
    )
    def test_an_unknown_set_is_refused_with_the_known(
        self, component: str, targets: str, choice: dict[str, object]
    ) -> None:
        with pytest.raises(
            ConfigError, match=re.escape(f"'{targets}' for the {component}.")
        ) as caught:
            select_layers(components_of("sd1")[component], component, targets)
        assert ", ".join(choice) in caught.value.fix

    def test_layers_of_another_type_are_left_out(self) -> None:
        model = nn.ModuleDict(
            {"a": nn.ModuleDict({"to_q": nn.LayerNorm(2), "to_k": nn.Linear(2, 2)})}
        )
        assert select_layers(model, "unet", "attention") == ("a.to_k",)


class TestPatterns:
    def test_include_narrows_and_exclude_leaves_out(self) -> None:
        whole = unet_layers("attention")
        some = unet_layers(
            "attention", include=["down_blocks.1.*", "mid_block.*"], exclude=["*.attn1.*"]
        )
        assert some == tuple(
            path
            for path in whole
            if path.startswith(("down_blocks.1.", "mid_block.")) and ".attn2." in path
        )
        assert len(some) == 12

    @pytest.mark.parametrize("kind", ["include", "exclude"])
    def test_a_pattern_that_fits_nothing_is_named(self, kind: str) -> None:
        patterns = {kind: ["mid_block.*", "down_block.1.*"]}
        with pytest.raises(
            ConfigError, match=r"'down_block\.1\.\*' fits none of the 128"
        ) as caught:
            unet_layers("attention", **patterns)
        assert set(caught.value.where.splitlines()) <= set(unet_layers("attention"))
        assert caught.value.where

    def test_nothing_left_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="No layer of the unet is left") as caught:
            unet_layers("attention", include=["*.attn1.*"], exclude=["*.attentions.*"])
        assert caught.value.where.splitlines() == ["include *.attn1.*", "exclude *.attentions.*"]

    def test_whole_layers_of_a_text_encoder(self) -> None:
        some = text_layers("attention+mlp", include=["encoder.layers.1?.*"], exclude=["*.mlp.*"])
        assert len(some) == 8

    @pytest.mark.parametrize("targets", ["attention", "attention+mlp"])
    def test_an_attention_of_a_text_encoder_stays_whole(self, targets: str) -> None:
        with pytest.raises(ConfigError, match="only be trained together") as caught:
            text_layers(targets, exclude=["encoder.layers.3.*.out_proj"])
        assert caught.value.where == "left out: encoder.layers.3.self_attn.out_proj"

    def test_the_attention_of_a_unet_may_be_split(self) -> None:
        assert len(unet_layers("attention", exclude=["*.to_out.0"])) == 96


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_whole_unet_with_everything_adapted_is_the_merged_one(family: str) -> None:
    """Down- and up-sampling too: adapted layers are called as the model calls its own."""
    unet = small_unet(family).eval()
    draw = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, 4, 8, 8, generator=draw)
    prompt = torch.randn(2, 5, 16, generator=draw)
    added = {"text_embeds": torch.randn(2, 16, generator=draw), "time_ids": torch.ones(2, 6)}
    added_or_none = added if family == "sdxl" else None

    @torch.no_grad()
    def predict() -> torch.Tensor:
        output = unet(noisy, 7, prompt, added_cond_kwargs=added_or_none, return_dict=False)
        prediction: torch.Tensor = output[0]
        return prediction

    plain = predict()
    attached = attach(unet, select_layers(unet, "unet", "all"), rank=2, alpha=1.0, seed=0)
    # A convolution with an adapter may lie in memory in another order, which changes last digits.
    torch.testing.assert_close(predict(), plain, rtol=0, atol=1e-5)
    state = attached.state()
    attached.load_state({k: 0.2 * torch.randn(v.shape, generator=draw) for k, v in state.items()})
    adapted = predict()
    assert (adapted - plain).abs().max() > 1e-3
    with torch.no_grad():
        for layer in attached.layers.values():
            layer.base.weight += layer.delta()
    attached.detach()
    torch.testing.assert_close(predict(), adapted, rtol=1e-4, atol=1e-5)
