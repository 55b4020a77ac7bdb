"""What comes from a stranger's file is shown harmlessly, read up to a limit, and kept in place."""

from __future__ import annotations

import json
import re
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from tests.runs import Outcome, save_photos
from tests.test_report import report
from trainer.commands.sample import load_lora
from trainer.commands.terminal import Terminal
from trainer.config.presets import prompts_path
from trainer.config.reader import build_config, override_layer, parse_override
from trainer.data.captions import caption_photos, leads_out, read_sidecar, write_sidecar
from trainer.errors import ConfigError, DataError, FileFormatError, TrainerError
from trainer.families.hub import is_hub_id
from trainer.report.contact_sheet import SheetRow, contact_sheet
from trainer.report.page import PhotoRow, render_report
from trainer.training.run_folder import file_stem
from trainer.types import Photo, Size
from trainer.untrusted import (
    is_device_name,
    on_one_line,
    parse_json,
    printable,
    read_bounded,
    tensor_shape,
)

EVIL = "\x1b]0;owned\x07\x9b2J\u202egpj\u2066<script>alert(1)</script>[red]"
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
NO_LINKS = pytest.mark.skipif(
    sys.platform == "win32", reason="Windows asks for a privilege to make links"
)
POSIX_NAMES = pytest.mark.skipif(sys.platform != "linux", reason="names that only Linux takes")


# --- text


@given(st.text(st.characters(), max_size=20))
@settings(max_examples=50)
def test_printable_text_steers_nothing_and_keeps_all_else(text: str) -> None:
    shown = printable(text)
    assert not STEERING.search(shown)
    shown.encode("utf-8")
    assert "\n" not in on_one_line(text)
    if not STEERING.search(text) and not re.search("[\u061c\ud800-\udfff]", text):
        assert shown == text


def test_letters_of_all_scripts_stay_as_they_are() -> None:
    text = "Zoë 日本語 عربى 👩‍👧 e\u0301\tline\nline"
    assert printable(text) == text


def test_an_error_steers_no_terminal() -> None:
    error = str(DataError(f"{EVIL} is bad.", where=f"{EVIL}\nsecond line", fix=EVIL))
    assert not STEERING.search(error)
    assert error.splitlines()[2] == "  second line"


def test_plain_text_steers_no_rich_console(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal(width=200).print(EVIL)
    out = capsys.readouterr().out
    assert not STEERING.search(out)
    assert "[red]" in out


@POSIX_NAMES
def test_no_command_prints_what_steers(
    cli: Callable[..., Outcome], train: Callable[..., Outcome], tmp_path: Path
) -> None:
    folder = save_photos(tmp_path / "an\x1b[31mna\u202e")
    (folder / "0.png").rename(folder / "\x1b]0;x\x07\u202e.png")
    (folder / "\x1b]0;x\x07\u202e.txt").write_text(EVIL, encoding="utf-8")
    (folder / "\x9bbad.png").write_bytes(b"no picture")
    page = tmp_path / "page.html"
    outcomes = [
        cli("prepare", folder, "--page", page),
        cli("prepare", folder, "--json"),
        cli("caption", folder, "--captioner", "filename"),
        train(folder=folder),
    ]
    for outcome in outcomes:
        assert not STEERING.search(outcome.out + outcome.err)
        assert "should not have" not in outcome.err
    assert json.loads(outcomes[1].out)["folder"].endswith("an\x1b[31mna\u202e")
    html = page.read_text(encoding="utf-8")
    assert not STEERING.search(html)
    assert "<script" not in html


def test_the_report_holds_no_script_and_forbids_any() -> None:
    row = PhotoRow(EVIL, Image.new("RGB", (8, 8)), EVIL * 1000, "sidecar", "64x64")
    data = replace(report(), title=EVIL, photos=(row,), notes=(EVIL,), command=EVIL)
    html = render_report(data)
    assert not STEERING.search(html)
    assert "<script" not in html
    assert "Content-Security-Policy" in html
    assert len(html) < 200_000


def test_a_prompt_as_long_as_a_book_makes_no_mile_of_a_sheet() -> None:
    row = SheetRow("word " * 20_000, [Image.new("RGB", (64, 64))])
    assert contact_sheet([row], ["step 1"], title="x" * 20_000).height < 3000


# --- limits


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"a" * 11)
    assert read_bounded(path, 11) == b"a" * 11
    with pytest.raises(ValueError, match="larger"):
        read_bounded(path, 10)


def test_a_small_file_takes_little_memory_whatever_its_limit(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"a" * 1000)
    tracemalloc.start()
    read_bounded(tmp_path / "small", 10**12)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_json_that_is_nested_too_deeply_is_no_json() -> None:
    with pytest.raises(ValueError, match="deeply"):
        parse_json("[" * 100_000)


@pytest.mark.parametrize(
    "stated",
    [None, "3", [1.0], [True], [-1], [2**60], [0, 2**60], [2**30, 2**30], [1] * 9, {"a": 1}],
)
def test_a_shape_that_is_none(stated: object) -> None:
    with pytest.raises(ValueError, match="count|numbers"):
        tensor_shape(stated)


def test_a_shape() -> None:
    assert tensor_shape([320, 4, 1, 1]) == (320, 4, 1, 1)
    assert tensor_shape([]) == ()
    assert tensor_shape([0]) == (0,)


@pytest.mark.parametrize("shape", [(), (0, 8), (10**9, 0), (5000, 1)])
def test_a_rank_that_is_none_is_refused_before_layers_are_made(
    shape: tuple[int, ...], base: Path, tmp_path: Path
) -> None:
    from tests.learners import load_backbone
    from trainer.adapters.file import read_lora

    path = tmp_path / "a.safetensors"
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{name}.lora_down.weight": torch.zeros(shape)}, path)
    with pytest.raises(FileFormatError, match="plain LoRA"):
        load_lora(load_backbone(base), read_lora(path))


# --- places


@pytest.mark.parametrize("name", ["con", "CON", "nul.old", "Com1", "lpt9.x", "aux", "prn", "com¹"])
def test_no_file_is_called_like_a_device_of_windows(name: str) -> None:
    assert is_device_name(name)
    assert not is_device_name(file_stem(name))
    with pytest.raises(ConfigError, match="wrong"):
        build_config([override_layer([parse_override(f"run.name='{name}'")], "--set")])


@pytest.mark.parametrize("name", ["anna", "console", "nullam", "com", "com10", "a.con"])
def test_other_names_stay(name: str) -> None:
    assert file_stem(name) == name


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/evil", "a/b", "a\\b", "..", ".", "a\n", "C:x", ""]
)
def test_the_lora_file_stays_in_its_folder(name: str) -> None:
    with pytest.raises(ConfigError):
        build_config([override_layer([("run.name", name)], "--set")])
    stem = file_stem(name)
    assert Path(stem).name == stem
    assert not set(stem) & set("/\\:\n")


@pytest.mark.parametrize("name", ["../prompts/face", "./face", "face/../face"])
def test_a_shipped_prompts_file_is_named_not_reached(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert prompts_path("face").is_file()
    with pytest.raises(TrainerError):
        prompts_path(name)


@pytest.mark.parametrize(
    "text", ["a/b@../../x", "a/b@x/../../y", "a/b@/etc", "../a/b", "a/..", "a"]
)
def test_a_name_on_the_hub_leads_nowhere_else(text: str) -> None:
    assert not is_hub_id(text)


def test_a_revision_may_have_a_path() -> None:
    assert is_hub_id("author/model@refs/pr/3")


@NO_LINKS
class TestLinkedCaptions:
    def test_a_link_out_of_the_folder_is_no_caption(self, tmp_path: Path) -> None:
        secret = tmp_path / "secret.txt"
        secret.write_text("my password", encoding="utf-8")
        folder = tmp_path / "photos"
        folder.mkdir()
        sidecar = folder / "a.txt"
        sidecar.symlink_to(secret)
        photo = Photo(folder / "a.png", Size(64, 64), "0" * 64)
        with pytest.raises(DataError, match="outside of its folder"):
            read_sidecar(sidecar)
        with pytest.raises(DataError, match="outside of its folder"):
            caption_photos([photo], trigger="ohwx", class_noun="person")
        with pytest.raises(PermissionError, match="leads out"):
            write_sidecar(sidecar, "red hat", overwrite=True)
        assert secret.read_text(encoding="utf-8") == "my password"

    def test_a_linked_photo_may_have_its_caption_where_it_lies(self, tmp_path: Path) -> None:
        shelf, folder = tmp_path / "all", tmp_path / "photos"
        shelf.mkdir()
        folder.mkdir()
        for name in ("a.png", "a.txt"):
            (shelf / name).write_text("red hat", encoding="utf-8")
            (folder / name).symlink_to(shelf / name)
        assert read_sidecar(folder / "a.txt") == "red hat"

    def test_links_in_a_circle_lead_out(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").symlink_to(tmp_path / "b.txt")
        (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
        assert leads_out(tmp_path / "a.txt") or not (tmp_path / "a.txt").exists()
