"""The import floors, and what keeps files readable (docs/architecture.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "trainer"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A room may import from lower floors and from itself, never from another room of its floor.
FLOORS = {
    "types": 0,
    "registry": 0,
    "errors": 0,
    "machine": 0,
    "transfer": 0,
    "untrusted": 0,
    "config": 1,
    "diffusion": 1,
    "data": 2,
    "captioners": 2,
    "faces": 2,
    "families": 2,
    "adapters": 2,
    "optim": 2,
    "scoring": 2,
    "report": 2,
    "training": 3,
    "doctor": 3,
    "commands": 4,
    "cli": 5,
    "parser": 5,
    "waiting": 5,
    "__main__": 5,
    "__init__": 5,
}
# Floor 2 takes plain values, so it never sees the settings.
NOT_FOR_FLOOR_2 = {"config"}
MAXIMUM_LINES = 320
MAXIMUM_FUNCTION_LINES = 75
MAXIMUM_ARGUMENTS = 8


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import of our own package, wherever it stands in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "trainer":
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trainer":
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def offences(path: Path) -> list[str]:
    room = room_of(path)
    found = []
    for line, name in imports_of(path):
        parts = name.split(".")
        target = parts[1] if len(parts) > 1 else "__init__"
        if target == "__version__":
            continue
        ours, theirs = FLOORS[room], FLOORS[target]
        sideways = theirs == ours and room != target and ours not in (0, 5)
        if theirs > ours or sideways or (ours == 2 and target in NOT_FOR_FLOOR_2):
            found.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_only_go_down(path: Path) -> None:
    assert offences(path) == []


def test_the_test_finds_a_wrong_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = PACKAGE / "data" / "wrong.py"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "from trainer.training import loop\n")
    assert offences(wrong)


def test_every_room_is_on_a_floor() -> None:
    assert {room_of(path) for path in MODULES} == set(FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAXIMUM_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MAXIMUM_FUNCTION_LINES, node.name
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([a for a in arguments if a.arg not in ("self", "cls")])
            assert count <= MAXIMUM_ARGUMENTS, node.name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_print_and_no_pickle(path: Path) -> None:
    """Printing is for the commands; unpickling a file can run anything that is in it."""
    forbidden = {"load", "save"} if room_of(path) != "commands" else set()
    if path == PACKAGE / "families" / "checkpoints.py":  # PyTorch's weights-only reader
        forbidden = {"save"}
        assert "weights_only=True" in path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if room_of(path) not in ("commands", "cli"):
                assert called != "print"
            assert called not in {f"torch.{name}" for name in forbidden}
            assert called not in {"eval", "exec", "pickle.load", "pickle.loads"}


def test_one_broad_handler_only() -> None:
    """Errors are never swallowed: everything may be caught in one place, where it is said."""
    broad = [
        path.relative_to(PACKAGE).as_posix()
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
    ]
    assert broad == ["cli.py"]


def test_the_command_line_imports_nothing_heavy() -> None:
    code = (
        "import sys, trainer.cli; trainer.cli.build_parser();"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'pydantic'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == "[]"


def test_datasets_folder_is_no_package() -> None:
    """A `.py` there would shadow the Hugging Face package of that name."""
    assert list((ROOT / "datasets").rglob("*.py")) == []
