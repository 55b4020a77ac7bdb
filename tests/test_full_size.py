"""One step on the full Stable Diffusion 1.5 architecture, with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel

from tests.tiny import put_together, tiny_tokenizer
from trainer.cli import main

GOLDEN = Path(__file__).parent / "golden" / "sd15_lora_keys.txt"


def full_size_base(folder: Path) -> Path:
    """The released model's configuration, 1.07 billion random weights, 2.1 GB in half precision."""
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        hidden_act="quick_gelu",
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    pipeline = put_together(
        tiny_tokenizer(folder.parent / "words"),
        CLIPTextModel(text),
        UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=768,
            attention_head_dim=8,
            block_out_channels=(320, 640, 1280, 1280),
        ),
        AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        ),
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_step_on_the_full_architecture_writes_the_golden_keys(tmp_path: Path) -> None:
    base = full_size_base(tmp_path / "base")
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.linear_gradient("L").convert("RGB").save(photos / "a.png")
    settings = {
        "data.resolution": 128,
        "run.total_steps": 1,
        "adapter.rank": 4,
        "adapter.alpha": 4.0,
        "adapter.targets": "attention+ff",
        "preview.every_steps": 0,
        "model.precision": "bf16",
        "data.cache": "false",
    }
    arguments = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    output = tmp_path / "run"
    assert (
        main(["train", str(photos), "--base", str(base), "--output", str(output), *arguments]) == 0
    )
    with safe_open(output / "photos.safetensors", "pt") as file:
        names = file.keys()
        written = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        metadata = file.metadata()
    golden = GOLDEN.read_text(encoding="utf-8").splitlines()
    trained = {"unet-attention", "unet-ff-proj", "te-attention"}
    rows = [line.split() for line in golden if not line.startswith("#")]
    named = {row[1]: row[2:] for row in rows if row[0] in trained}
    assert {name.split(".")[0] for name in written} == set(named)
    assert len(written) == 3 * (192 + 48)
    for name, (down, up) in named.items():
        for part, shape in (("lora_down", down), ("lora_up", up)):
            assert "x".join(map(str, written[f"{name}.{part}.weight"])) == shape
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert "fits no real" not in metadata["modelspec.title"]
