"""The families: facts, prompts, loading, drawing, and what is refused."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.learners import load_backbone, vae_of
from tests.single_files import ldm_tensors, save, small_modules
from tests.tiny import save_tiny, tiny_pipeline, tiny_tokenizer
from trainer.diffusion.schedule import schedule_from_config
from trainer.errors import ModelError
from trainer.families import FAMILIES, AttentionFacts, BaseFacts, LoadOptions
from trainer.families import backbone as backbone_module
from trainer.families.detect import inspect_base
from trainer.families.sd1 import FAMILY
from trainer.training.preview import decode, draw_latents
from trainer.types import Size

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
        attention=AttentionFacts(heads=2, head_width=8, latents_per_token=1),
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
        prompts = backbone.encode_prompts(["a " * 75, "a " * 200, "a " * 74 + "b"])
    short, long, other = prompts.embeddings_BTD
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
    modules = [*backbone.components.values(), vae_of(backbone)]
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


@pytest.mark.parametrize("name", ["sd1", "sd2-v", "sdxl"])
def test_a_base_of_any_family_answers_the_same_from_a_single_file(
    name: str, tmp_path: Path
) -> None:
    family = name.partition("-")[0]
    modules = small_modules(family)
    path = save(tmp_path / "model.safetensors", ldm_tensors(modules))
    tiny_tokenizer(tmp_path / "words").save_pretrained(tmp_path / "tokenizer")
    prediction = "v_prediction" if name == "sd2-v" else "epsilon"
    found = replace(inspect_base(path, prediction=prediction), tokenizer=tmp_path / "tokenizer")
    assert FAMILIES.load(family).token_counter(found)("ab") == 2
    backbone = FAMILIES.load(family).load(found, LoadOptions(CPU, torch.float32, "sdpa"))
    assert backbone.scheduler_config["prediction_type"] == prediction
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    steps, sizes = torch.tensor([500]), torch.tensor([[32, 32, 0, 0, 32, 32]])
    with torch.no_grad():
        prompts = backbone.encode_prompts(["ab"])
        answer = backbone.predict(noisy, steps, prompts)
        added = {"text_embeds": prompts.pooled_BP, "time_ids": sizes}
        wanted = modules.unet(
            noisy, steps, encoder_hidden_states=prompts.embeddings_BTD, added_cond_kwargs=added
        ).sample
    torch.testing.assert_close(answer, wanted)
    assert prompts.embeddings_BTD.shape == (1, 77, found.width)
    assert (prompts.pooled_BP is not None) == (found.pooled > 0) == (family == "sdxl")


def test_what_the_facts_say_of_the_prediction_holds_against_the_folder(base: Path) -> None:
    """For models whose folder does not say what its author does."""
    found = replace(facts(base), prediction="v_prediction", zero_terminal_snr=True)
    backbone = FAMILY.load(found, LoadOptions(CPU, torch.float32, "sdpa"))
    schedule = schedule_from_config(backbone.scheduler_config)
    assert schedule.prediction == "v_prediction"
    assert float(schedule.alphas_cumprod_N[-1]) == 0
    scheduler = backbone.pipeline().scheduler
    assert scheduler.config.timestep_spacing == "trailing"
    assert float(scheduler.alphas_cumprod[-1]) < 1e-6
    scheduler.set_timesteps(4)
    assert int(scheduler.timesteps[0]) == 999


# --- number formats and what leaves the device


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("sdxl") / "sdxl", "sdxl")


@pytest.mark.parametrize(
    ("dtype", "upcast", "expected"),
    [
        (torch.float16, True, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float16, False, torch.float16),
        (torch.bfloat16, True, torch.bfloat16),
    ],
)
def test_the_vae_of_sdxl_runs_where_it_is_safe(
    dtype: torch.dtype, upcast: bool | None, expected: torch.dtype, sdxl: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sdxl, tmp_path / "copy"))
    config = folder / "vae" / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("force_upcast")
    if upcast is not None:
        values["force_upcast"] = upcast
    config.write_text(json.dumps(values), encoding="utf-8")
    backbone = load_backbone(folder, dtype=dtype)
    vae = vae_of(backbone)
    assert {weight.dtype for weight in vae.parameters()} == {expected}
    assert backbone.components["unet"].dtype == dtype
    assert bool(backbone.notices) == (expected != dtype)
    assert all("fp32" in notice for notice in backbone.notices)
    pixels, noise = torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 8, 8)
    if expected != torch.float16:
        with torch.no_grad():
            assert backbone.encode_pixels(pixels, noise).dtype == torch.float32


def test_the_vae_of_sd1_is_safe_in_half_precision(base: Path) -> None:
    backbone = load_backbone(base, dtype=torch.float16)
    assert vae_of(backbone).dtype == torch.float16
    assert backbone.notices == ()


def test_parts_that_are_released_come_back_when_they_are_used(
    sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(sdxl)
    # As on a GPU, where what is released stays in main memory.
    monkeypatch.setattr(backbone, "device", torch.device("cuda:0"))
    places: dict[str, list[str]] = {"vae": [], "text_encoder": [], "text_encoder_2": []}

    def record(name: str, module: torch.nn.Module) -> None:
        monkeypatch.setattr(module, "to", lambda device: places[name].append(str(device)))

    record("vae", vae_of(backbone))
    record("text_encoder", backbone.components["text_encoder"])
    record("text_encoder_2", backbone.components["text_encoder_2"])
    with backbone.complete():
        assert not any(places.values())  # nothing was released
    backbone.release("vae", "text_encoder", "text_encoder_2")
    with backbone.complete(), backbone.complete():
        assert {name: moves[-1] for name, moves in places.items()} == dict.fromkeys(
            places, "cuda:0"
        )
    assert all(moves == ["cpu", "cuda:0", "cpu"] for moves in places.values())
    with backbone.complete("vae"):
        pass
    assert places["vae"] == ["cpu", "cuda:0"] * 2 + ["cpu"]
    assert places["text_encoder"] == places["text_encoder_2"] == ["cpu", "cuda:0", "cpu"]
    with torch.no_grad():
        backbone.encode_prompts(["a"])
        backbone.encode_prompts(["b"])
    assert places["text_encoder"] == places["text_encoder_2"] == ["cpu", "cuda:0", "cpu", "cuda:0"]
    with pytest.raises(ZeroDivisionError), backbone.complete():
        raise ZeroDivisionError
    assert places["vae"] == ["cpu", "cuda:0"] * 3 + ["cpu"]


def test_on_the_processor_parts_are_read_when_they_are_used_and_forgotten_when_released(
    sdxl: Path,
) -> None:
    backbone: Any = load_backbone(sdxl)
    assert not backbone.held
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = backbone.encode_prompts(["a"])
        assert set(backbone.held) == {"text_encoder", "text_encoder_2"}
        picture = backbone.decode_latents(latents)
    drawn = draw_latents(backbone, ["a"], [1], size=Size(32, 32), steps=2, guidance=2.0)
    unet = backbone.components["unet"]
    encoder = weakref.ref(backbone.components["text_encoder"])
    vae = weakref.ref(vae_of(backbone))
    backbone.release("vae", "text_encoder", "text_encoder_2")
    gc.collect()
    assert set(backbone.held) == {"unet"}
    assert encoder() is None
    assert vae() is None
    with backbone.complete("vae"):
        assert torch.equal(backbone.decode_latents(latents), picture)
    again = draw_latents(backbone, ["a"], [1], size=Size(32, 32), steps=2, guidance=2.0)
    assert torch.equal(again, drawn)
    assert set(backbone.held) == {"unet"}
    with torch.no_grad():
        after = backbone.encode_prompts(["a"])
    assert torch.equal(after.embeddings_BTD, before.embeddings_BTD)
    assert backbone.components["unet"] is unet


def test_what_is_done_to_components_is_done_whenever_they_are_read(sdxl: Path) -> None:
    seen: list[str] = []
    backbone = load_backbone(sdxl, finish=lambda module: seen.append(type(module).__name__))
    with torch.no_grad():
        backbone.encode_prompts(["a"])
        backbone.release("text_encoder", "text_encoder_2")
        backbone.encode_prompts(["a"])
    backbone.hold("vae", "unet")
    assert seen == [*["CLIPTextModel", "CLIPTextModelWithProjection"] * 2, "UNet2DConditionModel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_unet_is_what_diffusers_reads(dtype: torch.dtype, sdxl: Path) -> None:
    theirs = UNet2DConditionModel.from_pretrained(str(sdxl), subfolder="unet", torch_dtype=dtype)
    ours = load_backbone(sdxl, dtype=dtype).components["unet"]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for one, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_what_is_released_leaves_its_memory_and_draws_the_same(
    dtype: torch.dtype, sdxl: Path
) -> None:
    backbone = load_backbone(sdxl, device=torch.device("cuda"), dtype=dtype)

    def drawn() -> torch.Tensor:
        size = Size(32, 32)
        return draw_latents(backbone, ["a"], [1], size=size, steps=2, guidance=2.0)

    before, held = drawn(), torch.cuda.memory_allocated()
    backbone.release("vae", "text_encoder", "text_encoder_2")
    assert torch.cuda.memory_allocated() < held
    assert torch.equal(drawn(), before)
    assert torch.isfinite(before).all()
    assert vae_of(backbone).device.type == "cpu"
    assert len(decode(backbone, before)) == 1
    weights = backbone.components["text_encoder_2"].parameters()
    assert {weight.device.type for weight in weights} == {"cpu"}


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried ...")])
def test_where_memory_is_short_a_picture_is_decoded_in_tiles(
    error: Exception, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbone_module, "TILE", 16)
    backbone = load_backbone(base)
    vae = vae_of(backbone)
    before = {name: getattr(vae, name) for name in dir(vae) if "til" in name}
    latents = torch.randn(2, 4, 24, 20, generator=torch.Generator().manual_seed(0))
    wanted = [np.asarray(image, np.float32) for image in decode(backbone, latents)]
    whole, sizes = vae.decode, []

    def small(latents_BChw: Tensor, **named: Any) -> Any:
        sizes.append(len(latents_BChw))
        if len(sizes) == 1:
            raise error
        assert vae.use_tiling
        return whole(latents_BChw, **named)

    monkeypatch.setattr(vae, "decode", small)
    tiled = [np.asarray(image, np.float32) for image in decode(backbone, latents)]
    assert sizes == [2, 1, 1]
    assert {name: getattr(vae, name) for name in before} == before
    for one, other in zip(tiled, wanted, strict=True):
        # Nearly the same: a tile does not see all of a picture.
        assert 0 < np.abs(one - other).mean() < 0.5 * other.std()
    sizes.clear()
    error = RuntimeError("another")
    with pytest.raises(RuntimeError, match="another"):
        decode(backbone, latents)


# --- what cannot be trained


def refused(folder: Path) -> str:
    def load() -> None:
        backbone = FAMILY.load(inspect_base(folder), LoadOptions(CPU, torch.float32, "sdpa"))
        backbone.hold("vae", "text_encoder", "unet")

    with pytest.raises(ModelError) as caught:
        load()
    assert str(folder) in str(caught.value)
    return str(caught.value)


def drop_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors[next(name for name in sorted(tensors) if name.endswith("bias"))]
    save_file(tensors, path, {"format": "pt"})


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
    "weights of SD 1, configuration of SD 2": (
        lambda folder: edit(folder / "unet" / "config.json", use_linear_projection=True),
        "does not fit",
    ),
    "inpainting": (
        lambda folder: edit(folder / "unet" / "config.json", in_channels=9),
        "inpainting",
    ),
    "unet without channels": (
        lambda folder: edit(folder / "unet" / "config.json", block_out_channels=None),
        "can be built",
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
    "too few weights": (
        lambda folder: drop_tensor(folder / "unet" / "diffusion_pytorch_model.safetensors"),
        "it has no conv_in.bias",
    ),
    "too few text weights": (
        lambda folder: drop_tensor(folder / "text_encoder" / "model.safetensors"),
        "1 weights of text_encoder are missing",
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
