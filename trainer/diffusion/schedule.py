"""The noise schedule of the base: how much signal and noise there is at each timestep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.errors import ModelError


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """DDPM's cumulative products (arXiv 2006.11239, eq. 4), float32 [timesteps].

    prediction: `epsilon`, or `v_prediction` (arXiv 2202.00512, appendix D).
    """

    alphas_cumprod_N: Tensor
    prediction: str

    @property
    def timesteps(self) -> int:
        return len(self.alphas_cumprod_N)

    def signal_and_noise(self, timesteps_B: Tensor) -> tuple[Tensor, Tensor]:
        """Square roots of alpha-bar and of 1 - alpha-bar, each [B, 1, 1, 1]."""
        alpha_bar_B = self.alphas_cumprod_N.to(timesteps_B.device)[timesteps_B]
        signal_B, noise_B = alpha_bar_B.sqrt(), (1 - alpha_bar_B).sqrt()
        return signal_B[:, None, None, None], noise_B[:, None, None, None]

    def add_noise(self, latents_BChw: Tensor, noise_BChw: Tensor, timesteps_B: Tensor) -> Tensor:
        """q(x_t | x_0), arXiv 2006.11239 eq. 4."""
        signal, noise = self.signal_and_noise(timesteps_B)
        return signal * latents_BChw + noise * noise_BChw

    def target(self, latents_BChw: Tensor, noise_BChw: Tensor, timesteps_B: Tensor) -> Tensor:
        """What the UNet should answer: the noise, or v = signal * noise - sigma * latents."""
        if self.prediction == "epsilon":
            return noise_BChw
        signal, noise = self.signal_and_noise(timesteps_B)
        return signal * noise_BChw - noise * latents_BChw

    def snr(self, timesteps_B: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha-bar / (1 - alpha-bar), [B]."""
        alpha_bar_B = self.alphas_cumprod_N.to(timesteps_B.device)[timesteps_B]
        return alpha_bar_B / (1 - alpha_bar_B)


def schedule_from_config(config: Mapping[str, Any], prediction: str = "auto") -> NoiseSchedule:
    """Build the schedule from a diffusers scheduler configuration.

    Args:
        config: `scheduler_config.json`.
        prediction: `auto` reads it from the configuration.

    Raises:
        ModelError: the configuration names a beta schedule or prediction that is not known.
    """
    steps = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas_N = torch.tensor(config["trained_betas"], dtype=torch.float32)
    elif kind == "scaled_linear":
        betas_N = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    elif kind == "linear":
        betas_N = torch.linspace(start, end, steps, dtype=torch.float32)
    else:
        raise ModelError(f"The base's noise schedule '{kind}' is not known.", where="scheduler")
    if prediction == "auto":
        prediction = str(config.get("prediction_type", "epsilon"))
    if prediction not in ("epsilon", "v_prediction"):
        raise ModelError(
            f"The base's prediction type '{prediction}' is not known.",
            where="scheduler",
            fix="Set objective.prediction to epsilon or v_prediction if you know which it is.",
        )
    alphas_cumprod_N = torch.cumprod(1 - betas_N, dim=0)
    if config.get("rescale_betas_zero_snr"):
        alphas_cumprod_N = _zero_terminal_snr(alphas_cumprod_N)
    return NoiseSchedule(alphas_cumprod_N, prediction)


def _zero_terminal_snr(alphas_cumprod_N: Tensor) -> Tensor:
    """Moved so that the last step is pure noise (arXiv 2305.08891, algorithm 1)."""
    signal_N = alphas_cumprod_N.sqrt()
    first, last = signal_N[0], signal_N[-1]
    return ((signal_N - last) * (first / (first - last))).square()
