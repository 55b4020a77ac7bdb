"""Fingerprints of a base: what they depend on, and what is remembered of large files."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainer.families import BaseFacts
from trainer.families.detect import inspect_base
from trainer.training import fingerprints
from trainer.training.device import Device
from trainer.training.fingerprints import (
    base_fingerprint,
    content_hash,
    text_fingerprint,
    vae_fingerprint,
)

CPU = Device(torch.device("cpu"), "fp32", "sdpa")


def all_three(facts: BaseFacts, device: Device = CPU) -> dict[str, str]:
    return {
        "vae": vae_fingerprint(facts, device),
        "text": text_fingerprint(facts, device),
        "base": base_fingerprint(facts, device),
    }


def differing(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


@pytest.fixture
def facts(base: Path, tmp_path: Path) -> BaseFacts:
    shutil.copytree(base, tmp_path / "base")
    return replace(inspect_base(base), folder=tmp_path / "base")


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("vae/diffusion_pytorch_model.safetensors", {"vae", "base"}),
        ("vae/config.json", {"vae", "base"}),
        ("text_encoder/model.safetensors", {"text", "base"}),
        ("tokenizer/vocab.json", {"text", "base"}),
        ("text_encoder_2/model.safetensors", {"text", "base"}),
        ("tokenizer_2/spiece.model", {"text", "base"}),
        ("unet/diffusion_pytorch_model.safetensors", {"base"}),
        ("scheduler/scheduler_config.json", {"base"}),
        ("model_index.json", {"base"}),
        ("vae/.cache/download.json.lock", set()),
        ("safety_checker/model.safetensors", set()),
        ("other.safetensors", set()),
        ("README.md", set()),
    ],
)
def test_a_fingerprint_depends_on_what_is_used_and_nothing_else(
    file: str, expected: set[str], facts: BaseFacts
) -> None:
    before = all_three(facts)
    assert len(set(before.values())) == 3
    path = facts.folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as changed:
        changed.write(b" ")
    assert differing(before, all_three(facts)) == expected


def test_place_and_date_do_not_matter_but_numbers_do(facts: BaseFacts, base: Path) -> None:
    before = all_three(facts)
    assert all_three(replace(facts, folder=base)) == before
    assert differing(before, all_three(facts, replace(CPU, precision="bf16"))) == set(before)
    cuda = replace(CPU, device=torch.device("cuda"))
    assert differing(before, all_three(facts, cuda)) == {"vae", "text"}
    assert all_three(facts, replace(CPU, attention="eager", notices=("a",))) == before


def test_a_renamed_file_is_another(facts: BaseFacts) -> None:
    before = all_three(facts)
    weights = facts.folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("other.safetensors"))
    assert differing(before, all_three(facts)) == {"vae", "base"}


# --- large files


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read; files of more than ten bytes are large."""
    names: list[str] = []
    plain = fingerprints._hash

    def counted(path: Path) -> str:
        names.append(path.name)
        return plain(path)

    monkeypatch.setattr(fingerprints, "_hash", counted)
    monkeypatch.setattr(fingerprints, "REMEMBERED_BYTES", 10)
    monkeypatch.setattr(fingerprints, "_SETTLED_SECONDS", -60.0)
    return names


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_large_file_is_read_once(read: list[str], tmp_path: Path) -> None:
    memory = tmp_path / "cache" / "hashes.json"
    one, two = write(tmp_path / "one", b"1" * 50), write(tmp_path / "two", b"2" * 50)
    small = write(tmp_path / "small", b"3")
    first = [content_hash(path, memory) for path in (one, two, small)]
    again = [content_hash(path, memory) for path in (one, two, small)]
    assert again == first
    assert len(set(first)) == 3
    assert read == ["one", "two", "small", "small"]
    assert [path.name for path in memory.parent.iterdir()] == ["hashes.json"]
    write(one, b"4" * 51)
    assert content_hash(one, memory) != first[0]
    assert len(json.loads(memory.read_text(encoding="utf-8"))["files"]) == 2


def test_a_link_and_what_it_leads_to_are_one_file(read: list[str], tmp_path: Path) -> None:
    """As model files in a download cache are."""
    real = write(tmp_path / "blob", b"1" * 50)
    link = tmp_path / "model.safetensors"
    try:
        link.symlink_to(real)
    except OSError:
        pytest.skip("links need a privilege here")
    memory = tmp_path / "hashes.json"
    assert content_hash(link, memory) == content_hash(real, memory)
    assert len(read) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps no date of change")
def test_other_content_of_equal_size_and_date_is_noticed(read: list[str], tmp_path: Path) -> None:
    memory, path = tmp_path / "hashes.json", write(tmp_path / "one", b"1" * 50)
    before, stat = content_hash(path, memory), path.stat()
    write(path, b"2" * 50)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert content_hash(path, memory) != before
    assert read == ["one", "one"]


def test_a_file_just_written_is_not_remembered(
    read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "_SETTLED_SECONDS", 3.0)
    memory, path = tmp_path / "hashes.json", write(tmp_path / "one", b"1" * 50)
    assert content_hash(path, memory) == content_hash(path, memory)
    assert read == ["one", "one"]
    assert not memory.exists()


@pytest.mark.parametrize("cut", range(0, 300, 7))
def test_a_damaged_memory_is_not_believed(read: list[str], tmp_path: Path, cut: int) -> None:
    memory, path = tmp_path / "hashes.json", write(tmp_path / "one", b"1" * 50)
    expected = content_hash(path, memory)
    whole = memory.read_bytes()
    place = cut % len(whole)
    memory.write_bytes(whole[:place])
    assert content_hash(path, memory) == expected
    # Another digit for a digit, which is JSON as before.
    turned = bytes([whole[place] ^ 1])
    memory.write_bytes(whole[:place] + turned + whole[place + 1 :])
    assert content_hash(path, memory) == expected
    assert content_hash(path, memory) == expected


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"format":1}', "[" * 50_000, "\x00"])
def test_any_other_file_in_its_place_is_not_believed(
    read: list[str], tmp_path: Path, text: str
) -> None:
    memory, path = tmp_path / "hashes.json", write(tmp_path / "one", b"1" * 50)
    memory.write_text(text, encoding="utf-8")
    assert content_hash(path, memory) == content_hash(path, memory)
    assert read == ["one"]


def test_a_cache_that_cannot_be_written_costs_only_time(read: list[str], tmp_path: Path) -> None:
    write(tmp_path / "file", b"")
    path = write(tmp_path / "one", b"1" * 50)
    memory = tmp_path / "file" / "hashes.json"
    assert content_hash(path, memory) == content_hash(path, memory)
    assert read == ["one", "one"]


def test_a_base_of_large_files_is_read_once(
    read: list[str], facts: BaseFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIKENESS_CACHE", str(tmp_path / "cache"))
    first = all_three(facts)
    count = len(read)
    # Each file once, though two fingerprints depend on it.
    assert count == sum(path.is_file() for path in facts.folder.rglob("*"))
    assert all_three(facts) == first
    assert len(read) == count
