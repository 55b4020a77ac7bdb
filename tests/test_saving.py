"""Saves that fail: nothing is lost, whatever fails and when, and it is said what to do."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.learners import Recipe, make_learner, make_plan
from tests.runs import (
    Outcome,
    checkpoint_of,
    files_in,
    metrics_of,
    run_cli,
    same_tensors,
    save_photos,
    tensors_of,
)
from trainer.config.reader import build_config, override_layer
from trainer.errors import DataError, FileFormatError, OutputError
from trainer.training import checkpoint_files, preview, saving
from trainer.training import state as state_module
from trainer.training.guards import Guard
from trainer.training.learner import Learner
from trainer.training.lock import LOCK_FILE, FolderLock
from trainer.training.loop import train as steps
from trainer.training.numbers import StepNumbers
from trainer.training.reports import MetricsFile, read_metrics
from trainer.training.run_folder import RunFolder, choose_root, open_root, run_of, sweep
from trainer.training.saving import SAVE_NOW, Saver
from trainer.training.state import checkpoint_at, newest_checkpoint, restore, save_checkpoint
from trainer.training.stop import StopNow, StopSignal
from trainer.training.team import ALONE

Train = Callable[..., Outcome]
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def learner(base: Path) -> Learner:
    """After one step, with few layers."""
    learner = make_learner(base, Recipe(text_encoder=False))
    list(steps(learner, make_plan(4, last=1), 0))
    return learner


# --- a save that breaks off


def whole_steps(folder: Path) -> int:
    """The step of the newest whole checkpoint; nothing in the folder is damaged."""
    checkpoint, notices = newest_checkpoint(folder)
    assert checkpoint is not None
    assert notices == []
    return checkpoint.step


# What a save calls to change something on the disk.
CALLS: tuple[tuple[Any, str], ...] = (
    (state_module, "save_file"),
    (os, "fsync"),
    *((Path, name) for name in ("mkdir", "write_text", "rename", "unlink", "open")),
    (shutil, "rmtree"),
)


class Failing:
    """Lets so many of the calls through; the next one, or all that follow, fail."""

    def __init__(self, patch: pytest.MonkeyPatch, through: int, *, for_good: bool) -> None:
        self.count = 0
        for place, name in CALLS:
            patch.setattr(place, name, self._counted(getattr(place, name), through, for_good))

    def _counted(self, real: Any, through: int, for_good: bool) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == through + 1 or (for_good and self.count > through):
                if options.get("ignore_errors"):
                    return None
                raise FULL
            return real(*arguments, **options)

        return call


@pytest.mark.parametrize("for_good", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("again", [False, True])
def test_a_save_may_fail_at_any_of_its_writes(
    again: bool,
    for_good: bool,
    learner: Learner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before, during and after: there is a whole checkpoint, and the next save is well."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # only that takes time
    failed = 0
    for through in range(200):
        folder = tmp_path / f"{through}"
        save_checkpoint(folder, learner, 1, {}, keep=1)
        step = 1 if again else 2  # a save of the same step replaces it
        with pytest.MonkeyPatch.context() as patch:
            failing = Failing(patch, through, for_good=for_good)
            try:
                save_checkpoint(folder, learner, step, {}, keep=1)
                words = ""
            except OutputError as error:
                words = error.what
        failed += bool(words)
        assert not words or "No space left" in words
        assert whole_steps(folder) in ({1, step} if words else {step})
        save_checkpoint(folder, learner, 3, {}, keep=1)
        sweep(RunFolder(tmp_path, "anna"))
        assert whole_steps(folder) == 3
        if failing.count <= through:
            break
    assert failing.count <= through  # the last round had nothing left to fail
    assert failed > 8


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of a file's size")
def test_a_file_may_end_anywhere(learner: Learner, tmp_path: Path) -> None:
    """The system itself breaks the writing off, in the middle of each file."""
    import resource

    save_checkpoint(tmp_path, learner, 1, {}, keep=1)
    largest = max(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for share in (0.01, 0.3, 0.6, 0.95):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * largest), hard))
        try:
            with pytest.raises(OutputError, match="step 2 cannot be written"):
                save_checkpoint(tmp_path, learner, 2, {}, keep=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert whole_steps(tmp_path) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_an_interrupted_save_leaves_the_one_before(
    learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, learner, 1, {}, keep=1)

    def interrupted(*arguments: object) -> None:
        raise StopNow

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, learner, 2, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert whole_steps(tmp_path) == 1


# --- which checkpoint is the newest, and which are kept


def test_what_a_checkpoint_is_stands_in_it(learner: Learner, tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, learner, step, {}, keep=9)
    (tmp_path / "step-000002").rename(tmp_path / "other")
    (tmp_path / "step-000001").rename(tmp_path / "step-000009")
    (tmp_path / "other").rename(tmp_path / "step-000001")
    os.utime(tmp_path / "step-000009")
    assert whole_steps(tmp_path) == 2


def test_damaged_ones_do_not_count_as_kept(learner: Learner, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, learner, step, {}, keep=9)
    for step in (2, 3):
        (tmp_path / f"step-00000{step}" / "optimizer.safetensors").write_bytes(b"x")
    save_checkpoint(tmp_path, learner, 4, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000004"]


def test_checkpoints_of_later_steps_go_when_the_run_comes_from_an_earlier_one(
    learner: Learner, tmp_path: Path
) -> None:
    for step in (1, 8, 9):
        save_checkpoint(tmp_path, learner, step, {}, keep=9)
    save_checkpoint(tmp_path, learner, 2, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


def test_a_file_that_is_far_too_large_is_not_read(
    learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, learner, 1, {}, keep=1)
    read: list[Path] = []
    monkeypatch.setattr(checkpoint_files, "file_sha256", lambda path: read.append(path))
    checkpoint, (notice,) = newest_checkpoint(tmp_path, 1000)
    assert checkpoint is None
    assert "far more than this training needs" in notice
    assert read == []


@pytest.mark.parametrize("name", ["999/exp_avg", "x/exp_avg", "-1x"])
def test_an_optimizer_of_something_else_is_refused(
    name: str, learner: Learner, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, learner, 1, {}, keep=1)
    checkpoint, _ = checkpoint_at(tmp_path)
    assert checkpoint is not None
    tensors = dict(checkpoint.optimizer)
    tensors[name] = tensors.pop(next(iter(tensors)))
    changed = dataclasses.replace(checkpoint, optimizer=tensors)
    with pytest.raises(FileFormatError, match="does not fit this training"):
        restore(learner, changed)


def test_a_checkpoint_is_found_by_any_of_its_folders(learner: Learner, tmp_path: Path) -> None:
    below = tmp_path / "checkpoints"
    for step in (1, 2):
        save_checkpoint(below, learner, step, {}, keep=2)
    found = [checkpoint_at(p)[0] for p in (tmp_path, below, below / "step-000001")]
    assert [checkpoint.step for checkpoint in found if checkpoint] == [2, 2, 1]
    assert {run_of(p) for p in (tmp_path, below, below / "step-000001")} == {tmp_path}
    assert run_of(tmp_path / "elsewhere" / "step-000001") is None
    (below / "step-000001" / "state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FileFormatError):
        checkpoint_at(below / "step-000001")


def test_leftovers_go_at_the_next_start_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "anna")
    for place in (folder.checkpoints / ".tmp-000009-1", folder.checkpoints / ".del-step-000001"):
        place.mkdir(parents=True)
        (place / "adapter.safetensors").write_bytes(b"x")
    folder.previews.mkdir()
    left = (".settings.toml.tmp-7", ".likeness-ab.tmp", ".write-test-3", "anna.unfinished")
    for name in (*left, "previews/.step-000001_01.png.tmp-7"):
        (tmp_path / name).write_bytes(b"x")
    kept = ("settings.toml", "anna-2.safetensors", ".hidden", "notes.tmp", "previews/mine.png")
    for name in kept:
        (tmp_path / name).write_bytes(b"x")
    sweep(folder)
    assert files_in(tmp_path) == set(kept)


def test_leftovers_of_a_run_that_had_not_begun_go_and_strange_files_stay(tmp_path: Path) -> None:
    for name in (".settings.toml.tmp-7", ".write-test-3", ".mine.tmp-1", "anna.unfinished"):
        (tmp_path / name).write_bytes(b"x")
    sweep(RunFolder(tmp_path, "anna"))
    assert files_in(tmp_path) == {".mine.tmp-1", "anna.unfinished"}


# --- where a save goes


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make_saver(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[Saver, StopSignal]]]:
    """Savers of a run in `home`, whose checkpoints are a line of text each."""

    def write(folder: Path, _learner: object, step: int, *_: object, **__: object) -> None:
        if list(tmp_path.glob("full")):
            raise OutputError("It cannot be written: No space left", where=str(folder))
        if "home" in folder.parts and list(tmp_path.glob("home is full")):
            raise OutputError("It cannot be written: No space left", where=str(folder))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{step}").write_text("saved", encoding="utf-8")

    monkeypatch.setattr(saving, "save_checkpoint", write)
    monkeypatch.setattr(saving, "checkpoint_bytes", lambda _: 10**15)
    monkeypatch.setattr(saving, "in_folder", lambda session, folder: session)
    monkeypatch.setattr(
        saving, "export_lora", lambda session, path, **_: path.write_text("LoRA", encoding="utf-8")
    )
    monkeypatch.setattr(saving, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(saving, "_NAP_SECONDS", 0.005)
    monkeypatch.setattr(saving, "_LOOK_SECONDS", 0.0)
    with ExitStack() as stack:

        def make(*settings: tuple[str, Any]) -> tuple[Saver, StopSignal]:
            typed = [("run.fallback_folder", str(tmp_path / "away")), *settings]
            resolved = build_config([override_layer(typed, "test")])
            home = tmp_path / "home"
            home.mkdir()
            lock, stop = stack.enter_context(FolderLock(home)), StopSignal()
            job = SimpleNamespace(
                folder=RunFolder(home, "anna"),
                config=resolved.config,
                origins=resolved.origins,
                source="photos",
            )
            session: Any = SimpleNamespace(
                job=job,
                learner=None,
                facts={},
                guard=Guard(),
                plan=make_plan(999),
                start_step=0,
                team=ALONE,
            )
            return Saver(session, lock, stop, 0.0, said.append), stop

        yield make


Make = Callable[..., tuple[Saver, StopSignal]]


def test_saves_come_by_steps_at_the_end_and_when_asked_for(
    make_saver: Make, tmp_path: Path
) -> None:
    saver, stop = make_saver(("run.save_every_steps", 10))
    assert [step for step in (9, 10, 11, 20, 999) if saver.due(step)] == [10, 20, 999]
    stop.save_asked = True
    assert saver.due(11)
    saver.save(11)
    assert not saver.due(12)
    (tmp_path / "home" / SAVE_NOW).touch()
    assert saver.due(12)
    saver.save(12)
    assert not (tmp_path / "home" / SAVE_NOW).exists()
    assert not saver.due(13)
    stop.number = 15
    assert saver.due(13)
    saved = {name for name in files_in(tmp_path / "home") if name != LOCK_FILE}
    assert saved == {
        *("settings.toml", "checkpoints/11", "checkpoints/12"),
        *("anna-11.safetensors", "anna-12.safetensors"),
    }


def test_saves_come_by_the_clock_without_a_lora_file(make_saver: Make, tmp_path: Path) -> None:
    saver, _ = make_saver(("run.save_every_minutes", 0.001), ("run.save_every_steps", 100))
    time.sleep(0.07)
    assert saver.due(3)
    saver.save(3)
    assert not saver.due(4)
    assert not list((tmp_path / "home").glob("*.safetensors"))
    assert (tmp_path / "home" / "checkpoints" / "3").exists()


def test_a_save_waits_until_there_is_room(
    make_saver: Make, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, _ = make_saver()
    (tmp_path / "home is full").touch()
    waits: list[int] = []

    def wait() -> None:
        waits.append(1)
        if len(waits) == 3:
            (tmp_path / "home is full").unlink()

    monkeypatch.setattr(saver, "_wait", wait)
    saver.save(250)
    assert len(waits) == 3
    assert (tmp_path / "home" / "checkpoints" / "250").exists()
    assert not (tmp_path / "away").exists()
    (words,) = said
    assert "paused" in words
    assert "No space left" in words
    assert str(tmp_path / "home") in words
    assert "needs about 1000000000.0 MB" in words
    assert "after 10 minutes" in words


def test_a_save_that_fails_for_too_long_goes_elsewhere_and_comes_back(
    make_saver: Make, said: list[str], tmp_path: Path
) -> None:
    saver, _ = make_saver(("run.save_retry_minutes", 0.0005))
    (tmp_path / "home is full").touch()
    saver.save(250)
    (away,) = (tmp_path / "away").iterdir()
    assert files_in(away) == {"settings.toml", "checkpoints/250", "anna-250.safetensors"}
    assert saver.folder.root == away
    assert f'--output "{tmp_path / "home"}" --resume "{away}"' in said[-1]
    assert len(said) == 2
    saver.save(500)
    assert (away / "checkpoints" / "500").exists()
    assert len(said) == 2  # said once
    (tmp_path / "home is full").unlink()
    saver.save(750)
    assert (tmp_path / "home" / "checkpoints" / "750").exists()
    assert "again" in said[-1]
    assert saver.way_on.endswith("--resume")


def test_ctrl_c_while_it_waits_saves_elsewhere_at_once_and_a_second_gives_up(
    make_saver: Make, tmp_path: Path
) -> None:
    saver, stop = make_saver()
    (tmp_path / "home is full").touch()
    with stop, stop.noted():
        signal.raise_signal(signal.SIGINT)
        began = time.monotonic()
        saver.save(250)
        assert time.monotonic() - began < 5
        assert saver.folder.root.parent == tmp_path / "away"
        (tmp_path / "full").touch()
        signal.signal(signal.SIGALRM, stop._note)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(StopNow):
            saver.save(500)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def test_where_the_fallback_fails_too_the_next_folder_is_taken(
    make_saver: Make, cache_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "away").write_text("a file", encoding="utf-8")
    saver, stop = make_saver()
    stop.number = 2
    (tmp_path / "home is full").touch()
    saver.save(250)
    assert saver.folder.root.parent == cache_folder / "unsaved"
    shutil.rmtree(cache_folder / "unsaved")


def test_a_folder_that_was_deleted_is_made_anew(make_saver: Make, tmp_path: Path) -> None:
    saver, _ = make_saver()
    shutil.rmtree(tmp_path / "home")
    saver.save(250)
    assert files_in(tmp_path / "home") == {
        *(LOCK_FILE, "settings.toml", "checkpoints/250", "anna-250.safetensors")
    }
    with pytest.raises(OutputError, match="Another run"), FolderLock(tmp_path / "home"):
        pass


def test_nothing_is_written_to_the_place_of_a_drive_that_is_gone(
    make_saver: Make, tmp_path: Path
) -> None:
    saver, stop = make_saver()
    saver.session.job.folder = RunFolder(tmp_path / "drive" / "home", "anna")  # type: ignore[misc]
    saver.folder = saver.session.job.folder
    stop.number = 2
    saver.save(250)
    assert not (tmp_path / "drive").exists()
    assert saver.folder.root.parent == tmp_path / "away"


def test_another_run_that_took_the_folder_is_not_disturbed(
    make_saver: Make, said: list[str], tmp_path: Path
) -> None:
    saver, stop = make_saver()
    shutil.rmtree(tmp_path / "home")
    (tmp_path / "home").mkdir()
    stop.number = 2
    with FolderLock(tmp_path / "home"):
        saver.save(250)
    assert "Another run is writing" in said[0]
    assert not (tmp_path / "home" / "checkpoints").exists()
    assert saver.folder.root.parent == tmp_path / "away"


def test_what_is_beside_the_training_is_said_once_and_again_after_it_was_well(
    make_saver: Make, said: list[str]
) -> None:
    saver, _ = make_saver()
    for error in (FULL, DataError("gone"), None, FULL):
        with saver.aside("the report"):
            if error:
                raise error
    assert len(said) == 2
    assert "goes on without the report" in said[0]


# --- metrics


def row(step: int) -> StepNumbers:
    return StepNumbers(step=step, loss=0.5, rate=0.1, grad_norm=1.0, seconds=0.1)


def test_lines_that_cannot_be_written_come_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    metrics.step(row(1))
    opened = Path.open

    def full(self: Path, *arguments: Any, **options: Any) -> Any:
        with opened(self, *arguments, **options) as file:
            file.write(b'{"step": 2, "lo')  # as a full disk leaves it
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        for step in (2, 3):
            with pytest.raises(OSError, match="No space"):
                metrics.step(row(step))
    metrics.step(row(4))
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 4
    path.unlink()
    metrics.step(row(5))
    assert [line["step"] for line in read_metrics(path)] == [5]


def test_metrics_are_cut_back_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    for step in (1, 2, 3):
        metrics.step(row(step))
    before = path.read_bytes()

    def full(*arguments: object) -> None:
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError):
            MetricsFile(path, 2)
    assert path.read_bytes() == before
    MetricsFile(path, 2)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    assert files_in(tmp_path) == {"metrics.jsonl"}


# --- output folders


def test_two_runs_that_begin_at_once_get_two_folders(tmp_path: Path) -> None:
    roots = [
        choose_root(Path("anna"), None, resume=False, overwrite=False, runs=tmp_path / "runs")
        for _ in range(2)
    ]
    assert roots[0] == roots[1]
    opened = [open_root(root, numbered=True) for root in roots]
    assert [root.name for root in opened] == ["anna-1", "anna-2"]


def test_samples_and_step_files_of_others_are_not_replaced(train: Train, tmp_path: Path) -> None:
    for name in ("anna-2.safetensors", "previews/step-000000_01.png"):
        place = tmp_path / name.partition("/")[0] / "out" / name
        place.parent.mkdir(parents=True)
        place.write_bytes(b"mine")
        outcome = train(output=tmp_path / name.partition("/")[0] / "out")
        assert outcome.code == 1
        assert str(place) in outcome.err
        assert place.read_bytes() == b"mine"
        assert outcome.out.count("\n") < 2  # before anything is loaded


# --- whole runs


def test_a_run_in_a_folder_that_is_held_is_refused_and_leaves_it_alone(
    train: Train, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    with FolderLock(tmp_path / "out"):
        for flags in ((), ("--overwrite",), ("--resume",)):
            outcome = train(*flags)
            assert outcome.code == 1
            assert f"process {os.getpid()}" in outcome.err
            assert files_in(tmp_path / "out") == {LOCK_FILE}


def test_a_run_on_a_full_disk_pauses_and_ends_as_any_other(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other save and LoRA file fails at first; the folder is deleted in the middle."""
    monkeypatch.setattr(saving, "RETRY_SECONDS", 0.0)
    real, calls = save_checkpoint, [0]

    def sometimes(folder: Path, *arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] % 2:
            raise OutputError("It cannot be written: No space left", where=str(folder))
        if calls[0] == 2:
            shutil.rmtree(folder.parent)
            folder.parent.mkdir()
            shutil.rmtree(folder.parent)
            raise FileNotFoundError(2, "No such file or directory", str(folder))
        return real(folder, *arguments, **options)

    monkeypatch.setattr(saving, "save_checkpoint", sometimes)
    outcome = train("adapter.save_precision=fp32").done()
    assert outcome.out.count("paused") >= 2
    assert "No space left" in outcome.out
    monkeypatch.undo()
    train("adapter.save_precision=fp32", output=tmp_path / "plain").done()
    assert same_tensors(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "plain"))
    assert same_tensors(checkpoint_of(tmp_path / "out", 4), checkpoint_of(tmp_path / "plain", 4))
    assert [row["step"] for row in metrics_of(tmp_path / "out")][-1] == 4
    assert LOCK_FILE not in files_in(tmp_path / "out")


@pytest.mark.slow
def test_a_run_whose_folder_is_gone_ends_elsewhere_and_goes_on_at_home(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "RETRY_SECONDS", 0.0)
    away = tmp_path / "away"
    drive, gone = tmp_path / "drive", tmp_path / "unplugged"
    drive.mkdir()
    output = drive / "out"

    def unplugged(folder: Path, learner: Learner, step: int, *rest: Any, **options: Any) -> Any:
        if step == 4 and drive.exists():
            drive.rename(gone)
        return save_checkpoint(folder, learner, step, *rest, **options)

    settings = ("adapter.save_precision=fp32", "run.save_retry_minutes=0", "run.total_steps=6")
    monkeypatch.setattr(saving, "save_checkpoint", unplugged)
    outcome = train(*settings, f"run.fallback_folder={away}", output=output).done()
    (place,) = away.iterdir()
    assert f'--output "{output}" --resume "{place}"' in outcome.out
    monkeypatch.undo()
    train(*settings, output=tmp_path / "plain").done()
    assert same_tensors(tensors_of(place), tensors_of(tmp_path / "plain"))
    gone.rename(drive)
    code = run_cli("train", place.parent.parent, "--resume", place / "nothing")
    assert code == 2
    train(f"--resume={place}", output=output).done()
    assert same_tensors(tensors_of(output), tensors_of(tmp_path / "plain"))


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_that_is_named(train: Train, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    settings = ("run.total_steps=6", "adapter.save_precision=fp32", "run.keep_checkpoints=9")
    train(*settings, output=whole).done()
    named = whole / "checkpoints" / "step-000002"
    outcome = train(f"--resume={named}", output=tmp_path / "branch").done()
    assert "Going on from step 2." in outcome.out
    assert same_tensors(tensors_of(tmp_path / "branch"), tensors_of(whole))
    before = tensors_of(whole)
    (named / "state.json").write_text("{}", encoding="utf-8")
    assert train(f"--resume={named}", output=tmp_path / "other").code == 1
    train(f"--resume={whole / 'checkpoints' / 'step-000004'}", output=whole).done()
    assert same_tensors(tensors_of(whole), before)
    assert [row["step"] for row in metrics_of(whole)] == [1, 2, 3, 4, 5, 6]


def test_a_run_ended_between_checkpoint_and_file_writes_the_file_when_it_goes_on(
    train: Train, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train("run.stop_at_step=2", output=out).done()
    (file,) = out.glob("*-2.safetensors")
    before = load_file(file)
    file.unlink()
    train("run.stop_at_step=0", "--resume", output=out).done()
    assert same_tensors(load_file(file), before)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tmpfs is Linux's")
@pytest.mark.parametrize("kilobytes", [100, 200, 300, 400, 600])
def test_a_small_disk_is_filled_and_nothing_is_lost(
    kilobytes: int, train: Train, tmp_path: Path
) -> None:
    """A real disk of so many kilobytes, which is full at some write of a save."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    settings = ("adapter.save_precision=fp32", "run.save_retry_minutes=0")
    away = tmp_path / "away"
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(saving, "RETRY_SECONDS", 0.0)
            outcome = train(*settings, f"run.fallback_folder={away}", output=disk / "out").done()
        places = [*away.iterdir()] if away.exists() else [disk / "out"]
        train(*settings, output=tmp_path / "plain").done()
        if places[0] != disk / "out":
            assert "paused" in outcome.out
            assert "MB are free there" in outcome.out
        assert same_tensors(tensors_of(places[0]), tensors_of(tmp_path / "plain"))
        assert "Traceback" not in outcome.err
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_photos_that_are_gone_at_the_end_do_not_cost_the_file(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.commands import train as command
    from trainer.training.finish import write_report

    photos = save_photos(tmp_path / "photos" / "anna")

    def later(*arguments: Any) -> None:
        shutil.rmtree(photos)
        write_report(*arguments)

    monkeypatch.setattr(command, "write_report", later)
    outcome = train(folder=photos).done()
    assert "goes on without the report" in outcome.out
    assert "anna.safetensors" in files_in(tmp_path / "out")


def test_a_file_in_the_folder_asks_for_a_save(train: Train, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / SAVE_NOW).touch()
    train("run.keep_checkpoints=9").done()
    assert (output / "checkpoints" / "step-000001").is_dir()
    assert (output / "anna-1.safetensors").is_file()
    assert not (output / SAVE_NOW).exists()
    state = json.loads((output / "checkpoints" / "step-000001" / "state.json").read_text("utf-8"))
    assert state["step"] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_training_ends_it_at_once_and_cleanly(
    number: signal.Signals, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*arguments: object, **options: object) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr("trainer.training.session.encode_job", encode)
    outcome = train()
    assert outcome.code == 128 + number
    assert "Stopped" in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_signal_while_samples_are_drawn_saves_and_stops(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a step that is not saved by itself; the samples are drawn when the run goes on."""
    from trainer.training import gallery

    drawn: list[int] = []

    def draw(*arguments: Any) -> Any:
        drawn.append(1)
        if len(drawn) == 2:
            signal.raise_signal(signal.SIGTERM)
        return preview.draw(*arguments)

    previews = ("preview.every_steps=1", "run.save_every_steps=4")
    with monkeypatch.context() as patch:
        patch.setattr(gallery, "draw", draw)
        outcome = train(*previews)
    assert outcome.code == 143
    assert "Stopped after step 1 of 4" in outcome.err
    assert (tmp_path / "out" / "checkpoints" / "step-000001").is_dir()
    assert not (tmp_path / "out" / "previews" / "step-000001_01.png").exists()
    train("--resume").done()
    assert (tmp_path / "out" / "previews" / "step-000001_01.png").exists()
