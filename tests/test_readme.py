"""What the README says can be typed, and what it links to is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from trainer.parser import build_parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[list[str]]:
    """Arguments of every `likeness` and `train.py` command in the README's code blocks."""
    found = []
    for block in re.findall(r"```\n(.*?)```", README, re.DOTALL):
        for line in block.splitlines():
            for command in line.split("&&"):
                words = shlex.split(command)
                if words[:1] == ["likeness"]:
                    found.append(words[1:])
                elif words[:2] == ["python", "train.py"]:
                    found.append(["train", *words[2:]])
    return found


def test_the_readme_has_commands() -> None:
    assert len(commands()) >= 2


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_commands_parse(arguments: list[str]) -> None:
    assert build_parser().parse_args(arguments).command == arguments[0]


def test_the_first_screen_has_the_two_commands() -> None:
    head = README[: README.index("## ")]
    assert "pip install -e . && python train.py datasets/zia\n" in head
    assert 'pip install -e ".[test]" && pytest -n 2 --dist loadfile\n' in head
    assert (ROOT / "datasets" / "zia").is_dir()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), target


def test_the_architecture_document_names_every_file_of_the_run() -> None:
    document = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in (ROOT / "trainer" / "training").glob("[!_]*.py"):
        assert f"`{path.name}`" in document, path.name
