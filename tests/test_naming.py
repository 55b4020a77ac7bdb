"""Key names of LoRA files: there and back, what is refused, and the table of real SD 1.5."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from trainer.adapters.attach import Attached, attach
from trainer.adapters.naming import KeyNaming, expected_shapes, from_kohya, kohya_tensors
from trainer.errors import FileFormatError

GOLDEN = Path(__file__).parent / "golden"
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


UNET_GROUPS = {
    "unet-attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "unet-ff-proj": ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
}
TEXT_GROUPS = {
    "te-attention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "te-mlp": ("fc1", "fc2"),
}


def key_table(
    model: nn.Module, groups: Mapping[str, tuple[str, ...]], naming: KeyNaming
) -> list[str]:
    """Lines "<group> <module name> <down shape> <up shape>" at rank 4."""
    lines = []
    for group, endings in groups.items():
        dotted = tuple(f".{ending}" for ending in endings)
        names = [name for name, _ in model.named_modules() if name.endswith(dotted)]
        attached = attach(model, names, rank=4, alpha=4.0, seed=0)
        shapes = expected_shapes(attached, naming)
        attached.detach()
        assert len(shapes) == 3 * len(names)
        for name in names:
            module = naming.module_name(name)
            down, up = (
                "x".join(map(str, shapes[f"{module}.{part}.weight"]))
                for part in ("lora_down", "lora_up")
            )
            assert shapes[f"{module}.alpha"] == ()
            lines.append(f"{group} {module} {down} {up}")
    return lines


def test_names_and_shapes_for_stable_diffusion_1_5() -> None:
    """The golden table was checked against kohya's trainer and ComfyUI: 264 modules."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, layers_per_block=2
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                projection_dim=768,
            )
        )
    lines = key_table(unet, UNET_GROUPS, UNET_NAMING) + key_table(text, TEXT_GROUPS, TEXT_NAMING)
    golden = (GOLDEN / "sd15_lora_keys.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(lines) == [line for line in golden if not line.startswith("#")]
