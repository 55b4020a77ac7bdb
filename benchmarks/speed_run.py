"""A run of the speed benchmark: processes that take turns, and the rows that come of it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.speed_blocks import Block, Closed, Opened, Order
from benchmarks.speed_rows import Row
from benchmarks.speed_task import Task
from trainer.machine import processor_name
from trainer.waiting import choose_waiting

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "xformers", "torchao")
NAN = float("nan")


class SpeedError(Exception):
    """A side failed, or the sides do not do the same work."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A side by its name in the table; settings: of ours, further ones."""

    name: str
    side: str
    settings: tuple[str, ...] = ()

    def threads(self, task: Task) -> int:
        """Of PyTorch: the task's, or those that it is set to."""
        said = [word.partition("=") for word in self.settings]
        return int(next((n for name, _, n in said if name == "run.threads"), task.threads))


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured and how. base: its name. task: the work; its paths and its number of steps
    are filled in. steps: in a block. rounds: blocks of each side. together: all sides start at
    once, so that their starts are not those of a quiet machine. cold: the cache of latents is
    emptied before a start. profile: steps that are traced after the last round."""

    base: str
    task: Task
    variants: tuple[Variant, ...]
    photos: int
    steps: int
    rounds: int
    warmup: int
    fresh: bool
    together: bool
    cold: bool
    profile: int
    home: Path

    @property
    def steps_in_all(self) -> int:
        """The first step, those of all blocks, and one for the end, in which a file is written."""
        rounds = 1 if self.fresh else self.rounds
        return 1 + self.warmup + rounds * self.steps + self.profile + 1


@dataclass
class Measured:
    """All that one side answered."""

    variant: Variant
    opened: list[Opened]
    blocks: list[Block]
    closed: Closed | None = None
    trace: Mapping[str, float] | None = None


class Side:
    """The process of one side."""

    def __init__(
        self, variant: Variant, task: Task, log: Path, environment: Mapping[str, str]
    ) -> None:
        self.variant, self.log = variant, log
        self._stream = log.open("w", encoding="utf-8")
        task = replace(task, settings=variant.settings, started=time.time())
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.speed_blocks", variant.side, task.to_json()],
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stream,
            encoding="utf-8",
        )

    def opened(self) -> Opened:
        """Wait for its first step."""
        return Opened(**self._answer(Opened))

    def block(self, steps: int, *, profile: bool = False) -> Block:
        """Have it do a block."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(asdict(Order(steps, profile))) + "\n")
        self._process.stdin.flush()
        return Block(**self._answer(Block))

    def close(self) -> Closed:
        """Let it train to its end."""
        assert self._process.stdin
        self._process.stdin.close()
        closed = Closed(**self._answer(Closed))
        self._process.wait()
        return closed

    def end(self) -> None:
        """End the process if it is still there."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stream):
            assert stream
            with suppress(OSError):  # an order that nobody reads any more
                stream.close()

    def _answer(self, kind: type) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        found: dict[str, Any] = json.loads(line) if line.strip() else {}
        if found.pop("kind", "") != kind.__name__:
            code = self._process.wait()
            self._stream.flush()
            said = self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise SpeedError(f"{self.variant.name} failed (exit code {code}):\n{said}")
        return found


def run_plan(plan: Plan) -> list[Row]:
    """Measure all sides of a configuration.

    Raises:
        SpeedError: a side failed, or the sides do not do the same work.
    """
    task, flops = prepared(plan)
    environment = _environment(plan)
    rates = [_rate(task, environment)]
    if not plan.cold and any(variant.side == "ours" for variant in plan.variants):
        _fill_cache(plan, task, environment)
    found = (_fresh if plan.fresh else _kept)(plan, task, environment)
    if task.device == "cpu":  # which others use too: the better of two
        rates.append(_rate(task, environment))
    require_same_work(found)
    return [make_row(plan, task, one, found, flops, max(rates)) for one in found]


def prepared(plan: Plan) -> tuple[Task, float]:
    """Make what is kept for every run: the base, the photos and the count of operations.

    Returns:
        The task with its paths, and the operations of a step for one picture.
    """
    plan.home.mkdir(parents=True, exist_ok=True)
    task = replace(plan.task, base=str(_base(plan)), photos=str(_photos(plan)))
    return replace(task, steps=plan.steps_in_all), _flops(task, plan.home)


def _kept(plan: Plan, task: Task, environment: Mapping[str, str]) -> list[Measured]:
    """One process for each side; they take turns with blocks of steps."""
    sides: list[Side] = []
    found = []
    with ExitStack() as stack:
        for variant in plan.variants:
            sides.append(stack.enter_context(_side(plan, variant, task, environment)))
            if not plan.together:
                found.append(Measured(variant, [sides[-1].opened()], []))
        if plan.together:
            found = [Measured(side.variant, [side.opened()], []) for side in sides]
        for side in sides:
            if plan.warmup:
                side.block(plan.warmup)
        for _ in range(plan.rounds):
            for side, one in zip(sides, found, strict=True):
                one.blocks.append(side.block(plan.steps))
        for side, one in zip(sides, found, strict=True):
            if plan.profile:
                one.trace = side.block(plan.profile, profile=True).trace
            one.closed = side.close()
    return found


def _fresh(plan: Plan, task: Task, environment: Mapping[str, str]) -> list[Measured]:
    """A process for each block; the sides take turns."""
    found = [Measured(variant, [], []) for variant in plan.variants]
    for number in range(plan.rounds):
        for one in found:
            with _side(plan, one.variant, task, environment) as side:
                one.opened.append(side.opened())
                if plan.warmup:
                    side.block(plan.warmup)
                one.blocks.append(side.block(plan.steps))
                if plan.profile:
                    one.trace = side.block(plan.profile, profile=True).trace
                if number == plan.rounds - 1:
                    one.closed = side.close()
    return found


@contextmanager
def _side(
    plan: Plan, variant: Variant, task: Task, environment: Mapping[str, str]
) -> Iterator[Side]:
    number = plan.variants.index(variant)
    output = plan.home / f"run-{number}"
    shutil.rmtree(output, ignore_errors=True)
    if plan.cold:
        shutil.rmtree(environment["LIKENESS_CACHE"], ignore_errors=True)
    threads = variant.threads(task)
    task = replace(task, output=str(output), threads=threads)
    environment = {**environment, **_threads(threads)}
    side = Side(variant, task, plan.home / f"run-{number}.log", environment)
    try:
        yield side
    finally:
        side.end()
        shutil.rmtree(output, ignore_errors=True)


def _fill_cache(plan: Plan, task: Task, environment: Mapping[str, str]) -> None:
    """Have our side encode the photos, so that a measured start finds them in the cache."""
    words = (plan.base, task.resolution, plan.photos, task.precision, task.text_encoder)
    done = plan.home / ("filled-" + "-".join(str(word) for word in (*words, task.device)))
    if done.exists():
        return
    ours = next(variant for variant in plan.variants if variant.side == "ours")
    with _side(plan, ours, replace(task, steps=1), environment) as side:
        side.opened()
        side.close()
    done.touch()


def _environment(plan: Plan) -> dict[str, str]:
    """What all sides run in; the same settings of OpenMP for each."""
    environment = dict(os.environ)
    choose_waiting(environment)
    return environment | {
        "LIKENESS_CACHE": str(plan.home / ("cache-cold" if plan.cold else "cache")),
        **_threads(plan.task.threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUTF8": "1",
    }


def _threads(count: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}


def _run(words: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """The last line that a process of our own printed."""
    result = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env=dict(environment) if environment else None,
        capture_output=True,
        encoding="utf-8",
    )
    if result.returncode:
        raise SpeedError(f"{words[0]} failed:\n{result.stderr[-3000:]}")
    return result.stdout.splitlines()[-1]


def _base(plan: Plan) -> Path:
    return Path(_run(["benchmarks.random_bases", plan.base, str(plan.home)]))


def _photos(plan: Plan) -> Path:
    folder = plan.home / f"photos-{plan.task.resolution}-{plan.photos}"
    if not folder.is_dir():
        from benchmarks.random_bases import draw_photos

        unfinished = plan.home / f".{folder.name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        draw_photos(unfinished, plan.photos, plan.task.resolution)
        unfinished.rename(folder)
    return folder


def _flops(task: Task, home: Path) -> float:
    """Operations of a step for one picture; counted once and kept."""
    base = Path(task.base).name
    words = [str(task.resolution), str(task.rank), task.targets, str(task.text_encoder)]
    kept = home / f"flops-{base}-{'-'.join(words)}.json"
    if not kept.is_file():
        text = _run(["benchmarks.speed_work", "flops", task.base, *words])
        kept.write_text(text, encoding="utf-8")
    _, step = json.loads(kept.read_text(encoding="utf-8"))
    return float(step)


def _rate(task: Task, environment: Mapping[str, str]) -> float:
    words = [task.device, task.precision, str(task.threads)]
    return float(json.loads(_run(["benchmarks.speed_work", "rate", *words], environment)))


def require_same_work(found: Sequence[Measured]) -> None:
    counts = {one.variant.name: one.opened[0].parameters for one in found}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name}: {count:,}" for name, count in counts.items())
        raise SpeedError(f"The sides do not train the same number of parameters: {said}")


def _clock(task: Task, found: Sequence[Measured]) -> str:
    """On a processor that others use too, only CPU seconds are those of the work; but not where
    sides compute in different numbers of threads, which is done to save time."""
    threads = {one.variant.threads(task) for one in found}
    return "wall" if task.device == "cuda" or len(threads) > 1 else "cpu"


def _medians(one: Measured, clock: str) -> list[float]:
    """Of the seconds of a step in each block."""
    if clock == "wall":
        return [median(block.seconds) for block in one.blocks]
    return [median(block.cpu_seconds) for block in one.blocks]


def _ratio(one: Measured, name: str, found: Sequence[Measured], clock: str) -> float:
    """How many times faster than another side: the median over rounds."""
    other = next((two for two in found if two.variant.name == name), None)
    if other is None:
        return NAN
    pairs = zip(_medians(other, clock), _medians(one, clock), strict=True)
    return median(theirs / ours if ours else NAN for theirs, ours in pairs)


def _mean_loss(one: Measured) -> float:
    return mean(loss for block in one.blocks for loss in block.losses)


def make_row(
    plan: Plan, task: Task, one: Measured, found: Sequence[Measured], flops: float, rate: float
) -> Row:
    clock = _clock(task, found)
    threads = one.variant.threads(task)
    walls = [second for block in one.blocks for second in block.seconds]
    cpus = [second for block in one.blocks for second in block.cpu_seconds]
    wall_medians, cpu_medians = _medians(one, "wall"), _medians(one, "cpu")
    step = median(walls)
    # On a processor all threads' seconds count, and what one of them could do.
    spent, able = (step, rate) if task.device == "cuda" else (median(cpus), rate / task.threads)
    loss = _mean_loss(one)
    trace = one.trace or {}
    return Row(
        base=plan.base,
        side=one.variant.side,
        settings=" ".join(one.variant.settings),
        resolution=task.resolution,
        batch=task.batch,
        rank=task.rank,
        targets=task.targets,
        text_encoder=task.text_encoder,
        precision=task.precision,
        attention=task.attention,
        checkpointing=task.checkpointing,
        min_snr_gamma=task.min_snr_gamma,
        device=task.device,
        threads=threads,
        photos=plan.photos,
        rounds=plan.rounds,
        steps=plan.steps,
        process="fresh" if plan.fresh else "kept",
        cached=not plan.cold,
        parameters=one.opened[0].parameters,
        loss=loss,
        losses_alike=0.5 <= loss / _mean_loss(found[0]) <= 2,
        step_seconds=step,
        step_seconds_low=min(wall_medians),
        step_seconds_high=max(wall_medians),
        step_cpu_seconds=median(cpus),
        step_cpu_seconds_low=min(cpu_medians),
        step_cpu_seconds_high=max(cpu_medians),
        images_per_second=task.batch / step,
        clock=clock,
        vs_plain=_ratio(one, "plain", found, clock),
        vs_cached=_ratio(one, "plain-cached", found, clock),
        vs_ours=_ratio(one, "ours", found, clock),
        tflop_per_image=flops / 1e12,
        matrix_tflops=rate / 1e12,
        mfu=flops * task.batch / spent / able if spent else NAN,
        device_mb=max(block.device_mb for block in one.blocks),
        reserved_mb=max(block.reserved_mb for block in one.blocks),
        device_start_mb=max(opened.device_mb for opened in one.opened),
        process_mb=max(block.process_mb for block in one.blocks),
        training_mb=median(block.now_mb for block in one.blocks),
        start_seconds=median(opened.seconds for opened in one.opened),
        start_cpu_seconds=median(opened.cpu_seconds for opened in one.opened),
        file_mb=one.closed.file_mb if one.closed else NAN,
        copies=trace.get("copies", NAN),
        waits=trace.get("waits", NAN),
        kernels=trace.get("kernels", NAN),
        idle=trace.get("idle", NAN),
        idle_between=trace.get("idle_between", NAN),
        date=date.today().isoformat(),
        machine=_machine(task.device),
        versions=versions(),
    )


def _machine(device: str) -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return f"{processor_name()}, {os.cpu_count()} cores, {platform.system()}"


def versions() -> str:
    """Of Python and of the packages that do the work, those that are there."""
    found = [f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
