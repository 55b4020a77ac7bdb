"""Learning rate schedules, and every optimizer of the table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.strategies import unhurried
from trainer.errors import ConfigError
from trainer.optim import OPTIMIZERS, build_optimizer
from trainer.optim.schedules import rate_multiplier, set_rate

SCHEDULES = ("constant", "cosine")
LENGTHS = st.integers(1, 5000).flatmap(
    lambda total: st.tuples(st.integers(0, total - 1), st.integers(0, total), st.just(total))
)


def multiplier(step: int, schedule: str, warmup: int, total: int) -> float:
    return rate_multiplier(step, schedule=schedule, warmup_steps=warmup, total_steps=total)


@unhurried
@given(lengths=LENGTHS, schedule=st.sampled_from(SCHEDULES))
def test_the_rate_is_never_zero_nor_above_its_setting(
    lengths: tuple[int, int, int], schedule: str
) -> None:
    step, warmup, total = lengths
    assert 0 < multiplier(step, schedule, warmup, total) <= 1


@unhurried
@given(lengths=LENGTHS, schedule=st.sampled_from(SCHEDULES))
def test_it_rises_through_the_warm_up_and_never_after(
    lengths: tuple[int, int, int], schedule: str
) -> None:
    step, warmup, total = lengths
    now, later = (multiplier(n, schedule, warmup, total) for n in (step, step + 1))
    assert (later > now) if step < warmup else (later <= now)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_ends_at_the_whole_rate(schedule: str) -> None:
    rates = [multiplier(step, schedule, 4, 100) for step in range(5)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_cosine_is_half_in_the_middle_and_zero_at_the_end() -> None:
    assert multiplier(50, "cosine", 0, 100) == pytest.approx(0.5)
    assert multiplier(100, "cosine", 0, 100) == pytest.approx(0.0)
    assert multiplier(1000, "constant", 0, 100) == 1.0


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_200_steps_lower_a_loss(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    inputs = torch.randn(64, 6)
    target = inputs @ torch.randn(6, 3)
    optimizer = build_optimizer(
        name, [("unet", list(layer.parameters()), 0.02)], weight_decay=0.0, betas=(0.9, 0.999)
    )
    losses = []
    for _ in range(200):
        loss = (layer(inputs) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_rates_and_options_arrive_in_the_groups(name: str) -> None:
    unet, text = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    optimizer = build_optimizer(
        name,
        [("unet", [unet], 0.1), ("text_encoder", [text], 0.2), ("nothing", [], 0.3)],
        weight_decay=0.25,
        betas=(0.5, 0.75),
    )
    first, second = optimizer.param_groups
    assert (first["name"], first["lr"], first["params"]) == ("unet", 0.1, [unet])
    assert (second["name"], second["lr"], second["params"]) == ("text_encoder", 0.2, [text])
    for group in (first, second):
        assert group["weight_decay"] == 0.25
        assert tuple(group["betas"]) == (0.5, 0.75)


def test_set_rate_starts_from_each_groups_own_rate_every_time() -> None:
    optimizer = build_optimizer(
        "adamw",
        [(name, [nn.Parameter(torch.zeros(1))], rate) for name, rate in (("a", 1.0), ("b", 0.5))],
        weight_decay=0.0,
        betas=(0.9, 0.999),
    )
    for factor in (0.5, 0.1, 1.0):
        set_rate(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == [factor, factor / 2]


def test_an_unknown_optimizer_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"adamx.*Did you mean 'adamw'"):
        build_optimizer("adamx", [], weight_decay=0.0, betas=(0.9, 0.999))
