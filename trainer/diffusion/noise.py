"""Random numbers of a training step, each a pure function of (seed, step, image).

No generator lives from one step to the next, so a resumed run draws what an uninterrupted one does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Draws:
    """noise_BChw float32; timesteps_B int64; keep_caption: for each sample, whether it has one."""

    noise_BChw: Tensor
    timesteps_B: Tensor
    keep_caption: tuple[bool, ...]


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from any mix of numbers and texts (BLAKE2b)."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator_of(*parts: int | str) -> torch.Generator:
    """A CPU generator started from `seed_of(*parts)`."""
    return torch.Generator().manual_seed(seed_of(*parts))


def draw_for_step(
    seed: int,
    step: int,
    keys: Sequence[str],
    shape: tuple[int, int, int],
    *,
    timesteps: int,
    noise_offset: float = 0.0,
    caption_dropout: float = 0.0,
) -> Draws:
    """Noise and timestep of each sample of a batch.

    Args:
        seed: of the run.
        step: number of the batch since the start of training.
        keys: one per sample; a key that comes twice in a batch gets different numbers.
        shape: (C, h, w) of one sample.
        timesteps: how many the schedule has.
        noise_offset: share of noise that is constant over each channel
            (Nicholas Guttenberg, "Diffusion with offset noise", 2023).
        caption_dropout: probability of training without the caption.
    """
    noise, steps, keep = [], [], []
    seen: dict[str, int] = {}
    for key in keys:
        seen[key] = seen.get(key, 0) + 1
        generator = generator_of(seed, "step", step, key, seen[key])
        noise_Chw = torch.randn(shape, generator=generator)
        steps.append(int(torch.randint(timesteps, (), generator=generator)))
        # Drawn even when unused, so that a setting does not move the numbers of another.
        offset_C11 = torch.randn((shape[0], 1, 1), generator=generator)
        keep.append(float(torch.rand((), generator=generator)) >= caption_dropout)
        noise.append(noise_Chw + noise_offset * offset_C11)
    return Draws(torch.stack(noise), torch.tensor(steps), tuple(keep))
