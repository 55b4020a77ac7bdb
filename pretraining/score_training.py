"""What the trainings of the reader and of the identity embedding share.

Both must read what a small diffusion model draws, not only clean drawings: part of their pictures
goes through the embedded base's autoencoder with noise on the latents, and all are disturbed a
little before each step.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pretraining.training import generator, load_state, pixels, rate_share, save_state
from trainer.scoring.avatar_net import AvatarNet

BASE = Path("trainer/assets/base")
TARGET = Path("trainer/assets/likeness")
WORK = Path("pretraining/work")


@dataclass(frozen=True, slots=True)
class ScoreRecipe:
    """Sizes, amounts and rates of both nets; counts of steps are optimizer steps."""

    seed: int = 1
    widths: tuple[int, int, int, int] = (48, 64, 128, 160)
    hidden: int = 192
    rate: float = 2e-3
    weight_decay: float = 1e-2
    warmup_steps: int = 100
    decay_share: float = 0.7
    final_rate_share: float = 0.01
    save_every_steps: int = 200

    # Reader: the base's training pictures, some with held-out looks, some through the autoencoder.
    reader_rare_pictures: int = 8_000
    reader_soft_pictures: int = 10_000
    reader_soft_rare_pictures: int = 2_500
    reader_soft_share: float = 0.4
    # A fifth of the clean pictures are in the pixel style, which shows in the finest detail only.
    reader_pixel_share: float = 0.2
    reader_steps: int = 2_900
    reader_batch: int = 128

    # Identity: avatars in twos that differ in one or two looks, each in several pictures; more
    # with features of chance, which make up half of each batch.
    identity_avatars: int = 10_000
    identity_odd_avatars: int = 4_000
    identity_views: int = 3
    identity_steps: int = 1_300
    identity_batch: int = 96
    identity_dimensions: int = 64
    identity_temperature: float = 0.07
    identity_soft_share: float = 0.4
    identity_recoloured_share: float = 0.6


@torch.no_grad()
def soft_copies(
    pictures: NDArray[np.uint8], vae: AutoencoderKL, seed: int, most_noise: float = 0.3
) -> NDArray[np.uint8]:
    """The pictures as a diffusion model might draw them: uint8 [N, 64, 64, 3].

    Encoded, given latent noise of a strength between 0 and `most_noise` deviations, and decoded.
    """
    copies = []
    vae = vae.to(memory_format=torch.channels_last)
    for start in range(0, len(pictures), 64):
        rng = generator(seed, "soft", start)
        part = pixels(torch.from_numpy(pictures[start : start + 64].copy()))
        part = part.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(part).latent_dist.mean.float()
            strength = most_noise * torch.rand(len(part), 1, 1, 1, generator=rng) * latents.std()
            noise = torch.randn(latents.shape, generator=rng)
            made = vae.decode(latents + strength * noise).sample.float()
        rounded = made.clamp(-1, 1).add(1).mul(127.5).round().byte()
        copies.append(rounded.permute(0, 2, 3, 1).numpy())
    return np.concatenate(copies)


def load_base_vae(base: Path = BASE) -> AutoencoderKL:
    """The embedded base's autoencoder in single precision."""
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae", torch_dtype=torch.float32)
    return vae.eval().requires_grad_(False)


def disturbed(pictures_B3hw: Tensor, rng: torch.Generator) -> Tensor:
    """Mirror, shift, soften, recolour slightly and add noise, all at random."""
    count = len(pictures_B3hw)
    mirrored = torch.rand(count, 1, 1, 1, generator=rng) < 0.5
    out = torch.where(mirrored, pictures_B3hw.flip(3), pictures_B3hw)
    parts = []
    for part in out.chunk(8):
        part = _shifted(part, rng)
        if torch.rand((), generator=rng) < 0.3:
            part = _softened(part, rng)
        parts.append(part)
    out = torch.cat(parts)
    gain = 1 + 0.05 * torch.randn(count, 3, 1, 1, generator=rng)
    lift = 0.04 * torch.randn(count, 3, 1, 1, generator=rng)
    strength = 0.06 * torch.rand(count, 1, 1, 1, generator=rng)
    return out * gain + lift + strength * torch.randn(out.shape, generator=rng)


def _shifted(pictures_B3hw: Tensor, rng: torch.Generator) -> Tensor:
    side = pictures_B3hw.shape[-1]
    # Even, so that the squares of the pixel style stay in the places of the net's first layer.
    left, top = (2 * torch.randint(0, 3, (2,), generator=rng)).tolist()
    padded = F.pad(pictures_B3hw, (2, 2, 2, 2), mode="replicate")
    return padded[:, :, top : top + side, left : left + side]


def _softened(pictures_B3hw: Tensor, rng: torch.Generator) -> Tensor:
    side = pictures_B3hw.shape[-1]
    small = int(torch.randint(28, 60, (), generator=rng))
    reduced = F.interpolate(pictures_B3hw, (small, small), mode="bilinear", antialias=True)
    return F.interpolate(reduced, (side, side), mode="bilinear")


def new_net(recipe: ScoreRecipe, outputs: int) -> AvatarNet:
    """An untrained net, laid out for speed on a CPU."""
    torch.manual_seed(recipe.seed)
    return AvatarNet(recipe.widths, recipe.hidden, outputs)


def train_net(
    net: nn.Module,
    recipe: ScoreRecipe,
    state_path: Path,
    steps: int,
    loss_of: Callable[[nn.Module, int], Tensor],
) -> None:
    """Train to the last step, saving on the way and going on from what was saved.

    Args:
        loss_of: the loss of the net at a step; its random draws depend on the step alone.
    """
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    net.train()
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=recipe.rate, weight_decay=recipe.weight_decay
    )
    first = 0
    if state := load_state(state_path):
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    started, losses = time.process_time(), []
    for step in range(first, steps):
        share = rate_share(
            step, steps, recipe.warmup_steps, recipe.decay_share, recipe.final_rate_share
        )
        optimizer.param_groups[0]["lr"] = recipe.rate * share
        loss = loss_of(net, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % recipe.save_every_steps == 0 or step + 1 == steps:
            spent = time.process_time() - started
            print(
                f"{state_path.stem} step {step + 1}/{steps} "
                f"loss {np.mean(losses[-100:]):.4f} {spent:.0f} core seconds",
                flush=True,
            )
            save_state(
                state_path,
                {
                    "model": net.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                },
            )
    net.eval()


def export_net(
    net: nn.Module, recipe: ScoreRecipe, facts: dict[str, object], target: Path, name: str
) -> None:
    """Write `<name>.safetensors` in half precision and `<name>.json` with what loading needs."""
    target.mkdir(parents=True, exist_ok=True)
    tensors = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in net.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    weights = target / f"{name}.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    layout = {"widths": list(recipe.widths), "hidden": recipe.hidden}
    text = json.dumps({"net": layout, **facts}, indent=1)
    (target / f"{name}.json").write_text(text + "\n", encoding="utf-8")
