"""Kills short runs at random moments, goes on with them, and compares what comes out.

    python -m tests.crash --kills 200 --signals 50 --seed 0

Every run is a child of one warmed-up process that has all libraries loaded, so that the moments
fall into the run and not into its imports. Half of the kills come after a random time; the other
half just before a random one of the run's own touches of its output folder (a file opened, renamed
or removed), so that saving is hit at every stage. The exit code is 1 when anything was lost.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import torch

from tests.runs import files_in, run_cli, same_tensors, save_photos, tensors_of
from tests.tiny import save_tiny_base

# What Python reports when a file is touched (https://docs.python.org/3/library/audit_events.html).
TOUCHES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}
SETTINGS = (
    "run.total_steps=6",
    "run.save_every_steps=1",
    "run.keep_checkpoints=2",
    "data.batch_size=2",
    "adapter.rank=2",
    "optimizer.learning_rate=0.01",
    "optimizer.text_encoder_learning_rate=0.01",
    "optimizer.accumulate_steps=2",
    "preview.every_steps=3",
    "preview.sampling_steps=2",
    "objective.prior_pictures=4",
)
# So many times longer than the undisturbed run a resumed one may take before it counts as hanging.
PATIENCE = 60


@dataclass(frozen=True, slots=True)
class Course:
    """The undisturbed run: what it left, how long it took and how often it touched its folder."""

    folder: Path
    seconds: float
    touches: int


class Missed(Exception):
    """A run had ended before its moment came."""


class Range:
    """Where runs are shot at: photos, base and settings, and the folder for all of them.

    seconds: how long a run takes just now; that changes with what else the machine does.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.base = save_tiny_base(work / "base")
        self.photos = save_photos(work / "photos")
        self.seconds = 0.0

    def command(self, output: Path) -> list[str]:
        chosen = [f"--set={setting}" for setting in SETTINGS]
        place = ["--base", str(self.base), "--output", str(output)]
        return ["train", str(self.photos), *place, *chosen]

    def start(self, output: Path, *flags: str, before: Callable[[], None] | None = None) -> int:
        """Fork a child that runs the command; returns its process number."""
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        code = 70
        try:
            log = os.open(f"{output}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if before:
                before()
            code = run_cli(*self.command(output), *flags)
        except BaseException:  # noqa: BLE001 - whatever it is, it must be in the log and not go on
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def undisturbed(self) -> Course:
        """Run to the end, once to warm the caches up, once for the clock and once to count."""
        ended(self.start(self.work / "warm"))
        began = time.monotonic()
        folder = self.work / "reference"
        require(ended(self.start(folder)) == 0, "the undisturbed run failed", folder)
        self.seconds = seconds = time.monotonic() - began
        counted, tally = self.work / "counted", self.work / "tally"
        child = self.start(counted, before=partial(_watch, counted, partial(_note, tally)))
        require(ended(child) == 0, "the counted run failed", counted)
        return Course(folder, seconds, int(tally.read_text()))

    def wait_for(self, child: int, seconds: float, *, may_end: bool = False) -> None:
        """Until a run's moment has come.

        Raises:
            Missed: it had ended before, unless it may; how long a run takes is known better now.
        """
        began = time.monotonic()
        while (passed := time.monotonic() - began) < seconds:
            status = Path(f"/proc/{child}/stat").read_text(encoding="utf-8")
            if status.rpartition(")")[2].split()[0] == "Z":
                if may_end:
                    return
                ended(child)
                self.seconds = passed
                raise Missed
            time.sleep(0.005)

    def finish(self, course: Course, folder: Path) -> None:
        """Go on with a run and compare it with the undisturbed one."""
        code = ended(self.start(folder, "--resume"), PATIENCE * course.seconds)
        require(code == 0, f"the run cannot go on: exit code {code}", folder)
        require(
            same_tensors(tensors_of(course.folder), tensors_of(folder)),
            "the resumed run ends elsewhere than the undisturbed one",
            folder,
        )
        # Killed between its last save and the removal of an older checkpoint, a run keeps that one.
        older = {name for name in files_in(folder) if name.startswith("checkpoints/step-")}
        strange = (files_in(folder) ^ files_in(course.folder)) - (older - files_in(course.folder))
        require(not strange, f"files too many or too few: {sorted(strange)}", folder)


def kill_once(place: Range, course: Course, folder: Path, draw: random.Random) -> str:
    """Kill a run, and in a third of the cases the resumed one too; then finish it."""
    words = []
    for flags in ((), ("--resume",)) if draw.random() < 1 / 3 else ((),):
        if draw.random() < 0.5:
            seconds = draw.uniform(0, place.seconds)
            child = place.start(folder, *flags)
            # A resumed run is shorter; where it is done, there is nothing left to kill.
            place.wait_for(child, seconds, may_end=bool(flags))
            os.kill(child, signal.SIGKILL)
            words.append(f"after {seconds:.2f} s")
        else:
            last = draw.randint(1, course.touches)
            child = place.start(folder, *flags, before=partial(_die_at, folder, last))
            words.append(f"before touch {last} of {course.touches}")
        ended(child)
    place.finish(course, folder)
    return " and ".join(words)


def stop_once(place: Range, course: Course, folder: Path, draw: random.Random) -> str:
    """Send SIGINT or SIGTERM; exit code and what is saved must be as promised."""
    kind = draw.choice([signal.SIGINT, signal.SIGTERM])
    seconds = draw.uniform(0, place.seconds)
    child = place.start(folder)
    place.wait_for(child, seconds)
    os.kill(child, kind)
    code = ended(child, PATIENCE * course.seconds)
    # It may be past its last step; before the command has begun, Python's own handlers answer, as
    # they do for any program.
    early = seconds < 0.1 * place.seconds
    allowed = {0, 128 + kind} | ({-kind, 70} if early else set())
    require(code in allowed, f"{kind.name} after {seconds:.2f} s: exit code {code}", folder)
    log = Path(f"{folder}.log").read_text(encoding="utf-8")
    require(early or "Traceback" not in log, f"{kind.name}: a traceback was shown", folder)
    place.finish(course, folder)
    return f"{kind.name} after {seconds:.2f} s: {code}"


def ended(child: int, seconds: float = 3600) -> int:
    """Wait for a child; its exit code, or minus the signal that ended it."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGALRM


class Lost(Exception):
    """Something was lost, or the run does not go on as promised."""


def require(holds: bool, what: str, folder: Path) -> None:
    if not holds:
        log = Path(f"{folder}.log")
        tail = log.read_text(encoding="utf-8")[-3000:] if log.exists() else ""
        raise Lost(f"{what}\n{folder}\n{tail}")


def _watch(folder: Path, then: Callable[[int], None]) -> None:
    """Call `then` with a running number before each touch of the folder or a file in it."""
    seen, root = [0], str(folder)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        path = arguments[0] if event in TOUCHES and arguments else None
        if isinstance(path, str | os.PathLike) and str(path).startswith(root):
            seen[0] += 1
            then(seen[0])

    sys.addaudithook(hook)


def _die_at(folder: Path, last: int) -> None:
    def die(number: int) -> None:
        if number == last:
            os.kill(os.getpid(), signal.SIGKILL)

    _watch(folder, die)


def _note(tally: Path, number: int) -> None:
    tally.write_text(str(number))


def survives(
    place: Range,
    course: Course,
    name: str,
    once: Callable[[Range, Course, Path, random.Random], str],
    draw: random.Random,
) -> bool:
    """Whether a run that is shot at loses nothing; those that were missed are done again."""
    for attempt in count():
        try:
            words = once(place, course, place.work / f"{name}-{attempt}".replace(" ", "-"), draw)
        except Missed:
            continue
        except Lost as error:
            print(f"{name}: LOST: {error}")
            return False
        print(f"{name}: {words}: nothing lost")
        return True
    raise AssertionError  # count() has no end


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--signals", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory(prefix="crash-") as name:
        os.environ["LIKENESS_CACHE"] = str(Path(name) / "cache")
        place = Range(Path(name))
        course = place.undisturbed()
        print(f"undisturbed: {course.seconds:.2f} s, {course.touches} touches of its folder")
        lost = 0
        for what, times, once in (
            ("kill", chosen.kills, kill_once),
            ("stop", chosen.signals, stop_once),
        ):
            for number in range(times):
                draw = random.Random(f"{chosen.seed}:{what}:{number}")
                lost += not survives(place, course, f"{what} {number}", once, draw)
        print(f"{chosen.kills} kills, {chosen.signals} signals: {lost} times something was lost")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
