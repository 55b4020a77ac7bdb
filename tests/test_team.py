"""Several processes that train together: the same result as one, and one end for all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import QUICK
from tests.learners import Recipe, make_learner, make_plan
from tests.runs import Outcome, files_in, metrics_of, tensors_of
from trainer.errors import DataError
from trainer.training.learner import Learner
from trainer.training.loop import train
from trainer.training.team import ALONE, LAUNCHED, Team, open_team

ROOT = Path(__file__).resolve().parent.parent
# How far weights may be from those of one process after a few steps at a rate of 0.01: sums come in
# another order, and Adam makes the most of the smallest gradients.
RELATIVE, ABSOLUTE = 1e-4, 1e-4
# Whoever is left when a process was killed ends within so many seconds, on a busy machine.
SOON = 30.0

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent to processes")


def assert_same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=RELATIVE, atol=ABSOLUTE)


# --- a process alone


def test_every_micro_batch_is_taken_once() -> None:
    for size, accumulate in product(range(1, 9), repeat=2):
        count = size * accumulate
        taken = [Team(rank, size).mine(count) for rank in range(size)]
        assert sorted(number for mine in taken for number in mine) == list(range(count))
        assert {len(mine) for mine in taken} == {accumulate}


def test_a_team_of_one_changes_nothing() -> None:
    parameter, loss = nn.Parameter(torch.zeros(2)), torch.ones(3)
    parameter.grad = gradient = torch.ones(2)
    with ALONE as team:
        team.sum_gradients([parameter])
        team.wait("nobody")
        team.require_alike("anything", "text")
        team.require_device(torch.device("cuda"))
        assert parameter.grad is gradient
        assert team.sum(loss) is loss
        assert (team.told("words"), team.stop(2), team.leader) == ("words", 2, True)
        assert team.command == "likeness train"


def test_a_process_is_alone_unless_a_launcher_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    assert open_team(pytest.fail) is ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")  # some clusters set it for every program
    assert open_team(pytest.fail) is ALONE
    for name, value in zip(LAUNCHED, ("0", "1", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert open_team(pytest.fail) is ALONE


@pytest.mark.parametrize("fails", [False, True])
def test_the_leader_goes_first(fails: bool) -> None:
    done: list[str] = []

    class Noted(Team):
        def wait(self, for_what: str) -> None:
            done.append(f"{self.rank} waits for {for_what}")

    for rank in (0, 1):
        try:
            with Noted(rank, 2).leader_first("photos"):
                done.append(f"{rank} works")
                if fails:
                    raise DataError("gone")
        except DataError:
            done.append(f"{rank} fails")
    first, second = ["0 works", "0 waits for photos"], ["1 waits for photos", "1 works"]
    if fails:
        first, second = ["0 works", "0 fails"], [*second, "1 fails"]
    assert done == first + second


# --- the sums


class Threads(Team):
    """Processes played by threads: what is to be summed lies on a table that all see."""

    def __init__(self, rank: int, table: list[Tensor | None], barrier: threading.Barrier) -> None:
        super().__init__(rank, len(table))
        self.table, self.barrier = table, barrier

    def sum(self, tensor: Tensor) -> Tensor:
        self.table[self.rank] = tensor
        self.barrier.wait(60)
        total = torch.stack([part for part in self.table if part is not None]).sum(0)
        self.barrier.wait(60)
        return total

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad = self.sum(parameter.grad)


def test_three_processes_compute_what_one_does_with_three_times_the_batches(base: Path) -> None:
    size = 3
    recipe = Recipe(prior_weight=0.5, caption_dropout=0.3)
    table: list[Tensor | None] = [None] * size
    barrier = threading.Barrier(size)

    def trained(team: Team, accumulate: int, learner: Learner) -> tuple[list[float], list[Tensor]]:
        torch.set_num_threads(1)
        plan = make_plan(2, accumulate=accumulate)
        losses = [report.loss for report in train(learner, plan, 0, None, team)]
        return losses, [parameter.detach() for parameter in learner.parameters]

    with ThreadPoolExecutor(size) as pool:
        teams = [Threads(rank, table, barrier) for rank in range(size)]
        learners = [make_learner(base, recipe) for _ in teams]
        together = list(pool.map(trained, teams, [2] * size, learners))
    alone_losses, alone = trained(ALONE, 2 * size, make_learner(base, recipe))
    for losses, weights in together:
        assert losses == pytest.approx(alone_losses, rel=1e-5)
        for mine, its in zip(weights, alone, strict=True):
            assert_same(mine, its)


# --- processes

PLAYED = """
import json, os, signal, sys, time
import torch
from trainer.errors import DataError, TrainerError
from trainer.training.team import open_team

def play(team):
    first, second, third = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    if team.leader:
        first.grad = torch.ones(2)
    second.grad = torch.full((2,), team.rank + 1.0)
    team.sum_gradients([first, second, third])
    team.require_alike("the weather", "fine")
    seen = {
        "first": first.grad.tolist(),
        "second": second.grad.tolist(),
        "third": third.grad,
        "sum": team.sum(torch.tensor([1.0, team.rank])).tolist(),
        "told": team.told(f"words of {team.rank} \\u00e9"),
        "stop": [team.stop(0), team.stop(15 * team.rank)],
        "command": team.command,
    }
    print(json.dumps(seen), flush=True)
    team.way_out = "Go on with --resume."
    if sys.argv[1] == "error" and not team.leader:
        raise DataError("A photo is gone.", where="b.png")
    if sys.argv[1] == "killed" and not team.leader:
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "busy":
        if not team.leader:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    if sys.argv[1] == "differ":
        team.require_alike("the weather", str(team.rank))
    team.wait("the next step")

try:
    with open_team(lambda words: print(words, file=sys.stderr, flush=True)) as team:
        play(team)
except TrainerError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def play(what: str) -> list[Outcome]:
    """Two processes that do something small together, without a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PLAYED, what],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    outcomes = []
    for process in started:
        out, err = process.communicate(timeout=120)
        outcomes.append(Outcome(process.returncode, out, err))
    return outcomes


def test_processes_sum_tell_and_stop_together() -> None:
    for outcome in play("nothing"):
        seen = json.loads(outcome.done().out)
        assert seen == {
            "first": [1.0, 1.0],
            "second": [3.0, 3.0],
            "third": None,
            "sum": [2.0, 1.0],
            "told": "words of 0 \u00e9",
            "stop": [0, 15],
            "command": "torchrun --nproc_per_node 2 train.py",
        }
        assert outcome.err == ""


@pytest.mark.slow
@posix
def test_who_is_killed_is_missed_by_name() -> None:
    for what in ("killed", "busy"):
        leader, other = play(what)
        assert (leader.code, other.code) == (1, -signal.SIGKILL)
        assert "Process 2 of 2 ended without a word" in leader.err
        assert "Go on with --resume." in leader.err
        assert "Traceback" not in leader.err


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_and_is_said_once() -> None:
    leader, other = play("error")
    assert (leader.code, other.code) == (1, 1)
    assert (leader.err + other.err).count("A photo is gone.") == 1
    assert "Traceback" not in leader.err + other.err


@pytest.mark.slow
def test_processes_that_have_not_the_same_before_them_are_refused() -> None:
    leader, other = play("differ")
    assert (leader.code, other.code) == (1, 1)
    assert (leader.err + other.err).count("The processes do not agree on the weather.") == 1


# --- whole runs, started by torchrun

Words = Sequence[object]


@contextmanager
def torchrun(*words: object) -> Iterator[subprocess.Popen[str]]:
    """`train.py` in two processes; nothing of it is left afterwards."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(ROOT / "train.py"), *map(str, words)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            for child in workers_of(process).values():
                child.kill()
            process.kill()
            process.communicate()


def workers_of(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The processes that torchrun has started, by rank."""
    children = psutil.Process(process.pid).children()
    return {int(child.environ()["RANK"]): child for child in children}


def finished(process: subprocess.Popen[str]) -> Outcome:
    out, err = process.communicate(timeout=300)
    return Outcome(process.returncode, out, err)


def together(*words: object) -> Outcome:
    with torchrun(*words) as process:
        return finished(process)


@pytest.fixture
def words(base: Path, photos: Path) -> Callable[..., list[object]]:
    """The command line of a short run into a folder, with settings."""

    def call(output: Path, *settings: str) -> list[object]:
        chosen = [f"--set={word}" for word in (*QUICK, "adapter.save_precision=fp32", *settings)]
        return [photos, "--base", base, "--output", output, *chosen]

    return call


@pytest.mark.slow
def test_two_processes_make_the_file_of_one(
    words: Callable[..., list[object]], cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    settings = ("preview.every_steps=2", "objective.prior_weight=0.5", "objective.prior_pictures=9")
    one, two, half = tmp_path / "one", tmp_path / "two", tmp_path / "half"
    done = together(*words(two, *settings, "data.cache=false")).done()
    assert done.out.count("step 4/4") == done.out.count("LoRA file") == 1
    doubled = (*settings, "optimizer.accumulate_steps=2")
    cli("train", *words(one, *doubled)).done()
    assert files_in(one) == files_in(two)
    losses = [[row["loss"] for row in metrics_of(folder)] for folder in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    mine, its = (tensors_of(folder) for folder in (one, two))
    assert mine.keys() == its.keys()
    for name, tensor in mine.items():
        assert_same(tensor, its[name])

    # Half of it in two processes, with a cache, and the rest in one.
    together(*words(half, *settings, "run.stop_at_step=2")).done()
    refused = cli("train", *words(half, *settings), "--resume")
    assert refused.code == 2
    assert "times the number of processes: was 2, now 1" in refused.err
    cli("train", *words(half, *doubled), "--resume").done()
    for name, tensor in tensors_of(half).items():
        assert_same(tensor, its[name])


@pytest.mark.slow
def test_a_wrong_setting_is_said_once(words: Callable[..., list[object]], tmp_path: Path) -> None:
    outcome = together(*words(tmp_path / "out", "optimizer.name=nothing"))
    assert outcome.code != 0
    assert outcome.err.count("There is no optimizer named 'nothing'.") == 1
    assert not (tmp_path / "out").exists()


def wait_for_steps(output: Path, count: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 240
    while not (output / "metrics.jsonl").exists() or len(metrics_of(output)) < count:
        assert time.monotonic() < until
        assert process.poll() is None, finished(process)
        time.sleep(0.1)


@pytest.mark.slow
@posix
@pytest.mark.parametrize("killed", [0, 1])
def test_when_a_process_is_killed_the_other_ends_and_says_how_to_go_on(
    killed: int, words: Callable[..., list[object]], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    long = words(output, "run.total_steps=100000", "run.keep_checkpoints=2")
    with torchrun(*long) as process:
        wait_for_steps(output, 5, process)
        workers = workers_of(process)
        workers[killed].kill()
        ended, _ = psutil.wait_procs([workers[1 - killed]], timeout=SOON)
        outcome = finished(process)
    assert ended
    assert outcome.code != 0
    assert f"Process {killed + 1} of 2 ended without a word" in outcome.err
    assert f'train.py "{long[0]}" --output "{output}" --resume' in outcome.err
    assert outcome.err.count("Traceback (most recent call last)") == 1  # torchrun's own


@pytest.mark.slow
@posix
@pytest.mark.parametrize("whom", ["torchrun", "leader", "other"])
def test_a_signal_to_one_or_all_stops_all_after_the_same_step(
    whom: str, words: Callable[..., list[object]], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with torchrun(*words(output, "run.total_steps=100000", "run.save_every_steps=5000")) as process:
        wait_for_steps(output, 3, process)
        workers = workers_of(process)
        if whom == "torchrun":
            process.send_signal(signal.SIGINT)
        else:
            workers[("leader", "other").index(whom)].send_signal(signal.SIGTERM)
        outcome = finished(process)
    assert outcome.err.count("Stopped after step") == 1
    step = metrics_of(output)[-1]["step"]
    assert f"Stopped after step {step} of 100000; everything is saved" in outcome.err
    # A signal that comes just after all have agreed to go on has the step before saved as well.
    saved = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert saved in (
        [f"step-{n:06d}" for n in range(first, step + 1)] for first in (step - 1, step)
    )
    assert "ended without a word" not in outcome.err
