"""Key names of LoRA files: there and back, both styles of UNet names, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainer.adapters.attach import Attached, attach
from trainer.adapters.ldm_names import BlockNames, ldm_blocks, to_diffusers, to_ldm
from trainer.adapters.naming import (
    KeyNaming,
    expected_shapes,
    from_kohya,
    kohya_tensors,
    names_in,
)
from trainer.errors import FileFormatError

UNET_NAMING = KeyNaming("lora_unet")
TEXT_NAMING = KeyNaming("lora_te", insert="text_model.")


def attached_model() -> Attached:
    """Two linear layers and a 1x1 convolution with random factors."""
    torch.manual_seed(3)
    attention = nn.ModuleDict({"to_q": nn.Linear(6, 8), "to_k": nn.Linear(6, 8)})
    model = nn.ModuleDict({"attn": attention, "proj_in": nn.Conv2d(4, 6, 1)})
    names = ["attn.to_q", "attn.to_k", "proj_in"]
    attached = attach(model, names, rank=2, alpha=4.0, seed=0)
    attached.load_state({k: torch.randn(v.shape) for k, v in attached.state().items()})
    return attached


class TestNaming:
    def test_text_encoder_names_are_the_same_flat_and_nested(self) -> None:
        wanted = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
        assert TEXT_NAMING.module_name("encoder.layers.0.self_attn.q_proj") == wanted
        assert TEXT_NAMING.module_name("text_model.encoder.layers.0.self_attn.q_proj") == wanted

    def test_there_and_back(self) -> None:
        attached = attached_model()
        tensors = kohya_tensors(attached, UNET_NAMING)
        assert {k: tuple(v.shape) for k, v in tensors.items()} == expected_shapes(
            attached, UNET_NAMING
        )
        assert tensors["lora_unet_attn_to_q.alpha"].item() == 4.0
        assert all(v.dtype == torch.float32 for v in tensors.values())
        back = from_kohya(tensors, attached, UNET_NAMING)
        state = attached.state()
        assert back.keys() == state.keys()
        assert all(torch.equal(back[k], state[k]) for k in state)

    @given(alpha=st.floats(0.25, 64.0))
    @settings(max_examples=20, deadline=None)
    def test_another_alpha_gives_the_same_delta(self, alpha: float) -> None:
        attached = attached_model()
        tensors = kohya_tensors(attached, UNET_NAMING)
        tensors["lora_unet_attn_to_q.alpha"] = torch.tensor(alpha)
        layer = attached.layers["attn.to_q"]
        wanted = layer.delta() * (alpha / layer.alpha)
        attached.load_state(from_kohya(tensors, attached, UNET_NAMING))
        torch.testing.assert_close(layer.delta(), wanted)

    def test_missing_alpha_means_scale_one(self) -> None:
        attached = attached_model()
        tensors = kohya_tensors(attached, UNET_NAMING)
        del tensors["lora_unet_attn_to_q.alpha"]
        layer = attached.layers["attn.to_q"]
        wanted = layer.up.detach() @ layer.down.detach()
        attached.load_state(from_kohya(tensors, attached, UNET_NAMING))
        torch.testing.assert_close(layer.delta(), wanted)

    def test_flattened_convolution_factors_are_taken(self) -> None:
        attached = attached_model()
        tensors = kohya_tensors(attached, UNET_NAMING)
        flat = {key: value.flatten(1) if value.ndim else value for key, value in tensors.items()}
        assert flat["lora_unet_proj_in.lora_down.weight"].shape == (2, 4)
        back = from_kohya(flat, attached, UNET_NAMING)
        assert all(torch.equal(back[k], v) for k, v in attached.state().items())

    def test_other_models_are_left_aside_and_missing_layers_named(self) -> None:
        attached = attached_model()
        tensors = kohya_tensors(attached, UNET_NAMING)
        tensors["lora_te_text_model_x.lora_up.weight"] = torch.zeros(2, 2)
        for part in ("lora_up.weight", "lora_down.weight", "alpha"):
            del tensors[f"lora_unet_attn_to_k.{part}"]
        with pytest.raises(FileFormatError) as caught:
            attached.load_state(from_kohya(tensors, attached, UNET_NAMING))
        assert "layer attn.to_k.down: is not in the file" in caught.value.where

    def test_unknown_layers_are_refused_by_name(self) -> None:
        attached = attached_model()
        tensors = kohya_tensors(attached, UNET_NAMING)
        tensors["lora_unet_other.alpha"] = torch.tensor(1.0)
        with pytest.raises(FileFormatError, match=r"\(1 of 4\)") as caught:
            from_kohya(tensors, attached, UNET_NAMING)
        assert caught.value.where == "lora_unet_other"

    @pytest.mark.parametrize(
        ("part", "value"),
        [
            ("hada_w1_a", torch.zeros(2, 2)),
            ("lora_down.weight", torch.zeros(0, 6)),
            ("lora_down.weight", None),
            ("alpha", torch.zeros(3)),
        ],
    )
    def test_layers_that_are_no_plain_lora_are_refused(
        self, part: str, value: Tensor | None
    ) -> None:
        attached = attached_model()
        tensors = kohya_tensors(attached, UNET_NAMING)
        key = f"lora_unet_attn_to_q.{part}"
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value
        with pytest.raises(FileFormatError, match="not a plain LoRA") as caught:
            from_kohya(tensors, attached, UNET_NAMING)
        assert "lora_unet_attn_to_q" in caught.value.where


def small_blocks(layers: int | tuple[int, ...] = 2) -> BlockNames:
    """Three levels, as in Stable Diffusion XL."""
    return ldm_blocks(
        {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": layers,
        }
    )


class TestLdmNames:
    @pytest.mark.parametrize(
        ("diffusers", "ldm"),
        [
            ("down_blocks.0.resnets.0.conv1", "input_blocks.1.0.in_layers.2"),
            ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
            ("down_blocks.1.resnets.0.conv_shortcut", "input_blocks.4.0.skip_connection"),
            ("down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in"),
            ("down_blocks.2.attentions.1.proj_out", "input_blocks.8.1.proj_out"),
            ("mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
            ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
            ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
            ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
            ("up_blocks.2.resnets.2.conv2", "output_blocks.8.0.out_layers.3"),
        ],
    )
    def test_stable_diffusion_xl(self, diffusers: str, ldm: str) -> None:
        blocks = small_blocks()
        assert to_ldm(diffusers, blocks) == ldm
        assert to_diffusers(ldm, blocks) == diffusers
        ours, theirs = diffusers.replace(".", "_"), ldm.replace(".", "_")
        assert to_ldm(ours, blocks, "_") == theirs
        assert to_diffusers(theirs, blocks, "_") == ours

    @pytest.mark.parametrize("layers", [1, 3, 9, (1, 2, 3)])
    def test_there_and_back_for_any_number_of_layers(self, layers: int | tuple[int, ...]) -> None:
        blocks = small_blocks(layers)
        assert len({ldm for _, ldm in blocks}) == len({ours for ours, _ in blocks}) == len(blocks)
        for separator in (".", "_"):
            for ours, ldm in blocks:
                ours, ldm = (x.replace(".", separator) for x in (ours, ldm))
                assert to_ldm(ours, blocks, separator) == ldm
                assert to_diffusers(f"{ldm}{separator}x", blocks, separator) == (
                    f"{ours}{separator}x"
                )

    def test_the_last_block_without_attention(self) -> None:
        """In Stable Diffusion 1 the first sampler on the way up stands where an attention would."""
        blocks = ldm_blocks(
            {
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                "layers_per_block": 2,
            }
        )
        assert to_ldm("up_blocks.0.upsamplers.0.conv", blocks) == "output_blocks.2.1.conv"

    def test_layers_outside_of_blocks_keep_their_names(self) -> None:
        assert to_ldm("time_embedding.linear_1", small_blocks()) == "time_embedding.linear_1"

    @pytest.mark.parametrize("ldm", [False, True])
    def test_files_with_either_style_are_read(self, ldm: bool) -> None:
        path = "down_blocks.1.attentions.0.proj_in"
        naming = KeyNaming("lora_unet", blocks=small_blocks(), ldm=ldm)
        other = KeyNaming("lora_unet", blocks=small_blocks(), ldm=not ldm)
        assert naming.module_names(path) == other.module_names(path)[::-1]
        assert naming.module_name(path) == (
            "lora_unet_input_blocks_4_1_proj_in" if ldm else f"lora_unet_{path.replace('.', '_')}"
        )
        attached = attached_at(path)
        for written in (naming, other):
            tensors = kohya_tensors(attached, written)
            assert names_in(tensors, [path, "other"], naming) == {path: written.module_name(path)}
            back = from_kohya(tensors, attached, naming)
            assert all(torch.equal(back[k], v) for k, v in attached.state().items())

    def test_a_layer_under_both_names_is_refused(self) -> None:
        path = "down_blocks.1.attentions.0.proj_in"
        attached = attached_at(path)
        naming, other = (
            KeyNaming("lora_unet", blocks=small_blocks(), ldm=ldm) for ldm in (True, False)
        )
        tensors = kohya_tensors(attached, naming) | kohya_tensors(attached, other)
        with pytest.raises(FileFormatError, match="twice") as caught:
            from_kohya(tensors, attached, naming)
        assert caught.value.where.splitlines() == list(naming.module_names(path))


def attached_at(path: str) -> Attached:
    """A model with one linear layer, at this path."""
    model: nn.Module = nn.Linear(3, 5)
    for name in reversed(path.split(".")):
        model = nn.ModuleDict({name: model})
    attached = attach(model, [path], rank=2, alpha=4.0, seed=0)
    attached.load_state({k: torch.randn(v.shape) for k, v in attached.state().items()})
    return attached
