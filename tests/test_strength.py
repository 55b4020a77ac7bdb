"""`adapter.strength`: training goes on in full, samples and files apply a part of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from tests.runs import Outcome, checkpoint_of, lora_of, metrics_of, same_tensors, tensors_of
from trainer.adapters.attach import attach
from trainer.adapters.file import read_lora

Train = Callable[..., Outcome]
SETTINGS = (
    "preview.every_steps=2",
    "run.total_steps=4",
    "optimizer.learning_rate=0.05",
    "run.save_every_steps=2",
    "adapter.alpha=3",
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a {trigger} {class} --w 32 --h 32 --s 3\n", encoding="utf-8")
    return path


def pictures(run: Path, step: int) -> list[bytes]:
    paths = sorted((run / "previews").glob(f"step-{step:06d}_*.png"))
    assert len(paths) == 2
    return [Image.open(path).tobytes() for path in paths]


def test_steps_are_the_same_and_what_is_used_of_them_is_a_part(
    train: Train, prompts: Path, tmp_path: Path
) -> None:
    full, part = tmp_path / "full", tmp_path / "part"
    for output, strength in ((full, 1.0), (part, 0.25)):
        train(
            *SETTINGS,
            f"preview.prompts={prompts}",
            f"adapter.strength={strength}",
            output=output,
        ).done()
    assert same_tensors(checkpoint_of(full, 4), checkpoint_of(part, 4))
    assert [row["loss"] for row in metrics_of(full)] == [row["loss"] for row in metrics_of(part)]
    before, after = tensors_of(full), tensors_of(part)
    alphas = {name for name in before if name.endswith(".alpha")}
    assert {name.split("_")[1] for name in alphas} == {"unet", "te"}
    for name, tensor in before.items():
        wanted = 0.25 * tensor if name in alphas else tensor
        assert torch.equal(after[name], wanted), name
    facts = read_lora(lora_of(part)).metadata
    assert (facts["ss_network_alpha"], facts["ss_network_args"]) == ("0.75", '{"strength": "0.25"}')
    assert pictures(full, 0) == pictures(part, 0)
    assert pictures(full, 4) != pictures(part, 4)


@pytest.mark.slow
def test_a_run_that_goes_on_writes_the_same_file(
    train: Train, prompts: Path, tmp_path: Path
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    common = (*SETTINGS, f"preview.prompts={prompts}", "adapter.strength=0.5")
    train(*common, output=whole).done()
    train(*common, "run.stop_at_step=2", output=halves)
    train("run.stop_at_step=0", "--resume", output=halves).done()
    assert same_tensors(tensors_of(whole), tensors_of(halves))
    assert pictures(whole, 4) == pictures(halves, 4)


def test_inside_what_is_off_it_stays_off() -> None:
    attached = attach(nn.Sequential(nn.Linear(2, 3)), ["0"], rank=1, alpha=1.0, seed=0)
    layers = attached.layers.values()
    with attached.disabled(), attached.scaled(0.5):
        assert {layer.multiplier for layer in layers} == {0.0}
    attached.set_multiplier(2.0)
    with attached.scaled(0.25):
        assert {layer.multiplier for layer in layers} == {0.5}
    assert {layer.multiplier for layer in layers} == {2.0}
