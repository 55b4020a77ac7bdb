"""Converted files: loaded by diffusers and peft they do what ours does, and back they are ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from tests.tiny import tiny_pipeline, tiny_sdxl_pipeline
from trainer.adapters.attach import attach
from trainer.adapters.convert import convert
from trainer.adapters.file import file_hashes, read_lora, write_lora
from trainer.adapters.forms import Form
from trainer.adapters.ldm_names import ldm_blocks
from trainer.adapters.naming import KeyNaming, kohya_tensors
from trainer.adapters.outside import CONFIG_NAME, WEIGHTS_NAME
from trainer.cli import main
from trainer.errors import FileFormatError, OutputError

METADATA = {
    "sd1": {"ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_output_name": "anna"},
    "sdxl": {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"},
}
MIDDLE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"

Base = tuple[str, Any]


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("tiny")
    if request.param == "sd1":
        return "sd1", tiny_pipeline(folder)
    return "sdxl", tiny_sdxl_pipeline(folder)


def components(pipeline: Any) -> dict[str, nn.Module]:
    names = ("unet", "text_encoder", "text_encoder_2")
    return {n: m for n in names if (m := getattr(pipeline, n, None)) is not None}


def namings(family: str, pipeline: Any) -> dict[str, KeyNaming]:
    if family == "sd1":
        return {
            "unet": KeyNaming("lora_unet"),
            "text_encoder": KeyNaming("lora_te", insert="text_model."),
        }
    return {
        "unet": KeyNaming("lora_unet", blocks=ldm_blocks(pipeline.unet.config), ldm=True),
        "text_encoder": KeyNaming("lora_te1", insert="text_model."),
        "text_encoder_2": KeyNaming("lora_te2", insert="text_model."),
    }


ENDS = (
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    *("conv1", "conv2", "time_emb_proj", "conv_shortcut", "downsamplers.0.conv"),
    *("upsamplers.0.conv", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
)


@torch.no_grad()
def answers(family: str, pipeline: Any) -> list[Tensor]:
    """What the UNet and the text encoders say to fixed questions."""
    draw = torch.Generator().manual_seed(5)
    tokens = torch.tensor([[512, 5, 6, *[513] * 74]])
    unet = pipeline.unet
    added = None
    if family == "sdxl":
        added = {"text_embeds": torch.randn(1, 24, generator=draw), "time_ids": torch.ones(1, 6)}
    prompt = torch.randn(1, 77, unet.config.cross_attention_dim, generator=draw)
    noise = torch.randn(1, 4, 8, 8, generator=draw)
    said = [unet(noise, 7, encoder_hidden_states=prompt, added_cond_kwargs=added).sample]
    for name, module in components(pipeline).items():
        if name != "unet":
            said.append(module(tokens, output_hidden_states=True).hidden_states[-1])
    return said


@pytest.fixture(scope="module")
def ours(base: Base, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor]]:
    """A file of our own writer, and what the base says with it as we apply it."""
    family, pipeline = base
    path = tmp_path_factory.mktemp("ours") / "anna.safetensors"
    tensors: dict[str, Tensor] = {}
    attached = []
    torch.manual_seed(1)
    for name, module in components(pipeline).items():
        paths = [n for n, _ in module.named_modules() if n.endswith(tuple(f".{e}" for e in ENDS))]
        layers = attach(module, paths, rank=4, alpha=3.0 if name == "unet" else 2.0, seed=0)
        layers.load_state({k: 0.3 * torch.randn(v.shape) for k, v in layers.state().items()})
        tensors |= kohya_tensors(layers, namings(family, pipeline)[name])
        attached.append(layers)
    write_lora(path, tensors, METADATA[family], dtype=torch.float32)
    said = answers(family, pipeline)
    for layers in attached:
        layers.detach()
    return path, said


def assert_same(found: list[Tensor], wanted: list[Tensor], without: list[Tensor]) -> None:
    for one, other, bare in zip(found, wanted, without, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert (other - bare).abs().max() > 0.01


def deltas(path: Path) -> dict[str, Tensor]:
    """{module name: update} of a file of kohya's, by its definition."""
    tensors = read_lora(path).tensors
    found = {}
    for key, down in tensors.items():
        if key.endswith(".lora_down.weight"):
            name = key.removesuffix(".lora_down.weight")
            up = tensors[f"{name}.lora_up.weight"].double().flatten(1)
            scale = float(tensors[f"{name}.alpha"]) / down.shape[0]
            product = scale * up @ down.double().flatten(1)
            found[name] = product.unflatten(1, down.shape[1:])
    return found


def assert_same_deltas(one: Path, other: Path) -> None:
    found, wanted = deltas(one), deltas(other)
    assert list(sorted(found)) == list(sorted(wanted))
    for name, delta in wanted.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-6, atol=1e-7)


class TestThereAndBack:
    def test_diffusers_loads_it_with_the_same_result(
        self, base: Base, ours: tuple[Path, list[Tensor]], tmp_path: Path
    ) -> None:
        family, pipeline = base
        source, said = ours
        bare = answers(family, pipeline)
        target = tmp_path / "converted.safetensors"
        made = convert(source, target, to="diffusers")
        assert made.family == family
        assert made.layers * 2 == made.tensors == len(read_lora(target).tensors)
        pipeline.load_lora_weights(str(target))
        try:
            assert_same(answers(family, pipeline), said, bare)
        finally:
            pipeline.unload_lora_weights()
        back = tmp_path / "back.safetensors"
        convert(target, back, to="kohya")
        assert_same_deltas(back, source)

    def test_peft_loads_it_with_the_same_result(
        self, base: Base, ours: tuple[Path, list[Tensor]], tmp_path: Path
    ) -> None:
        family, pipeline = base
        source, said = ours
        bare = answers(family, pipeline)
        folder = tmp_path / "converted"
        convert(source, folder, to="peft")
        assert {x.name for x in folder.iterdir()} == components(pipeline).keys()
        wrapped = {
            name: peft.PeftModel.from_pretrained(module, str(folder / name))
            for name, module in components(pipeline).items()
        }
        try:
            assert_same(answers(family, pipeline), said, bare)
        finally:
            for model in wrapped.values():
                model.unload()
        back = tmp_path / "back.safetensors"
        convert(folder, back, to="kohya")
        assert_same_deltas(back, source)

    def test_kohya_to_kohya_keeps_names_and_numbers(
        self, ours: tuple[Path, list[Tensor]], tmp_path: Path
    ) -> None:
        source, _ = ours
        target = tmp_path / "same.safetensors"
        convert(source, target, to="kohya")
        one, other = read_lora(source).tensors, read_lora(target).tensors
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def small(**changes: Tensor | None) -> dict[str, Tensor]:
    """One UNet layer and one of the text encoder, rank 2, alpha 1; None takes a tensor away."""
    draw = torch.Generator().manual_seed(2)
    tensors: dict[str, Tensor] = {}
    for name, width in ((MIDDLE, 320), (TEXT, 768)):
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, width, generator=draw)
        tensors[f"{name}.lora_up.weight"] = torch.randn(width, 2, generator=draw)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    for key, value in changes.items():
        full = f"{MIDDLE}.{key.replace('__', '.')}"
        tensors.pop(full, None)
        if value is not None:
            tensors[full] = value
    return tensors


def saved(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    metadata = metadata or METADATA["sd1"]
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
    return path


class TestForms:
    def test_metadata_is_kept_and_the_hash_computed_anew(self, tmp_path: Path) -> None:
        source = saved(
            tmp_path / "a.safetensors", small(), **METADATA["sd1"], sshs_model_hash="0" * 64
        )
        target = tmp_path / "b.safetensors"
        forms: tuple[Form, ...] = ("diffusers", "kohya")
        for to in forms:
            convert(source, target, to=to, overwrite=True)
            file = read_lora(target)
            assert file.metadata["ss_output_name"] == "anna"
            assert file.metadata["sshs_model_hash"] == file_hashes(target).autov3
        convert(source, tmp_path / "c", to="peft")
        with safe_open(tmp_path / "c" / "unet" / WEIGHTS_NAME, "pt") as opened:
            assert opened.metadata()["ss_output_name"] == "anna"

    @pytest.mark.parametrize(
        ("alpha", "dtype"), [(1.0, torch.float16), (1.5, torch.float32), (2.0, torch.bfloat16)]
    )
    def test_number_format_is_kept_where_that_is_exact(
        self, tmp_path: Path, alpha: float, dtype: torch.dtype
    ) -> None:
        stored = dtype if dtype != torch.float32 else torch.float16
        tensors = {k: v.to(stored) for k, v in small(alpha=torch.tensor(alpha)).items()}
        target = tmp_path / "b.safetensors"
        made = convert(saved(tmp_path / "a.safetensors", tensors), target, to="diffusers")
        assert made.dtype == str(dtype).removeprefix("torch.")
        up = read_lora(target).tensors[
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight"
        ]
        wanted = tensors[f"{MIDDLE}.lora_up.weight"].float() * (alpha / 2)
        assert torch.equal(up.float(), wanted)

    def test_ranks_and_alphas_that_differ_are_right_in_diffusers(self, tmp_path: Path) -> None:
        """Where diffusers would apply the file itself with a wrong strength, or not at all."""
        pipeline = tiny_pipeline(tmp_path / "tiny")
        unet = pipeline.unet
        names = [n for n, _ in unet.named_modules() if n.endswith((".to_q", ".to_k", ".proj_in"))]
        rows: dict[str, Tensor] = {}
        wanted: dict[str, Tensor] = {}
        torch.manual_seed(4)
        for i, name in enumerate(names):
            layer = attach(unet, [name], rank=1 + i % 3, alpha=1.0 + i % 2, seed=0)
            layer.load_state({k: torch.randn(v.shape) for k, v in layer.state().items()})
            rows |= kohya_tensors(layer, KeyNaming("lora_unet"))
            wanted[name] = layer.layers[name].delta()
            layer.detach()
        target = tmp_path / "b.safetensors"
        convert(saved(tmp_path / "a.safetensors", rows), target, to="diffusers")
        before = {n: m.weight.detach().clone() for n, m in unet.named_modules() if n in names}
        pipeline.load_lora_weights(str(target))
        pipeline.fuse_lora(components=["unet"])
        pipeline.unload_lora_weights()
        for name in names:
            after = unet.get_submodule(name).weight.detach()
            torch.testing.assert_close(after - before[name], wanted[name], rtol=1e-4, atol=1e-5)

    def test_peft_states_ranks_and_alphas_that_differ(self, tmp_path: Path) -> None:
        tensors = small(alpha=torch.tensor(7.0))
        other = MIDDLE.replace("to_q", "to_k")
        tensors[f"{other}.lora_down.weight"] = torch.ones(5, 320)
        tensors[f"{other}.lora_up.weight"] = torch.ones(320, 5)
        tensors[f"{other}.alpha"] = torch.tensor(2.0)
        source = saved(tmp_path / "a.safetensors", tensors)
        convert(source, tmp_path / "b", to="peft")
        config = peft.PeftConfig.from_pretrained(str(tmp_path / "b" / "unet"))
        assert sorted([config.r, *config.rank_pattern.values()]) == [2, 5]
        assert sorted([config.lora_alpha, *config.alpha_pattern.values()]) == [2.0, 7.0]
        convert(tmp_path / "b", tmp_path / "c.safetensors", to="kohya")
        assert_same_deltas(tmp_path / "c.safetensors", source)

    def test_rooted_scale_and_patterns_of_peft(self, tmp_path: Path) -> None:
        convert(saved(tmp_path / "a.safetensors", small()), tmp_path / "b", to="peft")
        config_file = tmp_path / "b" / "unet" / CONFIG_NAME
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config |= {"use_rslora": True, "lora_alpha": 3.0, "alpha_pattern": {"^attn1.to_k": 9}}
        config_file.write_text(json.dumps(config), encoding="utf-8")
        convert(tmp_path / "b", tmp_path / "c.safetensors", to="kohya", family="sd1")
        alpha = read_lora(tmp_path / "c.safetensors").tensors[f"{MIDDLE}.alpha"]
        torch.testing.assert_close(float(alpha), 3.0 * 2**0.5)
        config["alpha_pattern"] = {"(a+)+to_q": 9}
        config_file.write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(FileFormatError, match="more than a layer's name"):
            convert(tmp_path / "b", tmp_path / "d.safetensors", to="kohya", family="sd1")

    def test_names_and_missing_alphas_are_put_right_for_kohya(self, tmp_path: Path) -> None:
        tensors = small(alpha=None)
        # LDM's blocks in a file for SD 1, "te1", and no "text_model": only some load each of them.
        ldm = MIDDLE.replace("mid_block_attentions_0", "middle_block_1")
        bare = TEXT.replace("lora_te_text_model_", "lora_te1_")
        renamed = {k.replace(MIDDLE, ldm).replace(TEXT, bare): v for k, v in tensors.items()}
        target = tmp_path / "b.safetensors"
        convert(saved(tmp_path / "a.safetensors", renamed), target, to="kohya")
        found = read_lora(target).tensors
        assert found.keys() == small().keys()
        assert float(found[f"{MIDDLE}.alpha"]) == 2.0  # the rank: scale 1

    def test_middle_factor_becomes_a_plain_lora(self, tmp_path: Path) -> None:
        name = "lora_unet_mid_block_resnets_0_conv1"
        draw = torch.Generator().manual_seed(3)
        down = torch.randn(2, 6, 1, 1, generator=draw)
        mid = torch.randn(2, 2, 3, 3, generator=draw)
        up = torch.randn(8, 2, 1, 1, generator=draw)
        parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
        tensors = {f"{name}.{part}": tensor for part, tensor in parts.items()}
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
        target = tmp_path / "b.safetensors"
        convert(saved(tmp_path / "a.safetensors", tensors), target, to="diffusers")
        made = read_lora(target).tensors
        path = "unet.mid_block.resnets.0.conv1"
        a, b = made[f"{path}.lora_A.weight"], made[f"{path}.lora_B.weight"]
        found = torch.einsum("onpq,nikl->oikl", b, a)
        wanted = 0.5 * torch.einsum("on,nmkl,mi->oikl", up[..., 0, 0], mid, down[..., 0, 0])
        torch.testing.assert_close(found, wanted)

    def test_dora_by_rows_goes_to_peft_and_back(self, tmp_path: Path) -> None:
        width, rank = 320, 2
        magnitude = torch.rand(width, 1) + 0.5
        tensors = {k: v for k, v in small(dora_scale=magnitude).items() if TEXT not in k}
        source = saved(tmp_path / "a.safetensors", tensors)
        convert(source, tmp_path / "b", to="peft")
        path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        model = nn.Module()
        inner: nn.Module = model
        for part in path.split(".")[:-1]:
            child = nn.Module()
            inner.add_module(part, child)
            inner = child
        linear = nn.Linear(width, width)
        inner.add_module("to_q", linear)
        weight = linear.weight.detach().clone()
        wrapped = peft.PeftModel.from_pretrained(model, str(tmp_path / "b" / "unet"))
        merged = wrapped.merge_and_unload().get_submodule(path).weight.detach()
        down, up = (tensors[f"{MIDDLE}.lora_{part}.weight"] for part in ("down", "up"))
        turned = weight + up @ down / rank
        wanted = magnitude * turned / turned.norm(dim=1, keepdim=True)
        torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-6)
        convert(tmp_path / "b", tmp_path / "c.safetensors", to="kohya", family="sd1")
        back = read_lora(tmp_path / "c.safetensors").tensors[f"{MIDDLE}.dora_scale"]
        assert torch.equal(back, magnitude)


REFUSED: list[tuple[str, dict[str, Tensor], str]] = [
    (
        "diffusers",
        {**small(), f"{MIDDLE.replace('to_q', 'to_k')}.hada_w1_a": torch.ones(4, 2)},
        "loha",
    ),
    (
        "peft",
        {f"{MIDDLE}.lokr_w1": torch.ones(2, 2), f"{MIDDLE}.lokr_w2": torch.ones(2, 2)},
        "lokr",
    ),
    ("diffusers", small(dora_scale=torch.ones(320, 1)), "DoRA"),
    ("peft", small(dora_scale=torch.ones(1, 320)), "by input columns"),
    (
        "peft",
        {
            **small(dora_scale=torch.ones(320, 1)),
            f"{MIDDLE.replace('to_q', 'to_k')}.lora_down.weight": torch.ones(2, 320),
            f"{MIDDLE.replace('to_q', 'to_k')}.lora_up.weight": torch.ones(320, 2),
        },
        "with and without DoRA",
    ),
    ("kohya", small(lora_up__weight=None), "down without up"),
    ("kohya", small(lora_up__weight=torch.ones(320, 3)), "do not fit"),
    ("kohya", {**small(), "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.ones(1)}, "double"),
    ("kohya", small(lora_up__weight=torch.full((320, 2), float("nan"))), MIDDLE),
    ("diffusers", {**small(), "bundle_emb.anna.string_to_param.*": torch.ones(1, 768)}, "bundle"),
    ("kohya", {**small(), TEXT.replace("lora_te", "lora_te2") + ".diff": torch.ones(2)}, "second"),
]


@pytest.mark.parametrize(("to", "tensors", "reason"), REFUSED)
def test_what_cannot_be_said_is_refused(
    tmp_path: Path, to: Any, tensors: dict[str, Tensor], reason: str
) -> None:
    source = saved(tmp_path / "a.safetensors", tensors)
    with pytest.raises(FileFormatError) as caught:
        convert(source, tmp_path / "b.safetensors", to=to)
    assert reason in str(caught.value)
    assert list(tmp_path.iterdir()) == [source]


def test_unknown_family_is_asked_for(tmp_path: Path) -> None:
    tensors = {
        f"{MIDDLE}.lora_down.weight": torch.ones(2, 16),
        f"{MIDDLE}.lora_up.weight": torch.ones(16, 2),
    }
    source = saved(tmp_path / "a.safetensors", tensors, title="x")
    with pytest.raises(FileFormatError, match="SDXL") as caught:
        convert(source, tmp_path / "b.safetensors", to="kohya")
    assert "--family" in caught.value.fix
    convert(source, tmp_path / "b.safetensors", to="kohya", family="sdxl")
    names = {key.partition(".")[0] for key in read_lora(tmp_path / "b.safetensors").tensors}
    assert names == {"lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"}


def test_family_that_it_is_not_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.safetensors", {k: v for k, v in small().items() if TEXT in k})
    with pytest.raises(FileFormatError, match="sd1"):
        convert(source, tmp_path / "b.safetensors", to="kohya", family="sdxl")


class TestTarget:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        return saved(tmp_path / "a.safetensors", small())

    @pytest.mark.parametrize("to", ["diffusers", "peft"])
    def test_nothing_is_overwritten_unasked(self, source: Path, tmp_path: Path, to: Any) -> None:
        target = tmp_path / ("b" if to == "peft" else "b.safetensors")
        convert(source, target, to=to)
        files = target if target.is_file() else target / "unet" / WEIGHTS_NAME
        before = files.read_bytes()
        with pytest.raises(OutputError, match="already"):
            convert(source, target, to=to)
        assert files.read_bytes() == before
        source.write_bytes(
            safetensors.torch.save(
                {k: 2 * v for k, v in small().items()}, {"ss_base_model_version": "sd_v1"}
            )
        )
        convert(source, target, to=to, overwrite=True)
        assert files.read_bytes() != before
        assert {x.name for x in tmp_path.iterdir()} == {source.name, target.name}

    def test_only_a_folder_of_its_own_is_replaced(self, source: Path, tmp_path: Path) -> None:
        photos = tmp_path / "photos"
        photos.mkdir()
        (photos / "anna.png").write_bytes(b"x")
        with pytest.raises(OutputError, match="cannot be replaced"):
            convert(source, photos, to="peft", overwrite=True)
        with pytest.raises(OutputError, match="cannot be replaced"):
            convert(source, photos, to="kohya", overwrite=True)
        assert (photos / "anna.png").read_bytes() == b"x"

    def test_a_failure_leaves_nothing_behind(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        convert(source, tmp_path / "b", to="peft")
        config = (tmp_path / "b" / "unet" / CONFIG_NAME).read_bytes()

        def full(*_args: object, **_kwargs: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(OutputError, match="No space left"):
            convert(source, tmp_path / "b", to="peft", overwrite=True)
        assert {x.name for x in tmp_path.iterdir()} == {"a.safetensors", "b"}
        assert (tmp_path / "b" / "unet" / CONFIG_NAME).read_bytes() == config

    @pytest.mark.parametrize("name", ["missing/b.safetensors", "b.ckpt"])
    def test_a_target_that_cannot_be(self, source: Path, tmp_path: Path, name: str) -> None:
        with pytest.raises(OutputError):
            convert(source, tmp_path / name, to="kohya")
        with pytest.raises(OutputError):
            convert(source, tmp_path / "missing" / "b", to="peft")
        assert [x.name for x in tmp_path.iterdir()] == [source.name]

    def test_command_line(
        self, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        target = tmp_path / "b.safetensors"
        assert main(["convert", str(source), str(target), "--to", "diffusers"]) == 0
        assert capsys.readouterr().out == f"{target}: 2 layers, 4 tensors, float32\n"
        assert main(["convert", str(source), str(target), "--to", "kohya"]) == 1
        assert "--overwrite" in capsys.readouterr().err
        again = ["convert", str(source), str(target), "--to", "kohya", "--overwrite"]
        assert main([*again, "--family", "sd1"]) == 0
        assert main(["convert", str(source), str(target), "--to", "ckpt"]) == 2
