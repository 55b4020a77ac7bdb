"""The speed benchmark: both sides do the same work, and what is counted and shown is right. Nothing
here looks at a clock: how quick something is depends on the machine."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import fields, replace
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from benchmarks import gpu, speed_growth, speed_trace, train_speed
from benchmarks.random_bases import ARCHITECTURES, config_of, draw_photos
from benchmarks.speed_blocks import Block, Closed, Gate, Opened, Order, run_side
from benchmarks.speed_rows import Row, append_rows, show
from benchmarks.speed_run import (
    Measured,
    SpeedError,
    Variant,
    make_row,
    require_same_work,
)
from benchmarks.speed_task import Task
from benchmarks.speed_work import count_flops
from tests.tiny import RESOLUTION, save_tiny, save_tiny_base
from trainer.machine import processor_name


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """Five steps on the tiny base."""
    monkeypatch.setenv("LIKENESS_CACHE", str(tmp_path / "cache"))
    draw_photos(tmp_path / "photos", 2, RESOLUTION)
    return Task(
        base=str(save_tiny_base(tmp_path / "base")),
        photos=str(tmp_path / "photos"),
        output=str(tmp_path / "run"),
        steps=5,
        resolution=RESOLUTION,
        rank=4,
        started=time.time(),
    )


def answers_of(side: str, task: Task, orders: list[Order]) -> list[Any]:
    """All that a side answers, in this process."""
    left = iter(orders)
    found: list[Any] = []
    run_side(side, task, Gate(task, lambda: next(left, None), found.append))
    return found


def measured(side: str, task: Task, *, settings: tuple[str, ...] = ()) -> Measured:
    output = f"{task.output}-{len(list(Path(task.output).parent.iterdir()))}"
    task = replace(task, settings=settings, output=output)
    opened, block, closed = answers_of(side, task, [Order(3)])
    return Measured(Variant(side, side, settings), [opened], [block], closed)


def plan_of(task: Task, *words: str) -> Any:
    asked = train_speed.asked_of(["--base", "tiny", "--device", "cpu", *words])
    return replace(asked.plan, task=task)


@pytest.mark.parametrize("side", ["ours", "plain", "plain-cached"])
def test_a_side_steps_as_it_is_told(task: Task, side: str) -> None:
    opened, first, second, closed = answers_of(side, task, [Order(1), Order(2)])
    assert isinstance(opened, Opened)
    assert opened.seconds > 0
    for block, count in ((first, 1), (second, 2)):
        assert isinstance(block, Block)
        assert len(block.seconds) == len(block.cpu_seconds) == len(block.losses) == count
        assert all(seconds > 0 for seconds in block.seconds)
        assert all(math.isfinite(loss) for loss in block.losses)
        assert math.isnan(block.device_mb)
    # One step is left when there are no more orders: the training goes to its end by itself.
    assert isinstance(closed, Closed)
    written = next(Path(task.output).glob("*.safetensors"))
    assert closed.file_mb == written.stat().st_size / 1e6
    with safe_open(written, "pt") as file:
        assert len(list(file.keys())) > 0


@pytest.mark.parametrize("targets", ["attention", pytest.param("all", marks=pytest.mark.slow)])
def test_both_sides_do_the_same_work(task: Task, targets: str) -> None:
    task = replace(task, targets=targets)
    found = [measured(side, task) for side in ("ours", "plain", "plain-cached")]
    assert len({one.opened[0].parameters for one in found}) == 1
    require_same_work(found)
    plan = plan_of(task, "--steps", "3", "--rounds", "1")
    rows = [make_row(plan, task, one, found, flops=2e9, rate=1e12) for one in found]
    assert all(row.losses_alike for row in rows)
    assert [row.vs_ours for row in rows][0] == [row.vs_plain for row in rows][1] == 1.0
    assert rows[0].mfu == pytest.approx(2e9 / rows[0].step_cpu_seconds / 1e12)


def test_sides_in_other_numbers_of_threads_are_compared_by_the_clock_on_the_wall(
    task: Task,
) -> None:
    """Of which all threads' seconds are more in two; what they make of those stays comparable."""
    one = measured("ours", task)
    block = Block(
        seconds=[0.5], cpu_seconds=[1.1], losses=[1.0], device_mb=0.0, reserved_mb=0.0,
        process_mb=1.0, now_mb=1.0,
    )  # fmt: skip
    alone = replace(block, seconds=[0.9], cpu_seconds=[0.9])
    sides = [
        Measured(Variant("ours", "ours"), one.opened, [alone]),
        Measured(Variant("ours in two", "ours", ("run.threads=2",)), one.opened, [block]),
    ]
    rows = [make_row(plan_of(task), task, side, sides, flops=2e9, rate=1e12) for side in sides]
    assert [row.threads for row in rows] == [1, 2]
    assert {row.clock for row in rows} == {"wall"}
    assert rows[1].vs_ours == pytest.approx(0.9 / 0.5)
    assert [row.mfu for row in rows] == pytest.approx([2e9 / 0.9 / 1e12, 2e9 / 1.1 / 1e12])


def test_both_sides_train_the_text_encoder(task: Task) -> None:
    task = replace(task, text_encoder=True, min_snr_gamma=5.0)
    ours, plain = measured("ours", task), measured("plain-cached", task)
    assert ours.opened[0].parameters == plain.opened[0].parameters
    alone = measured("plain", replace(task, text_encoder=False))
    assert plain.opened[0].parameters > alone.opened[0].parameters


@pytest.mark.slow
@pytest.mark.parametrize("base", ["sd2-v", "sdxl"])
def test_both_sides_know_the_families(task: Task, tmp_path: Path, base: str) -> None:
    task = replace(task, base=str(save_tiny(tmp_path / base, base)))
    ours, plain = measured("ours", task), measured("plain", task)
    assert ours.opened[0].parameters == plain.opened[0].parameters
    if base == "sdxl":  # what is left of v depends on the step that is drawn
        assert 0.3 < plain.blocks[0].losses[0] / ours.blocks[0].losses[0] < 3


def test_other_work_is_refused() -> None:
    found = [
        Measured(Variant(name, name), [Opened(count, 1.0, 1.0, 1.0, math.nan)], [])
        for name, count in (("ours", 1000), ("plain", 999))
    ]
    with pytest.raises(SpeedError, match="same number of parameters"):
        require_same_work(found)


def test_further_settings_come_last(task: Task) -> None:
    words = replace(task, settings=("adapter.rank=8",)).command
    assert words[0] == "train"
    assert words[-2:] == ["--set", "adapter.rank=8"]


@pytest.mark.slow
def test_further_settings_reach_our_command(task: Task) -> None:
    changed = measured("ours", task, settings=("adapter.rank=8", "adapter.alpha=8.0"))
    assert changed.opened[0].parameters == 2 * measured("ours", task).opened[0].parameters


def test_a_task_survives_its_way_to_the_process(task: Task) -> None:
    task = replace(task, settings=("a.b=c", "d.e=1"))
    assert Task.from_json(task.to_json()) == task


def test_a_block_is_profiled(task: Task) -> None:
    *_, block, _ = answers_of("plain", task, [Order(2, profile=True)])
    assert len(block.seconds) == 2
    # Without a GPU nobody waits for one, and nothing can be idle.
    assert block.trace.pop("kernels") == 0
    assert len(block.trace) == 4
    assert all(math.isnan(value) for value in block.trace.values())


# --- counting


def published(tmp_path: Path, name: str) -> Path:
    """The configurations of an architecture, without weights."""
    for part in ("unet", "vae", "text_encoder"):
        (tmp_path / part).mkdir()
        text = json.dumps(config_of(name, part))
        (tmp_path / part / "config.json").write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_operations_of_a_step_on_sd15(tmp_path: Path) -> None:
    base = published(tmp_path, "sd15")
    forward, step = count_flops(base, 512, rank=16, targets="attention")
    assert forward / 1e12 == pytest.approx(0.808, abs=5e-4)
    assert step / 1e12 == pytest.approx(1.725, abs=1e-3)
    _, smaller = count_flops(base, 256, rank=16, targets="attention")
    assert smaller / 1e12 == pytest.approx(0.3647, abs=5e-4)


@pytest.mark.slow
def test_operations_grow_with_the_work(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    forward, step = count_flops(base, 32, rank=4, targets="attention")
    assert 1.5 * forward < step < 3 * forward
    assert count_flops(base, 32, rank=16, targets="attention")[1] > step
    trained = count_flops(base, 32, rank=4, targets="attention", text_encoder=True)
    assert trained[0] == forward
    assert trained[1] > step


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_published_configurations_are_there(name: str) -> None:
    width = {"sd15": 768, "sd21": 1024, "sdxl": 2048}
    assert config_of(name, "unet")["cross_attention_dim"] == width[name]
    assert config_of(name, "text_encoder")["hidden_size"] <= width[name]


# --- traces


def event(name: str, category: str, start: float, length: float, number: int = 0) -> dict[str, Any]:
    arguments = {"correlation": number} if number else {}
    return {"name": name, "cat": category, "ts": start, "dur": length, "args": arguments, "ph": "X"}


def test_waiting_is_found_in_a_trace() -> None:
    events = [
        event("cudaDeviceSynchronize", "cuda_runtime", -50, 10),  # before the first step
        event(speed_trace.STEP, "user_annotation", 0, 100),
        event(speed_trace.STEP, "user_annotation", 100, 100),
        event(speed_trace.STEP, "gpu_user_annotation", 10, 150),
        event("cudaLaunchKernel", "cuda_runtime", 5, 1, number=1),
        event("cudaLaunchKernel", "cuda_runtime", 10, 1, number=2),
        event("cuLaunchKernel", "cuda_driver", 110, 1, number=3),
        event("cudaStreamSynchronize", "cuda_runtime", 120, 5),
        event("first", "kernel", 20, 20, number=1),
        event("second", "kernel", 50, 50, number=2),  # 10 of nothing within the first step
        event(
            "Memcpy DtoH (Device -> Pageable)", "gpu_memcpy", 115, 5, number=3
        ),  # 15 between the steps
    ]
    found = speed_trace.summary(events)
    assert found["copies"] == 0.5
    assert found["waits"] == 0.5
    assert found["kernels"] == 1.5
    assert found["idle"] == pytest.approx(25 / 100)
    assert found["idle_between"] == pytest.approx(15 / 100)


def test_a_trace_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="no step"):
        speed_trace.summary([event("cudaLaunchKernel", "cuda_runtime", 5, 1, number=1)])


# --- rows, tables, pictures


def row(**changes: Any) -> Row:
    values: dict[str, Any] = {
        field.name: {"str": "", "int": 1, "float": 0.5, "bool": True}[str(field.type)]
        for field in fields(Row)
    }
    known = {
        "base": "tiny",
        "side": "ours",
        "clock": "cpu",
        "device": "cpu",
        "targets": "attention",
    }
    return Row(**(values | known | changes))


def test_rows_are_added_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "results" / "speed.csv"
    append_rows([row()], path)
    append_rows([row(side="plain", device_mb=float("nan"), step_seconds=0.123456)], path)
    with path.open(encoding="utf-8", newline="") as stream:
        read = list(csv.DictReader(stream))
    assert list(read[0]) == [field.name for field in fields(Row)]
    assert [one["side"] for one in read] == ["ours", "plain"]
    assert read[1]["device_mb"] == ""
    assert read[1]["step_seconds"] == "0.1235"


def test_rows_name_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text("vendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R) Processor\n")
    assert processor_name(told) == "Intel(R) Xeon(R) Processor"
    assert processor_name(tmp_path / "none") == (platform.processor() or platform.machine())
    monkeypatch.setattr(train_speed, "processor_name", lambda: "AMD EPYC(TM) 9R14 @ 2.6")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert train_speed.hardware_name("cpu") == "amd-epyc-9r14-2-6-2-cores"


def test_a_file_with_other_columns_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "speed.csv"
    path.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="other columns"):
        append_rows([row()], path)
    assert path.read_text(encoding="utf-8") == "a,b\n1,2\n"


def test_the_tables_say_what_is_wrong() -> None:
    output = StringIO()
    console = Console(file=output, width=150, markup=False)
    show([row(step_seconds=1.25), row(side="plain", losses_alike=False)], console)
    text = output.getvalue()
    assert "1.250" in text
    assert "ours: in a step 0.5 copies to the host" in text
    assert "plain: its loss is not that of the others" in text
    assert "ours: its loss" not in text


def test_growth_is_drawn() -> None:
    rows = [
        row(side=s, batch=b, step_cpu_seconds=b * 2.0) for b in (1, 2) for s in ("ours", "plain")
    ]
    picture = ElementTree.fromstring(speed_growth.plot("tiny", {"batch": rows}))
    name = "{http://www.w3.org/2000/svg}"
    assert len(picture.findall(f"{name}polyline")) == 4  # two sides; cost and memory
    texts = [found.text for found in picture.findall(f"{name}text")]
    assert "batch: CPU seconds per step" in texts
    assert "4" in texts  # the highest figure


def test_growth_changes_one_thing_at_a_time(task: Task) -> None:
    plan = plan_of(task)
    for axis in ("batch", "resolution", "rank", "targets"):
        for value in speed_growth.values_of(plan, axis):
            changed = speed_growth.at(plan, axis, value)
            assert getattr(changed.task, axis) == value
            assert changed.photos % changed.task.batch == 0
            assert replace(changed.task, **{axis: getattr(task, axis)}) == task
    more = speed_growth.at(plan, "photos", 32)
    assert (more.photos, more.cold) == (32, True)


# --- the command line


def test_variants_are_sides_of_their_own() -> None:
    words = ["--set", "a.b=1", "--variant", "c.d=2 e.f=3", "--only", "plain", "ours"]
    plan = train_speed.asked_of([*words, "--device", "cpu"]).plan
    assert plan.variants == (
        Variant("ours", "ours", ("a.b=1",)),
        Variant("ours c.d=2 e.f=3", "ours", ("a.b=1", "c.d=2", "e.f=3")),
        Variant("plain", "plain"),
    )
    assert plan.task.resolution == 32


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--batch", "3", "--photos", "8"]])
def test_nonsense_is_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        train_speed.asked_of([*words, "--device", "cpu"])


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path) -> None:
    """The processes of both sides, as they are started by the command."""
    output = tmp_path / "speed.csv"
    words = ["--base", "tiny", "--device", "cpu", "--rounds", "2", "--steps", "2", "--warmup", "1"]
    words += ["--only", "ours", "plain", "--variant", "adapter.include=[]", "--profile", "1"]
    words += ["--home", str(tmp_path / "home"), "--output", str(output)]
    train_speed.main(words)
    with output.open(encoding="utf-8", newline="") as stream:
        read = list(csv.DictReader(stream))
    assert [one["side"] for one in read] == ["ours", "ours", "plain"]
    assert read[1]["settings"] == "adapter.include=[]"
    assert len({one["parameters"] for one in read}) == 1
    for one in read:
        assert float(one["start_seconds"]) > 0
        assert float(one["process_mb"]) > 0 or sys.platform == "win32"
        assert f"torch {torch.__version__}" in one["versions"]


@pytest.mark.slow
def test_a_side_that_fails_says_why(tmp_path: Path) -> None:
    words = ["--base", "tiny", "--device", "cpu", "--only", "ours", "--set", "adapter.rank=0"]
    words += ["--home", str(tmp_path / "home"), "--output", str(tmp_path / "speed.csv")]
    with pytest.raises(SystemExit, match="adapter.rank"):
        train_speed.main(words)
    assert not (tmp_path / "speed.csv").exists()


# --- the GPU set


def item(code: str, limit: float = 60.0, **more: Any) -> gpu.Item:
    return gpu.Item("an item", ("-c", code), limit, **more)


def test_every_item_can_be_read() -> None:
    for one in gpu.ITEMS:
        if one.words[: len(gpu.SPEED)] == gpu.SPEED:
            asked = train_speed.asked_of([*one.words[len(gpu.SPEED) :], "--output", "x.csv"])
            assert asked.plan.task.device == "cuda"
            sides = {" ".join(variant.settings) for variant in asked.plan.variants}
            assert one.goals.keys() <= sides
    assert gpu.bases_of(gpu.ITEMS) == ["sd15", "sdxl", "sd21"]


def test_an_item_is_ended_at_its_limit(tmp_path: Path) -> None:
    started = time.monotonic()
    result = gpu.run_item(
        item("import time; print('here', flush=True); time.sleep(60)"),
        tmp_path / "x",
        tmp_path,
        1.0,
    )
    assert "ran past 1 s" in result.said
    assert result.output.strip() == "here"
    assert time.monotonic() - started < 30


def test_items_run_until_the_time_is_used_up(tmp_path: Path) -> None:
    items = [item("print('7 passed')"), item("1/0"), item("", limit=1e6), item("", needs="no_such")]
    done, failed, skipped, lacking = gpu.run_items(items, tmp_path / "x", tmp_path, 100)
    assert done.said == ""
    assert "exit code 1" in failed.said
    assert "ZeroDivisionError" in failed.output
    assert skipped.said == "skipped: no time left"
    assert "no_such is not installed" in lacking.said
    text = gpu.table([done, failed, skipped, lacking])
    assert text.splitlines()[2:] == [
        "an item: 7 passed",
        "an item: failed with exit code 1",
        "an item: skipped: no time left",
        "an item: skipped: no_such is not installed",
    ]


def test_rows_stand_beside_their_goals(tmp_path: Path) -> None:
    path = tmp_path / "speed.csv"
    rows = [row(vs_plain=1.8, mfu=0.2, device_mb=2500.0), row(side="plain", device_mb=float("nan"))]
    append_rows(rows, path)
    one = item("", goals={"": gpu.Goal(2.0, 0.15, 2.6)})
    text = gpu.table([gpu.Result(one, 1.0, tuple(gpu.read_rows(path)))])
    head, _, ours, plain = text.splitlines()
    assert head.startswith("configuration")
    assert all(figure in ours for figure in ("1.80 (2)", "20.0 (15)", "2.50 (2.6)"))
    assert "(" not in plain
    assert len({len(line) for line in (head, ours, plain)}) <= 2


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "look", lambda: ("", "2.11"))
    with pytest.raises(SystemExit, match="no GPU"):
        gpu.main(["--home", str(tmp_path)])
    with pytest.raises(SystemExit, match="No item"):
        gpu.main(["--only", "nothing-like-it"])


def test_the_set_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--list", "--only", "sdxl"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum("SDXL" in one.name for one in gpu.ITEMS)


def test_wheels_are_asked_for_by_folder(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no wheels"):
        gpu.install(tmp_path, tmp_path / "site")


@pytest.mark.slow
def test_a_broken_wheel_is_said(tmp_path: Path) -> None:
    (tmp_path / "broken-1.0-py3-none-any.whl").write_bytes(b"no wheel")
    with pytest.raises(SystemExit, match="cannot be installed"):
        gpu.install(tmp_path, tmp_path / "site")


def test_the_gpu_set_needs_nothing_but_python() -> None:
    """It installs the packages, so it cannot need them."""
    code = (
        "import sys, benchmarks.gpu;"
        "print(sorted({'torch', 'rich', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=gpu.ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
