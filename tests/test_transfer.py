"""Tensors go to a GPU without the processor waiting for what the GPU is doing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.learners import Recipe, load_backbone, make_learner, make_plan
from tests.tiny import TINY_BASES, save_tiny
from trainer.training.guards import Guard
from trainer.training.loop import one_step
from trainer.transfer import to_device
from trainer.types import Prompts


def test_nothing_is_copied_where_it_is_already() -> None:
    there = torch.ones(3)
    assert to_device(there, torch.device("cpu")) is there
    prompts = Prompts(there).to(torch.device("cpu"))
    assert prompts.embeddings_BTD is there
    assert prompts.pooled_BP is None


class Asked:
    """In place of a tensor: what it was asked for."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.calls: list[object] = []

    def pin_memory(self) -> Asked:
        self.calls.append("pinned")
        return self

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Asked:
        self.calls.append((device.type, non_blocking))
        return self


@pytest.mark.parametrize(
    ("there", "target", "calls"),
    [
        ("cpu", "cuda", ["pinned", ("cuda", True)]),
        ("cuda", "cuda", [("cuda", False)]),
        ("cuda", "cpu", [("cpu", False)]),  # what comes back is read at once
        ("cpu", "mps", [("mps", False)]),  # knows no pinned memory
    ],
)
def test_only_main_memory_is_pinned_and_only_for_gpus_that_know_it(
    there: str, target: str, calls: list[object]
) -> None:
    tensor = Asked(there)
    to_device(tensor, torch.device(target))  # type: ignore[arg-type]
    assert tensor.calls == calls


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", TINY_BASES)
@pytest.mark.parametrize("text_encoder", [False, True])
def test_steps_between_two_reports_wait_for_nothing(
    name: str, text_encoder: bool, tmp_path: Path
) -> None:
    backbone = load_backbone(
        save_tiny(tmp_path / name, name), device=torch.device("cuda"), blocks="lean"
    )
    learner = make_learner(backbone, Recipe(text_encoder=text_encoder))
    plan, guard = replace(make_plan(12), read_steps=10), Guard()
    one_step(learner, [0], plan, guard)  # the first one makes what is kept, and may wait
    with waiting_is_an_error():
        for number in range(1, 6):
            one_step(learner, [number], plan, guard)
