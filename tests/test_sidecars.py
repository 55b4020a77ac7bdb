"""Files beside a LoRA file, and the hashes that name a base model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from trainer.adapters.hashes import model_hashes
from trainer.adapters.sidecars import SidecarFacts, write_sidecars
from trainer.errors import ModelError, OutputError

FACTS = SidecarFacts(
    description="a face LoRA of Ännä",
    family="sdxl",
    activation_text="zqx woman",
    preferred_weight=0.8,
    notes="12 photos",
    preview_png=b"\x89PNG",
)


class TestSidecars:
    def test_names_and_content(self, tmp_path: Path) -> None:
        written = write_sidecars(tmp_path / "anna-1.5.safetensors", FACTS)
        assert [p.name for p in written] == ["anna-1.5.json", "anna-1.5.preview.png"]
        assert {p.name for p in tmp_path.iterdir()} == {p.name for p in written}
        card = json.loads(written[0].read_text(encoding="utf-8"))
        assert card == {
            "description": "a face LoRA of Ännä",
            "sd version": "SDXL",
            "activation text": "zqx woman",
            "preferred weight": 0.8,
            "notes": "12 photos",
        }
        assert written[1].read_bytes() == b"\x89PNG"

    @pytest.mark.parametrize(
        ("family", "version"), [("sd1", "SD1"), ("sd2", "SD2"), ("", "Unknown")]
    )
    def test_versions_in_the_words_of_a1111(
        self, tmp_path: Path, family: str, version: str
    ) -> None:
        facts = SidecarFacts(description="", family=family, activation_text="")
        (notes,) = write_sidecars(tmp_path / "a.safetensors", facts)
        assert json.loads(notes.read_text(encoding="utf-8"))["sd version"] == version

    def test_what_the_user_has_written_stays(self, tmp_path: Path) -> None:
        notes = tmp_path / "a.json"
        notes.write_text('{"negative text": "blurry", "notes": "old"}', encoding="utf-8")
        write_sidecars(tmp_path / "a.safetensors", FACTS)
        card = json.loads(notes.read_text(encoding="utf-8"))
        assert (card["negative text"], card["notes"]) == ("blurry", "12 photos")
        notes.write_bytes(b"\xff no JSON")
        write_sidecars(tmp_path / "a.safetensors", FACTS)
        assert json.loads(notes.read_text(encoding="utf-8"))["notes"] == "12 photos"

    def test_failure_keeps_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_sidecars(tmp_path / "a.safetensors", FACTS)
        before = (tmp_path / "a.json").read_bytes()

        def full(*_args: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(OutputError, match="No space left"):
            write_sidecars(tmp_path / "a.safetensors", FACTS)
        assert (tmp_path / "a.json").read_bytes() == before
        assert len(list(tmp_path.iterdir())) == 2


class TestModelHashes:
    @pytest.mark.parametrize("size", [3 * 2**20 + 5, 2**20 + 100, 2**20, 7])
    def test_as_defined(self, tmp_path: Path, size: int) -> None:
        content = bytes(i * 31 % 251 for i in range(1000)) * (size // 1000 + 1)
        content = content[:size]
        path = tmp_path / "base.safetensors"
        path.write_bytes(content)
        hashes = model_hashes(path)
        assert hashes.sha256 == hashlib.sha256(content).hexdigest()
        part = content[0x100000 : 0x100000 + 0x10000]
        assert hashes.autov1 == hashlib.sha256(part).hexdigest()[:8]

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="cannot be read"):
            model_hashes(tmp_path / "base.safetensors")
