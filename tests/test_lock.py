"""One folder, one run: who holds it, who is refused, and what is left of the dead."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

from trainer.errors import OutputError
from trainer.training import lock as lock_module
from trainer.training.lock import LOCK_FILE, FolderLock

ROOT = Path(__file__).resolve().parent.parent
HOLDER = """
import sys
from pathlib import Path
from trainer.training.lock import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def another_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the folder until its input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    with (
        another_process(tmp_path) as process,
        pytest.raises(OutputError, match=f"Another run.*process {process.pid} on .*, since") as e,
        FolderLock(tmp_path),
    ):
        pass
    assert str(tmp_path) in e.value.where
    assert "--output" in e.value.fix


def test_the_lock_of_a_killed_process_is_taken_over_and_said(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        process.kill()
        process.wait()
        assert (tmp_path / LOCK_FILE).exists()
        with FolderLock(tmp_path) as lock:
            (notice,) = lock.notices
            assert f"process {process.pid}" in notice
            assert "taken over" in notice
            holder = json.loads((tmp_path / LOCK_FILE).read_text(encoding="utf-8"))
            assert holder["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_ends_well_leaves_nothing(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        process.communicate("\n")
        assert process.returncode == 0
        with FolderLock(tmp_path) as lock:
            assert lock.notices == []


def test_a_second_lock_in_one_process_is_refused_and_the_first_stays(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        for _ in range(2):
            with pytest.raises(OutputError, match="Another run"), FolderLock(tmp_path):
                pass
        assert (tmp_path / LOCK_FILE).exists()
    with FolderLock(tmp_path) as lock:
        assert lock.notices == []


def test_of_many_that_come_at_once_one_has_it(tmp_path: Path) -> None:
    """They take and give up the lock, which removes its file, as fast as they can."""
    inside, most, failures = 0, 0, 0
    guard = threading.Lock()

    def come() -> None:
        nonlocal inside, most, failures
        for _ in range(40):
            try:
                with FolderLock(tmp_path):
                    with guard:
                        inside += 1
                        most = max(most, inside)
                    with guard:
                        inside -= 1
            except OutputError:
                failures += 1

    threads = [threading.Thread(target=come) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert failures < 160


@pytest.mark.parametrize("content", [b"", b"{", b"[3]", b'{"pid": "\\u001b[31m"}', b"\xff" * 9])
def test_whatever_stands_in_the_file_the_lock_counts(content: bytes, tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_bytes(content)
    with FolderLock(tmp_path):
        pass
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_folder_that_was_made_anew_is_locked_once_more(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with FolderLock(folder) as lock:
        shutil.rmtree(folder)
        with pytest.raises(OutputError, match="cannot be locked"):
            lock.hold()
        folder.mkdir()
        lock.hold()
        lock.hold()
        with pytest.raises(OutputError, match="Another run"), FolderLock(folder):
            pass
        shutil.rmtree(folder)
        folder.mkdir()
        with (
            FolderLock(folder),
            pytest.raises(OutputError, match=f"process {os.getpid()} on"),
        ):
            lock.hold()


def test_without_locks_in_the_file_system_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(file: BinaryIO) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock_module, "_try_lock", none)
    with FolderLock(tmp_path) as lock:
        assert "knows no locks" in lock.notices[0]


def test_a_folder_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be locked"), FolderLock(tmp_path / "missing"):
        pass
