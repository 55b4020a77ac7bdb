"""How threads wait: spinning where nothing else runs, sleeping where something does."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.waiting import SPINS, choose_waiting, others_at_work


def load(folder: Path, running: int) -> Path:
    path = folder / "loadavg"
    path.write_text(f"0.95 1.20 1.42 {running}/92 18607\n", encoding="ascii")
    return path


@pytest.mark.parametrize(("running", "others"), [(0, 0), (1, 0), (2, 1), (9, 8)])
def test_the_one_that_looks_does_not_count(running: int, others: int, tmp_path: Path) -> None:
    assert others_at_work(load(tmp_path, running)) == others


def test_threads_spin_where_nothing_else_runs(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    choose_waiting(environment, load(tmp_path, 1))
    assert environment == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(SPINS)}


def test_threads_sleep_where_something_else_runs(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    choose_waiting(environment, load(tmp_path, 2))
    assert environment == {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize("content", [None, "", "0.95 1.20 1.42", "a b c d/e f"])
def test_threads_sleep_where_nothing_can_be_told(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "loadavg"
    if content is not None:
        path.write_text(content, encoding="ascii")
    environment: dict[str, str] = {}
    choose_waiting(environment, path)
    assert environment == {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_what_the_user_has_set_stays(name: str, tmp_path: Path) -> None:
    environment = {name: "ACTIVE"}
    choose_waiting(environment, load(tmp_path, 1))
    assert environment == {name: "ACTIVE"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what wants to run")
def test_a_busy_neighbour_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
        try:
            # It may take a while to start on a machine that is busy anyway.
            looks: list[int] = []
            while len(looks) < 40 and not any(looks):
                looks.append(others_at_work() or 0)
                time.sleep(0.05)
        finally:
            neighbour.kill()
    assert any(looks)
