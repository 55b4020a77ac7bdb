"""Numbers that are not finite, losses that run away, memory that is full: what is done and said."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tests.learners import Recipe, load_backbone, make_learner, make_plan, make_samples
from tests.runs import Outcome, files_in, metrics_of, same_tensors
from trainer.data.batches import BatchPlan
from trainer.errors import DeviceError, ModelError, TrainerError
from trainer.families.backbone import StableDiffusionBackbone
from trainer.scoring.drift import looks_blank
from trainer.training.guards import Guard, GuardPlan, unmoved
from trainer.training.learner import Learner
from trainer.training.loop import LoopPlan, StepDone, train
from trainer.training.memory import (
    FULL_WORDS,
    KEPT_VALUES,
    Saving,
    explained,
    is_memory_full,
    left_out,
    let_go,
    memory_error,
)
from trainer.training.numbers import Readings, StepNumbers, as_row
from trainer.training.preview import decode, draw
from trainer.training.snapshot import go_back, take_snapshot
from trainer.training.state import newest_checkpoint, restore, save_checkpoint
from trainer.training.tally import RUNAWAY, WINDOW, runs_away

Train = Callable[..., Outcome]
ALONE = Recipe(batch_size=1, text_encoder=False)
NAMES = {f"photo-{number}": f"{number}.jpg" for number in range(4)}


def everything(learner: Learner) -> dict[str, Tensor]:
    """Adapter and optimizer tensors, copied."""
    snapshot = take_snapshot(learner, 0)
    return {**snapshot.adapter, **snapshot.optimizer}


def spoil(learner: Learner, *numbers: int) -> None:
    """Plant a number that is none into the latents of some photos."""
    samples = make_samples("photo", ALONE.sizes, learner.backbone, ALONE)
    for number in numbers:
        samples[number].latents_Chw[0, 3, 3] = math.nan
    learner.batches = BatchPlan(samples, batch_size=1, seed=0)


def bad_losses(learner: Learner, bad: Callable[[int], bool], value: float = math.nan) -> None:
    """Make the loss of some batches another number."""
    sound = learner.loss
    learner.loss = lambda i: sound(i) * (value if bad(i) else 1.0)  # type: ignore[method-assign, assignment]


def watched(learner: Learner, plan: LoopPlan, guard: Guard, start: int = 0) -> list[StepDone]:
    return list(train(learner, plan, start, guard))


def skipped(reports: list[StepDone]) -> list[int]:
    return [row.step for report in reports for row in report.read if row.skipped]


def sentences(reports: list[StepDone]) -> list[str]:
    return [words for report in reports for words in report.said]


# --- steps that are left out


def test_a_photo_with_bad_latents_is_named_and_training_goes_on(base: Path) -> None:
    learner, guard = make_learner(base, ALONE), Guard(GuardPlan(names=NAMES))
    spoil(learner, 2)
    reports = watched(learner, make_plan(8), guard)
    assert len(skipped(reports)) == 2  # in each of two rounds through four photos
    (said,) = sentences(reports)
    assert "the latents of 2.jpg at timestep" in said
    assert said.startswith(f"Step {skipped(reports)[0]} was left out")
    assert guard.tally.culprits == {"2.jpg": 2}
    assert guard.words() == [
        "2 of 8 steps were left out, because their numbers were not finite; most often with 2.jpg "
        "(2 steps)."
    ]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in everything(learner).values())


def test_a_bad_step_changes_neither_weights_nor_optimizer(base: Path) -> None:
    learner, guard = make_learner(base, ALONE), Guard()
    watched(learner, make_plan(8, last=2), guard)
    before = everything(learner)
    bad_losses(learner, lambda index: index == 2, math.inf)
    watched(learner, make_plan(8, last=3), guard, 2)
    assert same_tensors(everything(learner), before)
    assert all(parameter.grad is None for parameter in learner.parameters)
    watched(learner, make_plan(8, last=4), guard, 3)
    assert not same_tensors(everything(learner), before)


def test_the_step_left_out_is_as_if_it_had_not_been(base: Path) -> None:
    """The others are what they are without it: data and noise are those of their step."""
    with_bad, without = make_learner(base, ALONE), make_learner(base, ALONE)
    bad_losses(with_bad, lambda index: index == 1)
    watched(with_bad, make_plan(3), Guard())
    watched(without, make_plan(3, last=1), Guard())
    watched(without, make_plan(3), Guard(), 2)
    assert same_tensors(everything(with_bad), everything(without))


def test_a_bad_gradient_is_traced_to_its_photo(base: Path) -> None:
    """The loss is finite, the gradient of the third photo is not."""
    learner, guard = make_learner(base, ALONE), Guard(GuardPlan(names=NAMES))
    before = everything(learner)
    of_batch = learner._losses
    spoilt: list[bool] = []

    def losses(batch: Any, *arguments: Any) -> Tensor:
        spoilt.append("photo-2" in batch.keys)
        return of_batch(batch, *arguments)

    learner._losses = losses  # type: ignore[method-assign, assignment]
    handle = learner.parameters[1].register_hook(
        lambda gradient: gradient * (math.nan if spoilt[-1] else 1.0)
    )
    reports = watched(learner, make_plan(4), guard)
    handle.remove()
    assert len(skipped(reports)) == 1
    assert "the gradient of 2.jpg at timestep" in sentences(reports)[0]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in everything(learner).values())
    assert not same_tensors(everything(learner), before)


def test_the_timestep_named_is_that_of_the_step(base: Path) -> None:
    learner, guard = make_learner(base, ALONE), Guard(GuardPlan(names=NAMES))
    drawn: list[int] = []
    predict = learner.backbone.predict

    def noted(noisy: Tensor, timesteps: Tensor, *rest: Any) -> Tensor:
        drawn.append(int(timesteps[0]))
        return predict(noisy, timesteps, *rest)

    learner.backbone.predict = noted  # type: ignore[method-assign, assignment]
    bad_losses(learner, lambda index: index == 0)
    learner_losses = learner._losses
    learner._losses = lambda *words: learner_losses(*words) * math.nan  # type: ignore[method-assign]
    (report,) = watched(learner, make_plan(4, last=1), guard)
    assert f"at timestep {drawn[0]} " in report.said[0]


def test_a_bad_number_of_a_text_encoder_names_the_photos(base: Path) -> None:
    learner = make_learner(base, replace(ALONE, text_encoder=True))
    guard = Guard(GuardPlan(names=NAMES))
    encode = learner.backbone.encode_prompts

    def spoilt(texts: Any) -> Any:
        prompts = encode(texts)
        bad = math.nan if "photo 1" in texts else 1.0
        return replace(prompts, embeddings_BTD=prompts.embeddings_BTD * bad)

    learner.backbone.encode_prompts = spoilt  # type: ignore[method-assign]
    reports = watched(learner, make_plan(4), guard)
    assert len(skipped(reports)) == 1
    assert "the loss of 1.jpg at timestep" in sentences(reports)[0]


def test_embeddings_in_the_cache_that_are_bad_are_named(base: Path) -> None:
    learner, guard = make_learner(base, ALONE), Guard(GuardPlan(names=NAMES))
    samples = make_samples("photo", ALONE.sizes, learner.backbone, ALONE)
    prompt = samples[3].prompt_TD
    assert prompt is not None
    prompt[0, 0] = math.nan
    learner.batches = BatchPlan(samples, batch_size=1, seed=0)
    reports = watched(learner, make_plan(4), guard)
    assert "the caption's embedding of 3.jpg" in sentences(reports)[0]


def test_numbers_that_are_sound_when_computed_again_are_said_to_be(base: Path) -> None:
    learner, guard = make_learner(base, ALONE), Guard(GuardPlan(names=NAMES))
    bad_losses(learner, lambda index: index == 1)
    reports = watched(learner, make_plan(3), guard)
    assert "did not happen again when it was computed once more" in sentences(reports)[0]
    assert ".jpg" in sentences(reports)[0]
    assert guard.tally.culprits == {}


def test_a_batch_of_several_names_only_the_bad_one(base: Path) -> None:
    learner = make_learner(base, replace(ALONE, prior_weight=1.0))
    guard = Guard(GuardPlan(names=NAMES))
    samples = make_samples("photo", ALONE.sizes, learner.backbone, ALONE)
    samples[1].latents_Chw[:] = math.nan
    learner.batches = BatchPlan(samples, batch_size=4, seed=0)
    (report,) = watched(learner, make_plan(9, last=1), guard)
    assert "1.jpg" in report.said[0]
    assert not any(name in report.said[0] for name in ("0.jpg", "2.jpg", "3.jpg", "prior"))


# --- going back


def test_many_bad_steps_in_a_row_lead_back_with_half_the_rate(base: Path) -> None:
    learner = make_learner(base, ALONE)
    guard = Guard(GuardPlan(tolerated_steps=2, snapshot_steps=3))
    bad_losses(learner, lambda index: index in (4, 5))
    states = {}
    reports = []
    for report in train(learner, make_plan(9), 0, guard):
        reports.append(report)
        states[report.step] = everything(learner)
    assert not same_tensors(states[4], states[3])
    assert same_tensors(states[5], states[4])
    assert same_tensors(states[6], states[3])
    assert not same_tensors(states[7], states[6])
    assert "went back to those of step 3" in reports[5].said[-1]
    plain = [
        row.rate for done in train(make_learner(base, ALONE), make_plan(9), 0) for row in done.read
    ]
    rates = [row.rate for report in reports for row in report.read]
    assert rates == [*plain[:6], *(rate / 2 for rate in plain[6:])]
    assert guard.rate_factor == 0.5
    assert any("went back" in words for words in guard.words())


def test_what_going_back_does_not_help_ends_with_advice(base: Path) -> None:
    """Not one step has worked, so there is nothing to go back to."""
    learner = make_learner(base, ALONE)
    guard = Guard(GuardPlan(tolerated_steps=2, names=NAMES, precision="bf16"))
    spoil(learner, 0, 1, 2, 3)
    before = everything(learner)
    with pytest.raises(TrainerError, match="the last 2 steps until step 2") as caught:
        watched(learner, make_plan(9), guard)
    assert caught.value.exit_code == 1
    assert all(words in caught.value.fix for words in ("model.precision=fp32", ".jpg (1 step"))
    assert "optimizer.learning_rate" in caught.value.fix
    assert "the base may be damaged" in caught.value.fix
    assert same_tensors(everything(learner), before)


def test_it_goes_back_a_few_times_and_then_ends(base: Path) -> None:
    learner, guard = make_learner(base, ALONE), Guard(GuardPlan(tolerated_steps=1))
    bad_losses(learner, lambda index: index % 2 == 1)
    with pytest.raises(TrainerError, match="It went back 3 times before"):
        watched(learner, make_plan(40), guard)
    assert guard.rate_factor == 1 / 8
    assert guard.step == 8


def test_a_snapshot_stays_what_it_was(base: Path) -> None:
    """Training goes on in copies of it, so it is good for another time."""
    learner = make_learner(base, ALONE)
    watched(learner, make_plan(9, last=2), Guard())
    snapshot = take_snapshot(learner, 2)
    there = everything(learner)
    for _ in range(2):
        watched(learner, make_plan(9, last=4), Guard(), 2)
        assert not same_tensors(everything(learner), there)
        go_back(learner, snapshot)
        assert same_tensors(everything(learner), there)


# --- going on later


def resumed(base: Path, folder: Path, guard: GuardPlan, plan: LoopPlan, stop: int) -> Learner:
    """Train to `stop`, save, and go on in another learner as another process would."""
    learner, first = spoilt_learner(base), Guard(guard)
    watched(learner, replace(plan, last_step=stop), first)
    kept = first.tensors(stop)
    save_checkpoint(folder, learner, stop, {}, keep=1, guard=first.state(), snapshot=kept)
    checkpoint, _ = newest_checkpoint(folder)
    assert checkpoint is not None
    learner, second = spoilt_learner(base), Guard(guard)
    restore(learner, checkpoint)
    second.load_state(checkpoint.guard, checkpoint.snapshot)
    watched(learner, plan, second, stop)
    return learner


def spoilt_learner(base: Path) -> Learner:
    """A bad photo, and two bad steps one after the other."""
    learner = make_learner(base, ALONE)
    spoil(learner, 2)
    bad_losses(learner, lambda index: index in (10, 11))
    return learner


@pytest.mark.parametrize(
    ("read_steps", "stops"),
    [
        (1, (7, 11)),
        pytest.param(1, (3, 10, 12), marks=pytest.mark.slow),
        pytest.param(3, (3, 7, 10, 11, 12), marks=pytest.mark.slow),
    ],
)
def test_a_run_with_bad_steps_goes_on_from_any_step_bit_for_bit(
    base: Path, tmp_path: Path, read_steps: int, stops: tuple[int, ...]
) -> None:
    """Also from between the last good state and the step at which training goes back to it."""
    watching = GuardPlan(tolerated_steps=2, snapshot_steps=6, names=NAMES)
    plan = replace(make_plan(14), read_steps=read_steps)
    whole, guard = spoilt_learner(base), Guard(watching)
    watched(whole, plan, guard)
    assert guard.tally.times_back == 1
    assert guard.tally.skipped >= 4
    for stop in stops:
        again = resumed(base, tmp_path / str(stop), watching, plan, stop)
        assert same_tensors(everything(again), everything(whole)), stop


def test_the_state_of_a_guard_is_json_and_comes_back(base: Path) -> None:
    guard = Guard(GuardPlan(tolerated_steps=3, names=NAMES))
    learner = make_learner(base, ALONE)
    spoil(learner, 1)
    watched(learner, replace(make_plan(9, last=5), read_steps=2), guard)
    state = json.loads(json.dumps(guard.state(), allow_nan=False))
    other = Guard(GuardPlan(tolerated_steps=3, names=NAMES))
    other.load_state(state, guard.tensors(5))
    assert other.state() == state
    assert other.tally.applied + other.tally.skipped == 4
    assert [row.step for row in other.numbers.take()] == [5]


def test_a_checkpoint_from_before_there_were_guards_is_fine() -> None:
    guard = Guard()
    guard.load_state({})
    assert guard.rate_factor == 1.0


# --- numbers that stay on the device


def test_reading_several_steps_at_once_changes_nothing(base: Path) -> None:
    one, several = make_learner(base, ALONE), make_learner(base, ALONE)
    plain = watched(one, make_plan(7), Guard())
    read = watched(several, replace(make_plan(7), read_steps=3), Guard())
    assert same_tensors(everything(one), everything(several))
    assert [len(report.read) for report in read] == [0, 0, 3, 0, 0, 3, 1]
    losses = [row.loss for report in read for row in report.read]
    assert losses == [report.loss for report in plain]
    assert math.isnan(read[0].loss)


def test_the_optimizer_is_told_on_the_device_and_leaves_all_as_it_was(base: Path) -> None:
    """As on a GPU: nobody looks at the numbers, and the bad step still changes nothing."""
    with_bad, without = make_learner(base, ALONE), make_learner(base, ALONE)
    bad_losses(with_bad, lambda index: index == 1)
    reports = watched(with_bad, replace(make_plan(3), read_steps=3), Guard())
    watched(without, make_plan(3, last=1), Guard())
    watched(without, make_plan(3), Guard(), 2)
    assert skipped(reports) == [2]
    assert same_tensors(everything(with_bad), everything(without))


def test_an_optimizer_that_cannot_be_told_is_asked_for_nothing(base: Path) -> None:
    learner = make_learner(base, ALONE)
    for group in learner.optimizer.optimizer.param_groups:
        group["fused"] = False
    learner.optimizer.optimizer._step_supports_amp_scaling = False
    bad_losses(learner, lambda index: True)
    before = everything(learner)
    watched(learner, replace(make_plan(9, last=2), read_steps=9), Guard())
    assert same_tensors(everything(learner), before)


class Scaler:
    """What the guard asks of fp16's loss scaler."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def get_scale(self) -> float:
        return self.scale


@pytest.mark.parametrize(
    ("scale", "loss", "bad"),
    [
        (65536.0, 1.0, False),
        (0.5, 1.0, True),
        (65536.0, math.nan, True),
    ],
)
def test_overflows_of_the_loss_scaler_are_normal_until_it_collapses(
    base: Path, scale: float, loss: float, bad: bool
) -> None:
    learner, guard = make_learner(base, ALONE), Guard()
    guard.begin(learner, 0)
    learner.accelerator.scaler = Scaler(scale)
    guard.judge([StepNumbers(1, loss, 1e-4, math.inf, 0.1, skipped=True)], learner, 1)
    assert (guard.tally.skipped, guard.tally.overflows) == (int(bad), int(not bad))


def test_rows_of_bad_steps_are_json() -> None:
    row = as_row(StepNumbers(3, math.nan, 1e-4, math.inf, 0.5, skipped=True))
    assert json.loads(json.dumps(row, allow_nan=False)) == {
        "step": 3,
        "loss": None,
        "rate": 1e-4,
        "grad_norm": None,
        "seconds": 0.5,
        "skipped": True,
    }


@given(st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), max_size=6))
def test_readings_come_back_from_their_state(rows: list[tuple[float, float]]) -> None:
    readings, again = Readings(), Readings()
    for step, (loss, norm) in enumerate(rows):
        readings.add(step + 1, 1e-4, 0.5, torch.tensor([loss, norm]))
    again.load_state(json.loads(json.dumps(readings.state(), allow_nan=False)))
    for left, right in zip(readings.take(), again.take(), strict=True):
        assert as_row(left) == as_row(right)
        assert left.skipped == right.skipped == (not math.isfinite(left.loss + left.grad_norm))
    assert again.take() == readings.take() == []


# --- a loss that runs away, an adapter that does nothing


def test_a_loss_that_runs_away_is_said_once(base: Path) -> None:
    learner, guard = make_learner(base, ALONE), Guard()
    guard.begin(learner, 0)
    said = []
    for step in range(1, 3 * WINDOW):
        loss = 0.1 * (1 + step % 5) * (1.0 if step <= WINDOW else 20.0)
        said += guard.judge([StepNumbers(step, loss, 1e-4, 1.0, 0.1)], learner, 1)
    runaway = [words for words in said if "runs away" in words]
    assert len(runaway) == 1
    assert "learning_rate" in runaway[0]
    assert runaway[0] in guard.words()


@given(st.lists(st.floats(0.01, 100.0), min_size=WINDOW, max_size=WINDOW))
def test_losses_that_only_differ_do_not_run_away(losses: list[float]) -> None:
    assert not runs_away(losses, losses)
    assert not runs_away(losses, [loss * RUNAWAY * 0.99 for loss in losses])
    assert runs_away(losses, [loss * RUNAWAY * 1.01 for loss in losses])
    assert not runs_away(losses[1:], [loss * 100 for loss in losses[1:]])


def test_an_adapter_that_does_nothing_is_said_by_its_component(base: Path) -> None:
    learner, guard = make_learner(base, replace(ALONE, text_encoder=True)), Guard()
    for name, parameter in (
        (n, p) for n in learner.adapters for p in learner.adapters[n].parameters()
    ):
        if name == "text_encoder":
            parameter.register_hook(torch.zeros_like)
    for group in learner.optimizer.param_groups:
        group["weight_decay"] = 0.0
    said = sentences(watched(learner, make_plan(12), guard))
    assert len(said) == 1
    assert "After 10 steps the LoRA of the text encoder still changes nothing" in said[0]
    assert unmoved(learner) == ["text_encoder"]


def test_a_normal_run_says_nothing(base: Path) -> None:
    guard = Guard()
    reports = watched(make_learner(base), make_plan(12), guard)
    assert sentences(reports) == guard.words() == []
    assert guard.tally.applied == 12


# --- memory


FULL = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: str(error)[:30])
def test_full_memory_is_known_by_its_many_names(error: Exception) -> None:
    assert is_memory_full(error)


def test_full_memory_is_explained_or_only_said() -> None:
    said: list[str] = []
    with left_out("samples", said.append):
        raise MemoryError
    assert "training goes on" in said[0]
    error = FULL[1]
    with (
        pytest.raises(DeviceError, match="full while trying") as caught,
        explained("trying", lambda: [Saving("model.checkpointing=true", 3 * 2**30)]),
    ):
        raise error
    assert "model.checkpointing=true saves about 3.0 GB, also when going on" in caught.value.fix


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError(FULL_WORDS[0])])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert not is_memory_full(error)
    for guarded in (explained("trying", list), left_out("samples", print)):
        with pytest.raises(type(error), match=str(error)[:5]), guarded:
            raise error


def test_what_an_error_holds_is_let_go() -> None:
    held: list[Any] = []

    def hold() -> None:
        big = Kept()
        held.append(Kept.living)
        raise MemoryError(big is None)

    try:
        hold()
    except MemoryError as error:
        let_go(error)
        assert Kept.living == 0
    assert held == [1]


class Kept:
    """Counts how many of it are alive."""

    living = 0

    def __init__(self) -> None:
        Kept.living += 1

    def __del__(self) -> None:
        Kept.living -= 1


def test_the_error_says_what_is_saved_and_what_would_help() -> None:
    helps = [Saving("data.batch_size=1", 2**30), Saving("model.checkpointing=true", 5)]
    error = memory_error("training", helps, MemoryError(), saved="Step 3 is saved.")
    assert error.fix.splitlines() == [
        "Step 3 is saved.",
        "What helps most (estimates; --preflight measures):",
        "  --set data.batch_size=1 saves about 1.0 GB",
        "  --set model.checkpointing=true saves a little, also when going on with --resume",
        "Closing other programs that use this memory helps as well.",
    ]
    assert error.where == "MemoryError"


# --- whole runs


@contextmanager
def patched(target: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, value)
        yield


def full_from(method: Callable[..., Any], call: int) -> Callable[..., Any]:
    """A method that has too little memory from its n-th call on."""
    calls: list[int] = []

    def wrapped(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) >= call:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
        return method(*arguments, **options)

    return wrapped


def test_a_run_with_a_bad_photo_ends_well_and_tells(train: Train, tmp_path: Path) -> None:
    """Stopped in the middle, it goes on to the same file."""
    of_batch = Learner._losses
    bad: list[str] = []

    def losses(learner: Learner, batch: Any, *arguments: Any) -> Tensor:
        bad[:] = bad or [batch.keys[0]]
        return of_batch(learner, batch, *arguments) * (math.nan if bad[0] in batch.keys else 1.0)

    settings = ("data.batch_size=1", "run.total_steps=6", "adapter.save_precision=fp32")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    with patched("trainer.training.learner.Learner._losses", losses):
        outcome = train(*settings, output=whole).done()
        train(*settings, "run.stop_at_step=3", output=halves).done()
        train("--resume", output=halves).done()
    assert "Step 1 was left out: the loss of " in outcome.out
    assert "Note       2 of 6 steps were left out" in outcome.out
    rows = metrics_of(whole)
    assert [row["skipped"] for row in rows].count(True) == 2
    assert rows[0]["loss"] is None
    assert "2 of 6 steps were left out" in (whole / "report.html").read_text(encoding="utf-8")
    assert (whole / "anna.safetensors").read_bytes() != b""
    for name in ("adapter.safetensors", "optimizer.safetensors"):
        place = Path("checkpoints") / "step-000006" / name
        assert (whole / place).read_bytes() == (halves / place).read_bytes()


def test_photos_that_cannot_be_encoded_are_named_or_left_out(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = StableDiffusionBackbone.encode_pixels

    def spoilt(backbone: Any, pixels: Tensor, noise: Tensor) -> Tensor:
        wide = pixels.shape[3] > pixels.shape[2]
        return encode(backbone, pixels, noise) * (math.nan if wide else 1.0)

    monkeypatch.setattr(StableDiffusionBackbone, "encode_pixels", spoilt)
    monkeypatch.setenv("LIKENESS_CACHE", str(tmp_path / "cache"))
    outcome = train()
    assert outcome.code == 1
    assert "cannot encode 1 of the photos" in outcome.err
    assert "1.png: its latents are not finite" in outcome.err
    assert "data.skip_bad=true" in outcome.err
    assert not (tmp_path / "out").exists()
    outcome = train("data.skip_bad=true").done()
    assert "Left out, since the base cannot encode them" in outcome.out


def test_full_memory_while_training_saves_the_last_step_and_explains(
    train: Train, tmp_path: Path
) -> None:
    with patched("trainer.training.learner.Learner.loss", full_from(Learner.loss, 4)):
        outcome = train("run.save_every_steps=10")
    assert outcome.code == 1
    assert "The memory was full while training." in outcome.err
    assert "Step 3 is saved. Go on with: likeness train" in outcome.err
    assert outcome.err.count("saves") >= 3
    assert "--set data.batch_size=1" in outcome.err
    assert "Going on from step 3." in train("--resume").done().out


@pytest.mark.slow
def test_full_memory_inside_the_optimizer_saves_nothing_half_done(
    train: Train, tmp_path: Path
) -> None:
    step = torch.optim.AdamW.step
    with patched("torch.optim.AdamW.step", full_from(step, 2)):
        outcome = train("run.save_every_steps=10")
    assert outcome.code == 1
    assert "is saved" not in outcome.err
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.slow
def test_full_memory_while_loading_and_encoding_is_explained(train: Train, tmp_path: Path) -> None:
    with patched("trainer.training.session.attach_adapters", full_from(list, 1)):
        outcome = train()
    assert "The memory was full while loading the base." in outcome.err
    assert "model.precision=bf16" in outcome.err
    with patched("trainer.training.session.encode_job", full_from(list, 1)):
        outcome = train()
    assert "The memory was full while encoding the photos." in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_full_memory_while_drawing_leaves_samples_out(train: Train, tmp_path: Path) -> None:
    settings = ("preview.every_steps=2", f"preview.prompts={one_prompt(tmp_path)}")
    plain = tmp_path / "plain"
    train("preview.every_steps=0", output=plain).done()
    for number, call in enumerate((1, 2)):  # at the start, and at step 2
        output = tmp_path / f"full-{number}"
        with patched("trainer.training.gallery.draw", full_from(draw, call)):
            outcome = train(*settings, output=output).done()
        assert "memory is too full for samples" in outcome.out
        place = Path("checkpoints") / "step-000004" / "adapter.safetensors"
        assert (output / place).read_bytes() == (plain / place).read_bytes()
        assert not (output / "previews" / "step-000004_01.png").exists()


@pytest.mark.slow
def test_a_base_that_is_gone_when_samples_are_due_does_not_end_the_run(
    train: Train, tmp_path: Path
) -> None:
    calls: list[int] = []

    def gone(backbone: Any, prompts: Any) -> list[Image.Image]:
        calls.append(1)
        if len(calls) > 1:
            raise ModelError("The base model cannot be loaded: gone", where="D:/base")
        return draw(backbone, prompts)

    with patched("trainer.training.gallery.draw", gone):
        outcome = train("preview.every_steps=2", f"preview.prompts={one_prompt(tmp_path)}").done()
    assert len(calls) > 2
    assert (
        "goes on without the files of the samples. The base model cannot be loaded" in outcome.out
    )
    assert "LoRA file" in outcome.out


def test_latents_that_are_no_numbers_come_out_black(base: Path) -> None:
    (image,) = decode(load_backbone(base), torch.full((1, 4, 8, 8), math.nan))
    assert set(image.getcolors() or []) == {(32 * 32, (0, 0, 0))}
    assert looks_blank(image)


@pytest.mark.slow
def test_samples_of_one_colour_are_said_and_in_the_report(train: Train, tmp_path: Path) -> None:
    calls: list[int] = []

    def black_from_the_second_time(backbone: Any, prompts: Any) -> list[Image.Image]:
        calls.append(1)
        images = draw(backbone, prompts)
        return images if len(calls) == 1 else [Image.new("RGB", i.size) for i in images]

    with patched("trainer.training.gallery.draw", black_from_the_second_time):
        settings = ("preview.every_steps=2", f"preview.prompts={one_prompt(tmp_path)}")
        outcome = train(*settings, "preview.scorer=plain").done()
    assert outcome.out.count("2 of the samples are of one colour") == 2
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Samples of one colour were drawn at step 2, 4." in report


def one_prompt(folder: Path) -> Path:
    path = folder / "mine.txt"
    path.write_text("a {trigger} {class} --d 7\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("drawn", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_preflight_measures_and_leaves_nothing_behind(
    train: Train, tmp_path: Path, drawn: bool
) -> None:
    every = "preview.every_steps=2" if drawn else "preview.every_steps=0"
    settings = (every, f"preview.prompts={one_prompt(tmp_path)}")
    outcome = train("--preflight", *settings).done()
    assert "Preflight  a step of the largest bucket (2 of 32x32 px):" in outcome.out
    assert "the whole run: about" in outcome.out
    assert ("with 6 samples" in outcome.out) == drawn
    assert files_in(tmp_path) == {"mine.txt"}


@pytest.mark.slow
def test_preflight_of_a_run_that_is_there_leaves_it_alone(train: Train, tmp_path: Path) -> None:
    train("run.stop_at_step=2").done()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    train("--preflight", "--resume").done()
    train("--preflight", "--overwrite").done()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_preflight_explains_full_memory(train: Train, tmp_path: Path) -> None:
    with patched("trainer.training.learner.Learner.loss", full_from(Learner.loss, 1)):
        outcome = train("--preflight")
    assert outcome.code == 1
    assert "The memory was full while making a step of the largest bucket." in outcome.err
    assert "--set data.batch_size=1" in outcome.err
    assert not (tmp_path / "out").exists()


def test_the_estimates_are_those_that_were_counted() -> None:
    """Activations in GiB that attention LoRA keeps in bf16 for one picture, all 320 wide."""
    counted = {"sd1": (64, 0.75), "sd2": (96, 1.59), "sdxl": (128, 5.22)}
    for family, (side, gigabytes) in counted.items():
        estimate = KEPT_VALUES[family] * 320 * 2 * side**2 / 2**30
        assert estimate == pytest.approx(gigabytes, rel=0.05)
    assert counted.keys() == KEPT_VALUES.keys()
