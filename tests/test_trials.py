"""What was found by trying is found again, so that one command gives one file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.runs import Outcome, same_tensors, tensors_of
from trainer.data.publish import publish
from trainer.training import processor, trials
from trainer.training.trials import answer

CPU = torch.device("cpu")
AMONG = ("left", "right")


class Trial:
    """Finds something else each time."""

    def __init__(self, *found: str) -> None:
        self.found = found
        self.made = 0

    def __call__(self) -> str:
        self.made += 1
        return self.found[self.made - 1]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIKENESS_CACHE", str(tmp_path / "cache"))
    forget(monkeypatch)
    return tmp_path / "cache"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(trials, "_known", {})


def test_the_first_answer_is_kept_to(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial("left", "right")
    for _ in range(3):
        assert answer("which hand", CPU, AMONG, trial) == "left"
        forget(monkeypatch)
    assert trial.made == 1
    (file,) = cache.iterdir()
    assert "which hand" in file.read_text(encoding="utf-8")
    assert answer("which foot", CPU, AMONG, trial) == "right"


def test_other_hardware_or_libraries_are_tried_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial("left", "right", "left")
    assert answer("which", CPU, AMONG, trial) == "left"
    with monkeypatch.context() as patch:
        patch.setattr(trials, "processor_name", lambda: "another")
        assert answer("which", CPU, AMONG, trial) == "right"
    with monkeypatch.context() as patch:
        patch.setattr(trials, "version", lambda library: "99.0")
        assert answer("which", CPU, AMONG, trial) == "left"
    assert answer("which", CPU, AMONG, trial) == "left"
    assert trial.made == 3


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"[]",
        b'{"answer": "right"}',
        b'{"answer": "left", "check": 1}',
        b"\xff",
        b"null",
    ],
)
def test_a_damaged_answer_is_found_anew_and_mended(
    damage: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial("left", "right", "left")
    answer("which", CPU, AMONG, trial)
    (file,) = cache.iterdir()
    file.write_bytes(damage)
    for _ in range(2):
        forget(monkeypatch)
        assert answer("which", CPU, AMONG, trial) == "right"
    assert json.loads(file.read_text(encoding="utf-8"))["answer"] == "right"


def test_an_answer_that_is_none_of_them_is_found_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answer("which", CPU, AMONG, Trial("left")) == "left"
    forget(monkeypatch)
    assert answer("which", CPU, ("right", "none"), Trial("none")) == "none"


def test_an_answer_that_no_longer_holds_is_found_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answer("which", CPU, AMONG, Trial("left")) == "left"
    forget(monkeypatch)
    assert answer("which", CPU, AMONG, Trial("right"), lambda name: name != "left") == "right"
    forget(monkeypatch)
    assert answer("which", CPU, AMONG, Trial()) == "right"


def test_where_nothing_could_be_found_out_nothing_is_kept(cache: Path) -> None:
    assert answer("which", CPU, AMONG, Trial("")) == ""
    assert not cache.exists()
    assert answer("which", CPU, AMONG, Trial("left")) == "left"


def test_an_answer_that_cannot_be_read_just_now_is_not_lost(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answer("which", CPU, AMONG, Trial("left")) == "left"

    def locked(path: Path) -> None:
        raise PermissionError("in use")

    with monkeypatch.context() as patch:
        patch.setattr(trials, "read_json", locked)
        forget(monkeypatch)
        assert answer("which", CPU, AMONG, Trial("right")) == "right"
    forget(monkeypatch)
    assert answer("which", CPU, AMONG, Trial()) == "left"


def test_where_nothing_can_be_written_it_holds_for_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    monkeypatch.setenv("LIKENESS_CACHE", str(tmp_path / "file" / "cache"))
    forget(monkeypatch)
    trial = Trial("left", "right")
    assert [answer("which", CPU, AMONG, trial) for _ in range(2)] == ["left"] * 2


def test_of_two_runs_at_once_the_first_to_write_is_right(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slower() -> str:
        assert answer("which", CPU, AMONG, Trial("left")) == "left"
        forget(monkeypatch)
        return "right"

    assert answer("which", CPU, AMONG, slower) == "left"


def test_a_file_system_without_links_does_as_well(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("trainer.data.publish.os.link", refused)
    assert answer("which", CPU, AMONG, Trial("left")) == "left"
    forget(monkeypatch)
    assert answer("which", CPU, AMONG, Trial("right")) == "left"
    (file,) = cache.iterdir()
    with pytest.raises(FileExistsError):
        publish(file, file)


def test_the_cache_command_knows_it(cache: Path, cli: Callable[..., Outcome]) -> None:
    answer("which", CPU, AMONG, Trial("left"))
    shown = cli("cache").done().out
    assert "what is the quickest here" in shown
    assert "left alone" not in shown
    cli("cache", "--clear").done()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_runs_give_the_same_file_whichever_way_is_quicker_meanwhile(
    precision: str,
    cache: Path,
    train: Callable[..., Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    words = (f"model.precision={precision}", "adapter.save_precision=fp32")
    asked: list[object] = []
    for turn, name in enumerate(("one", "two")):

        def seconds(*of: object, turn: int = turn) -> float:
            asked.append(of)
            return 1.0 + 9 * ((of[-1] is True or of[0] == "blockwise") == (turn == 0))

        monkeypatch.setattr(processor, "product_seconds", seconds)
        monkeypatch.setattr(processor, "milliseconds", seconds)
        train(*words, output=tmp_path / name).done()
        if turn == 0:
            assert asked
            asked.clear()
            forget(monkeypatch)
    assert asked == []
    assert same_tensors(tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two"))
