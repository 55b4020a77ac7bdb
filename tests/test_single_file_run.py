"""A whole training on a base that is a single file, from the command line to the metadata."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from tests.conftest import QUICK
from tests.runs import run_cli
from tests.single_files import ldm_tensors, save, small_modules
from tests.tiny import tiny_tokenizer
from trainer.adapters.file import read_lora


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_single_file_is_trained_on_and_named(family: str, photos: Path, tmp_path: Path) -> None:
    base = save(tmp_path / "my base.safetensors", ldm_tensors(small_modules(family)))
    tokenizer = tmp_path / "words" / "tokenizer"
    tiny_tokenizer(tmp_path / "made").save_pretrained(tokenizer)
    output = tmp_path / "out"
    words = [*QUICK, "run.total_steps=2", "data.resolution=64", "data.bucket_step_px=32"]
    assert (
        run_cli(
            *("train", photos, "--output", output, "--base", base),
            *("--tokenizer", tmp_path / "words"),
            *(f"--set={word}" for word in words),
        )
        == 0
    )
    metadata = read_lora(output / "anna.safetensors").metadata
    content = base.read_bytes()
    assert metadata["ss_sd_model_name"] == "my base"
    assert metadata["ss_new_sd_model_hash"] == hashlib.sha256(content).hexdigest()
    part = content[2**20 : 2**20 + 2**16]
    assert metadata["ss_sd_model_hash"] == hashlib.sha256(part).hexdigest()[:8]
    version = {"sd1": "sd_v1", "sdxl": "sdxl_base_v1-0"}[family]
    assert metadata["ss_base_model_version"] == version
    assert StableDiffusionPipeline.lora_state_dict(output / "anna.safetensors")
