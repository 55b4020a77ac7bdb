"""The SD 1.x family: facts, layers of the released architecture, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tests.learners import load_backbone
from tests.tiny import tiny_pipeline
from trainer.errors import ModelError
from trainer.families import FAMILIES, BaseFacts, LoadOptions
from trainer.families.detect import inspect_base
from trainer.families.sd1 import FAMILY, StableDiffusion1Backbone

CPU = torch.device("cpu")

# The configuration of Stable Diffusion 1.5's UNet, as published with its weights.
SD15_UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-05,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
# CLIP ViT-L/14's text encoder.
SD15_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}


def facts(base: Path) -> BaseFacts:
    return inspect_base(base)


def edit(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, **changes}), encoding="utf-8")


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    """A base that may be spoilt."""
    return Path(shutil.copytree(base, tmp_path / "copy"))


# --- facts


def test_the_tiny_base_is_recognised(base: Path) -> None:
    assert facts(base) == BaseFacts(
        family="sd1",
        name="tiny",
        folder=base,
        resolution=32,
        bucket_step_px=8,
        width=16,
        pixels_per_latent=4,
        prediction="epsilon",
        fits_real=False,
        embedded=False,
    )


def test_v_prediction_is_read_from_the_scheduler(v_base: Path) -> None:
    assert facts(v_base).prediction == "v_prediction"


def test_a_released_model_is_told_from_small_ones(copy: Path) -> None:
    edit(copy / "unet" / "config.json", **SD15_UNET)
    edit(copy / "vae" / "config.json", block_out_channels=[128, 256, 512, 512])
    found = facts(copy)
    assert found.fits_real
    assert (found.resolution, found.pixels_per_latent, found.bucket_step_px) == (512, 8, 64)
    edit(copy / "unet" / "config.json", block_out_channels=[320, 640, 1280, 1300])
    assert not facts(copy).fits_real


# --- layers of the released architecture


@pytest.fixture(scope="module")
def released() -> StableDiffusion1Backbone:
    """Stable Diffusion 1.5 without its weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(SD15_UNET)
        text_encoder = CLIPTextModel(CLIPTextConfig(**SD15_TEXT))
    return StableDiffusion1Backbone(
        facts=None,  # type: ignore[arg-type]
        tokenizer=None,
        text_encoder=text_encoder,
        unet=unet,
        vae=None,
        scheduler=None,
    )


@pytest.mark.parametrize(
    ("component", "targets", "count"),
    [
        ("unet", "attention", 128),
        ("unet", "attention+ff", 192),
        ("unet", "cross-attention", 64),
        ("unet", "cross-kv", 32),
        ("text_encoder", "attention", 48),
        ("text_encoder", "attention+ff", 48),
    ],
)
def test_the_layers_of_sd15(
    component: str, targets: str, count: int, released: StableDiffusion1Backbone
) -> None:
    names = released.layer_names(component, targets)
    assert len(names) == len(set(names)) == count
    modules = dict(released.components[component].named_modules())
    assert all(isinstance(modules[name], torch.nn.Linear | torch.nn.Conv2d) for name in names)


def test_the_wider_target_holds_the_narrower(released: StableDiffusion1Backbone) -> None:
    attention = set(released.layer_names("unet", "attention"))
    assert attention < set(released.layer_names("unet", "attention+ff"))
    assert all(".attentions." in name for name in released.layer_names("unet", "attention+ff"))


def test_the_keys_of_sd15_are_those_on_record(released: StableDiffusion1Backbone) -> None:
    from trainer.adapters.naming import KeyNaming

    recorded = (Path(__file__).parent / "golden" / "sd15_lora_keys.txt").read_text(encoding="utf-8")
    lines = [line.split() for line in recorded.splitlines() if not line.startswith("#")]
    keys = {words[1] for words in lines if words}
    for component, prefix in released.names.prefixes.items():
        names = released.layer_names(component, "attention+ff")
        made = {KeyNaming(*prefix).module_name(name) for name in names}
        assert made
        assert made <= keys


# --- a loaded base


def test_latents_have_the_shape_that_is_foretold(base: Path) -> None:
    backbone = load_backbone(base)
    assert backbone.latent_shape(48, 32) == (4, 8, 12)
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.zeros(2, 4, 8, 12)
    latents = backbone.encode_pixels(pixels, noise)
    assert latents.shape == (2, 4, 8, 12)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, backbone.encode_pixels(pixels, noise))
    assert not torch.equal(latents, backbone.encode_pixels(pixels, noise + 1))


@pytest.mark.parametrize(
    ("text", "count"), [("", 0), ("abc", 3), ("ab cd", 4), ("a" * 75, 75), ("a" * 100, 100)]
)
def test_tokens_are_counted_without_start_and_end(text: str, count: int, base: Path) -> None:
    assert load_backbone(base).token_count(text) == count


def test_text_beyond_75_tokens_is_cut_off(base: Path) -> None:
    backbone = load_backbone(base)
    with torch.no_grad():
        short, long, other = backbone.encode_prompts(["a " * 75, "a " * 200, "a " * 74 + "b"])
    assert torch.equal(short, long)
    assert not torch.equal(short, other)
    assert short.shape == (77, 16)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_attentions_answer_alike(attention: str, base: Path) -> None:
    def answer(kind: str) -> torch.Tensor:
        backbone = FAMILY.load(facts(base), LoadOptions(CPU, torch.float32, kind))
        noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            prompts = backbone.encode_prompts(["a", "b"])
            return backbone.predict(noisy, torch.tensor([1, 900]), prompts)

    torch.testing.assert_close(answer(attention), answer("sdpa"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_loaded_in_the_precision_asked_for_and_frozen(
    dtype: torch.dtype, base: Path
) -> None:
    backbone = FAMILY.load(facts(base), LoadOptions(CPU, dtype, "sdpa"))
    modules = [*backbone.components.values(), backbone.pipeline().vae]
    parameters = [p for module in modules for p in module.parameters()]
    assert {p.dtype for p in parameters} == {dtype}
    assert not any(p.requires_grad for p in parameters)
    assert not any(module.training for module in modules)
    noisy = torch.zeros(1, 4, 8, 8)
    with torch.no_grad():
        answer = backbone.predict(noisy, torch.tensor([1]), backbone.encode_prompts(["a"]))
    assert answer.dtype == torch.float32


def test_a_base_of_mixed_precision_is_loaded_in_one(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(tmp_path / "parts")
    pipeline.unet.half()
    pipeline.save_pretrained(tmp_path / "mixed")
    backbone = load_backbone(tmp_path / "mixed")
    assert {p.dtype for p in backbone.components["unet"].parameters()} == {torch.float32}


def test_a_base_saved_as_pickle_files_is_loaded_too(base: Path, tmp_path: Path) -> None:
    """diffusers and transformers read .bin files with tensors alone (weights_only)."""
    tiny_pipeline(tmp_path / "parts").save_pretrained(tmp_path / "old", safe_serialization=False)
    old = load_backbone(tmp_path / "old").components["unet"].state_dict()
    new = load_backbone(base).components["unet"].state_dict()
    assert all(torch.equal(old[name], new[name]) for name in new)


# --- what cannot be trained


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        FAMILY.load(inspect_base(folder), LoadOptions(CPU, torch.float32, "sdpa"))
    assert str(folder) in str(caught.value)
    return str(caught.value)


SPOILERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: shutil.rmtree(folder), "no such base model"),
    "empty": (
        lambda folder: (folder / "model_index.json").unlink(),
        "not a base model in diffusers format",
    ),
    "not JSON": (
        lambda folder: (folder / "model_index.json").write_text("{", encoding="utf-8"),
        "cannot be read",
    ),
    "a list": (
        lambda folder: (folder / "unet" / "config.json").write_text("[]", encoding="utf-8"),
        "not what it should be",
    ),
    "SDXL": (
        lambda folder: edit(folder / "model_index.json", _class_name="StableDiffusionXLPipeline"),
        "StableDiffusionXLPipeline",
    ),
    "SD 2": (
        lambda folder: edit(folder / "unet" / "config.json", use_linear_projection=True),
        "cannot be trained yet",
    ),
    "inpainting": (
        lambda folder: edit(folder / "unet" / "config.json", in_channels=9),
        "inpainting",
    ),
    "unet without channels": (
        lambda folder: edit(folder / "unet" / "config.json", block_out_channels=None),
        "cannot be loaded",
    ),
    "vae without channels": (
        lambda folder: (folder / "vae" / "config.json").write_text("{}", encoding="utf-8"),
        "not complete",
    ),
    "no unet": (lambda folder: shutil.rmtree(folder / "unet"), "is missing"),
    "no vae": (lambda folder: shutil.rmtree(folder / "vae"), "is missing"),
    "no scheduler": (lambda folder: shutil.rmtree(folder / "scheduler"), "is missing"),
    "no text encoder": (lambda folder: shutil.rmtree(folder / "text_encoder"), "is missing"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "has no words"),
    "no weights": (
        lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
        "cannot be loaded",
    ),
    "no text weights": (
        lambda folder: (folder / "text_encoder" / "model.safetensors").unlink(),
        "cannot be loaded",
    ),
    "damaged weights": (
        lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"x"),
        "cannot be loaded",
    ),
    "unknown sampler": (
        lambda folder: edit(folder / "scheduler" / "scheduler_config.json", _class_name="Nope"),
        "cannot be loaded",
    ),
}


@pytest.mark.parametrize("name", SPOILERS)
def test_what_is_wrong_with_a_base_is_said(name: str, copy: Path) -> None:
    spoil, words = SPOILERS[name]
    spoil(copy)
    assert words in refused(copy)


def test_a_single_file_says_how_to_convert_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    assert "from_single_file" in refused(path)


def test_every_family_of_the_table_can_be_loaded() -> None:
    for name in FAMILIES:
        assert callable(FAMILIES.load(name).read_facts)
