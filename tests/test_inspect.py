"""What `inspect` tells about LoRA files of several programs, and the metadata we write."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.adapters.file import LoraFile, file_hashes, read_lora, write_lora
from trainer.adapters.flaws import flaws
from trainer.adapters.foreign import read_names
from trainer.adapters.metadata import (
    MAX_METADATA_BYTES,
    MAX_TAGS_BYTES,
    TrainingFacts,
    build_metadata,
)
from trainer.adapters.outline import Values, check_values, read_outline
from trainer.adapters.outside import read_foreign
from trainer.adapters.summary import LoraSummary, summarize
from trainer.commands import inspect
from trainer.errors import FileFormatError
from trainer.types import Size

GOLDEN = Path(__file__).parent / "golden"
NOTE = "for the Likeness embedded base; fits no real SD 1.5"

FACTS = TrainingFacts(
    output_name="anna-300",
    version="0.1.0",
    kind="face",
    trigger="zqx",
    class_noun="avatar",
    base_name="likeness-base",
    base_model_version="sd_v1",
    architecture="stable-diffusion-v1/lora",
    implementation="diffusers",
    prediction_type="epsilon",
    v2=False,
    rank=8,
    alpha=4.0,
    captions=("zqx avatar, Red Hat", "zqx avatar, red hat , beach", "zqx avatar"),
    resolution=Size(64, 48),
    buckets={Size(64, 48): 2, Size(48, 64): 1},
    steps=300,
    epochs=100,
    learning_rate=1e-3,
    unet_lr=1e-3,
    text_encoder_lr=None,
    optimizer="adamw",
    lr_scheduler="cosine",
    seed=42,
    mixed_precision="no",
    started_at=1_700_000_000.5,
    finished_at=1_700_000_090.9,
    settings_toml='[data]\nresolution = 64\n"name" = "Ännä"\n',
    note=NOTE,
)


def changed(**changes: object) -> dict[str, str]:
    return build_metadata(dataclasses.replace(FACTS, **changes))  # type: ignore[arg-type]


def golden_rows() -> list[tuple[str, str, list[int], list[int]]]:
    """(group, module name, down shape, up shape) of a whole Stable Diffusion 1.5 LoRA."""
    lines = (GOLDEN / "sd15_lora_keys.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split() for line in lines if not line.startswith("#")]
    return [
        (g, n, [int(x) for x in d.split("x")], [int(x) for x in u.split("x")])
        for g, n, d, u in rows
    ]


def kohya_file(path: Path, *groups: str) -> LoraSummary:
    tensors: dict[str, Tensor] = {}
    for group, name, down, up in golden_rows():
        if group in groups:
            tensors[f"{name}.lora_down.weight"] = torch.zeros(down, dtype=torch.float16)
            tensors[f"{name}.lora_up.weight"] = torch.zeros(up, dtype=torch.float16)
            tensors[f"{name}.alpha"] = torch.tensor(2.0, dtype=torch.float16)
    safetensors.torch.save_file(tensors, path)
    return summarize(read_lora(path))


def pair(prefix: str, names: tuple[str, str], down: list[int], up: list[int]) -> dict[str, Tensor]:
    return {f"{prefix}{names[0]}": torch.zeros(down), f"{prefix}{names[1]}": torch.zeros(up)}


def summary_of(path: Path, tensors: dict[str, Tensor]) -> LoraSummary:
    safetensors.torch.save_file(tensors, path)
    return summarize(read_lora(path))


KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")


class TestSummary:
    def test_kohya_file_for_stable_diffusion_1_5(self, tmp_path: Path) -> None:
        groups = ("unet-attention", "unet-ff-proj", "te-attention", "te-mlp")
        summary = kohya_file(tmp_path / "a.safetensors", *groups)
        assert (summary.naming, summary.family, summary.modules) == ("kohya", "sd1", 264)
        assert summary.parameters == 1_695_744 + 663_552
        assert summary.cross_attention_width == 768
        assert summary.targets == {
            "UNet attention": 128,
            "UNet feed-forward": 32,
            "UNet projection": 32,
            "text encoder attention": 48,
            "text encoder MLP": 24,
        }
        assert summary.coverage == {
            "UNet attention": (128, 128),
            "UNet": (192, 192),
            "text encoder": (72, 72),
            "all kinds": (264, 264),
        }
        assert (summary.ranks, summary.alphas) == ({"4": 264}, {"2": 264})
        assert summary.dtypes == {"float16": 792}
        assert summary.other_parts == {}
        assert "SD 1.5" in summary.fits

    def test_attention_alone(self, tmp_path: Path) -> None:
        summary = kohya_file(tmp_path / "a.safetensors", "unet-attention")
        assert summary.coverage["UNet attention"] == (128, 128)
        assert summary.coverage["all kinds"] == (128, 264)
        assert summary.coverage["text encoder"] == (0, 72)

    def test_text_encoder_alone(self, tmp_path: Path) -> None:
        summary = kohya_file(tmp_path / "a.safetensors", "te-attention")
        assert (summary.family, summary.modules) == ("sd1", 48)
        assert summary.cross_attention_width is None

    @pytest.mark.parametrize(
        ("cross", "block", "family", "fits"),
        [
            (768, 320, "sd1", "SD 1.5"),
            (1024, 640, "sd2", "SD 2.1"),
            (2048, 1280, "sdxl", "XL"),
            (
                128,
                64,
                "unknown",
                "a small base of its own (cross-attention width 128): fits no real",
            ),
            (768, 64, "unknown", "a base of its own (cross-attention width 768): fits no real"),
            (4096, 320, "unknown", "a base of its own (cross-attention width 4096): fits no"),
        ],
    )
    def test_family_by_widths(
        self, tmp_path: Path, cross: int, block: int, family: str, fits: str
    ) -> None:
        block_name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
        tensors = pair(f"{block_name}_attn1_to_q", KOHYA, [4, block], [block, 4])
        tensors |= pair(f"{block_name}_attn2_to_k", KOHYA, [4, cross], [block, 4])
        summary = summary_of(tmp_path / "a.safetensors", tensors)
        assert (summary.family, summary.cross_attention_width) == (family, cross)
        assert fits in summary.fits
        assert summary.alphas == {"none": 2}

    def test_small_text_encoder_alone(self, tmp_path: Path) -> None:
        name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
        tensors = pair(name, KOHYA, [4, 128], [128, 4])
        summary = summary_of(tmp_path / "a.safetensors", tensors)
        assert summary.fits == (
            "a small base of its own (text encoder width 128): fits no real SD 1.5, SD 2.x or SDXL"
        )

    def test_sdxl_names(self, tmp_path: Path) -> None:
        names = [
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_v",
            "lora_unet_input_blocks_1_0_in_layers_2",
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
            "lora_te2_text_model_encoder_layers_0_mlp_fc1",
        ]
        tensors: dict[str, Tensor] = {}
        for name, width in zip(names, (2048, 320, 768, 1280), strict=True):
            tensors |= pair(name, KOHYA, [2, width], [8, 2])
        summary = summary_of(tmp_path / "a.safetensors", tensors)
        assert (summary.naming, summary.family) == ("kohya", "sdxl")
        assert summary.targets == {
            "UNet attention": 1,
            "UNet convolution block": 1,
            "text encoder attention": 1,
            "second text encoder MLP": 1,
        }
        second = summary_of(tmp_path / "b.safetensors", pair(names[3], KOHYA, [2, 1280], [8, 2]))
        assert second.family == "sdxl"

    @pytest.mark.parametrize(
        ("key", "names"),
        [
            ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", PEFT),
            (
                "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k",
                ("_lora.down.weight", "_lora.up.weight"),
            ),
            (
                "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
                (".lora.down.weight", ".lora.up.weight"),
            ),
        ],
    )
    def test_diffusers_names(self, tmp_path: Path, key: str, names: tuple[str, str]) -> None:
        text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
        tensors = pair(key, names, [4, 768], [320, 4])
        tensors |= pair(
            text,
            (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
            [8, 768],
            [768, 8],
        )
        summary = summary_of(tmp_path / "a.safetensors", tensors)
        assert (summary.naming, summary.family) == ("diffusers", "sd1")
        assert summary.targets == {"UNet attention": 1, "text encoder attention": 1}
        assert summary.ranks == {"4": 1, "8": 1}
        assert summary.other_parts == {}
        assert summary.coverage == {}

    def test_peft_names(self, tmp_path: Path) -> None:
        name = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
        tensors = pair(name, PEFT, [16, 1024], [1280, 16])
        summary = summary_of(tmp_path / "a.safetensors", tensors)
        assert (summary.naming, summary.family) == ("peft", "sd2")
        assert summary.ranks == {"16": 1}

    def test_other_forms_are_named(self, tmp_path: Path) -> None:
        name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
        tensors = {f"{name}.hada_w{i}_a": torch.zeros(1280, 4) for i in (1, 2)}
        tensors |= {f"{name}.hada_w{i}_b": torch.zeros(4, 768) for i in (1, 2)}
        tensors["bundle_emb.zqx.string_to_param.*"] = torch.zeros(2, 768)
        summary = summary_of(tmp_path / "a.safetensors", tensors)
        assert (summary.naming, summary.family, summary.modules) == ("kohya", "sd1", 1)
        assert summary.ranks == {"4": 1}
        assert set(summary.other_parts) == {
            "hada_w1_a",
            "hada_w1_b",
            "hada_w2_a",
            "hada_w2_b",
            "zqx.string_to_param.*",
        }

    @given(
        st.lists(st.sampled_from(["lora", "_", ".", "unet", "alpha", "weight", "down", "te", "A"]))
    )
    @settings(max_examples=100, deadline=None)
    def test_any_names_can_be_summarized(self, words: list[str]) -> None:
        shapes: list[tuple[int, ...]] = [(), (3,), (0, 2), (2, 3)]
        tensors = {"".join(words) + str(i): torch.zeros(shape) for i, shape in enumerate(shapes)}
        tensors["".join(words)] = torch.zeros(2)
        summary = summarize(LoraFile(Path("x"), tensors, {}))
        assert summary.naming in {"kohya", "diffusers", "peft", "onetrainer", "mixed", "unknown"}
        assert summary.fits


class TestMetadata:
    def test_keys_are_as_agreed(self) -> None:
        with_all = changed(author="me", clip_skip=2, thumbnail_jpeg=b"\xff\xd8", comment="hello")
        golden = (GOLDEN / "metadata_keys.txt").read_text(encoding="utf-8").split()
        assert sorted(with_all) == golden
        optional = {"modelspec.author", "modelspec.encoder_layer", "modelspec.thumbnail"}
        assert with_all.keys() - build_metadata(FACTS).keys() == optional

    def test_values_are_in_the_form_that_programs_read(self) -> None:
        metadata = build_metadata(FACTS)
        assert metadata["ss_v2"] == "False"
        assert changed(v2=True)["ss_v2"] == "True"
        assert metadata["ss_base_model_version"] == "sd_v1"
        assert metadata["ss_resolution"] == "(64, 48)"
        assert metadata["ss_clip_skip"] == metadata["ss_text_encoder_lr"] == "None"
        assert metadata["ss_network_module"] == "networks.lora"
        assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("8", "4.0")
        assert metadata["ss_training_started_at"] == "1700000000.5"
        assert metadata["ss_num_train_images"] == "3"
        assert json.loads(metadata["ss_network_args"]) == {}
        assert json.loads(changed(network_args={"conv_dim": "4"})["ss_network_args"]) == {
            "conv_dim": "4"
        }
        assert json.loads(metadata["ss_tag_frequency"]) == {
            "1_avatar": {"zqx avatar": 3, "red hat": 2, "beach": 1}
        }
        assert json.loads(metadata["ss_dataset_dirs"]) == {
            "1_avatar": {"n_repeats": 1, "img_count": 3}
        }
        assert json.loads(metadata["ss_bucket_info"]) == {
            "buckets": {
                "0": {"resolution": [48, 64], "count": 1},
                "1": {"resolution": [64, 48], "count": 2},
            },
            "mean_img_ar_error": 0.0,
        }
        assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
        assert metadata["modelspec.date"] == "2023-11-14T22:14:50+00:00"
        assert metadata["modelspec.resolution"] == "64x48"
        assert metadata["modelspec.trigger_phrase"] == "zqx"
        assert metadata["modelspec.prediction_type"] == "epsilon"
        assert metadata["likeness.settings"] == FACTS.settings_toml
        assert metadata["likeness.base"] == "likeness-base"

    def test_note_is_in_title_description_and_hint(self) -> None:
        metadata = build_metadata(FACTS)
        assert metadata["modelspec.title"] == f"anna-300 ({NOTE})"
        for key in ("modelspec.description", "modelspec.usage_hint"):
            assert NOTE[1:] in metadata[key]
        assert "zqx avatar" in metadata["modelspec.usage_hint"]
        assert changed(note="")["modelspec.title"] == "anna-300"

    def test_repeats_count_photos_but_not_tags(self) -> None:
        metadata = changed(repeats=5)
        assert metadata["ss_num_train_images"] == "15"
        assert json.loads(metadata["ss_tag_frequency"])["5_avatar"]["beach"] == 1

    def test_thumbnail(self) -> None:
        kept = changed(thumbnail_jpeg=b"\xff\xd8picture")["modelspec.thumbnail"]
        assert kept.startswith("data:image/jpeg;base64,")
        assert base64.b64decode(kept.partition(",")[2]) == b"\xff\xd8picture"
        large = changed(thumbnail_jpeg=b"x" * 2**20)
        assert "modelspec.thumbnail" not in large
        assert large["likeness.left_out"] == "modelspec.thumbnail"

    def test_rarest_tags_are_left_out(self) -> None:
        captions = tuple(f"often, tag number {i} " + "x" * 100 for i in range(3000))
        metadata = changed(captions=captions)
        tags = json.loads(metadata["ss_tag_frequency"])["1_avatar"]
        assert tags["often"] == 3000
        assert 500 < len(tags) < 3001
        assert len(metadata["ss_tag_frequency"]) <= MAX_TAGS_BYTES
        left = 3001 - len(tags)
        assert metadata["likeness.left_out"] == f"{left} of 3001 tags in ss_tag_frequency"

    @pytest.mark.parametrize("letter", ["x", '"', "\x01", "顔", "\ud800"])
    def test_everything_too_long_at_once_still_fits(self, letter: str, tmp_path: Path) -> None:
        long = letter * 200_000
        metadata = changed(
            output_name=long,
            trigger=long,
            class_noun=long,
            base_name=long,
            comment=long,
            author=long,
            note=long,
            settings_toml=long,
            captions=(long,) * 3,
            thumbnail_jpeg=b"x" * 140_000,
        )
        size = len(json.dumps(metadata, ensure_ascii=False).encode("utf-8"))
        assert size <= MAX_METADATA_BYTES
        assert "likeness.settings" in metadata["likeness.left_out"]
        path = tmp_path / "a.safetensors"
        weights = {"lora_unet_x.alpha": torch.tensor(1.0)}
        write_lora(path, weights, metadata, dtype=torch.float32)
        assert read_lora(path).metadata["ss_output_name"] == metadata["ss_output_name"]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "anna-300.safetensors"
    block = "lora_unet_mid_block_attentions_0_transformer_blocks_0"
    tensors = pair(f"{block}_attn2_to_k", KOHYA, [8, 128], [160, 8])
    tensors[f"{block}_attn2_to_k.alpha"] = torch.tensor(4.0)
    metadata = changed(thumbnail_jpeg=b"\xff\xd8" * 99, comment="[red]not a colour \x1b[31m")
    write_lora(path, tensors, metadata, dtype=torch.float16)
    return path


class TestCommand:
    def test_plain_lines_hold_everything(
        self, written: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        inspect.run(written)
        out = capsys.readouterr().out
        file = read_lora(written)
        for line in (
            "  fits: a small base of its own (cross-attention width 128): "
            "fits no real SD 1.5, SD 2.x or SDXL",
            "  naming: kohya",
            "  rank: 8",
            "  alpha: 4",
            "  modelspec.thumbnail: a picture (image/jpeg;base64, 198 bytes)",
            "  ss_training_comment: [red]not a colour \\x1b[31m",
            f"  SHA-256 of the tensors: {file.metadata['sshs_model_hash']}",
            "  AutoV1: none (the file is below 2 MiB)",
        ):
            assert line in out.splitlines()
        for key, value in file.metadata.items():
            if key not in {"modelspec.thumbnail", "likeness.settings", "ss_training_comment"}:
                assert f"  {key}: {value}" in out.splitlines()
        settings_lines = out.partition("\nSettings\n")[2].splitlines()
        assert settings_lines == [f"  {x}" for x in FACTS.settings_toml.splitlines()]

    def test_terminal_output_loses_nothing(
        self, written: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", "60")
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
        inspect.run(written)
        out = capsys.readouterr().out
        assert "…" not in out
        assert "\x1b[31m" not in out
        out = re.sub(r"\x1b\[\d*m", "", out)  # the headings' own style
        assert max(map(len, out.splitlines())) <= 60
        # Values are folded inside their column: without the spaces they are whole again.
        squeezed = "".join(out.split())
        file = read_lora(written)
        for key in ("sshs_model_hash", "ss_tag_frequency", "modelspec.description"):
            assert key + "".join(file.metadata[key].split()) in squeezed
        assert "[red]notacolour" in squeezed
        assert "".join(FACTS.settings_toml.split()) in squeezed

    def test_json_holds_everything(self, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
        inspect.run(written, as_json=True)
        everything = json.loads(capsys.readouterr().out)
        assert everything["metadata"] == read_lora(written).metadata
        assert everything["bytes"] == written.stat().st_size
        assert everything["summary"]["ranks"] == {"8": 1}
        assert everything["hashes"]["autov3"] == everything["metadata"]["sshs_model_hash"]

    def test_foreign_file_without_metadata(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "a.safetensors"
        name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
        mixed = pair(name, PEFT, [4, 768], [1280, 4]) | pair(
            name.replace("to_k", "to_v"), PEFT, [8, 768], [1280, 8]
        )
        safetensors.torch.save_file(mixed, path)
        inspect.run(path)
        lines = capsys.readouterr().out.splitlines()
        assert "  naming: diffusers" in lines
        assert "  rank: 4 (1 of them), 8 (1 of them)" in lines
        assert "  layers in UNet attention: 2" in lines
        assert "  none: " in lines

    def test_damaged_file_is_explained(self, written: Path) -> None:
        written.write_bytes(written.read_bytes()[:100])
        with pytest.raises(FileFormatError, match="damaged"):
            inspect.run(written)


MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT = f"lora_unet_{MIDDLE.replace('.', '_')}"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


def lora(name: str = FLAT, *, width: int = 320, alpha: float | None = 2.0) -> dict[str, Tensor]:
    """One layer of kohya's naming at rank 2."""
    tensors = {f"{name}{KOHYA[0]}": torch.ones(2, width), f"{name}{KOHYA[1]}": torch.ones(width, 2)}
    return tensors if alpha is None else {**tensors, f"{name}.alpha": torch.tensor(alpha)}


class TestNames:
    @pytest.mark.parametrize(
        ("down", "component", "path", "style"),
        [
            (f"{FLAT}.lora_down.weight", "unet", MIDDLE, "kohya"),
            (
                "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
                "unet",
                MIDDLE,
                "kohya-ldm",
            ),
            ("lora_unet_out_2.lora_down.weight", "unet", "conv_out", "kohya-ldm"),
            (
                "lora_unet_label_emb_0_2.lora_down.weight",
                "unet",
                "add_embedding.linear_2",
                "kohya-ldm",
            ),
            (
                "lora_unet_input_blocks_1_0_in_layers_0.w_norm",
                "unet",
                "down_blocks.0.resnets.0.norm1",
                "kohya-ldm",
            ),
            (
                "lora_unet_output_blocks_2_1_conv.lora_down.weight",
                "unet",
                "up_blocks.0.upsamplers.0.conv",
                "kohya-ldm",
            ),
            (f"unet.{MIDDLE}.lora_A.weight", "unet", MIDDLE, "diffusers"),
            (f"unet.{MIDDLE}.lora_A.default.weight", "unet", MIDDLE, "diffusers"),
            (
                f"unet.{MIDDLE.replace('to_q', 'processor.to_out_lora')}.down.weight",
                "unet",
                MIDDLE.replace("to_q", "to_out.0"),
                "diffusers-old",
            ),
            (
                f"{MIDDLE.replace('to_q', 'processor.to_q_lora')}.down.weight",
                "unet",
                MIDDLE,
                "diffusers-old",
            ),
            (
                f"text_encoder_2.{TEXT}.lora_linear_layer.down.weight",
                "text_encoder_2",
                TEXT,
                "diffusers",
            ),
            (
                f"text_encoder.{TEXT.replace('q_proj', 'to_q_lora')}.down.weight",
                "text_encoder",
                TEXT,
                "diffusers-old",
            ),
            (f"base_model.model.{MIDDLE}.lora_A.weight", "unet", MIDDLE, "peft"),
            (
                f"base_model.model.{TEXT.removeprefix('text_model.')}.lora_A.weight",
                "text_encoder",
                TEXT,
                "peft",
            ),
            (f"lora_unet.{MIDDLE}.lora_down.weight", "unet", MIDDLE, "onetrainer"),
            (
                "unet.middle_block.1.transformer_blocks.0.attn1.to_q.lora_down.weight",
                "unet",
                MIDDLE,
                "onetrainer",
            ),
            (f"clip_g.{TEXT}.lora_down.weight", "text_encoder_2", TEXT, "onetrainer"),
            (
                "lora_te2_text_projection.lora_down.weight",
                "text_encoder_2",
                "text_projection",
                "kohya",
            ),
        ],
    )
    def test_every_trainers_names(self, down: str, component: str, path: str, style: str) -> None:
        names = read_names(LoraFile(Path("x"), {down: torch.zeros(2, 320)}, {}))
        assert names.unknown == ()
        (layer,) = names.layers
        assert (layer.component, layer.path, layer.style) == (component, path, style)

    @pytest.mark.parametrize(
        "key",
        [
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
            f"{FLAT}q.lora_down.weight",
            f"{FLAT}.lora_sideways.weight",
            "transformer.single_blocks.0.attn.to_q.lora_A.weight",
            f"text_encoder.{MIDDLE}.lora_A.weight",
            "unet.conv_in.weight",
        ],
    )
    def test_strange_names_are_listed(self, key: str) -> None:
        names = read_names(LoraFile(Path("x"), {key: torch.zeros(2, 320)}, {}))
        assert (names.layers, names.unknown) == ((), (key,))

    @pytest.mark.parametrize(
        ("parts", "kind"),
        [
            (["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "alpha"], "loha"),
            (["lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2"], "lokr"),
            (["oft_blocks", "rescale"], "oft"),
            (["w_norm", "b_norm"], "norm"),
            (["diff", "diff_b"], "diff"),
            (["a1.weight", "a2.weight", "b1.weight", "b2.weight"], "glora"),
            (["lora_down.weight", "lora_up.weight", "lora_mid.weight"], "lora"),
            (["lora_down.weight", "lora_up.weight", "dora_scale"], "lora"),
            (["alpha"], "none"),
        ],
    )
    def test_kinds(self, parts: list[str], kind: str) -> None:
        tensors = {f"{FLAT}.{part}": torch.zeros(2, 2) for part in parts}
        names = read_names(LoraFile(Path("x"), tensors, {}))
        assert names.unknown == ()
        assert [layer.kind for layer in names.layers] == [kind]
        assert len(names.layers[0].parts) == len(parts)

    def test_alpha_from_the_configuration_beside_a_peft_file(self, tmp_path: Path) -> None:
        key = f"base_model.model.{MIDDLE}"
        path = tmp_path / "adapter_model.safetensors"
        safetensors.torch.save_file(pair(key, PEFT, [2, 320], [320, 2]), path)
        assert read_foreign(read_lora(path)).layers[0].alpha is None
        config = {"r": 2, "lora_alpha": 16, "alpha_pattern": {"attn1.to_q": 4}}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        assert read_foreign(read_lora(path)).layers[0].alpha == 4.0
        for broken in ("[]", "{", '{"r": "2"}', '{"lora_alpha": -1}', "\ud800"):
            (tmp_path / "adapter_config.json").write_bytes(broken.encode("utf-8", "surrogatepass"))
            with pytest.raises(FileFormatError, match="cannot be told"):
                read_foreign(read_lora(path))

    def test_alpha_from_the_metadata_of_a_diffusers_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        packed = json.dumps({"unet.r": 2, "unet.lora_alpha": 6})
        tensors = pair(f"unet.{MIDDLE}", PEFT, [2, 320], [320, 2])
        safetensors.torch.save_file(tensors, path, {"lora_adapter_metadata": packed})
        assert read_foreign(read_lora(path)).layers[0].alpha == 6.0


class TestOutline:
    def test_it_tells_what_the_whole_file_tells(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        tensors = {**lora(), **lora(FLAT.replace("to_q", "to_k"), alpha=3.0)}
        safetensors.torch.save_file(tensors, path, {"a": "b"})
        outline = read_outline(path)
        whole = read_lora(path)
        assert list(outline.file.tensors) == list(whole.tensors)
        assert outline.file.metadata == whole.metadata
        assert summarize(outline.file) == summarize(whole)
        large = [t for t in outline.file.tensors.values() if t.numel() > 1]
        assert large
        assert all(t.is_meta for t in large)
        assert outline.header_bytes == 8 + int.from_bytes(path.read_bytes()[:8], "little")

    @pytest.mark.parametrize(
        "dtype",
        [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2],
        ids=str,
    )
    def test_values(self, tmp_path: Path, dtype: torch.dtype) -> None:
        path = tmp_path / "a.safetensors"
        tensors = {
            f"{FLAT}.lora_down.weight": torch.tensor([[1.0, float("nan")]]).to(dtype),
            f"{FLAT}.lora_up.weight": torch.tensor([[0.0], [-0.0]]).to(dtype),
            f"{FLAT}.lora_mid.weight": torch.tensor([[-float("inf")]]).to(dtype),
            f"{FLAT}.dora_scale": torch.tensor([[-3.0, 0.0]]).to(dtype),
            f"{FLAT}.diff": torch.zeros(0, 3).to(dtype),
        }
        safetensors.torch.save_file(tensors, path)
        values = check_values(read_outline(path))
        assert values.not_finite == {f"{FLAT}.lora_down.weight", f"{FLAT}.lora_mid.weight"}
        assert values.zero == {f"{FLAT}.lora_up.weight"}

    @pytest.mark.parametrize("cut", [4, 60, -1])
    def test_damage_is_said(self, tmp_path: Path, cut: int) -> None:
        path = tmp_path / "a.safetensors"
        safetensors.torch.save_file(lora(), path)
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(FileFormatError, match="damaged"):
            read_outline(path)


def warnings_of(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> str:
    safetensors.torch.save_file(dict(tensors), path, metadata)
    outline = read_outline(path)
    names = read_foreign(outline.file)
    return "\n".join(flaws(outline, names, check_values(outline), file_hashes(path)))


class TestWarnings:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "a.safetensors"

    def test_none_for_our_own_files(self, written: Path) -> None:
        outline = read_outline(written)
        names = read_foreign(outline.file)
        found = flaws(outline, names, Values(frozenset(), frozenset()), file_hashes(written))
        assert found == ()

    @pytest.mark.parametrize(
        ("tensors", "metadata", "words"),
        [
            (lora(alpha=None), {}, "1 layers have no alpha"),
            (lora("lora_te_encoder_layers_0_self_attn_q_proj"), {}, "lack 'text_model'"),
            (
                {**lora(), **lora("lora_unet_input_blocks_1_1_proj_in")},
                {},
                "several styles are mixed (kohya, kohya-ldm)",
            ),
            ({**lora(), f"{FLAT}.dora_scale": torch.ones(1, 320)}, {}, "are DoRA"),
            ({**lora(), f"{FLAT}.dora_scale": torch.ones(320, 1)}, {}, "A1111 is wrong"),
            (
                {**lora(), f"{FLAT}.lora_up.weight": torch.full((320, 2), float("inf"))},
                {},
                "1 tensor is not finite",
            ),
            ({**lora(), f"{FLAT}.lora_up.weight": torch.zeros(320, 2)}, {}, "changes nothing"),
            (lora(), {"x": "y" * 2**20}, "ComfyUI shows no metadata above 1,048,576"),
            (lora(), {"sshs_model_hash": "0" * 64}, "is not that of the data"),
            (lora(), {"sshs_model_hash": "0x12"}, "is no SHA-256"),
            ({**lora(), "lora_unet_x.alpha": torch.ones(1)}, {}, "1 names are not understood"),
            ({f"{FLAT}.lora_up.weight": torch.ones(2, 2)}, {}, "up without down"),
            (
                lora(FLAT.replace("attn1_to_q", "attn2_to_k"), width=768),
                {"ss_base_model_version": "sdxl_base_v1-0"},
                "says sdxl, but the layers are those of sd1",
            ),
            (pair(f"base_model.model.{MIDDLE}", PEFT, [2, 4], [4, 2]), {}, "adapter_config.json"),
        ],
    )
    def test_each(
        self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], words: str
    ) -> None:
        assert words in warnings_of(path, tensors, **metadata)

    def test_the_command_says_them_and_who_loads_it(
        self, path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        warnings_of(path, lora(alpha=None))
        inspect.run(path)
        out = capsys.readouterr().out
        assert "\nPrograms\n  ComfyUI: takes all 2 tensors\n" in out
        assert "\nWarnings\n  1 layers have no alpha" in out
        inspect.run(path, as_json=True)
        everything = json.loads(capsys.readouterr().out)
        assert [x["loader"] for x in everything["loaders"]][:2] == ["ComfyUI", "Forge"]
        assert everything["loaders"][0]["taken"] == 2
        assert everything["warnings"][0].startswith("1 layers")
        assert everything["summary"]["kinds"] == {"lora": 1}

    def test_strangers_metadata_is_bounded_and_harmless(
        self, path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hostile = {f"key{i}": "v" for i in range(5000)}
        hostile |= {"\x1b[2J" + "k" * 10**5: "\x1b]0;title\x07\u202e\r\n" + "v" * 10**6}
        hostile |= {"likeness.settings": "x\x1b[31m\n" * 10**5}
        warnings_of(path, {**lora(), "\x1b[31mlora\x07.weight": torch.ones(2)}, **hostile)
        inspect.run(path)
        out = capsys.readouterr().out
        assert len(out) < 100_000
        assert not set("\x1b\x07\r\u202e") & set(out)
        assert "  and 4802 more" in out or "  and 4801 more" in out
        assert "1 names are not understood" in out
        inspect.run(path, as_json=True)
        text = capsys.readouterr().out
        assert not set("\x1b\x07\r\u202e") & set(text)
        assert len(json.loads(text)["metadata"]) == len(hostile)
