"""Photos of which a mask leaves nothing where they are cropped are told of before the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import QUICK
from tests.runs import run_cli, save_photos


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photos; of the wide one only the left edge is trained, which the crop leaves out."""
    photos = save_photos(tmp_path / "anna")
    with Image.open(photos / "1.png") as wide:
        mask = Image.new("L", wide.size, 0)
        mask.paste(255, (0, 0, wide.width // 8, wide.height))
    mask.save(photos / "1-mask.png")
    return photos


def command(name: str, folder: Path, base: Path, *more: object) -> list[object]:
    settings = [*QUICK, f"model.base={base}", "data.max_aspect=1"]
    return [name, folder, *(f"--set={setting}" for setting in settings), *more]


def test_a_training_is_refused_before_the_base_is_loaded(
    folder: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(*command("train", folder, base, "--output", tmp_path / "out")) == 1
    said = capsys.readouterr().err
    assert "1.png" in said
    assert "1-mask.png" in said
    assert "data.skip_bad=true" in said
    assert not (tmp_path / "out").exists()


def test_it_can_be_left_out(folder: Path, base: Path, tmp_path: Path) -> None:
    words = command("train", folder, base, "--output", tmp_path / "out")
    assert run_cli(*words, "--set=data.skip_bad=true") == 0
    assert (tmp_path / "out" / "anna.safetensors").exists()


def test_the_doctor_says_so(folder: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(*command("prepare", folder, base, "--json")) == 1
    found = json.loads(capsys.readouterr().out)
    (verdict,) = [row for row in found["photos"] if row["path"].endswith("1.png")]
    assert verdict["level"] == "bad"
