"""Whole runs of the command line on the tiny base: what they write, print and repeat."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import QUICK
from tests.runs import (
    Outcome,
    checkpoint_of,
    files_in,
    lora_of,
    metrics_of,
    run_cli,
    same_tensors,
    state_of,
    tensors_of,
)
from trainer.adapters.file import read_lora
from trainer.training import finish, loop
from trainer.training.export import written_step
from trainer.training.loop import StepDone

Train = Callable[..., Outcome]
ROOT = Path(__file__).resolve().parent.parent
PREVIEWS = ("preview.every_steps=2", "preview.prompts={prompts}", "adapter.save_precision=fp32")
PROMPTS = "a {trigger} {class} in snow --n ugly --d 7 --l 3 --s 3\n{class} --d 8\n"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "mine.txt"
    path.write_text(PROMPTS, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(
    base: Path, photos: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run with everything: previews, prior, checkpoints; not to be written to."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    settings = [*QUICK, *(word.format(prompts=prompts) for word in PREVIEWS)]
    settings += ["objective.prior_weight=0.5", "run.tensorboard=true"]
    words = [f"--set={word}" for word in settings]
    assert run_cli("train", photos, "--base", base, "--output", output, *words) == 0
    return output


# --- what a run leaves behind


def test_a_run_writes_the_files_that_were_agreed(whole: Path) -> None:
    files = files_in(whole)
    events = {name for name in files if name.startswith("tensorboard/events.out.tfevents.")}
    assert len(events) == 1
    steps = [f"checkpoints/step-00000{step}/{name}" for step in (2, 4) for name in STATE]
    pictures = [
        f"previews/step-00000{step}_{name}.png"
        for step in (0, 2, 4)
        for name in ("01", "02", "01-without-trigger")
    ]
    assert files - events == {
        "anna.safetensors",
        "anna-2.safetensors",
        "anna-best.safetensors",
        "contact_sheet.png",
        "report.html",
        "settings.toml",
        "metrics.jsonl",
        "scores.json",
        *steps,
        *pictures,
    }


STATE = ("adapter.safetensors", "optimizer.safetensors", "state.json")


def test_metrics_have_a_line_for_each_step(whole: Path) -> None:
    rows = metrics_of(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["loss"] > 0 and row["rate"] > 0 and row["grad_norm"] > 0 for row in rows)


def test_tensorboard_events_hold_the_losses(whole: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx([row["loss"] for row in metrics_of(whole)], rel=1e-5)


def test_samples_carry_their_prompt_and_settings(whole: Path) -> None:
    with Image.open(whole / "previews" / "step-000004_01.png") as image:
        assert image.size == (32, 32)
        assert image.info["parameters"] == (
            "a ohwx person in snow\nNegative prompt: ugly\n"
            "Steps: 3, Sampler: DDIM, CFG scale: 3, Seed: 7, Size: 32x32, Model: tiny"
        )
    with Image.open(whole / "previews" / "step-000004_01-without-trigger.png") as image:
        assert image.info["parameters"].startswith("a person in snow\n")


def test_the_file_knows_its_settings_and_whom_it_fits(whole: Path) -> None:
    metadata = read_lora(whole / "anna.safetensors").metadata
    assert metadata["ss_output_name"] == "anna"
    assert metadata["ss_network_dim"] == "2"
    assert metadata["ss_steps"] == "4"
    assert metadata["modelspec.trigger_phrase"] == "ohwx"
    assert "fits no real SD 1.5" in metadata["modelspec.title"]
    assert "rank = 2" in metadata["likeness.settings"]
    assert metadata["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert read_lora(whole / "anna-2.safetensors").metadata["ss_output_name"] == "anna-2"


def test_the_report_shows_the_run_and_needs_no_other_file(whole: Path) -> None:
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert "fits no real SD 1.5" in page
    assert "smiling" in page
    assert str(whole / "anna.safetensors") in page
    assert ".unfinished" not in page
    assert not re.search(r"""(?:src|href)=["'](?!data:|#|https?://)""", page)


def test_the_last_lines_say_where_everything_is_and_what_was_learned(
    train: Train, prompts: Path, tmp_path: Path
) -> None:
    outcome = train("preview.every_steps=4", f"preview.prompts={prompts}").done()
    lines = outcome.out.strip().splitlines()
    folder = tmp_path / "out"
    file, best, report, learned = [line for line in lines if not line.startswith(" ")][-4:]
    assert file.startswith(f"LoRA file  {folder / 'anna.safetensors'} (")
    assert re.search(r"read back: all \d+ tensors match", file)
    assert best == f"Best file  {folder / 'anna-best.safetensors'}"
    why = lines[lines.index(best) + 1]
    assert re.match(r"           Step \d is the best of 2: likeness -?\d\.\d\d", why)
    assert report == f"Report     {folder / 'report.html'}"
    number = r"-?\d+\.\d\d"
    words = rf"Learned    likeness of 'ohwx person' {number} -> {number} .*without the trigger"
    assert re.match(words, learned)


def test_the_lora_file_comes_last(train: Train, tmp_path: Path) -> None:
    """Until the report is there, the file does not have its name."""
    seen: list[set[str]] = []
    written = finish.write_report

    def spy(*arguments: object) -> None:
        seen.append(files_in(tmp_path / "out"))
        written(*arguments)  # type: ignore[arg-type]

    from trainer.commands import train as command

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "write_report", spy)
        train().done()
    assert "anna.safetensors" not in seen[0]
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert (tmp_path / "out" / "anna.safetensors") in files
    assert not list((tmp_path / "out").glob("*.unfinished"))


def test_a_report_that_fails_is_said_and_the_file_is_there(train: Train, tmp_path: Path) -> None:
    from trainer.commands import train as command

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "report.html")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "write_report", full)
        outcome = train().done()
    assert "goes on without the report" in outcome.out
    assert "No space left" in outcome.out
    assert "anna.safetensors" in files_in(tmp_path / "out")
    assert "report.html" not in files_in(tmp_path / "out")
    assert "Report " not in outcome.out


# --- the same again


def test_two_runs_of_one_seed_are_the_same_byte_for_byte(train: Train, tmp_path: Path) -> None:
    for name in "ab":
        train("objective.prior_weight=1", output=tmp_path / name).done()
    assert same_tensors(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b"))
    assert same_tensors(checkpoint_of(tmp_path / "a", 4), checkpoint_of(tmp_path / "b", 4))
    train("objective.prior_weight=1", "run.seed=1", output=tmp_path / "c").done()
    assert not same_tensors(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "c"))


def test_an_empty_cache_and_none_at_all_change_nothing(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("objective.prior_weight=1", output=tmp_path / "a").done()
    monkeypatch.setenv("LIKENESS_CACHE", str(tmp_path / "cache"))
    train("objective.prior_weight=1", "data.cache=false", output=tmp_path / "b").done()
    assert not (tmp_path / "cache").exists()
    train("objective.prior_weight=1", output=tmp_path / "c").done()
    assert (tmp_path / "cache").exists()
    assert same_tensors(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b"))
    assert same_tensors(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "c"))


def test_previews_do_not_change_what_is_learned(train: Train, whole: Path, tmp_path: Path) -> None:
    train("objective.prior_weight=0.5", "adapter.save_precision=fp32").done()
    assert same_tensors(tensors_of(tmp_path / "out"), tensors_of(whole))


@pytest.mark.parametrize("settings", [(), ("objective.prior_weight=1", "run.save_every_steps=7")])
def test_twenty_steps_equal_ten_and_ten_more(
    settings: tuple[str, ...], train: Train, tmp_path: Path
) -> None:
    settings = (*settings, "run.total_steps=20", "adapter.save_precision=fp32")
    train(*settings, output=tmp_path / "whole").done()
    stopped = train(*settings, "run.stop_at_step=10", output=tmp_path / "parts").done()
    assert "Stopped at step 10 of 20" in stopped.out
    assert "anna-10.safetensors" in files_in(tmp_path / "parts")
    assert "anna.safetensors" not in files_in(tmp_path / "parts")
    resumed = train("--resume", output=tmp_path / "parts").done()
    assert "Going on from step 10." in resumed.out
    assert same_tensors(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "parts"))
    whole, parts = (checkpoint_of(tmp_path / name, 20) for name in ("whole", "parts"))
    assert same_tensors(whole, parts)
    rows = metrics_of(tmp_path / "parts")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["loss"] for row in rows] == [row["loss"] for row in metrics_of(tmp_path / "whole")]


def test_a_finished_run_can_be_finished_again(train: Train, tmp_path: Path) -> None:
    train().done()
    before = tensors_of(tmp_path / "out")
    (tmp_path / "out" / "report.html").unlink()
    train("--resume").done()
    assert same_tensors(tensors_of(tmp_path / "out"), before)
    assert (tmp_path / "out" / "report.html").is_file()


def test_samples_are_the_same_after_going_on(
    train: Train, whole: Path, prompts: Path, tmp_path: Path
) -> None:
    settings = [word.format(prompts=prompts) for word in PREVIEWS]
    train(*settings, "objective.prior_weight=0.5", "run.stop_at_step=2").done()
    output = tmp_path / "out"
    # As if the run had been killed in the middle of drawing the samples of step 2.
    damaged = output / "previews" / "step-000002_01.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    (output / "scores.json").write_text("[{", encoding="utf-8")
    train("--resume").done()
    for path in sorted((whole / "previews").iterdir()):
        ours = pixels(output / "previews" / path.name)
        assert np.array_equal(ours, pixels(path)), path.name
    scores = "scores.json"
    assert (output / scores).read_text("utf-8") == (whole / scores).read_text("utf-8")


# --- the best step


def best_of(folder: Path) -> int | None:
    return written_step(folder / "anna-best.safetensors")


def set_likeness(folder: Path, likeness: dict[int, float]) -> None:
    """Change the likeness in a run's scores, so that another step is the best."""
    path = folder / "scores.json"
    kept = json.loads(path.read_text(encoding="utf-8"))
    for row in kept["scores"]:
        row["trigger"] = likeness.get(row["step"], row["trigger"])
    path.write_text(json.dumps(kept), encoding="utf-8")


def test_the_best_file_holds_the_step_that_the_report_names(whole: Path) -> None:
    step = best_of(whole)
    assert step in (2, 4)
    own = whole / ("anna.safetensors" if step == 4 else f"anna-{step}.safetensors")
    assert same_tensors(load_file(whole / "anna-best.safetensors"), load_file(own))
    metadata = read_lora(whole / "anna-best.safetensors").metadata
    assert metadata["ss_output_name"] == "anna-best"
    assert metadata["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert f"Take step {step}" in page
    assert f"Step {step} is the best of 2: likeness" in page
    assert str(whole / "anna-best.safetensors") in page


def test_every_save_is_scored(train: Train, prompts: Path, tmp_path: Path) -> None:
    """At the steps of both settings, and at the end; only saved steps can be the best."""
    settings = ("run.total_steps=7", "run.save_every_steps=2", "preview.every_steps=3")
    train(*settings, f"preview.prompts={prompts}").done()
    rows = json.loads((tmp_path / "out" / "scores.json").read_text("utf-8"))["scores"]
    assert [row["step"] for row in rows] == [0, 2, 3, 4, 6, 7]
    assert [row["step"] for row in rows if row["saved"]] == [2, 4, 6, 7]


@pytest.mark.parametrize("stop", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_going_on_ends_with_the_same_best_step(
    stop: int, train: Train, prompts: Path, tmp_path: Path
) -> None:
    """Stopped at a save or between two; the file is there whenever a step was scored."""
    settings = [word.format(prompts=prompts) for word in PREVIEWS]
    settings += ["run.total_steps=6", "optimizer.learning_rate=0.05"]
    train(*settings, output=tmp_path / "whole").done()
    parts = tmp_path / "parts"
    train(*settings, f"run.stop_at_step={stop}", output=parts).done()
    assert best_of(parts) in (2, 4)
    train("--resume", output=parts).done()
    assert best_of(parts) == best_of(tmp_path / "whole")
    ours, theirs = (
        load_file(tmp_path / name / "anna-best.safetensors") for name in ("whole", "parts")
    )
    assert same_tensors(ours, theirs)
    texts = [(tmp_path / name / "scores.json").read_text("utf-8") for name in ("whole", "parts")]
    assert texts[0] == texts[1]


def test_a_best_file_of_a_later_step_goes_back_with_the_run(
    train: Train, prompts: Path, tmp_path: Path
) -> None:
    """As if the run had been killed after step 4, which was the best, and its checkpoint lost."""
    output = tmp_path / "out"
    settings = [word.format(prompts=prompts) for word in PREVIEWS]
    train(*settings, "run.total_steps=6", "run.stop_at_step=4").done()
    set_likeness(output, {2: 0.5, 4: 9.0})
    train("--resume", "run.stop_at_step=5").done()
    assert best_of(output) == 4
    for step in (4, 5):
        shutil.rmtree(output / "checkpoints" / f"step-00000{step}", ignore_errors=True)
    train("--resume", "run.stop_at_step=3", "run.save_every_steps=2").done()
    assert best_of(output) == 2
    own, best = (load_file(output / f"anna-{name}.safetensors") for name in ("2", "best"))
    assert same_tensors(own, best)


def test_the_best_file_comes_back_from_the_steps_own(
    train: Train, prompts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    settings = [word.format(prompts=prompts) for word in PREVIEWS]
    train(*settings).done()
    set_likeness(output, {2: 0.9, 4: 0.1})
    (output / "anna-best.safetensors").write_bytes(b"damaged")
    outcome = train("--resume").done()
    assert best_of(output) == 2
    assert "step 4 has 0.80 less likeness" in outcome.out
    own, best = (load_file(output / f"anna-{name}.safetensors") for name in ("2", "best"))
    assert same_tensors(own, best)
    # Without any file of step 2 the run cannot offer it any more.
    for name in ("2", "best"):
        (output / f"anna-{name}.safetensors").unlink()
    train("--resume").done()
    assert best_of(output) == 4


def test_scores_of_other_prompts_are_not_compared(
    train: Train, prompts: Path, tmp_path: Path
) -> None:
    """Steps whose samples came from other prompts or seeds are left out when a run goes on."""
    settings = [word.format(prompts=prompts) for word in PREVIEWS]
    train(*settings, "run.stop_at_step=2").done()
    own = tmp_path / "own.txt"
    own.write_text("a {trigger} {class} at sea\n{class} --d 8\n", encoding="utf-8")
    train("--resume", f"preview.prompts={own}").done()
    rows = json.loads((tmp_path / "out" / "scores.json").read_text("utf-8"))["scores"]
    assert [row["step"] for row in rows] == [0, 2, 4]
    for step in (0, 2, 4):
        with Image.open(tmp_path / "out" / "previews" / f"step-00000{step}_01.png") as image:
            assert "at sea" in image.info["parameters"]


# --- where a run goes


def test_runs_are_numbered_and_the_newest_is_gone_on_with(
    cli: Train, base: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", photos, "--base", base, *(f"--set={word}" for word in QUICK)]
    cli(*words).done()
    cli(*words, "--set=run.stop_at_step=2").done()
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"anna-1", "anna-2"}
    before = state_of(tmp_path / "runs" / "anna-1")
    cli("train", photos, "--base", base, "--resume").done()
    assert "anna.safetensors" in files_in(tmp_path / "runs" / "anna-2")
    assert state_of(tmp_path / "runs" / "anna-1") == before
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_a_folder_that_holds_a_run_is_refused_and_stays_as_it_is(
    train: Train, tmp_path: Path
) -> None:
    train().done()
    before = state_of(tmp_path)
    outcome = train()
    assert outcome.code == 1
    assert "already holds a run" in outcome.err
    assert str(tmp_path / "out") in outcome.err
    assert "--overwrite" in outcome.err
    assert state_of(tmp_path) == before


def test_overwriting_replaces_the_run_and_nothing_else(train: Train, tmp_path: Path) -> None:
    train("run.name=old", "run.save_every_steps=1").done()
    output = tmp_path / "out"
    (output / "notes.txt").write_text("mine", encoding="utf-8")
    (output / "previews").mkdir()
    (output / "previews" / "favourite.png").write_bytes(b"mine")
    train("--overwrite", "run.total_steps=2").done()
    assert files_in(output) == {
        "anna.safetensors",
        "report.html",
        "settings.toml",
        "metrics.jsonl",
        "notes.txt",
        "previews/favourite.png",
        *(f"checkpoints/step-000002/{name}" for name in STATE),
    }
    assert len(metrics_of(output)) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        "preview.prompts=nothing",
        "model.precision=fp16",
        "optimizer.name=adamx",
        "adapter.kind=lola",
        "adapter.rank=x",
    ],
)
def test_overwriting_with_a_mistake_leaves_the_old_run(
    wrong: str, train: Train, tmp_path: Path
) -> None:
    train().done()
    before = state_of(tmp_path)
    assert train("--overwrite", "preview.every_steps=2", wrong).code in (1, 2)
    assert state_of(tmp_path) == before


def test_overwriting_with_a_broken_base_leaves_the_old_run(
    train: Train, base: Path, tmp_path: Path
) -> None:
    train().done()
    before = state_of(tmp_path / "out")
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    assert train("--overwrite", model=broken).code == 1
    assert state_of(tmp_path / "out") == before


def test_names_with_brackets_and_blanks_are_printed_as_they_are(
    train: Train, photos: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(photos, tmp_path / "my [red] cats[/b]" / "set [1]"))
    output = tmp_path / "out [bold] x"
    outcome = train("run.stop_at_step=2", folder=folder, output=output).done()
    assert f'likeness train "{folder}" --output "{output}" --resume' in outcome.out
    assert f"Output    {output}" in outcome.out
    assert "set_1-2.safetensors" in files_in(output)


def test_a_very_long_folder_name_is_no_obstacle(train: Train, photos: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(photos, tmp_path / ("x" * 180)))
    train(folder=folder).done()
    assert f"{'x' * 100}.safetensors" in files_in(tmp_path / "out")


# --- going on


def test_going_on_with_other_settings_names_them(train: Train, tmp_path: Path) -> None:
    train("run.stop_at_step=2").done()
    before = state_of(tmp_path)
    outcome = train("--resume", "adapter.alpha=3", "run.seed=9")
    assert outcome.code == 2
    assert "adapter.alpha: was 16.0, now 3.0" in outcome.err
    assert "run.seed: was 0, now 9" in outcome.err
    assert "adapter.rank" not in outcome.err
    assert state_of(tmp_path) == before


def test_going_on_with_other_photos_captions_or_base_is_refused(
    train: Train, base: Path, photos: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(photos, tmp_path / "set"))
    model = Path(shutil.copytree(base, tmp_path / "base"))
    train("run.stop_at_step=2", folder=folder, model=model).done()
    config = model / "unet" / "config.json"
    config.write_text(config.read_text("utf-8") + " ", encoding="utf-8")
    (folder / "1.txt").write_text("another text", encoding="utf-8")
    outcome = train("--resume", folder=folder, model=model)
    assert outcome.code == 2
    assert "the photos or captions: a picture or a text has changed" in outcome.err
    assert "the base model: its files have changed" in outcome.err
    (folder / "2.png").unlink()
    assert "was 3 training pictures, now 2" in train("--resume", folder=folder, model=model).err


def test_class_pictures_drawn_in_another_way_are_another_run(
    train: Train, prompts: Path, tmp_path: Path
) -> None:
    own = tmp_path / "prior.txt"
    own.write_text("{class}\nsome {class}\n", encoding="utf-8")
    prior = ("objective.prior_weight=1", f"objective.prior_prompts={own}")
    train(*prior, "run.stop_at_step=2").done()
    outcome = train("--resume", "preview.sampling_steps=3")
    assert outcome.code == 2
    assert "preview.sampling_steps: was 2, now 3" in outcome.err
    own.write_text("{class}\nno {class}\n", encoding="utf-8")
    outcome = train("--resume")
    assert outcome.code == 2
    assert "objective.prior_prompts" in outcome.err


@pytest.mark.parametrize(
    "free",
    ["run.save_every_steps=1", "run.keep_checkpoints=9", "data.cache=false"],
)
def test_what_changes_no_step_may_change(free: str, train: Train, tmp_path: Path) -> None:
    train("run.stop_at_step=2").done()
    train("--resume", free).done()
    assert "anna.safetensors" in files_in(tmp_path / "out")


def test_going_on_without_a_run_or_a_checkpoint_starts_one(train: Train, tmp_path: Path) -> None:
    started = train("--resume", *QUICK, output=tmp_path / "new").done()
    assert "There is no checkpoint yet" in started.out
    train().done()
    assert same_tensors(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "new"))
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    before = tensors_of(tmp_path / "out")
    assert "There is no checkpoint yet" in train("--resume").done().out
    assert same_tensors(tensors_of(tmp_path / "out"), before)


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(
    train: Train, tmp_path: Path
) -> None:
    train("adapter.save_precision=fp32").done()
    before = tensors_of(tmp_path / "out")
    path = tmp_path / "out" / "checkpoints" / "step-000004" / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    outcome = train("--resume").done()
    assert "step-000004 is damaged" in outcome.out
    assert "Going on from step 2." in outcome.out
    assert same_tensors(tensors_of(tmp_path / "out"), before)


def test_resume_and_overwrite_exclude_each_other(train: Train) -> None:
    outcome = train("--resume", "--overwrite")
    assert outcome.code == 2
    assert "exclude each other" in outcome.err


# --- stopping


def started(words: list[object], cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "LIKENESS_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_run_is_saved_and_goes_on_to_the_same_end(
    name: str,
    code: int,
    train: Train,
    base: Path,
    photos: Path,
    cache_folder: Path,
    tmp_path: Path,
) -> None:
    settings = ["run.total_steps=100", "run.threads=1", "adapter.save_precision=fp32"]
    output = tmp_path / "stopped"
    words: list[object] = ["train", photos, "--base", base, "--output", output]
    words += [f"--set={word}" for word in (*QUICK, *settings, "run.save_every_steps=1000")]
    process = started(words, cache_folder)
    metrics = output / "metrics.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    step = int(re.findall(r"Stopped after step (\d+) of 100", errors)[0])
    assert 0 < step < 100
    assert "Traceback" not in errors
    assert (output / "checkpoints" / f"step-{step:06d}").is_dir()
    assert f'likeness train "{photos}" --output "{output}" --resume' in errors
    train("--resume", output=output).done()
    train(*settings, output=tmp_path / "whole").done()
    assert same_tensors(tensors_of(output), tensors_of(tmp_path / "whole"))


def test_stopping_saves_in_process_too_and_draws_what_was_due(
    train: Train, prompts: Path, tmp_path: Path
) -> None:
    """The signal comes during the second step, whose samples are drawn when the run goes on."""
    from trainer.commands import train as command

    settings = [word.format(prompts=prompts) for word in PREVIEWS]

    def interrupted(*arguments: Any, **options: Any) -> Iterator[StepDone]:
        for report in loop.train(*arguments, **options):
            if report.step == 2:
                signal.raise_signal(signal.SIGINT)
            yield report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "train", interrupted)
        outcome = train(*settings)
    assert outcome.code == 130
    step = int(re.findall(r"Stopped after step (\d+) of 4", outcome.err)[0])
    assert step == 2
    assert (tmp_path / "out" / "checkpoints" / "step-000002").is_dir()
    assert not (tmp_path / "out" / "previews" / "step-000002_01.png").exists()
    train("--resume").done()
    assert (tmp_path / "out" / "previews" / "step-000002_01.png").exists()


def test_ctrl_c_before_the_training_is_no_error(train: Train) -> None:
    from trainer.commands import train as command

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "open_session", interrupted)
        outcome = train()
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
    assert "Stopped" in outcome.err


def test_an_error_of_ours_is_written_down(train: Train) -> None:
    from trainer.commands import train as command

    def broken(*arguments: object, **options: object) -> None:
        raise AssertionError("oops")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "open_session", broken)
        outcome = train()
    assert outcome.code == 1
    assert "AssertionError: oops" in outcome.err
    details = Path(next(line.strip() for line in outcome.err.splitlines() if ".txt" in line))
    assert "Traceback" in details.read_text(encoding="utf-8")
    details.unlink()


# --- kinds, bases and number formats


@pytest.mark.parametrize(
    "settings",
    [
        ("--kind=style", "preview.every_steps=2"),
        ("model.precision=bf16", "preview.every_steps=2"),
        ("adapter.text_encoder=false", "caption.dropout=0.5"),
        ("data.flip=true", "data.repeats=3"),
        ("adapter.targets=attention+ff",),
        ("data.resolution=52",),
        ("data.resolution=100", "objective.prior_weight=1", "preview.every_steps=4"),
        ("optimizer.accumulate_steps=2", "data.batch_size=3"),
        ("objective.prediction=v_prediction",),
    ],
    ids=lambda settings: settings[0],
)
def test_these_run_too(
    settings: tuple[str, ...], train: Train, prompts: Path, tmp_path: Path
) -> None:
    outcome = train(*settings, f"preview.prompts={prompts}").done()
    assert "Traceback" not in outcome.err
    assert all(torch.isfinite(t.float()).all() for t in tensors_of(tmp_path / "out").values())


def test_a_v_prediction_base_is_trained_as_one(train: Train, v_base: Path, tmp_path: Path) -> None:
    train(model=v_base).done()
    metadata = read_lora(lora_of(tmp_path / "out")).metadata
    assert metadata["modelspec.prediction_type"] == "v"


def test_without_previews_it_is_said_that_there_is_no_score(train: Train, tmp_path: Path) -> None:
    outcome = train("preview.every_steps=0").done()
    assert "Learned    not measured: preview.every_steps is 0" in outcome.out
    why = "the steps were not compared (preview.every_steps is 0, so no samples were drawn)"
    assert f"Best file  none: {why}" in outcome.out
    absent = {"contact_sheet.png", "scores.json", "anna-best.safetensors"}
    assert not absent & files_in(tmp_path / "out")
    assert not (tmp_path / "out" / "previews").exists()
    assert "not measured" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_without_the_trigger_in_any_prompt_there_is_no_score(train: Train, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("a {class}\n", encoding="utf-8")
    outcome = train("preview.every_steps=4", f"preview.prompts={own}").done()
    assert "not measured: no prompt in preview.prompts holds the trigger word" in outcome.out
    assert "contact_sheet.png" in files_in(tmp_path / "out")
    assert "anna-best.safetensors" not in files_in(tmp_path / "out")


@pytest.mark.skipif(torch.cuda.is_available(), reason="xformers may work there")
def test_xformers_that_does_not_work_is_said_and_replaced(train: Train, tmp_path: Path) -> None:
    outcome = train("model.attention=xformers", output=tmp_path / "x").done()
    assert "xformers was asked for but cannot be used" in outcome.out
    assert "using sdpa" in outcome.out
    train("model.attention=sdpa", output=tmp_path / "s").done()
    assert same_tensors(tensors_of(tmp_path / "x"), tensors_of(tmp_path / "s"))


def test_eager_attention_learns_nearly_the_same(train: Train, tmp_path: Path) -> None:
    for name in ("eager", "sdpa"):
        train(
            f"model.attention={name}", "adapter.save_precision=fp32", output=tmp_path / name
        ).done()
    eager, sdpa = tensors_of(tmp_path / "eager"), tensors_of(tmp_path / "sdpa")
    assert eager.keys() == sdpa.keys()
    # Adam divides by the gradient's size, so rounding decides where a gradient is nearly zero.
    distances = torch.cat([(eager[name] - sdpa[name]).abs().flatten() for name in sdpa])
    assert float(distances.median()) < 1e-5


def test_bad_photos_can_be_skipped(train: Train, photos: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(photos, tmp_path / "set"))
    (folder / "3.jpg").write_text("no picture", encoding="utf-8")
    (folder / ".hidden.jpg").write_text("hidden", encoding="utf-8")
    (folder / "list.csv").write_text("other", encoding="utf-8")
    refused = train(folder=folder)
    assert refused.code == 1
    assert "3.jpg" in refused.err
    assert "data.skip_bad=true" in refused.err
    outcome = train("data.skip_bad=true", folder=folder).done()
    assert "Photos    3 in" in outcome.out
    assert "1 hidden, 1 that are no pictures" in outcome.out
    assert "1 that cannot be used" in outcome.out


def test_a_long_caption_is_mentioned(train: Train, photos: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(photos, tmp_path / "set"))
    (folder / "1.txt").write_text("word " * 300, encoding="utf-8")
    assert re.search(r"1\.png .*has a caption of \d+ tokens", train(folder=folder).done().out)


@pytest.mark.slow
def test_real_photographs(train: Train, tmp_path: Path, prompts: Path) -> None:
    """scikit-image's bundled photographs, as PNG and JPEG, in three shapes."""
    from skimage import data

    folder = tmp_path / "photographs"
    folder.mkdir()
    for number, name in enumerate(("astronaut", "chelsea", "coffee", "rocket")):
        picture = Image.fromarray(getattr(data, name)())
        picture.save(folder / f"{name}.{'png' if number % 2 else 'jpg'}")
    outcome = train(
        "data.resolution=64", "preview.every_steps=4", f"preview.prompts={prompts}", folder=folder
    ).done()
    assert "Photos    4 in" in outcome.out
    assert "photographs.safetensors" in files_in(tmp_path / "out")


# --- the other commands


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_sample_draws_what_the_run_drew(
    cli: Callable[..., Outcome], whole: Path, base: Path, tmp_path: Path
) -> None:
    """The same prompt, seed and settings; one grey level may differ by rounding in batches."""
    outcome = cli(
        *("sample", whole / "anna.safetensors", "--base", base),
        *("--prompt", "a ohwx person in snow"),
        *("--negative", "ugly", "--seed", 7, "--steps", 3, "--guidance", 3),
        *("--output", tmp_path / "drawn"),
    ).done()
    (path,) = (tmp_path / "drawn").iterdir()
    assert str(path) in outcome.out
    drawn = pixels(path)
    assert np.abs(drawn - pixels(whole / "previews" / "step-000004_01.png")).max() <= 1
    assert np.abs(drawn - pixels(whole / "previews" / "step-000000_01.png")).max() > 1


def test_sample_never_replaces_a_picture_and_follows_its_flags(
    cli: Callable[..., Outcome], whole: Path, base: Path, tmp_path: Path
) -> None:
    words = ["sample", whole / "anna.safetensors", "--base", base, "--steps", 1]
    words += ["--prompt", "a", "--prompt", "b", "--count", 2, "--output", tmp_path / "drawn"]
    cli(*words, "--width", 64, "--height", 40).done()
    cli(*words, "--strength", 0).done()
    names = [path.name for path in sorted((tmp_path / "drawn").iterdir())]
    assert names == [f"anna_seed{s}_00{n}.png" for s in (0, 1) for n in (1, 2, 3, 4)]
    shapes = [pixels(tmp_path / "drawn" / name).shape for name in names[:4]]
    assert shapes == [(32, 64, 3), (32, 64, 3), (32, 32, 3), (32, 32, 3)]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--count", 0), "--count 0"),
        (("--steps", 0), "--steps 0"),
        (("--guidance", "nan"), "--guidance nan"),
        (("--seed", -1), "--seed -1"),
        (("--width", 5), "--width 5"),
        (("--width", 0), "--width 0"),
        (("--height", 9999), "--height 9999"),
        (("--strength", "inf"), "--strength inf"),
    ],
)
def test_sample_refuses_numbers_out_of_range(
    flags: tuple[object, ...],
    words: str,
    cli: Callable[..., Outcome],
    whole: Path,
    base: Path,
    tmp_path: Path,
) -> None:
    outcome = cli(
        *("sample", whole / "anna.safetensors", "--base", base, "--prompt", "a", *flags),
        *("--output", tmp_path / "drawn"),
    )
    assert outcome.code == 2
    assert words in outcome.err
    assert not (tmp_path / "drawn").exists()


def test_sample_says_what_is_wrong(
    cli: Callable[..., Outcome], whole: Path, base: Path, tmp_path: Path
) -> None:
    missing = cli("sample", tmp_path / "no.safetensors", "--base", base, "--prompt", "a")
    assert missing.code == 1
    assert "no.safetensors" in missing.err
    (tmp_path / "file").touch()
    lora = whole / "anna.safetensors"
    blocked = cli(
        *("sample", lora, "--base", base, "--prompt", "a", "--steps", 1),
        *("--output", tmp_path / "file"),
    )
    assert blocked.code == 1
    assert "--output" in blocked.err
    no_base = cli("sample", lora, "--base", tmp_path / "nothing", "--prompt", "a")
    assert no_base.code == 1
    assert "no such base model" in no_base.err


def test_inspect_shows_the_runs_file(cli: Callable[..., Outcome], whole: Path) -> None:
    text = cli("inspect", whole / "anna.safetensors").done().out
    for words in ("rank: 2", "fits no real SD 1.5", "trigger_phrase: ohwx", "SHA-256 of the file"):
        assert words in text


@pytest.mark.parametrize(("precision", "strength"), [("fp32", 0.7), ("fp16", 1.0)])
def test_a_plain_diffusers_pipeline_draws_the_trainers_own_picture(
    precision: str, strength: float, train: Train, base: Path, prompts: Path, tmp_path: Path
) -> None:
    """Loaded with `load_lora_weights`, both in fp32: at most one grey level of 255 differs with a
    file in fp32, at most three with one in fp16 (it rounds the weights)."""
    settings = ["preview.every_steps=4", f"preview.prompts={prompts}", "run.total_steps=8"]
    settings.append(f"adapter.strength={strength}")
    train(*settings, f"adapter.save_precision={precision}", "adapter.targets=attention+ff").done()
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)

    def picture() -> np.ndarray:
        image = pipeline(
            "a ohwx person in snow",
            negative_prompt="ugly",
            generator=torch.Generator().manual_seed(7),
            num_inference_steps=3,
            guidance_scale=3.0,
            width=32,
            height=32,
        ).images[0]
        return np.asarray(image).astype(int)

    previews = tmp_path / "out" / "previews"
    own, before = pixels(previews / "step-000008_01.png"), pixels(previews / "step-000000_01.png")
    assert np.abs(picture() - before).max() <= 1
    pipeline.load_lora_weights(str(lora_of(tmp_path / "out")))
    difference = np.abs(picture() - own).max()
    assert difference <= (1 if precision == "fp32" else 3)
    assert np.abs(own - before).max() > 10


# --- the command line itself


@pytest.mark.parametrize(
    "words",
    [("-m", "trainer", "--help"), ("train.py", "--help"), ("-m", "trainer", "--version")],
    ids=" ".join,
)
def test_help_comes_from_every_entry(words: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0
    assert "likeness" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["train", "sample", "inspect"])
def test_every_command_has_help(command: str, cli: Callable[..., Outcome]) -> None:
    outcome = cli(command, "--help").done()
    assert command in outcome.out


@pytest.mark.parametrize("words", [(), ("trian", "x"), ("train",), ("train", "x", "--nope")])
def test_a_wrong_command_line_is_usage(words: tuple[str, ...], cli: Callable[..., Outcome]) -> None:
    outcome = cli(*words)
    assert outcome.code == 2
    assert "usage: likeness" in outcome.err


@pytest.mark.slow
def test_a_run_by_subprocess_is_quiet_on_stderr(
    base: Path, photos: Path, cache_folder: Path, tmp_path: Path
) -> None:
    """No warnings and no progress bars of libraries: a photographer cannot act on them."""
    words: list[object] = ["train", photos, "--base", base, "--output", tmp_path / "out"]
    process = started([*words, *(f"--set={word}" for word in QUICK)], cache_folder)
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "LoRA file" in out
    assert errors == ""


def test_settings_come_from_a_file_and_the_command_line_wins(train: Train, tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text(
        "[adapter]\nrank = 5\n[caption]\ntrigger = 'fromfile'\nclass_noun = 'dog'\n", "utf-8"
    )
    outcome = train(f"--config={config}", "--trigger=zqx", "--class=old cat").done()
    settings = (tmp_path / "out" / "settings.toml").read_text(encoding="utf-8")
    assert 'trigger = "zqx"  # command line' in settings
    assert 'class_noun = "old cat"  # command line' in settings
    assert "rank = 2  # command line" in settings  # from the quick settings of these tests
    assert "resolution = 32  # by base" in settings
    assert 'name = "anna"  # the photo folder' in settings
    assert "weight_decay = 0.01  # default" in settings
    assert "'zqx old cat'" in outcome.out


@pytest.mark.parametrize("flag", ["--vae", "--tokenizer"])
@pytest.mark.parametrize("command", ["train", "prepare"])
def test_a_part_of_the_base_can_be_given_by_a_flag(
    command: str,
    flag: str,
    photos: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One that is not there is named, so the flag has reached the loading of the base."""
    monkeypatch.chdir(tmp_path)
    missing = tmp_path / 'not "there"'
    assert run_cli(command, photos, "--base", base, flag, missing) == 1
    assert 'not "there"' in capsys.readouterr().err
    assert files_in(tmp_path) == set()
