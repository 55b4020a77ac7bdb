"""LoRA files: written whole or not at all, read back, hashed, refused when damaged, and loaded by
diffusers with the same result as ours."""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers import DDIMScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from trainer.adapters.attach import attach
from trainer.adapters.file import file_hashes, read_lora, verify_lora, write_lora
from trainer.adapters.naming import KeyNaming, expected_shapes, from_kohya, kohya_tensors
from trainer.errors import FileFormatError, OutputError

METADATA = {"ss_base_model_version": "sd_v1", "ss_v2": "False", "modelspec.title": "Ännä 顔"}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "lora_unet_mid_to_q.lora_up.weight": torch.randn(6, 2, generator=draw),
        "lora_unet_mid_to_q.lora_down.weight": torch.randn(2, 4, generator=draw),
        "lora_unet_mid_to_q.alpha": torch.tensor(2.0),
    }


SHAPES = {name: tuple(tensor.shape) for name, tensor in tensors().items()}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    path = tmp_path / "anna.safetensors"
    write_lora(path, tensors(), METADATA, dtype=torch.float16)
    return path


def data_section(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


class TestWrite:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_round_trip(self, tmp_path: Path, dtype: torch.dtype) -> None:
        path = tmp_path / "a.safetensors"
        write_lora(path, tensors(), METADATA, dtype=dtype)
        file = read_lora(path)
        assert file.tensors.keys() == tensors().keys()
        for name, tensor in tensors().items():
            assert file.tensors[name].dtype == dtype
            assert torch.equal(file.tensors[name], tensor.to(dtype))
        assert {k: file.metadata[k] for k in METADATA} == METADATA
        with safe_open(path, framework="pt") as reference:
            assert reference.metadata() == file.metadata
            assert set(reference.keys()) == set(file.tensors)

    def test_equal_content_gives_equal_bytes_and_reordering_too(self, tmp_path: Path) -> None:
        paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
        write_lora(paths[0], tensors(), METADATA, dtype=torch.float16)
        write_lora(
            paths[1],
            dict(reversed(tensors().items())),
            dict(reversed(METADATA.items())),
            dtype=torch.float16,
        )
        assert paths[0].read_bytes() == paths[1].read_bytes()

    def test_header_begins_as_a1111_wants_and_data_is_aligned(self, lora: Path) -> None:
        content = lora.read_bytes()
        assert content[8:10] == b'{"'
        assert int.from_bytes(content[:8], "little") % 8 == 0

    def test_hashes_are_as_defined(self, lora: Path) -> None:
        file = read_lora(lora)
        data_hash = hashlib.sha256(data_section(lora)).hexdigest()
        whole = hashlib.sha256(lora.read_bytes()).hexdigest()
        assert write_lora(lora, tensors(), METADATA, dtype=torch.float16) == data_hash
        assert file.metadata["sshs_model_hash"] == data_hash
        assert file.metadata["modelspec.hash_sha256"] == f"0x{data_hash}"
        # Below 1 MiB the part that the old hash covers is empty.
        assert file.metadata["sshs_legacy_hash"] == hashlib.sha256(b"").hexdigest()[:8]
        hashes = file_hashes(lora)
        assert (hashes.sha256, hashes.autov2, hashes.autov3) == (whole, whole[:10], data_hash)
        assert hashes.autov1 is None

    def test_hashes_of_a_file_over_2_mib(self, tmp_path: Path) -> None:
        path = tmp_path / "big.safetensors"
        big = {"lora_unet_a.lora_up.weight": torch.arange(2**20).float()}
        write_lora(path, big, METADATA, dtype=torch.float32)
        content = path.read_bytes()
        part = content[2**20 : 2**20 + 2**16]
        assert file_hashes(path).autov1 == hashlib.sha256(part).hexdigest()[:8]
        # The old hash is that of the file as it is with the ss_* metadata alone.
        kohya = {key: value for key, value in METADATA.items() if key.startswith("ss_")}
        alone = tmp_path / "alone.safetensors"
        alone.write_bytes(safetensors.torch.save(big, kohya))
        assert len(kohya) == 2
        old = hashlib.sha256(alone.read_bytes()[2**20 : 2**20 + 2**16]).hexdigest()[:8]
        assert read_lora(path).metadata["sshs_legacy_hash"] == old

    def test_data_does_not_depend_on_metadata(self, lora: Path, tmp_path: Path) -> None:
        other = tmp_path / "b.safetensors"
        write_lora(other, tensors(), {}, dtype=torch.float16)
        assert data_section(other) == data_section(lora)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_non_finite_values_are_refused_by_name(self, lora: Path, bad: float) -> None:
        before = lora.read_bytes()
        broken = tensors()
        broken["lora_unet_mid_to_q.lora_up.weight"][3, 1] = bad
        with pytest.raises(FileFormatError, match="1 tensors of the LoRA are not finite") as caught:
            write_lora(lora, broken, METADATA, dtype=torch.float16)
        assert caught.value.where == "lora_unet_mid_to_q.lora_up.weight"
        assert lora.read_bytes() == before

    def test_values_beyond_float16_are_refused_but_fit_bfloat16(self, tmp_path: Path) -> None:
        large = tensors()
        large["lora_unet_mid_to_q.lora_up.weight"][0, 0] = 1e5
        path = tmp_path / "a.safetensors"
        with pytest.raises(FileFormatError, match="too large for float16"):
            write_lora(path, large, METADATA, dtype=torch.float16)
        assert not path.exists()
        write_lora(path, large, METADATA, dtype=torch.bfloat16)
        assert verify_lora(path, SHAPES).tensors == 3

    def test_too_long_header_is_refused(self, lora: Path) -> None:
        before = lora.read_bytes()
        with pytest.raises(FileFormatError, match="1048576"):
            write_lora(lora, tensors(), {"ss_x": "x" * 2**20}, dtype=torch.float16)
        assert lora.read_bytes() == before


class TestAtomic:
    def test_failure_leaves_the_old_file_and_no_other(
        self, lora: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = lora.read_bytes()

        def fail(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        for name in ("replace", "fsync"):
            with monkeypatch.context() as patch:
                patch.setattr(os, name, fail)
                with pytest.raises(OutputError, match="No space left") as caught:
                    write_lora(lora, tensors(1), METADATA, dtype=torch.float16)
            assert str(lora) in caught.value.where
            assert lora.read_bytes() == before
            assert list(lora.parent.iterdir()) == [lora]

    def test_interruption_leaves_the_old_file_and_no_other(
        self, lora: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = lora.read_bytes()

        def interrupt(_: int) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_lora(lora, tensors(1), METADATA, dtype=torch.float16)
        assert lora.read_bytes() == before
        assert list(lora.parent.iterdir()) == [lora]

    def test_missing_folder_and_a_file_as_folder_are_explained(
        self, lora: Path, tmp_path: Path
    ) -> None:
        for path in (tmp_path / "no" / "a.safetensors", lora / "a.safetensors"):
            with pytest.raises(OutputError, match="cannot be written"):
                write_lora(path, tensors(), METADATA, dtype=torch.float16)

    def test_a_folder_of_that_name_is_explained(self, tmp_path: Path) -> None:
        folder = tmp_path / "a.safetensors"
        (folder / "inside").mkdir(parents=True)
        with pytest.raises(OutputError, match="cannot be written"):
            write_lora(folder, tensors(), METADATA, dtype=torch.float16)
        assert list(tmp_path.iterdir()) == [folder]

    @pytest.mark.skipif(sys.platform == "win32", reason="whole paths end at 260 characters there")
    def test_longest_file_name_works(self, tmp_path: Path) -> None:
        path = tmp_path / ("a" * (255 - 12) + ".safetensors")
        write_lora(path, tensors(), METADATA, dtype=torch.float16)
        assert path.exists()

    @pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
    @pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
    def test_permissions_are_the_usual_ones(self, tmp_path: Path, umask: int) -> None:
        path = tmp_path / "a.safetensors"
        before = os.umask(umask)
        try:
            write_lora(path, tensors(), METADATA, dtype=torch.float16)
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask

    @pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need a privilege there")
    def test_symbolic_link_is_followed(self, lora: Path, tmp_path: Path) -> None:
        link = tmp_path / "elsewhere" / "link.safetensors"
        link.parent.mkdir()
        link.symlink_to(lora)
        write_lora(link, tensors(1), METADATA, dtype=torch.float32)
        assert link.is_symlink()
        assert read_lora(lora).tensors["lora_unet_mid_to_q.alpha"].dtype == torch.float32


class TestVerify:
    def test_a_good_file(self, lora: Path) -> None:
        verified = verify_lora(lora, SHAPES)
        assert (verified.tensors, verified.matched) == (3, 3)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"lora_unet_new.alpha": ()}, "lora_unet_new.alpha: missing"),
            ({"lora_unet_mid_to_q.alpha": None}, "lora_unet_mid_to_q.alpha: not expected"),
            (
                {"lora_unet_mid_to_q.lora_up.weight": (6, 3)},
                "lora_unet_mid_to_q.lora_up.weight: shape [6, 2], not [6, 3]",
            ),
        ],
    )
    def test_differences_are_named(
        self, lora: Path, change: dict[str, tuple[int, ...] | None], message: str
    ) -> None:
        expected = {k: v for k, v in {**SHAPES, **change}.items() if v is not None}
        with pytest.raises(FileFormatError, match="1 differences") as caught:
            verify_lora(lora, expected)
        assert caught.value.where.splitlines() == [str(lora), message]

    def test_missing_alpha_is_named_even_when_not_in_the_table(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        without = {k: v for k, v in tensors().items() if not k.endswith("alpha")}
        write_lora(path, without, METADATA, dtype=torch.float16)
        with pytest.raises(FileFormatError) as caught:
            verify_lora(path, {k: tuple(v.shape) for k, v in without.items()})
        assert "lora_unet_mid_to_q.alpha: missing" in caught.value.where

    def test_changed_data_does_not_match_its_hash(self, lora: Path) -> None:
        content = bytearray(lora.read_bytes())
        content[-1] ^= 1
        lora.write_bytes(content)
        with pytest.raises(FileFormatError) as caught:
            verify_lora(lora, SHAPES)
        assert "sshs_model_hash" in caught.value.where

    def test_not_finite_numbers_are_named(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        bad = tensors()
        bad["lora_unet_mid_to_q.lora_down.weight"][0, 0] = float("nan")
        safetensors.torch.save_file(bad, path)
        with pytest.raises(FileFormatError) as caught:
            verify_lora(path, SHAPES)
        assert "lora_unet_mid_to_q.lora_down.weight: not finite" in caught.value.where


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


class TestDamaged:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "empty"),
            (b"\x01", "damaged"),
            (b"PK\x03\x04" + b"\0" * 60, "pickle file"),
            (b"\x80\x02}q\x00.", "pickle file"),
            (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
            (b"<!DOCTYPE html><html>", "web page"),
            (struct.pack("<Q", 2**63) + b"{}", "damaged"),
            (struct.pack("<Q", 99) + b'{"a":1}', "damaged"),
            (with_header(b"[]"), "damaged"),
            (with_header(b'{"lora": '), "not valid JSON"),
            (with_header(b'{"a":' + b"[" * 100_000), "not valid JSON"),
            (with_header(b'{"a":"\xff"}'), "not valid JSON"),
            (
                with_header(b'{"lora_x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
                "damaged",
            ),
            (
                with_header(b'{"lora_x":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}', b"\0"),
                "damaged",
            ),
            (with_header(b'{"__metadata__":{"a":1},"lora":0}'), "damaged"),
            (with_header(b"{}"), "holds no LoRA"),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "a.safetensors"
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=message) as caught:
            read_lora(path)
        assert caught.value.fix

    def test_missing_file_and_folder(self, tmp_path: Path) -> None:
        for path in (tmp_path / "no.safetensors", tmp_path):
            with pytest.raises(FileFormatError, match="cannot be read") as caught:
                read_lora(path)
            assert caught.value.where == str(path)
            with pytest.raises(FileFormatError, match="cannot be read"):
                file_hashes(path)

    def test_whole_model_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        safetensors.torch.save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, path)
        with pytest.raises(FileFormatError, match="holds no LoRA") as caught:
            read_lora(path)
        assert "model.diffusion_model.out.2.bias" in caught.value.where

    @given(share=st.floats(0, 1, exclude_max=True))
    @settings(
        max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    def test_a_file_cut_off_anywhere_is_refused(self, lora: Path, share: float) -> None:
        content = lora.read_bytes()
        cut = lora.with_name("cut.safetensors")
        cut.write_bytes(content[: int(share * len(content))])
        with pytest.raises(FileFormatError):
            read_lora(cut)

    @given(content=st.binary(max_size=200))
    @settings(
        max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    def test_random_bytes_are_refused(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "random.safetensors"
        for start in (b"", struct.pack("<Q", len(content)), struct.pack("<Q", 1) + b"{"):
            path.write_bytes(start + content)
            with pytest.raises(FileFormatError):
                read_lora(path)

    @given(position=st.integers(0, 10_000), value=st.integers(0, 255))
    @settings(
        max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    def test_one_changed_byte_is_read_or_refused_but_never_crashes(
        self, lora: Path, position: int, value: int
    ) -> None:
        content = bytearray(lora.read_bytes())
        position %= len(content)
        changed = content[position] != value
        content[position] = value
        path = lora.with_name("changed.safetensors")
        path.write_bytes(content)
        in_data = position >= len(content) - len(data_section(lora))
        try:
            verify_lora(path, SHAPES)
        except FileFormatError:
            assert changed
        else:
            # Only a change of the header's free text may go unnoticed.
            assert not (changed and in_data)


@pytest.fixture(scope="module")
def models() -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """A random Stable Diffusion 1 in miniature."""
    torch.manual_seed(11)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    ).eval()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=12,
            bos_token_id=0,
            eos_token_id=98,
        )
    ).eval()
    return unet, text


UNET_ENDINGS = (
    ".to_q",
    ".to_k",
    ".to_v",
    ".to_out.0",
    ".ff.net.0.proj",
    ".ff.net.2",
    ".proj_in",
    ".proj_out",
)
TEXT_ENDINGS = (".q_proj", ".k_proj", ".v_proj", ".out_proj")


def names_ending(model: nn.Module, endings: tuple[str, ...]) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith(endings)]


@torch.no_grad()
def predict(unet: UNet2DConditionModel, text: CLIPTextModel) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    latents_BChw = torch.randn(2, 4, 8, 8, generator=draw)
    tokens_BT = torch.randint(0, 98, (2, 12), generator=draw)
    prompt_BTD = text(tokens_BT)[0]
    return unet(latents_BChw, torch.tensor(500), prompt_BTD).sample, prompt_BTD


def test_diffusers_loads_our_file_with_the_same_result(
    models: tuple[UNet2DConditionModel, CLIPTextModel], tmp_path: Path
) -> None:
    unet, text = models
    unet_naming, text_naming = KeyNaming("lora_unet"), KeyNaming("lora_te", insert="text_model.")
    base_sample, base_prompt = predict(unet, text)
    pairs = [
        (attach(unet, names_ending(unet, UNET_ENDINGS), rank=3, alpha=1.5, seed=0), unet_naming),
        (attach(text, names_ending(text, TEXT_ENDINGS), rank=2, alpha=4.0, seed=0), text_naming),
    ]
    draw = torch.Generator().manual_seed(8)
    written: dict[str, Tensor] = {}
    expected: dict[str, tuple[int, ...]] = {}
    for attached, naming in pairs:
        for layer in attached.layers.values():
            nn.init.normal_(layer.up, std=0.3, generator=draw)
        written |= kohya_tensors(attached, naming)
        expected |= expected_shapes(attached, naming)
    path = tmp_path / "tiny.safetensors"
    write_lora(path, written, METADATA, dtype=torch.float32)
    assert verify_lora(path, expected).matched == len(expected)
    stored = read_lora(path).tensors
    for attached, naming in pairs:
        attached.load_state(from_kohya(stored, attached, naming))
    our_sample, our_prompt = predict(unet, text)
    for attached, _ in pairs:
        attached.detach()
    assert torch.equal(predict(unet, text)[0], base_sample)

    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=text,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    try:
        pipe.load_lora_weights(path)
        sample, prompt = predict(unet, text)
    finally:
        pipe.unload_lora_weights()
    # The LoRA moves the outputs far more than the two implementations may differ.
    assert (our_prompt - base_prompt).abs().max() > 0.05
    assert (our_sample - base_sample).abs().max() > 0.05
    torch.testing.assert_close(prompt, our_prompt, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sample, our_sample, rtol=1e-5, atol=1e-5)
