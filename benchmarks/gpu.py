"""The whole set of GPU benchmarks in less than ten minutes, with one table at the end.

`python -m benchmarks.gpu` makes the bases, then measures one configuration after the other with
`benchmarks.train_speed`, the most important first, each in a process of its own with a limit of
time; then come the tests that need a GPU. What time does not suffice for, and what this machine
lacks, is skipped and said so. Rows go to `benchmarks/results/train-speed_<hardware>_<date>.csv`.
`--wheels FOLDER` installs the packages in a folder first, beside the others and without a network.
This file itself needs Python's own library only.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SPEED = ("-m", "benchmarks.train_speed")
HEAD: tuple[str, ...] = (
    *("configuration", "side", "s/step", "images/s", "x plain", "x ours", "MFU %", "GB"),
    *("copies/step", "waits/step", "idle %", "between %", "start s"),
)
LOOK = (
    "import torch;"
    "print(torch.cuda.get_device_name() if torch.cuda.is_available() else '');"
    "print(torch.__version__)"
)


@dataclass(frozen=True, slots=True)
class Goal:
    """What a side should reach: times the plain baseline, share of the matrix rate, gigabytes of
    the device; None: nothing is said."""

    speed: float | None = None
    mfu: float | None = None
    gigabytes: float | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to run.

    words: after `python`. limit: seconds it may take. needs: a package it cannot do without.
    goals: by the settings of our side, "" for none.
    """

    name: str
    words: tuple[str, ...]
    limit: float
    needs: str = ""
    goals: Mapping[str, Goal] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of an item. rows: those it added to the CSV file. said: "" where all went well,
    else why there is nothing. output: what it printed."""

    item: Item
    seconds: float
    rows: tuple[Mapping[str, str], ...] = ()
    said: str = ""
    output: str = ""


def speed(*words: str | int) -> tuple[str, ...]:
    """The words of a measurement in bfloat16."""
    return (*SPEED, "--precision", "bf16", "--device", "cuda", *(str(word) for word in words))


CHECKPOINTED = "model.checkpointing=true"
EIGHT_BIT = "model.weights=int8"
BOTH = f"{EIGHT_BIT} {CHECKPOINTED}"
ATTENTIONS = ("sdpa", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "eager")


def attention_variants(*names: str) -> list[str]:
    return [word for name in names for word in ("--variant", f"model.attention={name}")]


SD15 = ("--base", "sd15", "--photos", 8)
SDXL = ("--base", "sdxl", "--photos", 8)
LONG = ("--warmup", 5, "--steps", 20, "--rounds", 4)
SHORT = ("--warmup", 3, "--steps", 8, "--rounds", 3)
ITEMS = (
    Item(
        "SD 1.5, 512 px, batch 1",
        speed(*SD15, *LONG, "--profile", 10),
        110,
        goals={"": Goal(2.0, 0.15, 2.6)},
    ),
    Item(
        "SDXL, 1024 px, batch 1",
        speed(*SDXL, *SHORT, "--profile", 5, "--only", "ours", "plain"),
        130,
        goals={"": Goal(1.5, 0.28, 10.5)},
    ),
    Item(
        "SD 1.5, 512 px, batch 8",
        speed(*SD15, *SHORT, "--batch", 8, "--only", "ours", "plain"),
        80,
        goals={"": Goal(1.8, 0.28, 6.5)},
    ),
    Item(
        "SD 2.1, 768 px, batch 4",
        speed("--base", "sd21", *SHORT, "--batch", 4, "--only", "ours", "plain"),
        90,
        goals={"": Goal(1.8, 0.25, 7.5)},
    ),
    Item(
        "SDXL, 1024 px, batch 4, checkpointed",
        speed(*SDXL, *SHORT, "--batch", 4, "--checkpointing", "--only", "ours", "plain"),
        100,
        goals={"": Goal(1.5, 0.35, 16.0)},
    ),
    Item(
        "SDXL, 1024 px, batch 1, little memory",
        speed(
            *(*SDXL, *SHORT, "--together", "--only", "ours"),
            *("--variant", CHECKPOINTED, "--variant", BOTH),
        ),
        80,
        goals={CHECKPOINTED: Goal(gigabytes=6.3), BOTH: Goal(gigabytes=4.3)},
    ),
    Item(
        "SD 1.5, 512 px, batch 1, little memory",
        speed(
            *(*SD15, *SHORT, "--together", "--only", "ours"),
            *("--variant", CHECKPOINTED, "--variant", EIGHT_BIT, "--variant", BOTH),
        ),
        60,
        goals={CHECKPOINTED: Goal(gigabytes=2.1), EIGHT_BIT: Goal(gigabytes=1.4)},
    ),
    Item(
        "tests that need a GPU",
        ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:warnings", "--continue-on-collection-errors"),
        120,
    ),
    Item(
        "SD 1.5, 512 px, batch 4, attention",
        speed(
            *(*SD15, *SHORT, "--batch", 4, "--together", "--only", "ours"),
            *attention_variants(*ATTENTIONS),
        ),
        70,
    ),
    Item(
        "SD 1.5, 512 px, batch 4, xformers",
        speed(
            *(*SD15, *SHORT, "--batch", 4, "--together", "--only", "ours"),
            *attention_variants("sdpa", "xformers"),
        ),
        60,
        needs="xformers",
    ),
    Item(
        "SDXL, 1024 px, batch 1, attention",
        speed(
            *(*SDXL, *SHORT, "--together", "--only", "ours"),
            *attention_variants("sdpa", "sdpa-flash", "sdpa-cudnn"),
        ),
        80,
    ),
)


def install(wheels: Path, site: Path) -> None:
    """Install the wheels of a folder into another, without a network, for this process and those it
    starts.

    Raises:
        SystemExit: there are none, or they cannot be installed.
    """
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    if not files:
        raise SystemExit(f"There are no wheels in {wheels}.")
    words = ["pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
    words += ["--upgrade", "--target", str(site), *files]
    result = subprocess.run([sys.executable, "-m", *words], capture_output=True, encoding="utf-8")
    if result.returncode:
        raise SystemExit(f"The wheels cannot be installed:\n{result.stderr[-2000:]}")
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(part for part in (str(site), before) if part)
    sys.path.insert(0, str(site))


def look() -> tuple[str, str]:
    """The name of the GPU, "" for none, and PyTorch's version."""
    result = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, encoding="utf-8")
    if result.returncode:
        raise SystemExit(f"PyTorch cannot be used:\n{result.stderr[-2000:]}")
    name, torch_version = result.stdout.splitlines()[-2:]
    return name, torch_version


def run_limited(words: Sequence[str], limit: float) -> tuple[int | None, str]:
    """Run `python` with words; its exit code, or None where it ran past its limit and was ended
    with all that it had started, and what it printed."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        output.seek(0)
        return code, output.read()


def _end(process: subprocess.Popen[Any]) -> None:
    """End a process of ours and what it started."""
    if process.poll() is not None:
        return
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def run_item(item: Item, results: Path, home: Path, limit: float) -> Result:
    """Run one item and read the rows it added."""
    if item.needs and find_spec(item.needs) is None:
        return Result(item, 0.0, said=f"skipped: {item.needs} is not installed")
    words = list(item.words)
    before = len(read_rows(results))
    if words[: len(SPEED)] == list(SPEED):
        words += ["--home", str(home), "--output", str(results)]
    started = time.monotonic()
    code, output = run_limited(words, limit)
    seconds = time.monotonic() - started
    said = ""
    if code is None:
        said = f"ended: it ran past {limit:.0f} s"
    elif code:
        said = f"failed with exit code {code}"
    return Result(item, seconds, tuple(read_rows(results)[before:]), said, output)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where it is not there."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def run_items(items: Sequence[Item], results: Path, home: Path, seconds: float) -> list[Result]:
    """Run items in their order until the time is used up.

    seconds: from now. An item that cannot have half of its own limit any more is skipped.
    """
    end = time.monotonic() + seconds
    found = []
    for item in items:
        left = end - time.monotonic()
        if left < item.limit / 2:
            found.append(Result(item, 0.0, said="skipped: no time left"))
            continue
        result = run_item(item, results, home, min(item.limit, left))
        print(f"{item.name}: {result.said or 'done'} ({result.seconds:.0f} s)", flush=True)
        if result.said and result.output:
            print(result.output[-1500:], flush=True)
        found.append(result)
    return found


def prepare(home: Path, bases: Sequence[str], seconds: float) -> None:
    """Make the bases and count their operations, all at once, before anything is timed."""
    processes = [
        subprocess.Popen(
            [sys.executable, *speed("--base", base, "--prepare", "--home", str(home))],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for base in bases
    ]
    end = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            _end(process)  # its item makes what is missing, or runs past its own limit


def table(results: Sequence[Result]) -> str:
    """One line for each side of each item, with the goal behind each figure that has one; then
    what was skipped."""
    lines = [HEAD, *(_line(result.item, row) for result in results for row in result.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    text = [
        "  ".join(
            value.ljust(width) if column < 2 else value.rjust(width)
            for column, (value, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "-" * max(len(line) for line in text))
    for result in results:
        if not result.rows:
            text.append(f"{result.item.name}: {result.said or _last_line(result.output)}")
        elif result.said:
            text.append(f"{result.item.name}: {result.said}")
    return "\n".join(text)


def _last_line(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1] if lines else "done"


def _line(item: Item, row: Mapping[str, str]) -> tuple[str, ...]:
    ours = row["side"] == "ours"
    goal = item.goals.get(row["settings"], Goal()) if ours else Goal()
    memory = number(row["device_mb"])
    return (
        item.name,
        f"{row['side']} {row['settings']}".strip(),
        _cell(row["step_seconds"], ".4f"),
        _cell(row["images_per_second"], ".2f"),
        _cell(row["vs_plain"], ".2f", goal.speed),
        _cell(row["vs_ours"], ".2f"),
        _percent(row["mfu"], None if goal.mfu is None else 100 * goal.mfu),
        _cell("" if memory is None else str(memory / 1000), ".2f", goal.gigabytes),
        _cell(row["copies"], ".1f"),
        _cell(row["waits"], ".1f"),
        _percent(row["idle"]),
        _percent(row["idle_between"]),
        _cell(row["start_seconds"], ".1f"),
    )


def number(text: str) -> float | None:
    return float(text) if text else None


def _cell(text: str, form: str, goal: float | None = None) -> str:
    value = number(text)
    shown = "-" if value is None else format(value, form)
    return shown if goal is None else f"{shown} ({goal:g})"


def _percent(text: str, goal: float | None = None) -> str:
    value = number(text)
    return _cell("" if value is None else str(100 * value), ".1f", goal)


def arguments_of(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, allow_abbrev=False
    )
    home = Path(tempfile.gettempdir()) / "likeness-train-speed"
    parser.add_argument("--wheels", type=Path, help="folder of wheels that are installed first")
    parser.add_argument("--minutes", type=float, default=8.7, help="for everything (default: 8.7)")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="items whose name has a word")
    parser.add_argument("--home", type=Path, default=home, help="where bases and caches are kept")
    parser.add_argument("--output", type=Path, help="the CSV file")
    parser.add_argument("--list", action="store_true", help="say what would be run")
    return parser.parse_args(words)


def chosen(only: Sequence[str] | None) -> list[Item]:
    """The items, all or those whose name has one of the words.

    Raises:
        SystemExit: there is none.
    """
    if not only:
        return list(ITEMS)
    found = [item for item in ITEMS if any(word.lower() in item.name.lower() for word in only)]
    if not found:
        raise SystemExit("No item has such a name: " + "; ".join(item.name for item in ITEMS))
    return found


def bases_of(items: Sequence[Item]) -> list[str]:
    """The bases they are measured on, each once."""
    pairs = [pair for item in items for pair in zip(item.words, item.words[1:], strict=False)]
    return list(dict.fromkeys(value for name, value in pairs if name == "--base"))


def main(words: Sequence[str] | None = None) -> None:
    started = time.monotonic()
    arguments = arguments_of(words)
    items = chosen(arguments.only)
    if arguments.list:
        for item in items:
            print(f"{item.name}: at most {item.limit:.0f} s: python {' '.join(item.words)}")
        return
    if arguments.wheels:
        install(arguments.wheels, arguments.home / "site")
    name, torch_version = look()
    if not name:
        raise SystemExit(
            f"There is no GPU that PyTorch ({torch_version}) can use; nothing was measured. "
            "On the processor: python -m benchmarks.train_speed"
        )
    print(f"{name}, PyTorch {torch_version}, Python {sys.version.split()[0]}", flush=True)
    hardware = name.removeprefix("NVIDIA ").replace(" ", "-").lower()
    file = f"train-speed_{hardware}_{date.today().isoformat()}.csv"
    output = arguments.output or ROOT / "benchmarks" / "results" / file
    arguments.home.mkdir(parents=True, exist_ok=True)
    prepare(arguments.home, bases_of(items), 90)
    print(f"bases are made ({time.monotonic() - started:.0f} s)", flush=True)
    left = 60 * arguments.minutes - (time.monotonic() - started)
    results = run_items(items, output, arguments.home, left)
    print(f"\n{name}: goals in brackets; {time.monotonic() - started:.0f} s in all; rows: {output}")
    print(table(results))


if __name__ == "__main__":
    main()
