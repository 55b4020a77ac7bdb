"""Schedule, targets, weights and random draws, against diffusers where it has the same."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import unhurried
from trainer.diffusion.noise import draw_for_step, seed_of
from trainer.diffusion.objective import diffusion_loss, min_snr_weight
from trainer.diffusion.schedule import NoiseSchedule, schedule_from_config
from trainer.errors import ModelError

SD1 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (4, 5, 7)
CONFIGS = [
    SD1,
    {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    {**SD1, "num_train_timesteps": 50},
    {"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3},
    {},
]


def draws(keys: list[str], step: int = 3, seed: int = 1, **options: float):  # type: ignore[no-untyped-def]
    return draw_for_step(seed, step, keys, SHAPE, timesteps=1000, **options)


# --- the schedule


@pytest.mark.parametrize("config", CONFIGS)
def test_the_schedule_is_that_of_diffusers(config: dict[str, object]) -> None:
    ours, theirs = schedule_from_config(config), DDPMScheduler(**config)
    assert ours.timesteps == theirs.config.num_train_timesteps
    assert torch.equal(ours.alphas_cumprod_N, theirs.alphas_cumprod)


def test_a_base_with_zero_terminal_snr_has_the_schedule_of_diffusers() -> None:
    config = {**SD1, "rescale_betas_zero_snr": True}
    ours = schedule_from_config(config).alphas_cumprod_N
    theirs = DDPMScheduler(**config).alphas_cumprod
    assert float(ours[-1]) == 0.0
    # diffusers goes through the betas and back, and rounds on the way.
    torch.testing.assert_close(ours[:-1], theirs[:-1], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noising_target_and_snr_are_those_of_diffusers(prediction: str) -> None:
    ours = schedule_from_config(SD1, prediction)
    theirs = DDPMScheduler(**SD1, prediction_type=prediction)
    steps = torch.tensor([0, 1, 250, 998, 999])
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 5, *SHAPE, generator=generator)
    assert torch.equal(
        ours.add_noise(latents, noise, steps), theirs.add_noise(latents, noise, steps)
    )
    target = noise if prediction == "epsilon" else theirs.get_velocity(latents, noise, steps)
    assert torch.equal(ours.target(latents, noise, steps), target)
    torch.testing.assert_close(ours.snr(steps), compute_snr(theirs, steps), rtol=1e-6, atol=0)


def test_the_prediction_comes_from_the_base_unless_it_is_named() -> None:
    assert schedule_from_config({}).prediction == "epsilon"
    assert schedule_from_config({"prediction_type": "v_prediction"}).prediction == "v_prediction"
    config = {"prediction_type": "v_prediction"}
    assert schedule_from_config(config, "epsilon").prediction == "epsilon"


@pytest.mark.parametrize(
    ("config", "word"),
    [({"beta_schedule": "cosine-ish"}, "cosine-ish"), ({"prediction_type": "sample"}, "sample")],
)
def test_what_is_not_known_is_said(config: dict[str, str], word: str) -> None:
    with pytest.raises(ModelError, match=word):
        schedule_from_config(config)


# --- weights


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_diffusers_training_scripts(
    prediction: str, gamma: float
) -> None:
    """As in diffusers' text-to-image example: min(SNR, gamma) / SNR, for v over SNR + 1."""
    schedule = schedule_from_config(SD1, prediction)
    steps = torch.arange(1000)
    snr = compute_snr(DDPMScheduler(**SD1), steps)
    divisor = snr if prediction == "epsilon" else snr + 1
    wanted = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0] / divisor
    torch.testing.assert_close(min_snr_weight(schedule, steps, gamma), wanted, rtol=1e-5, atol=0)


def test_without_gamma_every_step_weighs_the_same() -> None:
    schedule = schedule_from_config(SD1)
    assert torch.equal(min_snr_weight(schedule, torch.arange(1000), 0.0), torch.ones(1000))


@pytest.mark.parametrize(("prediction", "weight"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_pure_noise_has_the_limit_of_the_weight(prediction: str, weight: float) -> None:
    """Schedules with a zero terminal SNR end in alpha-bar 0."""
    schedule = NoiseSchedule(torch.tensor([0.5, 0.0]), prediction)
    assert float(min_snr_weight(schedule, torch.tensor([1]), 5.0)) == weight


def test_the_loss_is_the_weighted_mean_square_of_each_sample() -> None:
    schedule = schedule_from_config(SD1)
    steps = torch.tensor([0, 999])
    prediction, target = torch.zeros(2, *SHAPE), torch.ones(2, *SHAPE)
    target[1] *= 3
    loss = diffusion_loss(prediction, target, schedule, steps, 5.0)
    wanted = torch.tensor([1.0, 9.0]) * min_snr_weight(schedule, steps, 5.0)
    torch.testing.assert_close(loss, wanted)


# --- random draws


@unhurried
@given(
    keys=st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=5, unique=True),
    seed=st.integers(0, 2**31 - 1),
    step=st.integers(0, 10**6),
    order=st.randoms(use_true_random=False),
)
def test_a_sample_draws_the_same_in_any_company(
    keys: list[str],
    seed: int,
    step: int,
    order: object,
) -> None:
    together = draws(keys, step, seed, noise_offset=0.1, caption_dropout=0.5)
    shuffled = list(keys)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    again = draws(shuffled, step, seed, noise_offset=0.1, caption_dropout=0.5)
    for place, key in enumerate(keys):
        other = shuffled.index(key)
        alone = draws([key], step, seed, noise_offset=0.1, caption_dropout=0.5)
        for one, index in ((again, other), (alone, 0)):
            assert torch.equal(together.noise_BChw[place], one.noise_BChw[index])
            assert together.timesteps_B[place] == one.timesteps_B[index]
            assert together.keep_caption[place] == one.keep_caption[index]


def test_seed_step_and_key_each_change_the_draw() -> None:
    first = draws(["a"])
    for other in (draws(["a"], seed=2), draws(["a"], step=4), draws(["b"])):
        assert not torch.equal(first.noise_BChw, other.noise_BChw)


def test_the_global_generator_is_neither_used_nor_moved() -> None:
    torch.manual_seed(1)
    first = draws(["a"])
    before = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first.noise_BChw, draws(["a"]).noise_BChw)
    torch.manual_seed(1)
    assert torch.equal(before, torch.get_rng_state())


def test_a_sample_that_comes_twice_in_a_batch_draws_twice() -> None:
    twice = draws(["a", "a"])
    assert not torch.equal(twice.noise_BChw[0], twice.noise_BChw[1])
    assert torch.equal(twice.noise_BChw[0], draws(["a"]).noise_BChw[0])


def test_keys_and_numbers_do_not_run_into_each_other() -> None:
    assert seed_of(1, "step", 23) != seed_of(12, "step", 3)
    assert 0 <= seed_of("x") < 2**63


def test_timesteps_cover_the_schedule_evenly() -> None:
    steps = draws([str(n) for n in range(2000)]).timesteps_B
    assert int(steps.min()) >= 0
    assert int(steps.max()) <= 999
    # The mean of 2000 uniform draws lies within four standard errors (6.5) of 499.5.
    assert abs(float(steps.float().mean()) - 499.5) < 26


def test_noise_offset_adds_one_number_to_each_channel_and_moves_nothing_else() -> None:
    keys = [str(n) for n in range(500)]
    plain, offset = draws(keys), draws(keys, noise_offset=0.5)
    difference = offset.noise_BChw - plain.noise_BChw
    assert torch.equal(plain.timesteps_B, offset.timesteps_B)
    spread_inside = difference.flatten(2).std(dim=2)
    assert float(spread_inside.max()) < 1e-6
    # 2000 draws of a normal distribution with standard deviation 0.5.
    assert float(difference[:, :, 0, 0].std()) == pytest.approx(0.5, rel=0.08)
    assert float(plain.noise_BChw.std()) == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.3, 0.24, 0.36), (1.0, 1, 1)])
def test_captions_are_dropped_as_often_as_asked(share: float, low: float, high: float) -> None:
    kept = draws([str(n) for n in range(1000)], caption_dropout=share).keep_caption
    assert low <= 1 - sum(kept) / len(kept) <= high
