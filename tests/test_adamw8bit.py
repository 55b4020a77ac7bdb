"""AdamW in eight bits: its numbers, its course beside AdamW's, its size, and going on with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.runs import Outcome, checkpoint_of, same_tensors, tensors_of
from tests.strategies import unhurried
from trainer.optim import build_optimizer
from trainer.optim.adamw8bit import BLOCK, SMALL, TOGETHER, AdamW8bit, levels, pack, unpack

CPU = torch.device("cpu")
# Wide enough that the adapters' layers are remembered in eight bits.
WIDE = 256
Train = Callable[..., Outcome]


# --- the numbers


@pytest.mark.parametrize("signed", [True, False])
def test_there_are_256_levels_from_the_papers_smallest_to_one(signed: bool) -> None:
    values = levels(signed, CPU)
    assert values.shape == (256,)
    assert (values.diff() > 0).all()
    assert values[-1] == 1
    assert 0 in values
    assert values[values > 0][0] == pytest.approx(0.55e-6 if signed else 0.325e-6)
    assert values[0] == (pytest.approx(-0.993, abs=1e-3) if signed else 0)
    # The highest decade has half of all codes, as each has of those up to it.
    assert (values.abs() > 0.1).sum() == 129
    assert (values.abs() > 0.01).sum() == 129 + 64


@unhurried
@given(st.integers(0, 999), st.integers(-20, 20), st.booleans())
def test_every_number_gets_the_nearest_level(seed: int, exponent: int, signed: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randn(2 * BLOCK, generator=draw) ** 3 * 2.0**exponent
    numbers[:BLOCK] *= 1e-3
    numbers = numbers if signed else numbers.abs()
    codes, scales = pack(numbers, signed=signed)
    assert (codes.dtype, codes.shape, scales.shape) == (torch.uint8, numbers.shape, (2,))
    back = unpack(codes, scales, signed=signed)
    candidates = levels(signed, CPU)[:, None] * scales.repeat_interleave(BLOCK)
    nearest = (candidates - numbers).abs().amin(0)
    assert ((back - numbers).abs() <= nearest * (1 + 1e-4) + 1e-7 * numbers.abs()).all()


def test_the_largest_of_a_block_is_kept_and_a_block_of_zeros_stays() -> None:
    numbers = torch.zeros(3 * BLOCK)
    numbers[5], numbers[BLOCK + 1], numbers[BLOCK + 2] = 3.0, 1e-30, 1e-38
    back = unpack(*pack(numbers, signed=True), signed=True)
    assert back[5] == 3.0
    assert back[BLOCK + 1] == torch.tensor(1e-30)
    assert torch.equal(back.nonzero(), torch.tensor([[5], [BLOCK + 1]]))


# --- the course


def a_training(name: str, steps: int = 150, decay: float = 0.01) -> tuple[list[float], Any]:
    """Losses of adapters that learn a change of rank 4 of a layer, inputs of unlike sizes."""
    draw = torch.Generator().manual_seed(0)
    target = torch.randn(WIDE, 4, generator=draw) @ torch.randn(4, WIDE, generator=draw) / 50
    down = nn.Parameter(torch.randn(16, WIDE, generator=draw) / 16)
    up = nn.Parameter(torch.zeros(WIDE, 16))
    bias = nn.Parameter(torch.zeros(WIDE))
    parameters = [("unet", [down, up], 3e-3), ("text_encoder", [bias], 1e-3)]
    optimizer = build_optimizer(name, parameters, weight_decay=decay, betas=(0.9, 0.999))
    sizes = torch.logspace(-2, 1, WIDE)
    losses = []
    for _ in range(steps):
        x = torch.randn(16, WIDE, generator=draw) * sizes
        loss = ((x @ down.t()) @ up.t() + bias - x @ target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, optimizer


def test_its_course_is_that_of_adamw() -> None:
    """Within 3 % of the loss, averaged over ten steps, all along a training that makes a hundredth
    of it."""
    exact, found = (torch.tensor(a_training(name)[0]) for name in ("adamw", "adamw8bit"))
    assert exact[-10:].mean() < 0.01 * exact[:10].mean()
    exact, found = (losses.view(-1, 10).mean(1) for losses in (exact, found))
    assert ((found - exact).abs() <= 0.03 * exact).all()
    assert (found != exact).any()


def test_small_parameters_move_exactly_as_with_adamw() -> None:
    moved = []
    for name in ("adamw", "adamw8bit"):
        draw = torch.Generator().manual_seed(1)
        own = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((3, 5), (1,), (63,))]
        optimizer = build_optimizer(
            name, [("unet", own, 0.01)], weight_decay=0.1, betas=(0.9, 0.99)
        )
        for _ in range(5):
            for parameter in own:
                parameter.grad = torch.randn(parameter.shape, generator=draw)
            optimizer.step()
        moved.append(torch.cat([parameter.detach().flatten() for parameter in own]))
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-5, atol=1e-6)


def test_its_state_is_a_quarter_of_adamws() -> None:
    def size(name: str) -> int:
        _, optimizer = a_training(name, steps=1)
        state = optimizer.state_dict()["state"]
        return sum(v.nbytes for fields in state.values() for v in fields.values() if tensor(v))

    def tensor(value: object) -> bool:
        return isinstance(value, Tensor) and value.numel() > 1

    assert size("adamw") == 8 * (2 * 16 * WIDE + WIDE)
    large = 2 * 16 * WIDE
    assert size("adamw8bit") == 2 * (large + 4 * large // BLOCK) + 8 * WIDE


def test_how_many_are_taken_together_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, _ = a_training("adamw8bit", steps=5)
    monkeypatch.setattr("trainer.optim.adamw8bit.TOGETHER", 1)
    assert a_training("adamw8bit", steps=5)[0] == losses
    assert TOGETHER > 16 * WIDE


@pytest.mark.parametrize("count", [SMALL - 1, SMALL, SMALL + 1])
def test_parameters_that_fill_no_block_and_those_without_a_gradient(count: int) -> None:
    whole, still = nn.Parameter(torch.ones(count)), nn.Parameter(torch.ones(8))
    optimizer = AdamW8bit([whole, still], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        whole.grad = torch.linspace(0.5, 1, count)
        optimizer.step()
    torch.testing.assert_close(whole.detach(), torch.full((count,), 0.7), rtol=0, atol=0.01)
    assert torch.equal(still, torch.ones(8))
    assert ("mean_codes" in optimizer.state[whole]) == (count >= SMALL)
    assert "mean" not in optimizer.state[still]


# --- going on


def test_a_state_that_was_saved_goes_on_bit_for_bit() -> None:
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(80, 100, generator=draw)
    gradients = [torch.randn(80, 100, generator=draw) for _ in range(6)]

    def steps(optimizer: AdamW8bit, parameter: nn.Parameter, which: slice) -> None:
        for gradient in gradients[which]:
            parameter.grad = gradient
            optimizer.step()

    def made(values: Tensor) -> tuple[AdamW8bit, nn.Parameter]:
        parameter = nn.Parameter(values.clone())
        return AdamW8bit([parameter], lr=0.01), parameter

    optimizer, whole = made(start)
    steps(optimizer, whole, slice(0, 3))
    saved, halfway = optimizer.state_dict(), whole.detach().clone()
    other, later = made(halfway)
    other.load_state_dict(saved)
    assert other.state[later]["root_codes"].dtype == torch.uint8
    steps(optimizer, whole, slice(3, 6))
    steps(other, later, slice(3, 6))
    assert torch.equal(whole, later)
    for name, value in optimizer.state[whole].items():
        assert (
            value == other.state[later][name]
            if name == "step"
            else torch.equal(value, other.state[later][name])
        )


@pytest.mark.slow
def test_a_run_that_stops_goes_on_bit_for_bit(train: Train, tmp_path: Path) -> None:
    """Ranks so high that the tiny base's layers are remembered in eight bits."""
    settings = ("optimizer.name=adamw8bit", "adapter.rank=256", "optimizer.accumulate_steps=2")
    train(*settings, output=tmp_path / "whole").done()
    train(*settings, "run.stop_at_step=2", output=tmp_path / "part").done()
    train("--resume", output=tmp_path / "part").done()
    whole, part = (checkpoint_of(tmp_path / name, 4) for name in ("whole", "part"))
    assert {tensor.dtype for tensor in whole.values()} == {torch.uint8, torch.float32}
    assert same_tensors(whole, part)
    assert same_tensors(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "part"))


def test_a_step_whose_scaled_gradients_overflow_is_left_out() -> None:
    """As training in fp16 does it."""
    parameter = nn.Parameter(torch.ones(SMALL))
    optimizer = AdamW8bit([parameter], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for factor, moved in ((float("inf"), False), (1.0, True)):
        optimizer.zero_grad()
        scaler.scale((parameter * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (parameter != 1).all() == moved
    assert optimizer.state[parameter]["step"] == 1
