"""A run that was stopped and goes on ends with the same bits, whatever it trains and how."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from tests.runs import Outcome, checkpoint_of, metrics_of, same_tensors, tensors_of

PRECISIONS = ("fp32", "bf16")
ACCUMULATED = (1, 4)
WAYS = list(product(PRECISIONS, ACCUMULATED, (True, False), (True, False)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "accumulated", "text_encoder", "class_pictures"),
    WAYS,
    ids=[
        f"{p}-{a}-{'text' if t else 'no text'}-{'class' if c else 'no class'}"
        for p, a, t, c in WAYS
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    precision: str,
    accumulated: int,
    text_encoder: bool,
    class_pictures: bool,
    train: Callable[..., Outcome],
    tmp_path: Path,
) -> None:
    settings = (
        f"model.precision={precision}",
        f"optimizer.accumulate_steps={accumulated}",
        f"adapter.text_encoder={str(text_encoder).lower()}",
        f"objective.prior_weight={int(class_pictures)}",
        "adapter.save_precision=fp32",
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(*settings, output=whole).done()
    train(*settings, "run.stop_at_step=2", output=parts).done()
    assert (
        "Going on from step 2." in train("--resume", "run.stop_at_step=0", output=parts).done().out
    )
    assert same_tensors(tensors_of(parts), tensors_of(whole))
    assert same_tensors(checkpoint_of(parts, 4), checkpoint_of(whole, 4))
    losses = [[row["loss"] for row in metrics_of(folder)] for folder in (whole, parts)]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
