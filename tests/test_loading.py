"""Single files become the modules they were made from; hub, tokenizers, and `--base` itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import load_file
from torch import Tensor

from tests.single_files import (
    Modules,
    ldm_tensors,
    ldm_vae,
    open_clip,
    save,
    small_modules,
    small_vae,
)
from trainer.commands.bases import base_facts
from trainer.errors import ModelError
from trainer.families import BaseFacts
from trainer.families.detect import file_facts
from trainer.families.header import read_header
from trainer.families.hub import hub_folder, is_hub_id, variant_of, wanted_files
from trainer.families.kinds import identify
from trainer.families.single_file import load_vae, make_scheduler, open_single_file
from trainer.families.sizes import shipped_config, text_config
from trainer.families.tokenizers import find_tokenizer, padding_id

FAMILIES = ("sd1", "sd2", "sdxl")


@dataclass(frozen=True)
class Parts:
    """All modules of a single file."""

    unet: Any
    vae: Any
    text_encoder: Any
    text_encoder_2: Any
    notices: tuple[str, ...]


def load_single_file(facts: BaseFacts, dtype: torch.dtype) -> Parts:
    file = open_single_file(facts)
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    first, vae, text, second = (
        file.read(name, dtype) if name in {"vae", *file.plans} else None for name in names
    )
    return Parts(first, vae, text, second, tuple(file.notices))


@pytest.fixture(scope="module")
def bases() -> dict[str, Modules]:
    return {family: small_modules(family) for family in FAMILIES}


def single(path: Path, tensors: dict[str, Tensor], prediction: str = "epsilon") -> BaseFacts:
    """Write a single file and return its facts."""
    if path.suffix == ".ckpt":
        torch.save({"state_dict": tensors}, path)
    else:
        save(path, tensors, modelspec__resolution="32x32")
    header = read_header(path)
    return file_facts(header, identify(header), prediction)


@pytest.fixture(scope="module")
def file_base(bases: dict[str, Modules], tmp_path_factory: pytest.TempPathFactory) -> BaseFacts:
    """A single file of SD 1.x; never written to."""
    folder = tmp_path_factory.mktemp("files")
    return single(folder / "base.safetensors", ldm_tensors(bases["sd1"]))


@torch.no_grad()
def answers(modules: Modules | Parts) -> list[Tensor]:
    """What the modules of a base give for the same input."""
    text = modules.text if isinstance(modules, Modules) else modules.text_encoder
    second = modules.second if isinstance(modules, Modules) else modules.text_encoder_2
    ids = torch.arange(77)[None] % 514
    prompts = [text(ids).last_hidden_state]
    added = None
    if second is not None:
        given = second(ids)
        prompts.append(given.last_hidden_state)
        added = {"text_embeds": given.text_embeds, "time_ids": torch.arange(6.0)[None]}
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 4, 8, 8, generator=generator)
    prompt = torch.cat(prompts, dim=-1)
    unet = modules.unet(noisy, torch.tensor([7]), prompt, added_cond_kwargs=added).sample
    picture = torch.rand(1, 3, 32, 32, generator=generator)
    mean = modules.vae.encode(picture).latent_dist.mean
    return [unet, prompt, mean, modules.vae.decode(mean).sample]


# --- the modules of a single file


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_answers_as_its_base(
    family: str, suffix: str, bases: dict[str, Modules], tmp_path: Path
) -> None:
    facts = single(tmp_path / f"base.{suffix}", ldm_tensors(bases[family]))
    if suffix == "ckpt":
        facts = replace(facts, resolution=32)
    parts = load_single_file(facts, torch.float32)
    for ours, theirs in zip(answers(parts), answers(bases[family]), strict=True):
        assert torch.equal(ours, theirs)
    assert parts.notices == ()
    assert parts.unet.config.sample_size == 8
    assert (parts.text_encoder_2 is None) == (family != "sdxl")


def modules_of(parts: Parts) -> list[Any]:
    return [m for m in (parts.unet, parts.vae, parts.text_encoder, parts.text_encoder_2) if m]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_cast_while_they_are_read(
    dtype: torch.dtype, bases: dict[str, Modules], tmp_path: Path
) -> None:
    half = {
        name: t.half() if t.is_floating_point() else t
        for name, t in ldm_tensors(bases["sdxl"]).items()
    }
    parts = load_single_file(single(tmp_path / "half.safetensors", half), dtype)
    modules = modules_of(parts)
    assert len(modules) == 4
    for module in modules:
        assert not module.training
        for parameter in module.parameters():
            assert parameter.dtype == dtype
            assert not parameter.requires_grad
            assert parameter.device.type == "cpu"
    ours = parts.unet.state_dict()["mid_block.resnets.0.conv1.weight"]
    assert torch.equal(
        ours, half["model.diffusion_model.middle_block.0.in_layers.2.weight"].to(dtype)
    )


def test_weights_outlast_their_checkpoint(bases: dict[str, Modules], tmp_path: Path) -> None:
    """The tensors of a checkpoint lie in the file itself until they are copied."""
    facts = single(tmp_path / "base.ckpt", ldm_tensors(bases["sd1"]))
    parts = load_single_file(replace(facts, resolution=32), torch.float32)
    with (tmp_path / "base.ckpt").open("r+b") as file:
        file.write(b"\xff" * facts.folder.stat().st_size)
    assert torch.equal(answers(parts)[0], answers(bases["sd1"])[0])


def test_averaged_copies_are_passed_over_and_unknown_tensors_named(
    bases: dict[str, Modules], tmp_path: Path
) -> None:
    extra = {
        "model_ema.diffusion_modeltime_embed0weight": torch.ones(3),
        "alphas_cumprod": torch.ones(1000),
        "model.diffusion_model.time_embed.9.weight": torch.ones(2),
    }
    facts = single(tmp_path / "base.safetensors", ldm_tensors(bases["sd1"]) | extra)
    parts = load_single_file(facts, torch.float32)
    assert len(parts.notices) == 1
    assert parts.notices[0].startswith("1 tensors")
    assert "time_embed.9.weight" in parts.notices[0]


def spoilt(tmp_path: Path, tensors: dict[str, Tensor]) -> str:
    facts = single(tmp_path / "base.safetensors", tensors)
    with pytest.raises(ModelError) as caught:
        load_single_file(facts, torch.float32)
    assert caught.value.where == str(tmp_path / "base.safetensors")
    assert caught.value.fix
    return caught.value.what


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("model.diffusion_model.out.2.bias", "conv_out.bias"),
        ("first_stage_model.decoder.mid.attn_1.q.weight", "mid_block.attentions.0.to_q.weight"),
        (
            "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc2.bias",
            "encoder.layers.1.mlp.fc2.bias",
        ),
        (
            "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
            "token_embedding.weight",
        ),
    ],
)
def test_a_missing_tensor_is_named(
    lost: str, words: str, bases: dict[str, Modules], tmp_path: Path
) -> None:
    tensors = ldm_tensors(bases["sd1"])
    del tensors[lost]
    what = spoilt(tmp_path, tensors)
    assert "not complete" in what
    assert words in what


def test_many_missing_tensors_are_counted(bases: dict[str, Modules], tmp_path: Path) -> None:
    tensors = {n: t for n, t in ldm_tensors(bases["sd1"]).items() if "middle_block.0" not in n}
    assert "more" in spoilt(tmp_path, tensors)


def test_a_tensor_of_another_shape_is_named(bases: dict[str, Modules], tmp_path: Path) -> None:
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    what = spoilt(tmp_path, ldm_tensors(bases["sd1"]) | {name: torch.zeros(64, 64, 1, 1)})
    assert name in what
    assert "[64, 64, 1, 1]" in what
    assert "[64, 64, 3, 3]" in what


def test_quantised_weights_are_refused(bases: dict[str, Modules], tmp_path: Path) -> None:
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    tensors = ldm_tensors(bases["sd1"])
    what = spoilt(tmp_path, tensors | {name: tensors[name].to(torch.int8)})
    assert "quantised" in what


def test_sizes_that_cannot_be_built_are_explained(
    bases: dict[str, Modules], tmp_path: Path
) -> None:
    """33 channels do not divide into 32 groups."""
    names = ("in_layers.2.weight", "in_layers.2.bias")
    base = "model.diffusion_model.input_blocks.1.0."
    odd = {base + names[0]: torch.zeros(33, 32, 3, 3), base + names[1]: torch.zeros(33)}
    assert "can be built" in spoilt(tmp_path, ldm_tensors(bases["sd1"]) | odd)


def test_the_last_layer_of_sd2s_openclip_is_left_out() -> None:
    """Its file has 24 layers, of which 23 are used."""
    shapes = {
        "embeddings.token_embedding.weight": (49408, 1024),
        "embeddings.position_embedding.weight": (77, 1024),
        "encoder.layers.0.mlp.fc1.weight": (4096, 1024),
        "text_projection.weight": (1024, 1024),
        **{f"encoder.layers.{number}.layer_norm1.weight": (1024,) for number in range(24)},
    }
    assert text_config(shapes, shipped_config("sd2", "text_encoder"))["num_hidden_layers"] == 23


def test_an_unused_last_layer_is_no_news(bases: dict[str, Modules], tmp_path: Path) -> None:
    """What a family does not use is neither read nor called unknown."""
    prefix = "cond_stage_model.model."
    tensors = ldm_tensors(bases["sd2"])
    layer = {n: t for n, t in open_clip(prefix, bases["sd2"].text).items() if "resblocks.1." in n}
    for number in range(2, 24):
        tensors |= {n.replace("blocks.1.", f"blocks.{number}."): t for n, t in layer.items()}
    parts = load_single_file(single(tmp_path / "a.safetensors", tensors), torch.float32)
    assert parts.text_encoder.config.num_hidden_layers == 23
    assert parts.notices == ()


# --- schedules


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero", [True, False])
def test_the_schedule_is_that_of_the_base(
    family: str, prediction: str, zero: bool, file_base: BaseFacts
) -> None:
    facts = replace(file_base, family=family, prediction=prediction, zero_terminal_snr=zero)
    scheduler = make_scheduler(facts)
    assert scheduler.config.prediction_type == prediction
    assert scheduler.config.beta_schedule == "scaled_linear"
    last = float(scheduler.alphas_cumprod[-1])
    assert last < 1e-6 if zero else last == pytest.approx(0.00466, rel=1e-2)


# --- a VAE of its own


VAES: dict[str, Callable[[Path, Any], Path]] = {
    "folder": lambda path, vae: vae.save_pretrained(path / "vae") or path / "vae",
    "folder of a base": lambda path, vae: vae.save_pretrained(path / "vae") or path,
    "file": lambda path, vae: save(path / "vae.safetensors", ldm_vae(vae)),
    "file with prefix": lambda path, vae: save(
        path / "vae.safetensors",
        {f"first_stage_model.{name}": tensor for name, tensor in ldm_vae(vae).items()},
    ),
    "file of diffusers": lambda path, vae: save(path / "vae.safetensors", vae.state_dict()),
}


@pytest.mark.parametrize("name", VAES)
def test_a_vae_of_its_own(name: str, bases: dict[str, Modules], tmp_path: Path) -> None:
    torch.manual_seed(7)
    vae = small_vae()
    path = VAES[name](tmp_path, vae)
    facts = replace(single(tmp_path / "base.safetensors", ldm_tensors(bases["sd1"])), vae=path)
    parts = load_single_file(facts, torch.bfloat16)
    assert {p.dtype for p in parts.vae.parameters()} == {torch.bfloat16}
    ours, theirs = parts.vae.state_dict(), vae.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n].bfloat16()) for n in ours)


def test_what_is_no_vae_is_refused(bases: dict[str, Modules], tmp_path: Path) -> None:
    unet = save(tmp_path / "unet.safetensors", bases["sd1"].unet.state_dict())
    with pytest.raises(ModelError, match="no VAE"):
        load_vae(unet, "sd1", torch.float32)
    with pytest.raises(ModelError, match="missing"):
        load_vae(tmp_path, "sd1", torch.float32)
    small_vae().save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_vae(tmp_path / "vae", "sd1", torch.float32)


# --- the hub

REPOSITORY = [
    "README.md",
    "model_index.json",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "unet/config.json",
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_flax_model.msgpack",
    "unet/openvino_model.xml",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "vae_decoder/model.onnx",
    "safety_checker/model.safetensors",
]
COMMON = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "text_encoder/config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


def test_only_what_training_needs_is_downloaded() -> None:
    plain, half = wanted_files(REPOSITORY, ""), wanted_files(REPOSITORY, "fp16")
    assert set(plain) == COMMON | {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    }
    assert set(half) == COMMON | {
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    }
    assert len(set(plain)) == len(plain)
    only = ["model_index.json", "unet/a.fp16.safetensors"]
    assert wanted_files(only, "") == only


def test_the_variant_of_a_folder(tmp_path: Path) -> None:
    assert variant_of(tmp_path) is None
    (tmp_path / "model.fp16.safetensors").touch()
    assert variant_of(tmp_path) == "fp16"
    (tmp_path / "model.ema.safetensors").touch()
    assert variant_of(tmp_path) == "fp16"
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert variant_of(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "is_id"),
    [
        ("author/model", True),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", True),
        ("author/model-1.0@refs/pr/3", True),
        ("author/model@main", True),
        ("model", False),
        ("a/b/c", False),
        ("./author/model", False),
        ("/author/model", False),
        ("~/model", False),
        ("author/model.safetensors", False),
        ("author/model.ckpt", False),
        ("here/model", False),
        ("", False),
    ],
)
def test_what_can_be_a_name_on_the_hub(
    text: str, is_id: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(text) is is_id


class Hub:
    """Stands in for the hub: what was asked of it, and what it answers."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.asked: list[dict[str, Any]] = []
        self.files: list[str] | Exception = REPOSITORY
        self.cached = True
        self.folder = folder
        patch.setattr(huggingface_hub, "list_repo_files", self.list_files)
        patch.setattr(huggingface_hub, "snapshot_download", self.download)
        patch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)

    def list_files(self, repo_id: str, revision: str | None) -> list[str]:
        self.asked.append({"list": repo_id, "revision": revision})
        if isinstance(self.files, Exception):
            raise self.files
        return self.files

    def download(self, repo_id: str, **options: Any) -> str:
        self.asked.append({"download": repo_id, **options})
        if options.get("local_files_only") and not self.cached:
            raise errors.LocalEntryNotFoundError("not here")
        return str(self.folder)


@pytest.fixture
def hub(base: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(base, monkeypatch)


def gone(kind: type[Exception]) -> Exception:
    """An error of the hub, without the answer that it usually carries."""
    error = kind.__new__(kind)
    Exception.__init__(error, "sorry")
    return error


def test_a_model_on_the_hub_becomes_a_folder(hub: Hub, base: Path) -> None:
    assert hub_folder("author/model@v2", variant="fp16") == base
    assert hub.asked == [
        {"list": "author/model", "revision": "v2"},
        {
            "download": "author/model",
            "revision": "v2",
            "allow_patterns": wanted_files(REPOSITORY, "fp16"),
        },
    ]


@pytest.mark.parametrize("how", ["variable", "argument", "no connection"])
def test_without_network_the_cache_serves(
    how: str, hub: Hub, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "variable")
    if how == "no connection":
        hub.files = gone(errors.HTTPError)
    assert hub_folder("author/model", download=how != "argument") == base
    assert hub.asked[-1]["local_files_only"]
    assert len(hub.asked) == (2 if how == "no connection" else 1)
    hub.cached = False
    with pytest.raises(ModelError, match="not on this machine") as caught:
        hub_folder("author/model", download=how != "argument")
    assert "--base" in caught.value.fix


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.RepositoryNotFoundError, "There is no model 'author/model'"),
        (errors.GatedRepoError, "accepted its terms"),
        (errors.RevisionNotFoundError, "no revision 'v2'"),
    ],
)
def test_what_the_hub_refuses_is_explained(error: type[Exception], words: str, hub: Hub) -> None:
    hub.files = gone(error)
    with pytest.raises(ModelError) as caught:
        hub_folder("author/model@v2")
    assert words in caught.value.what
    assert caught.value.fix


def test_a_repository_of_single_files_says_which_to_download(hub: Hub) -> None:
    hub.files = ["README.md", "pony.safetensors"]
    with pytest.raises(ModelError, match="no model in diffusers format") as caught:
        hub_folder("author/model")
    assert "pony.safetensors" in caught.value.fix
    hub.files = ["README.md"]
    with pytest.raises(ModelError, match="no model in diffusers format"):
        hub_folder("author/model")


# --- tokenizers


def test_the_words_of_a_folder_are_its_own(base: Path, file_base: BaseFacts) -> None:
    facts = replace(file_base, folder=base)
    assert find_tokenizer(facts) == base / "tokenizer"
    assert find_tokenizer(facts, part="tokenizer_2") == base / "tokenizer"


@pytest.mark.parametrize("inner", ["", "tokenizer"])
def test_a_tokenizer_can_be_given(inner: str, base: Path, file_base: BaseFacts) -> None:
    given = base if inner else base / "tokenizer"
    assert find_tokenizer(file_base, given) == base / "tokenizer"
    with pytest.raises(ModelError, match="no tokenizer in this folder"):
        find_tokenizer(file_base, base / "unet")


def test_a_folder_that_has_lost_its_words_takes_no_others(
    base: Path, file_base: BaseFacts, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "copy", ignore=shutil.ignore_patterns("tokenizer"))
    with pytest.raises(ModelError, match="has no words"):
        find_tokenizer(replace(file_base, folder=tmp_path / "copy"))


def test_the_cache_is_looked_through(
    hub: Hub, base: Path, file_base: BaseFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def cached(repository: str, name: str) -> str | None:
        asked.append((repository, name))
        there = repository == "stabilityai/stable-diffusion-xl-base-1.0"
        return str(base / name) if there else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert find_tokenizer(file_base, download=False) == base / "tokenizer"
    assert asked[0] == ("openai/clip-vit-large-patch14", "vocab.json")
    assert hub.asked == []


def test_the_hub_is_asked_when_it_may_be(
    hub: Hub, base: Path, file_base: BaseFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.folder = base / "tokenizer"
    assert find_tokenizer(file_base) == base / "tokenizer"
    assert hub.asked[0]["download"] == "openai/clip-vit-large-patch14"
    assert "vocab.json" in hub.asked[0]["allow_patterns"]
    for variable, download in ((True, True), (False, False)):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", variable)
        with pytest.raises(ModelError, match="network may not be used") as caught:
            find_tokenizer(file_base, download=download)
        assert "--tokenizer" in caught.value.fix
    assert len(hub.asked) == 1


def test_a_hub_out_of_reach_or_empty_is_said(
    hub: Hub, base: Path, file_base: BaseFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.folder = base / "unet"
    with pytest.raises(ModelError, match="has none"):
        find_tokenizer(file_base)

    def broken(*_: Any, **__: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(ModelError, match="no route to host"):
        find_tokenizer(file_base)


@pytest.mark.parametrize(
    ("family", "part", "padded_with"),
    [
        ("sd1", "text_encoder", 49407),
        ("sd2", "text_encoder", 0),
        ("sdxl", "text_encoder", 49407),
        ("sdxl", "text_encoder_2", 0),
    ],
)
def test_what_fills_up_a_prompt(family: str, part: str, padded_with: int) -> None:
    assert padding_id(family, part, 49407) == padded_with


# --- what --base may be


def test_a_base_is_a_folder_a_file_or_a_name(
    hub: Hub, base: Path, file_base: BaseFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = base_facts(str(base))
    assert (folder.name, folder.tokenizer) == ("tiny", None)
    assert replace(base_facts("author/model@v2"), name="tiny") == folder
    assert base_facts("author/model").name == "model"
    given = base_facts(str(file_base.folder), tokenizer=base)
    assert given == replace(file_base, tokenizer=base / "tokenizer")


@pytest.mark.parametrize(("precision", "name"), [("auto", "fp16"), ("bf16", "fp16"), ("fp32", "")])
def test_half_precision_is_downloaded_where_it_is_enough(
    precision: str, name: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base_facts("author/model", precision=precision)
    assert hub.asked[-1]["allow_patterns"] == wanted_files(REPOSITORY, name)


def test_a_path_with_a_slip_in_it_is_not_looked_for_on_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    for slip in ("models/pony", "nowhere/pony.safetensors", "pony"):
        with pytest.raises(ModelError, match="no such base model"):
            base_facts(slip)
    assert hub.asked == []


def test_a_vae_beside_a_folder_is_kept(base: Path, tmp_path: Path) -> None:
    vae = save(tmp_path / "vae.safetensors", ldm_vae(small_vae()))
    assert base_facts(str(base), vae=vae).vae == vae
    assert load_file(vae)
    with pytest.raises(ModelError, match="no such VAE"):
        base_facts(str(base), vae=tmp_path / "nowhere")
