"""The loss of a training step."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.diffusion.schedule import NoiseSchedule
from trainer.transfer import to_device


def min_snr_weight(schedule: NoiseSchedule, timesteps_B: Tensor, gamma: float) -> Tensor:
    """Min-SNR-gamma weights [B] (arXiv 2303.09556, eq. 8 and appendix); 1 when gamma is 0.

    For epsilon min(SNR, gamma) / SNR, for v min(SNR, gamma) / (SNR + 1). Where the schedule ends
    in pure noise (SNR = 0) the epsilon weight's limit is 1.
    """
    if gamma == 0:
        return torch.ones_like(timesteps_B, dtype=torch.float32)
    snr_B = schedule.snr(timesteps_B)
    clipped_B = snr_B.clamp(max=gamma)
    if schedule.prediction == "v_prediction":
        return clipped_B / (snr_B + 1)
    return torch.where(snr_B > 0, clipped_B / snr_B.clamp(min=1e-12), 1.0)


def diffusion_loss(
    prediction_BChw: Tensor,
    target_BChw: Tensor,
    schedule: NoiseSchedule,
    timesteps_B: Tensor,
    gamma: float,
    weights_Bhw: Tensor | None = None,
) -> Tensor:
    """Weighted mean squared error of each sample, [B].

    weights_Bhw: how much each latent counts, of mean 1 for each sample; None: all alike.
    """
    error_BChw = (prediction_BChw - target_BChw).square()
    if weights_Bhw is not None:
        error_BChw = error_BChw * weights_Bhw[:, None]
    error_B = error_BChw.mean(dim=(1, 2, 3))
    return error_B * to_device(min_snr_weight(schedule, timesteps_B, gamma), error_B.device)
