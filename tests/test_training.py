"""The training itself: losses, gradients, resuming, checkpoints, prompts files, output folders."""

from __future__ import annotations

import io
import json
import math
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from tests.learners import Recipe, load_backbone, make_learner, make_plan, vae_of
from tests.runs import same_tensors
from tests.strategies import unhurried
from trainer.errors import DataError, FileFormatError, OutputError
from trainer.training import reports
from trainer.training import state as state_module
from trainer.training.learner import Learner, disabled
from trainer.training.loop import LoopPlan, train
from trainer.training.preview import (
    PreviewDefaults,
    PreviewPrompt,
    chunk_size,
    draw,
    parse_prompt,
    read_prompts,
    save_preview,
)
from trainer.training.reports import MetricsFile, read_metrics
from trainer.training.run_folder import (
    RunFolder,
    choose_root,
    clear_run,
    file_stem,
    open_root,
    require_free,
    write_text,
)
from trainer.training.state import newest_checkpoint, restore, save_checkpoint
from trainer.types import Size

GOLDEN = Path(__file__).parent / "golden" / "losses.json"
WIDE = ((8, 8), (8, 8), (8, 8), (8, 16), (8, 16))

Losses = list[float]


def run(learner: Learner, plan: LoopPlan, start: int = 0) -> Losses:
    return [report.loss for report in train(learner, plan, start)]


def adapter_of(learner: Learner) -> dict[str, Tensor]:
    return {
        f"{component} {name}": tensor
        for component, attached in learner.adapters.items()
        for name, tensor in attached.state().items()
    }


def everything(learner: Learner) -> dict[str, Tensor]:
    """Adapter and optimizer tensors."""
    tensors = adapter_of(learner)
    for number, fields in learner.optimizer.state_dict()["state"].items():
        tensors |= {f"{number} {field}": value.clone() for field, value in fields.items()}
    return tensors


# --- losses

OBJECTIVES = {
    "epsilon": Recipe(prediction="epsilon", min_snr_gamma=0.0),
    "v_prediction": Recipe(prediction="v_prediction"),
    "min-SNR": Recipe(min_snr_gamma=0.1),
    "prior": Recipe(prior_weight=0.5),
    "prior of another size": Recipe(prior_weight=0.5, prior_size=(8, 16)),
    "prior kept as the base": Recipe(prior_weight=0.5, prior_target="base", rate=0.1),
    "noise offset": Recipe(noise_offset=0.2),
    "caption dropout": Recipe(caption_dropout=0.5),
    "text encoder frozen": Recipe(text_encoder=False, caption_dropout=0.5),
    "two sizes": Recipe(sizes=WIDE),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_first_losses_are_those_on_record(name: str, base: Path, update_golden: bool) -> None:
    """Four steps; `pytest --update-golden` writes them anew after a change that is meant."""
    losses = run(make_learner(base, OBJECTIVES[name]), make_plan(4))
    golden = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.is_file() else {}
    if update_golden:
        golden[name] = losses
        text = json.dumps(dict(sorted(golden.items())), indent=1) + "\n"
        GOLDEN.write_text(text, encoding="utf-8", newline="\n")
    assert losses == pytest.approx(golden[name], rel=1e-4)


def test_the_objectives_on_record_all_differ(update_golden: bool) -> None:
    if update_golden:
        pytest.skip("they are being written")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert set(golden) == set(OBJECTIVES)
    assert len({tuple(round(loss, 4) for loss in losses) for losses in golden.values()}) == len(
        golden
    )


def test_training_learns_the_photos(base: Path) -> None:
    """The same noise before and after: the loss of the photos falls."""
    learner = make_learner(base, Recipe(sizes=((8, 8),), batch_size=1))
    plan = make_plan(40)
    before = [learner.loss(index).item() for index in range(8)]
    run(learner, plan)
    after = [learner.loss(index).item() for index in range(8)]
    assert math.fsum(after) < 0.97 * math.fsum(before)


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_can_be_switched_off(base: Path) -> None:
    learner = make_learner(base)
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def answer() -> Tensor:
        with torch.no_grad():
            prompt = learner.backbone.encode_prompts(["a"])
            return learner.backbone.predict(noisy, torch.tensor([500]), prompt)

    plain = load_backbone(base)
    with torch.no_grad():
        wanted = plain.predict(noisy, torch.tensor([500]), plain.encode_prompts(["a"]))
    assert torch.equal(answer(), wanted)
    run(learner, make_plan(3))
    assert not torch.equal(answer(), wanted)
    with disabled(learner.adapters):
        assert torch.equal(answer(), wanted)
    assert not torch.equal(answer(), wanted)


@pytest.mark.parametrize("text_encoder", [True, False])
def test_the_base_is_the_same_bit_for_bit_after_training(base: Path, text_encoder: bool) -> None:
    backbone = load_backbone(base)
    modules = {**backbone.components, "vae": vae_of(backbone)}
    before = {
        name: {key: tensor.clone() for key, tensor in module.state_dict().items()}
        for name, module in modules.items()
    }
    learner = make_learner(backbone, Recipe(text_encoder=text_encoder))
    assert ("text_encoder" in learner.adapters) == text_encoder
    run(learner, make_plan(3))
    for attached in learner.adapters.values():
        attached.detach()
    for name, module in modules.items():
        assert same_tensors(dict(module.state_dict()), before[name])
        assert all(p.grad is None for p in module.parameters())


def test_every_adapter_layer_gets_a_gradient(base: Path) -> None:
    """From the second step on: before, `up` is zero and hides `down`."""
    learner = make_learner(base)
    run(learner, make_plan(4, last=1))
    found = gradients(learner, range(1), 1)
    assert len(found) == len(learner.parameters)
    assert all(gradient.abs().max() > 0 for gradient in found)


# --- what a batch weighs


def gradients(learner: Learner, indices: range, divisor: int) -> list[Tensor]:
    for index in indices:
        (learner.loss(index) / divisor).backward()
    return [
        parameter.grad.clone() for parameter in learner.parameters if parameter.grad is not None
    ]


def kept_for_backward(learner: Learner) -> int:
    """Bytes of the tensors that the loss of a batch keeps."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        learner.loss(0)
    return kept


def test_checkpointing_keeps_less_and_gives_the_same_gradients(base: Path) -> None:
    plain = make_learner(load_backbone(base))
    saving = make_learner(load_backbone(base, checkpointing=True))
    assert kept_for_backward(saving) < kept_for_backward(plain) / 2
    for ours, theirs in zip(
        gradients(saving, range(2), 1), gradients(plain, range(2), 1), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_photo_weighs_the_same_in_a_batch_that_is_not_full(base: Path) -> None:
    """Three photos in batches of two: over an epoch the sum of losses is that of single photos.

    A batch divides by the batch size, not by the photos in it, so each photo counts 1/2.
    """
    recipe = Recipe(sizes=((8, 8),) * 3)
    learner = make_learner(base, recipe)
    assert learner.batches.batches_per_epoch == 2
    for index in range(2):
        batch = learner.batches.batch(index)
        with torch.no_grad():
            parts = learner._losses(batch, index)
            assert learner.loss(index).item() == pytest.approx(parts.sum().item() / 2)


def test_two_single_batches_weigh_what_one_of_two_does(base: Path) -> None:
    """Accumulating two batches of one averages their gradients, as a batch of two does.

    Noise is drawn by (seed, batch number, photo), so the numbers differ between the two runs
    and gradients agree in size only: the same photos, the same weight, other noise. With the
    loss of the batch of two taken apart photo by photo they agree to rounding.
    """
    learner = make_learner(base, Recipe(sizes=((8, 8),) * 2, text_encoder=False))
    whole = gradients(learner, range(1), 1)
    learner.optimizer.zero_grad()
    batch = learner.batches.batch(0)
    for place in range(2):
        single = type(batch)(
            batch.latents_BChw[place : place + 1],
            batch.samples[place : place + 1],
            batch.prompt_BTD[place : place + 1] if batch.prompt_BTD is not None else None,
        )
        (learner._losses(single, 0).sum() / 2).backward()
    parts = [parameter.grad for parameter in learner.parameters]
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)


def test_accumulated_batches_are_averaged(base: Path) -> None:
    learner = make_learner(base)
    with torch.no_grad():
        wanted = [(learner.loss(n).item() + learner.loss(n + 1).item()) / 2 for n in (0, 2)]
    frozen = make_plan(2, accumulate=2)
    learner.optimizer.param_groups[0]["initial_lr"] = 0.0
    learner.optimizer.param_groups[1]["initial_lr"] = 0.0
    assert run(learner, frozen) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (8, 16)])
def test_the_prior_enters_with_its_weight(base: Path, size: tuple[int, int]) -> None:
    """In one pass with the photos or, where the sizes differ, in its own."""
    backbone = load_backbone(base)

    def loss(weight: float) -> float:
        learner = make_learner(backbone, Recipe(prior_weight=weight, prior_size=size))
        with torch.no_grad():
            value = learner.loss(0).item()
        for attached in learner.adapters.values():
            attached.detach()
        return value

    photos, half, whole = loss(0.0), loss(0.5), loss(1.0)
    assert half > photos
    assert whole - half == pytest.approx(half - photos, rel=1e-4)


@pytest.mark.parametrize("size", [(8, 8), (8, 16)])
@pytest.mark.parametrize("text_encoder", [True, False])
def test_the_base_is_kept_by_its_own_predictions(
    base: Path, size: tuple[int, int], text_encoder: bool
) -> None:
    """Nothing is asked for on class pictures while the adapters change nothing, and then that
    they give what the base gives."""
    recipe = Recipe(
        prior_weight=1.0, prior_target="base", prior_size=size, text_encoder=text_encoder
    )
    learner = make_learner(base, recipe)
    alone = make_learner(base, replace(recipe, prior_weight=0.0))
    with torch.no_grad():
        assert learner.loss(0).item() == pytest.approx(alone.loss(0).item(), rel=1e-6)
        # Both start alike and move alike; from here on the class pictures are moved as well.
        for either in (learner, alone):
            for parameter in either.parameters:
                parameter.fill_(0.05)
        moved = learner.loss(0).item() - alone.loss(0).item()
        assert moved > 1e-4
    loss = learner.loss(0)
    loss.backward()
    assert all(parameter.grad is not None for parameter in learner.parameters)


def test_the_prior_pictures_have_captions_of_their_own(base: Path) -> None:
    learner = make_learner(base, Recipe(prior_weight=1.0))
    assert learner.prior is not None
    assert all(sample.text.startswith("prior") for sample in learner.prior.batch(0).samples)


# --- the loop


def test_gradients_are_clipped(base: Path) -> None:
    reports = list(train(make_learner(base), make_plan(2, clip=1e-6), 0))
    assert all(report.read[0].grad_norm > 1e-6 for report in reports)
    clipped, free = make_learner(base), make_learner(base)
    run(clipped, make_plan(1, clip=1e-8))
    run(free, make_plan(1, clip=0.0))
    assert not same_tensors(adapter_of(clipped), adapter_of(free))


def test_the_reports_count_from_one_and_tell_the_rate(base: Path) -> None:
    reports = list(train(make_learner(base), make_plan(4, last=3), 0))
    assert [report.step for report in reports] == [1, 2, 3]
    rates = [report.read[0].rate for report in reports]
    assert rates[0] == pytest.approx(0.005)  # half of 0.01: one step of warm-up
    assert rates[1] == pytest.approx(0.01)
    assert rates[2] < 0.01


# --- going on

RESUMED = {
    "plain": (Recipe(), 1),
    "accumulated": (Recipe(sizes=WIDE), 2),
    "prior": (Recipe(prior_weight=0.5), 1),
    "text encoder frozen": (Recipe(text_encoder=False, caption_dropout=0.3), 1),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_goes_on_from_any_step_is_the_same_bit_for_bit(
    name: str, base: Path, tmp_path: Path
) -> None:
    recipe, accumulate = RESUMED[name]
    plan = make_plan(5, accumulate=accumulate)
    whole = make_learner(base, recipe)
    losses = []
    for report in train(whole, plan, 0):
        losses.append(report.loss)
        save_checkpoint(tmp_path, whole, report.step, {"a": 1}, keep=9)
    for step in range(1, 6):
        shutil.copytree(tmp_path / f"step-{step:06d}", tmp_path / str(step) / f"step-{step:06d}")
        checkpoint, notices = newest_checkpoint(tmp_path / str(step))
        assert checkpoint is not None
        assert (checkpoint.step, notices, checkpoint.facts) == (step, [], {"a": 1})
        again = make_learner(base, recipe)
        restore(again, checkpoint)
        assert run(again, plan, step) == losses[step:]
        assert same_tensors(everything(again), everything(whole))


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the first and the second step; not to be written to."""
    folder = tmp_path_factory.mktemp("checkpoints")
    learner = make_learner(base)
    for report in train(learner, make_plan(4, last=2), 0):
        save_checkpoint(folder, learner, report.step, {"seed": 0, "rate": 0.1}, keep=9)
    return folder


FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json")


def passed_over(folder: Path) -> None:
    """The damaged second checkpoint is told and the first is taken."""
    checkpoint, notices = newest_checkpoint(folder)
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert len(notices) == 1
    assert "step-000002 is damaged" in notices[0]


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_noticed(name: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    path = folder / "step-000002" / name
    whole = path.read_bytes()
    chance = random.Random(0)
    for _ in range(25):
        place, bit = chance.randrange(len(whole)), 1 << chance.randrange(8)
        if name == "state.json" and whole[place : place + 1].isspace():
            continue  # blanks between JSON's words mean nothing
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        passed_over(folder)


def test_a_state_that_was_edited_is_noticed(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    path = folder / "step-000002" / "state.json"
    whole = path.read_text(encoding="utf-8")
    for old, new in (('"step": 2', '"step": 3'), ('"rate": 0.1', '"rate": 0.2')):
        assert old in whole
        path.write_text(whole.replace(old, new), encoding="utf-8")
        passed_over(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, None])
def test_a_file_that_is_cut_off_or_missing_is_noticed(
    name: str, share: float | None, saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    path = folder / "step-000002" / name
    content = path.read_bytes()
    path.unlink()
    if share is not None:
        path.write_bytes(content[: int(len(content) * share)])
    passed_over(folder)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{}", '{"format": 99}', "[" * 10_000])
def test_a_state_of_another_shape_is_noticed(text: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    (folder / "step-000002" / "state.json").write_text(text, encoding="utf-8")
    passed_over(folder)


def test_without_any_whole_checkpoint_there_is_none(saved: Path, tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nothing") == (None, [])
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    for step in (1, 2):
        (folder / f"step-00000{step}" / "state.json").unlink()
    checkpoint, notices = newest_checkpoint(folder)
    assert checkpoint is None
    assert len(notices) == 2


def test_leftovers_of_a_crash_and_other_folders_are_no_checkpoints(
    saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    for name in (".tmp-000009-1", ".del-step-000009", "step-9", "step-000009x", "notes"):
        shutil.copytree(saved / "step-000002", folder / name)
    checkpoint, notices = newest_checkpoint(folder)
    assert checkpoint is not None
    assert (checkpoint.step, notices) == (2, [])


def test_a_checkpoint_of_other_layers_is_refused(saved: Path, base: Path) -> None:
    checkpoint, _ = newest_checkpoint(saved)
    assert checkpoint is not None
    learner = make_learner(base, Recipe(text_encoder=False))
    del learner.adapters["unet"].layers[next(iter(learner.adapters["unet"].layers))]
    with pytest.raises(FileFormatError, match="do not fit this model"):
        restore(learner, checkpoint)


@pytest.mark.parametrize("broken", ["rename", "mkdir", "save_file", "fsync"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_older_ones(
    broken: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make_learner(base)
    save_checkpoint(tmp_path, learner, 1, {}, keep=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    place: Any = {"save_file": state_module, "fsync": os}.get(broken, Path)
    with monkeypatch.context() as patch:
        patch.setattr(place, broken, full)
        with pytest.raises(OutputError, match="step 2 cannot be written.*No space left") as caught:
            save_checkpoint(tmp_path, learner, 2, {}, keep=1)
    assert "--resume" in caught.value.fix
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before
    checkpoint, notices = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, notices) == (1, [])


def test_an_old_checkpoint_that_cannot_be_removed_is_no_error(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make_learner(base)
    save_checkpoint(tmp_path, learner, 1, {}, keep=1)

    def in_use(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "in use")

    monkeypatch.setattr(shutil, "rmtree", in_use)
    save_checkpoint(tmp_path, learner, 2, {}, keep=1)
    checkpoint, _ = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 2


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_checkpoints_are_kept(keep: int, base: Path, tmp_path: Path) -> None:
    learner = make_learner(base)
    for step in (1, 2, 3, 3, 12):  # the third one twice, as when a run goes on
        save_checkpoint(tmp_path, learner, step, {}, keep=keep)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == [f"step-{step:06d}" for step in (1, 2, 3, 12)][-keep:]


# --- prompts files

DEFAULTS = PreviewDefaults(Size(64, 64), seed=1000, guidance=6.0, steps=20, side_step_px=32)


def prompts_of(tmp_path: Path, text: str) -> list[PreviewPrompt]:
    path = tmp_path / "prompts.txt"
    path.write_bytes(text.encode())
    return read_prompts(path, "zqx", "cat", DEFAULTS)


def test_a_plain_line_has_the_defaults(tmp_path: Path) -> None:
    (prompt,) = prompts_of(tmp_path, "{trigger} {class}, in a park")
    assert prompt == PreviewPrompt("zqx cat, in a park", "", Size(64, 64), 1000, 6.0, 20, True)


def test_every_option_of_sd_scripts_is_read(tmp_path: Path) -> None:
    line = "a {class} --n no {class}, ugly  --w 96 --h 70 --d 7 --l 3.5 --s 9"
    (prompt,) = prompts_of(tmp_path, line)
    assert prompt == PreviewPrompt("a cat", "no cat, ugly", Size(96, 64), 7, 3.5, 9, False)
    (shuffled,) = prompts_of(
        tmp_path, "a {class} --S 9 --l 3.5 --D 7 --n no cat, ugly --h 64 --w 96"
    )
    assert shuffled == prompt


def test_comments_blank_lines_line_ends_and_a_mark_are_skipped(tmp_path: Path) -> None:
    prompts = prompts_of(tmp_path, "\ufeff# one\r\n\r\nfirst\r\n   \n  # two\nsecond --d 5\nthird")
    assert [(prompt.text, prompt.seed) for prompt in prompts] == [
        ("first", 1000),
        ("second", 5),
        ("third", 1002),
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a --q 3", "not known: --q"),
        ("a --w 9999", "--w 9999 is not between 32 and 2048"),
        ("a --w 31", "--w 31"),
        ("a --h x", "--h x"),
        ("a --d -1", "--d -1"),
        ("a --d 1e400", "--d 1e400"),
        ("a --l 0.5", "--l 0.5"),
        ("a --l nan", "--l nan"),
        ("a --s 0", "--s 0"),
        ("a --s", "--s "),
        ("a --w --h 64", "--w "),
    ],
)
def test_a_bad_option_names_its_line(line: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        prompts_of(tmp_path, f"# comment\nfine\n{line}\n")
    assert words in str(caught.value)
    assert f"line 3: {line}" in str(caught.value)
    assert "prompts.txt" in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize("line", ["well--known place", "a -- b", "a cat -n b", "50--60 mm"])
def test_dashes_that_are_no_option_are_text(line: str, tmp_path: Path) -> None:
    assert prompts_of(tmp_path, line)[0].text == line


@pytest.mark.parametrize("content", [b"", b"# only\n", b"\xff\xfe\x00"])
def test_a_file_without_prompts_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_prompts(path, "zqx", "cat", DEFAULTS)
    assert "prompts.txt" in str(caught.value)


@unhurried
@given(line=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"])))
def test_any_line_is_a_prompt_or_an_explained_error(line: str) -> None:
    try:
        width, fix = parse_prompt(line, "zqx", "cat", DEFAULTS, "x").size.width, ""
    except DataError as error:
        width, fix = 0, error.fix
    assert width % 32 == 0
    assert width or fix


@pytest.mark.parametrize(
    ("text", "triggered", "bare"),
    [
        ("zqx cat, sad", True, "cat, sad"),
        ("a zqx", True, "a"),
        ("A ZQX cat", True, "A cat"),  # CLIP does not tell capitals from small letters
        ("zqxy cat,", False, "zqxy cat"),
        ("(zqx cat:1.2)", True, "(cat:1.2)"),
    ],
)
def test_the_trigger_counts_as_a_whole_word(
    text: str, triggered: bool, bare: str, tmp_path: Path
) -> None:
    (prompt,) = prompts_of(tmp_path, text)
    assert prompt.triggered == triggered
    assert prompt.without("zqx").text == bare
    assert not prompt.without("zqx").triggered


def test_a_default_size_below_the_smallest_is_raised_to_it(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a", encoding="utf-8")
    small = PreviewDefaults(Size(16, 16), seed=0, guidance=1.0, steps=1, side_step_px=32)
    assert read_prompts(path, "a", "b", small)[0].size == Size(32, 32)


# --- drawing


@pytest.mark.parametrize(("side", "count"), [(32, 16), (256, 8), (512, 2), (768, 1), (2048, 1)])
def test_large_pictures_are_drawn_a_few_at_a_time(side: int, count: int) -> None:
    assert chunk_size(Size(side, side)) == count


def test_pictures_come_in_the_order_of_their_prompts_whatever_their_sizes(base: Path) -> None:
    backbone = load_backbone(base)

    def prompt(seed: int, width: int, steps: int = 1) -> PreviewPrompt:
        return PreviewPrompt("a", "", Size(width, 32), seed, 2.0, steps, False)

    prompts = [prompt(1, 64), prompt(2, 32), prompt(3, 64), prompt(4, 32, 2)]
    together = draw(backbone, prompts)
    assert [image.size for image in together] == [(64, 32), (32, 32), (64, 32), (32, 32)]
    for one, image in zip(prompts, together, strict=True):
        (alone,) = draw(backbone, [one])
        assert _difference(alone, image) <= 1  # batches round otherwise


def _difference(left: Any, right: Any) -> int:
    import numpy as np

    return int(np.abs(np.asarray(left, int) - np.asarray(right, int)).max())


def test_a_picture_that_cannot_be_written_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    path = tmp_path / "previews" / "a.png"
    prompt = PreviewPrompt("ä, 顔", "bad", Size(32, 32), 5, 2.5, 9, True)
    save_preview(path, Image.new("RGB", (32, 32), "red"), prompt, model="m", sampler="DDIM")
    before = path.read_bytes()

    def full(self: Image.Image, target: Path, *arguments: Any, **options: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(OSError, match="No space left"):
            save_preview(path, Image.new("RGB", (9, 9)), prompt, model="m", sampler="DDIM")
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]
    with Image.open(path) as image:
        assert image.info["parameters"] == (
            "ä, 顔\nNegative prompt: bad\n"
            "Steps: 9, Sampler: DDIM, CFG scale: 2.5, Seed: 5, Size: 32x32, Model: m"
        )


# --- metrics


def test_metrics_go_on_where_the_checkpoint_is(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for report in train(make_learner(base), make_plan(4), 0):
        file.step(*report.read)
    file.close()
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    MetricsFile(path, 2).close()
    assert read_metrics(path) == rows[:2]
    MetricsFile(path, 0).close()
    assert read_metrics(path) == []


def test_lines_that_are_no_reports_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n12\n[]\n{"ste\n{"step": null}\n', encoding="utf-8")
    assert read_metrics(path) == [{"step": 1}]


# --- the output folder


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("zia", "zia"),
        ("My cat (2024)", "My_cat_2024"),
        ("Ännä 顔", "Ännä_顔"),
        ("...", "lora"),
        ("", "lora"),
        ("a/b\\c:d", "a_b_c_d"),
        ("x²½", "x"),
        ("a" * 150, "a" * 100),
    ],
)
def test_a_folders_name_becomes_a_file_name(name: str, stem: str) -> None:
    assert file_stem(name) == stem


@unhurried
@given(name=st.text(max_size=150))
def test_every_folder_name_becomes_a_run_name_that_settings_accept(name: str) -> None:
    from trainer.config.run_settings import RunSettings

    RunSettings(name=file_stem(name))


def choose(tmp_path: Path, output: Path | None = None, *flags: str) -> Path:
    return choose_root(
        tmp_path / "anna",
        output,
        resume="resume" in flags,
        overwrite="overwrite" in flags,
        runs=tmp_path / "runs",
    )


def test_runs_without_a_name_are_numbered(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert choose(tmp_path) == runs / "anna-1"
    for name in ("anna-1", "anna-9", "anna-x", "annas-20", "anna-3.txt"):
        (runs / name).mkdir(parents=True)
    assert choose(tmp_path) == runs / "anna-10"
    assert choose(tmp_path, None, "resume") == runs / "anna-9"


def test_where_there_is_nothing_to_go_on_with_a_run_starts(tmp_path: Path) -> None:
    assert choose(tmp_path, None, "resume") == tmp_path / "runs" / "anna-1"
    assert choose(tmp_path, tmp_path / "new", "resume") == tmp_path / "new"


def test_a_run_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    assert choose(tmp_path, output) == output
    (output / "settings.toml").touch()
    with pytest.raises(OutputError, match="already holds a run") as caught:
        choose(tmp_path, output)
    assert "--resume" in caught.value.fix
    assert "--overwrite" in caught.value.fix
    assert choose(tmp_path, output, "resume") == choose(tmp_path, output, "overwrite") == output


def test_a_file_in_the_place_of_the_output_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.touch()
    for flags in ((), ("overwrite",), ("resume",)):
        with pytest.raises(OutputError, match="a file, not a folder"):
            choose(tmp_path, output, *flags)


def test_files_of_other_origin_are_not_replaced(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "anna")
    require_free(folder)
    for name in ("anna.safetensors", "anna-best.safetensors"):
        (tmp_path / name).touch()
        with pytest.raises(OutputError, match="would replace") as caught:
            require_free(folder)
        assert name in caught.value.where


def test_clearing_takes_the_runs_own_files_only(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "anna")
    (tmp_path / "settings.toml").write_text('[run]\nname = "old"\n', encoding="utf-8")
    own = [
        "anna.safetensors",
        "anna-10.safetensors",
        "anna-best.safetensors",
        "old.safetensors",
        "old-5.safetensors",
        "contact_sheet.png",
        "report.html",
        "metrics.jsonl",
        "scores.json",
        "checkpoints/step-000010/state.json",
        "previews/step-000000_01.png",
        "previews/step-000000_01-without-trigger.png",
    ]
    others = [
        "notes.txt",
        "anna-better.safetensors",
        "annabel.safetensors",
        "previews/favourite.png",
        "checkpoints/mine/x",
        "sub/report.html",
    ]
    for name in own + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    clear_run(folder)
    left = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert left - {"settings.toml"} == set(others)


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written") as caught:
        open_root(tmp_path / "file" / "out")
    assert "--output" in caught.value.fix


def test_opening_leaves_nothing_behind(tmp_path: Path) -> None:
    open_root(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("broken", ["write_text", "replace"])
def test_a_text_that_cannot_be_written_leaves_the_older_one(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "before")

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, broken, full)
        with pytest.raises(OutputError, match="No space left"):
            write_text(path, "after")
    assert path.read_text(encoding="utf-8") == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_a_long_stage_says_where_it_is(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "PROGRESS_SECONDS", seconds)
    out = io.StringIO()
    progress = reports.stage_progress(Console(file=out), "photos encoded")
    for done in (1, 2, 3):
        progress(done, 3)
    between = [f"  photos encoded: {done} of 3" for done in (1, 2)] if not seconds else []
    assert out.getvalue().splitlines() == [*between, "  photos encoded: 3"]
