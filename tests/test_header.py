"""What a file is: names, shapes and metadata read without weights, and the kind they tell."""

from __future__ import annotations

import json
import os
import pickle
import sys
import types
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.single_files import Modules, ldm_tensors, save, small_modules
from trainer.errors import ModelError
from trainer.families import FAMILIES
from trainer.families.detect import file_facts, inspect_base, shapes_of
from trainer.families.header import Header, TensorInfo, read_header
from trainer.families.kinds import Kind, identify, identify_configs
from trainer.families.ldm import text_sources, unet_sources, vae_sources
from trainer.families.sizes import shipped_config, text_config, unet_config, vae_config
from trainer.untrusted import HEADER_BYTES

UNET = "model.diffusion_model."
VAE = "first_stage_model."


@pytest.fixture(scope="module")
def tensors() -> dict[str, dict[str, Tensor]]:
    """The tensors of a small single file of each family; copied before they are changed."""
    return {family: ldm_tensors(small_modules(family)) for family in ("sd1", "sd2", "sdxl")}


def header_of(tensors: dict[str, Tensor], **metadata: str) -> Header:
    infos = {name: TensorInfo(tuple(tensor.shape), "F32") for name, tensor in tensors.items()}
    said = {key.replace("__", "."): value for key, value in metadata.items()}
    return Header(Path("model.safetensors"), "safetensors", infos, said)


# --- kinds of files

V_MARKERS = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
KNOWN: dict[str, tuple[str, dict[str, Tensor], dict[str, str], str, str, bool]] = {
    "SD 1.5": ("sd1", {}, {}, "sd1", "epsilon", False),
    "SD 1.5 v-prediction": ("sd1", {"v_pred": torch.zeros(0)}, {}, "sd1", "v_prediction", False),
    "SD 2.1 base": (
        "sd2",
        {},
        {"modelspec__architecture": "stable-diffusion-v2-512"},
        "sd2",
        "epsilon",
        False,
    ),
    "SD 2.1": (
        "sd2",
        {},
        {"modelspec__architecture": "stable-diffusion-v2-768-v"},
        "sd2",
        "v_prediction",
        False,
    ),
    "SD 2.1, prediction type": (
        "sd2",
        {},
        {"modelspec__prediction_type": "v"},
        "sd2",
        "v_prediction",
        False,
    ),
    "SD 2.1 with markers": ("sd2", V_MARKERS, {}, "sd2", "v_prediction", True),
    "SD 2.1 that says nothing": ("sd2", {}, {}, "sd2", "", False),
    "SDXL": ("sdxl", {}, {}, "sdxl", "epsilon", False),
    "SDXL v-prediction with markers": ("sdxl", V_MARKERS, {}, "sdxl", "v_prediction", True),
    "SDXL v-prediction in metadata": (
        "sdxl",
        {},
        {"modelspec__prediction_type": "v"},
        "sdxl",
        "v_prediction",
        False,
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_single_file_is_recognised(
    name: str, tensors: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    family, markers, metadata, known, prediction, zero = KNOWN[name]
    path = save(tmp_path / "model.safetensors", tensors[family] | markers, **metadata)
    kind = identify(read_header(path))
    assert (kind.family, kind.prediction, kind.zero_terminal_snr) == (known, prediction, zero)
    assert not kind.obstacle
    assert {"unet", "vae", "text_encoder"} <= kind.parts
    assert ("text_encoder_2" in kind.parts) == (family == "sdxl")


def only(tensors: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}


def plain(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in only(tensors, prefix).items()}


def refiner(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The second text encoder in the first place, and none beside it."""
    rest = {n: t for n, t in tensors.items() if not n.startswith("conditioner.embedders.0.")}
    return {name.replace("embedders.1.", "embedders.0."): t for name, t in rest.items()}


def wider(tensors: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    return tensors | {f"{UNET}input_blocks.0.0.weight": torch.zeros(32, channels, 3, 3)}


def named(*names: str) -> Callable[[dict[str, dict[str, Tensor]]], dict[str, Tensor]]:
    return lambda _: {name: torch.zeros(2, 2) for name in names}


Make = Callable[[dict[str, dict[str, Tensor]]], dict[str, Tensor]]
REFUSED: dict[str, tuple[Make, str]] = {
    "refiner": (lambda t: refiner(t["sdxl"]), "SDXL refiner"),
    "inpainting": (lambda t: wider(t["sd1"], 9), "inpainting"),
    "SDXL inpainting": (lambda t: wider(t["sdxl"], 9), "XL inpainting"),
    "instruct-pix2pix": (lambda t: wider(t["sd1"], 8), "instruct-pix2pix"),
    "depth": (lambda t: wider(t["sd2"], 5), "depth"),
    "unCLIP": (
        lambda t: t["sd2"] | {f"{UNET}label_emb.0.0.weight": torch.zeros(4, 4)},
        "unCLIP",
    ),
    "EDM": (lambda t: t["sdxl"] | {"edm_vpred.sigma_max": torch.zeros(1)}, "EDM"),
    "LoRA of sd-scripts": (
        named("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"),
        "LoRA",
    ),
    "LoRA of PEFT": (named("unet.mid_block.attentions.0.proj_in.lora_A.weight"), "LoRA"),
    "LoRA of old diffusers": (
        named("unet.mid_block.attentions.0.attn1.processor.to_q_lora.up.weight"),
        "LoRA",
    ),
    "LoHa": (named("lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a"), "LoRA"),
    "VAE alone": (lambda t: plain(t["sd1"], VAE), "VAE alone"),
    "VAE alone with prefix": (lambda t: only(t["sd1"], VAE), "VAE alone"),
    "text encoder alone": (
        lambda t: plain(t["sd1"], "cond_stage_model.transformer."),
        "text encoder alone",
    ),
    "OpenCLIP alone": (lambda t: plain(t["sd2"], "cond_stage_model.model."), "text encoder alone"),
    "T5": (named("encoder.block.0.layer.0.SelfAttention.q.weight"), "text encoder alone"),
    "textual inversion": (lambda _: {"emb_params": torch.zeros(4, 768)}, "textual inversion"),
    "SDXL textual inversion": (
        lambda _: {"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)},
        "textual inversion",
    ),
    "textual inversion of diffusers": (
        lambda _: {"<anna>": torch.zeros(1, 768)},
        "textual inversion",
    ),
    "ControlNet": (
        lambda _: {"control_model.time_embed.0.weight": torch.zeros(2, 2)},
        "ControlNet",
    ),
    "ControlNet of diffusers": (
        named("controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"),
        "ControlNet",
    ),
    "SD 3": (named(f"{UNET}joint_blocks.0.context_block.attn.qkv.weight"), "Stable Diffusion 3"),
    "Flux": (named(f"{UNET}double_blocks.0.img_attn.norm.key_norm.scale"), "Flux"),
    "PixArt": (named("adaln_single.linear.weight"), "PixArt"),
    "Lumina": (named("cap_embedder.0.weight"), "Lumina"),
    "AnimateDiff": (named("down_blocks.0.motion_modules.0.proj.weight"), "AnimateDiff"),
    "something else": (named("transformer.wte.weight", "transformer.h.0.ln.weight"), "no model"),
    "nothing": (lambda _: {}, "no model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_said_by_name(
    name: str, tensors: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    make, words = REFUSED[name]
    path = save(tmp_path / "model.safetensors", make(tensors))
    with pytest.raises(ModelError) as caught:
        inspect_base(path)
    assert words in caught.value.what
    assert caught.value.where == str(path)
    assert caught.value.fix


def test_a_unet_alone_is_recognised_and_what_is_missing_said(tmp_path: Path) -> None:
    for family in ("sd1", "sd2", "sdxl"):
        unet = small_modules(family).unet
        kind = identify(header_of(unet.state_dict()))
        assert (kind.family, kind.parts) == (family, frozenset({"unet"}))
    path = save(tmp_path / "unet.safetensors", small_modules("sd1").unet.state_dict())
    with pytest.raises(ModelError, match="has no text encoder"):
        inspect_base(path)


def test_a_checkpoint_without_vae_needs_one_given(
    tensors: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    rest = {name: t for name, t in tensors["sd1"].items() if not name.startswith(VAE)}
    path = save(tmp_path / "model.safetensors", rest)
    with pytest.raises(ModelError, match="has no VAE"):
        inspect_base(path)
    vae = save(tmp_path / "vae.safetensors", plain(tensors["sd1"], VAE))
    assert inspect_base(path, vae=vae).vae == vae
    with pytest.raises(ModelError, match="no such VAE"):
        inspect_base(path, vae=tmp_path / "nowhere")


def test_an_undecidable_prediction_is_asked_for(
    tensors: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    path = save(tmp_path / "model.safetensors", tensors["sd2"])
    with pytest.raises(ModelError) as caught:
        inspect_base(path)
    assert "objective.prediction=v_prediction" in caught.value.fix
    assert inspect_base(path, prediction="v_prediction").prediction == "v_prediction"


def test_a_family_that_is_not_in_the_table_is_recognised_all_the_same(
    tensors: dict[str, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "model.safetensors", tensors["sdxl"])
    monkeypatch.setattr(FAMILIES, "_entries", {"sd1": FAMILIES["sd1"]})
    with pytest.raises(ModelError, match="recognised as Stable Diffusion XL, which cannot be"):
        inspect_base(path)


def test_the_facts_of_a_small_file(tensors: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    path = save(tmp_path / "anna.safetensors", tensors["sdxl"] | V_MARKERS)
    facts = file_facts(read_header(path), identify(read_header(path)), "v_prediction")
    assert (facts.family, facts.name, facts.folder) == ("sdxl", "anna", path)
    assert (facts.width, facts.pooled, facts.pixels_per_latent) == (128, 64, 4)
    assert (facts.prediction, facts.zero_terminal_snr) == ("v_prediction", True)
    assert not facts.fits_real


# --- folders

SDXL_INDEX = {
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
}
SD_INDEX = {"text_encoder": ["transformers", "CLIPTextModel"]}
XL = {"addition_embed_type": "text_time", "in_channels": 4, "out_channels": 4}
FOLDERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str, str]] = {
    "sd1": (SD_INDEX, {"in_channels": 4, "out_channels": 4}, {}, "sd1", ""),
    "sd2": (SD_INDEX, {"use_linear_projection": True}, {}, "sd2", ""),
    "sd2 by its encoder": (SD_INDEX, {}, {"hidden_act": "gelu"}, "sd2", ""),
    "sdxl": (SDXL_INDEX, XL, {}, "sdxl", ""),
    "refiner": (SDXL_INDEX | {"text_encoder": [None, None]}, XL, {}, "sdxl", "refiner"),
    "sdxl inpainting": (SDXL_INDEX, XL | {"in_channels": 9}, {}, "sdxl", "inpainting"),
    "other": ({"_class_name": "FluxPipeline"}, {}, {}, "", "FluxPipeline"),
    "upscaler": (SD_INDEX, {"num_class_embeds": 1000, "in_channels": 7}, {}, "", "cannot"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_family_of_a_folder_is_told_by_structure(name: str) -> None:
    index, unet, text, family, obstacle = FOLDERS[name]
    kind = identify_configs(index, unet, text, {})
    assert kind.family == family
    assert obstacle in kind.obstacle
    assert bool(obstacle) == bool(kind.obstacle)


def test_prediction_and_terminal_snr_of_a_folder() -> None:
    said = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    kind = identify_configs(SDXL_INDEX, XL, {}, said)
    assert (kind.prediction, kind.zero_terminal_snr) == ("v_prediction", True)


def test_a_folder_with_a_single_file_in_it_says_which_to_give(tmp_path: Path) -> None:
    (tmp_path / "pony.safetensors").touch()
    with pytest.raises(ModelError, match=r"pony\.safetensors"):
        inspect_base(tmp_path)


# --- the released architectures, without weights


@cache
def released(family: str) -> Modules:
    def config(part: str) -> dict[str, Any]:
        return shipped_config(family, part)

    with torch.device("meta"):
        return Modules(
            family,
            UNet2DConditionModel.from_config(config("unet")),
            AutoencoderKL.from_config(config("vae")),
            CLIPTextModel(CLIPTextConfig(**config("text_encoder"))),
            CLIPTextModelWithProjection(CLIPTextConfig(**config("text_encoder_2")))
            if family == "sdxl"
            else None,
        )


# Tensors in the released models' UNet.
UNET_TENSORS = {"sd1": 686, "sd2": 686, "sdxl": 1680}
RESOLUTIONS = {"sd1": 512, "sd2": 512, "sdxl": 1024}
WIDTHS = {"sd1": 768, "sd2": 1024, "sdxl": 2048}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_the_released_models(family: str) -> None:
    """Facts, sizes from shapes and names, the latter as diffusers' own converters have them."""
    modules = released(family)
    tensors = ldm_tensors(modules)
    header = header_of(tensors)
    kind = identify(header)
    facts = file_facts(header, kind, "epsilon")
    assert (kind.family, facts.resolution, facts.width) == (
        family,
        RESOLUTIONS[family],
        WIDTHS[family],
    )
    assert facts.fits_real
    assert facts.bucket_step_px == 64
    assert facts.pooled == (1280 if family == "sdxl" else 0)

    unet = unet_sources(tensors)
    assert unet.keys() == modules.unet.state_dict().keys()
    assert len(unet) == UNET_TENSORS[family]
    shipped = shipped_config(family, "unet")
    assert unet_config(shapes_of(header, unet), shipped, facts.pooled) == shipped
    theirs = convert_ldm_unet_checkpoint(tensors, shipped)
    assert {name: id(tensors[source.name]) for name, source in unet.items()} == {
        name: id(tensor) for name, tensor in theirs.items()
    }

    vae = vae_sources(tensors)
    shipped = shipped_config(family, "vae")
    assert vae_config(shapes_of(header, vae), shipped) == shipped
    theirs = convert_ldm_vae_checkpoint(tensors, shipped)
    assert shapes_of(header, vae) == {name: tuple(t.shape) for name, t in theirs.items()}
    assert vae.keys() == modules.vae.state_dict().keys()


def test_openclip_as_diffusers_converts_it() -> None:
    modules = released("sdxl")
    tensors, prefix = ldm_tensors(modules), "conditioner.embedders.1.model."
    ours = text_sources(tensors, prefix, open_clip=True)
    theirs = convert_open_clip_checkpoint(modules.second, tensors, prefix)
    shapes = {name.removeprefix("text_model."): tuple(t.shape) for name, t in theirs.items()}
    found = shapes_of(header_of(tensors), ours)
    assert {name: shape for name, shape in found.items() if name != "logit_scale"} == shapes
    shipped = shipped_config("sdxl", "text_encoder_2")
    assert text_config(found, shipped) == shipped


def test_the_two_models_of_sd2_differ_in_size_and_prediction() -> None:
    small, large = (shipped_config("sd2", "unet", p) for p in ("epsilon", "v_prediction"))
    assert (small["sample_size"], large["sample_size"]) == (64, 96)
    assert shipped_config("sd2", "scheduler", "v_prediction")["prediction_type"] == "v_prediction"
    header = header_of(ldm_tensors(released("sd2")))
    assert file_facts(header, Kind("sd2", "SD 2.x"), "v_prediction").resolution == 768


def test_a_resolution_in_the_metadata_counts() -> None:
    header = header_of(ldm_tensors(small_modules("sd1")), modelspec__resolution="48x48")
    facts = file_facts(header, identify(header), "epsilon")
    assert (facts.resolution, facts.bucket_step_px) == (48, 12)
    odd = replace(header, metadata={"modelspec.resolution": "about 48"})
    assert file_facts(odd, identify(odd), "epsilon").resolution == 256


# --- files that are damaged or something else


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def refused(path: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    return caught.value


def entry(shape: list[Any], offsets: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HEADERS: dict[str, tuple[object, str]] = {
    "not JSON": (b"{" + b"x" * 20, "JSON"),
    "nested without end": (b'{"a":' + b"[" * 100_000, "JSON"),
    "metadata is no table": ({"__metadata__": [1]}, "metadata"),
    "metadata is no text": ({"__metadata__": {"a": 1}}, "metadata"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, "describe the tensor 'a'"),
    "no table": ({"a": 3}, "describe the tensor 'a'"),
    "negative": (entry([-1], [0, 4]), "describe the tensor 'a'"),
    "truth for a number": (entry([True], [0, 4]), "describe the tensor 'a'"),
    "three offsets": (entry([1], [0, 4, 8]), "describe the tensor 'a'"),
    "wrong size": (entry([3], [0, 4]), "does not fit its shape"),
    "backwards": (entry([1], [4, 0]), "does not fit its shape"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_damaged_header_is_refused(name: str, tmp_path: Path) -> None:
    header, words = HEADERS[name]
    assert words in refused(write(tmp_path / "a.safetensors", header, b"\0" * 64)).what


def test_a_file_that_is_cut_off_says_how_much_is_there(
    tensors: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    path = save(tmp_path / "model.safetensors", tensors["sd1"])
    whole = path.stat().st_size
    os.truncate(path, whole - 1000)
    assert f"{whole - 1000:,} bytes are there of {whole:,}" in refused(path).what
    os.truncate(path, 1000)
    assert "cut off" in refused(path).what


def test_a_header_of_no_measure_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((HEADER_BYTES + 1).to_bytes(8, "little") + b"{" + b" " * 100)
    assert "no model" in refused(path).what


FOREIGN = {
    "empty": (b"", "empty"),
    "web page": (b"<!DOCTYPE html><html>", "web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "gguf": (b"GGUF\x03\0\0\0", "GGUF"),
    "picture": (b"\x89PNG\r\n\x1a\n", "picture"),
    "json": (b'{"_class_name": "x"}', "JSON"),
    "text": (b"hello, this is a readme", "no model"),
    "short": (b"ab", "no model"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_model_is_said(name: str, tmp_path: Path) -> None:
    content, words = FOREIGN[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    error = refused(path)
    assert words in error.what
    assert error.fix


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path / "nowhere.safetensors").what
    with pytest.raises(ModelError, match="no such base model"):
        inspect_base(tmp_path / "nowhere")


# --- checkpoints


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f'echo caught > "{self.path}"',)


class Innocent:
    """Is no tensor, so it is code as well."""


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("nested", [True, False], ids=["state_dict", "flat"])
def test_a_checkpoint_is_read_like_its_safetensors(
    zipped: bool, nested: bool, tensors: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    content: Any = tensors["sd1"]
    content = {"state_dict": content, "global_step": 7, "optimizer": [1]} if nested else content
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    header = read_header(tmp_path / "a.ckpt")
    same = read_header(save(tmp_path / "a.safetensors", tensors["sd1"]))
    assert header.container == "pickle"
    assert header.tensors == same.tensors
    assert identify(header) == identify(same)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_a_malicious_checkpoint_never_runs(zipped: bool, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    path = tmp_path / "evil.ckpt"
    content = {"state_dict": {"a": torch.zeros(1), "b": Evil(trace)}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    error = refused(path)
    assert not trace.exists()
    assert "carries program code" in error.what
    assert "system" in error.what
    assert ".safetensors" in error.fix
    # The same file does what it is made for where it is read without care.
    torch.load(path, weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_bare_pickle_never_runs(protocol: int, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    path = tmp_path / "evil.ckpt"
    path.write_bytes(pickle.dumps({"a": Evil(trace)}, protocol))
    assert refused(path).fix
    assert not trace.exists()


def test_any_class_counts_as_code(tmp_path: Path) -> None:
    torch.save({"a": Innocent()}, tmp_path / "a.ckpt")
    assert "Innocent" in refused(tmp_path / "a.ckpt").what


def test_what_the_first_released_checkpoints_carry_is_no_code(tmp_path: Path) -> None:
    """They name a class of their training program, which is not brought to life."""
    path = tmp_path / "a.ckpt"
    name = "pytorch_lightning.callbacks.model_checkpoint"
    marker = type("ModelCheckpoint", (), {"__module__": name})
    with pytest.MonkeyPatch.context() as patch:
        for package in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
            patch.setitem(sys.modules, package, types.ModuleType(package))
        patch.setattr(sys.modules[name], "ModelCheckpoint", marker, raising=False)
        torch.save({"state_dict": {"a": torch.zeros(2)}, "callbacks": {marker: {"b": 1}}}, path)
    assert read_header(path).tensors == {"a": TensorInfo((2,), "F32")}


def test_a_zip_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photos/a.txt", "a")
    assert "zip archive" in refused(path).what


def test_a_checkpoint_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"a": torch.zeros(1000)}, path)
    os.truncate(path, 2000)
    assert "cut off" in refused(path).what


def test_a_checkpoint_without_tensors_is_no_model(tmp_path: Path) -> None:
    torch.save({"a": 1, "b": [2]}, tmp_path / "a.ckpt")
    with pytest.raises(ModelError, match="no model that is known"):
        inspect_base(tmp_path / "a.ckpt")


def test_a_textual_inversion_as_checkpoint(tmp_path: Path) -> None:
    content = {"string_to_param": {"*": torch.zeros(2, 768)}, "name": "anna"}
    torch.save(content, tmp_path / "anna.pt")
    with pytest.raises(ModelError, match="textual inversion"):
        inspect_base(tmp_path / "anna.pt")
