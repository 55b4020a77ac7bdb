"""Training on the full Stable Diffusion 1.5 architecture, with random weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from tests.single_files import Modules, ldm_tensors, save
from tests.tiny import put_together, tiny_tokenizer
from trainer.cli import main

GOLDEN = Path(__file__).parent / "golden" / "sd15_lora_keys.txt"
RANK = 4


def full_size_pipeline(folder: Path) -> StableDiffusionPipeline:
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
    torch.set_default_dtype(torch.float16)
    try:
        return put_together(
            tiny_tokenizer(folder),
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
    finally:
        torch.set_default_dtype(torch.float32)


def write_bases(folder: Path, *, single: bool) -> tuple[Path, Path]:
    """A full-size base in half precision: its folder, and what is trained on, the folder or a
    single file with the same weights."""
    pipeline = full_size_pipeline(folder / "words")
    pipeline.save_pretrained(folder / "base")
    if not single:
        return folder / "base", folder / "base"
    modules = Modules("sd1", pipeline.unet, pipeline.vae, pipeline.text_encoder)
    return folder / "base", save(folder / "base.safetensors", ldm_tensors(modules))


def peak_gib() -> float:
    """The most memory this process has had so far; 0 where the system does not say."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) / 2**20 if found else 0.0


def train(base: Path, folder: Path, *further: str) -> Path:
    """Two steps on one photo; the LoRA file."""
    photos = folder / "photos"
    photos.mkdir()
    Image.linear_gradient("L").convert("RGB").save(photos / "a.png")
    settings = {
        "data.resolution": 128,
        "run.total_steps": 2,
        "adapter.rank": RANK,
        "adapter.alpha": 2.0,
        "adapter.targets": "attention+ff",
        "adapter.text_encoder": "true",
        "adapter.save_precision": "fp32",
        "optimizer.warmup_steps": 0,
        "optimizer.learning_rate": 1e-3,
        "optimizer.text_encoder_learning_rate": 1e-3,
        "preview.every_steps": 0,
        "objective.prior_weight": 0,
        "model.precision": "bf16",
        "data.cache": "false",
    }
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    output = folder / "run"
    code = main(
        ["train", str(photos), "--base", str(base), "--output", str(output), *words, *further]
    )
    assert code == 0
    return output / "photos.safetensors"


def golden_rows() -> dict[str, list[str]]:
    """Name of each layer that is trained, with the shapes of down and up."""
    trained = {"unet-attention", "unet-ff-proj", "te-attention"}
    lines = GOLDEN.read_text(encoding="utf-8").splitlines()
    rows = [line.split() for line in lines if line and not line.startswith("#")]
    return {row[1]: row[2:] for row in rows if row[0] in trained}


@pytest.mark.slow
@pytest.mark.parametrize("single", [False, True], ids=["folder", "single file"])
def test_two_steps_on_the_full_architecture(
    single: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, base = write_bases(tmp_path, single=single)
    made = peak_gib()
    words = ["--set", f"model.tokenizer={folder / 'tokenizer'}"] if single else []
    path = train(base, tmp_path, *words)
    with capsys.disabled():
        print(f"\npeak memory: {made:.1f} GiB making the base, {peak_gib():.1f} GiB in all")
    with safe_open(path, "pt") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    rows = golden_rows()
    assert {name.split(".")[0] for name in written} == set(rows)
    assert len(written) == 3 * (192 + 48)
    for name, (down, up) in rows.items():
        for part, shape in (("lora_down", down), ("lora_up", up)):
            assert "x".join(map(str, written[f"{name}.{part}.weight"])) == shape
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert "fits no real" not in metadata["modelspec.title"]
    check_deltas(folder, path)


def check_deltas(base: Path, path: Path) -> None:
    """What diffusers adds to each layer is alpha / rank * up @ down of the file."""
    pipeline = StableDiffusionPipeline.from_pretrained(base, vae=None, safety_checker=None)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    tensors = load_file(path)
    layers = {
        **{f"lora_unet_{name}": layer for name, layer in wrapped(pipeline.unet)},
        **{f"lora_te_text_model_{name}": layer for name, layer in wrapped(pipeline.text_encoder)},
    }
    names = {key.partition(".")[0] for key in tensors}
    assert set(layers) == names
    moved = 0
    for name, layer in layers.items():
        parts = [tensors[f"{name}.{part}"] for part in ("lora_up.weight", "lora_down.weight")]
        up, down = (part.flatten(1) for part in parts)
        wanted = tensors[f"{name}.alpha"] / RANK * up @ down
        torch.testing.assert_close(delta_of(layer), wanted, rtol=1e-4, atol=1e-7)
        moved += bool(wanted.abs().max() > 0)
    assert moved == len(names)


def wrapped(module: Any) -> list[tuple[str, Any]]:
    """The layers that PEFT has put adapters on, by their names in a file."""
    found = [(name, part) for name, part in module.named_modules() if hasattr(part, "lora_A")]
    return [(name.removeprefix("text_model.").replace(".", "_"), part) for name, part in found]


def delta_of(layer: Any) -> Tensor:
    [adapter] = layer.lora_A
    down = layer.lora_A[adapter].weight.detach().float().flatten(1)
    up = layer.lora_B[adapter].weight.detach().float().flatten(1)
    return layer.scaling[adapter] * up @ down
