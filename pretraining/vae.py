"""The autoencoder: built as a thumbnail codec, then trained to add the detail."""

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from pretraining.data import HELD_OUT_PICTURES, PICTURES
from pretraining.recipe import Recipe
from pretraining.training import (
    Average,
    generator,
    load_state,
    pixels,
    rate_share,
    save_state,
)

STATE = "vae.pt"
LATENTS = "latents.npy"
_ANCHOR = 3.0


def new_vae(recipe: Recipe) -> AutoencoderKL:
    """An autoencoder that starts out as a thumbnail maker (see `_start_as_thumbnails`)."""
    torch.manual_seed(recipe.seed)
    levels = len(recipe.vae_channels)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=recipe.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        # One group: several groups on few channels would wipe out the colour level.
        norm_num_groups=1,
        sample_size=recipe.resolution_px,
        mid_block_add_attention=False,
    )
    _start_as_thumbnails(vae)
    return vae


@torch.no_grad()
def _start_as_thumbnails(vae: AutoencoderKL) -> None:
    """Carry +RGB in channels 0-2 and -RGB in 3-5 through the whole net.

    silu(x) - silu(-x) = x makes the last norm, activation and convolution linear; channels 6
    and 7 hold a constant that keeps the group norm's scale the same for every picture.
    Residual branches start at zero. Latents 0-2 are then the picture at a quarter of its size.
    """
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif name.endswith("conv_shortcut"):
            _carry(module, taps=((0, 0),))
        elif name.endswith("downsamplers.0.conv"):
            _carry(module, taps=((0, 0), (0, 1), (1, 0), (1, 1)))
        elif name.endswith("upsamplers.0.conv"):
            _carry(module, taps=((1, 1),))
    for conv in (vae.encoder.conv_in, vae.decoder.conv_in):
        _split_signs(conv)
    for conv in (vae.encoder.conv_out, vae.decoder.conv_out):
        _join_signs(conv)
    # The log-variances: small and constant, they are not trained.
    vae.encoder.conv_out.weight[4:] = 0
    vae.encoder.conv_out.bias[4:] = -6
    for conv in (vae.quant_conv, vae.post_quant_conv):
        nn.init.zeros_(conv.bias)
        conv.weight.copy_(torch.eye(conv.in_channels)[:, :, None, None])


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def _split_signs(conv: nn.Conv2d) -> None:
    conv.weight[:8] = 0
    _bias(conv)[:8] = 0
    for c in range(3):
        conv.weight[c, c, 1, 1] = 1
        conv.weight[3 + c, c, 1, 1] = -1
    _bias(conv)[6], _bias(conv)[7] = _ANCHOR, -_ANCHOR


def _join_signs(conv: nn.Conv2d) -> None:
    # Undoes the group norm, whose scale is the anchors' plus the picture's share.
    scale = (2 * (_ANCHOR**2 + 1) / conv.in_channels) ** 0.5
    conv.weight[:3] = 0
    _bias(conv)[:3] = 0
    for c in range(3):
        conv.weight[c, c, 1, 1] = scale
        conv.weight[c, 3 + c, 1, 1] = -scale


def _carry(conv: nn.Conv2d, taps: tuple[tuple[int, int], ...]) -> None:
    nn.init.zeros_(_bias(conv))
    conv.weight[:8] = 0
    for c in range(8):
        for row, column in taps:
            conv.weight[c, c, row, column] = 1 / len(taps)


def recoloured(pictures_BCHW: Tensor, rng: torch.Generator, share: float) -> Tensor:
    """Swap, invert and dim the colour channels of some pictures.

    The drawings know few colours; photos of strangers and other styles know all of them.
    """
    out = pictures_BCHW.clone()
    for i in range(len(out)):
        draw = torch.rand(4, generator=rng)
        if draw[0] >= share:
            continue
        picture = out[i, torch.randperm(3, generator=rng)]
        if draw[1] < 0.3:
            picture = -picture
        gain = 0.4 + 0.6 * torch.rand(3, 1, 1, generator=rng)
        lift = (1 - gain) * (2 * torch.rand(3, 1, 1, generator=rng) - 1)
        out[i] = picture * gain + lift if draw[2] < 0.7 else picture
    return out


def reconstruction_loss(made_BCHW: Tensor, true_BCHW: Tensor, gradient_weight: float) -> Tensor:
    """Mean absolute error of the pixels and of their differences to the neighbours."""
    loss = F.l1_loss(made_BCHW, true_BCHW)
    for axis in (2, 3):
        edges = F.l1_loss(made_BCHW.diff(dim=axis), true_BCHW.diff(dim=axis))
        loss = loss + gradient_weight * edges
    return loss


def train_vae(recipe: Recipe, work: Path) -> None:
    """Train encoder and decoder; the latents carry fixed noise instead of a sampled posterior."""
    _train(recipe, work, STATE, recipe.vae_steps, recipe.vae_rate, polish=False)


def polish_vae(recipe: Recipe, work: Path) -> None:
    """Train the decoder alone, so that latents encoded before stay valid."""
    _train(recipe, work, "polish.pt", recipe.polish_steps, recipe.polish_rate, polish=True)


def _train(
    recipe: Recipe, work: Path, state_name: str, steps: int, rate: float, polish: bool
) -> None:
    pictures = np.load(work / PICTURES, mmap_mode="r")
    vae = load_vae(recipe, work) if polish else new_vae(recipe)
    # Channels last and bfloat16 nearly double the speed of this net on a CPU.
    vae.to(memory_format=torch.channels_last)
    if polish:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    average = Average(vae, recipe.ema_decay)
    first = 0
    if state := load_state(work / state_name):
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.values = state["average"]
        first = state["step"]
    started, losses = time.monotonic(), []
    for step in range(first, steps):
        rng = generator(recipe.seed, state_name, step)
        index = torch.randint(len(pictures), (recipe.vae_batch,), generator=rng)
        true = pixels(torch.from_numpy(pictures[index.numpy()]))
        true = recoloured(true, rng, recipe.vae_recoloured_share)
        true = true.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(not polish):
                latents = vae.encode(true).latent_dist.mean.float()
            noise = torch.randn(latents.shape, generator=rng)
            made = vae.decode(latents + recipe.vae_latent_noise * noise).sample.float()
        loss = reconstruction_loss(made, true, recipe.vae_gradient_weight)
        loss = loss + recipe.vae_latent_penalty * latents.pow(2).mean()
        share = rate_share(step, steps, 100, 0.5, 0.02)
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
        optimizer.step()
        average.update(vae, step)
        losses.append(loss.item())
        if (step + 1) % recipe.save_every_steps == 0 or step + 1 == steps:
            seconds = time.monotonic() - started
            rate_now = recipe.vae_batch * (step + 1 - first) / seconds
            print(
                f"{state_name} step {step + 1}/{steps} loss {np.mean(losses[-200:]):.4f} "
                f"psnr {held_out_psnr(vae, average, work):.2f} {rate_now:.1f} pictures/s",
                flush=True,
            )
            save_state(
                work / state_name,
                {
                    "model": vae.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average.values,
                    "step": step + 1,
                },
            )


@torch.no_grad()
def held_out_psnr(vae: AutoencoderKL, average: Average | None, work: Path) -> float:
    """Mean PSNR in dB over drawings that were never trained on."""
    true = pixels(torch.from_numpy(np.load(work / HELD_OUT_PICTURES)[:128]))
    kept = {name: value.clone() for name, value in vae.state_dict().items()}
    if average is not None:
        vae.load_state_dict(average.values)
    made = vae.decode(vae.encode(true).latent_dist.mean).sample.clamp(-1, 1)
    vae.load_state_dict(kept)
    error = ((made - true) / 2).pow(2).mean(dim=(1, 2, 3))
    return float((-10 * error.log10()).mean())


def load_vae(recipe: Recipe, work: Path) -> AutoencoderKL:
    """The averaged autoencoder of the last finished stage."""
    vae = new_vae(recipe)
    for name in ("polish.pt", STATE):
        if state := load_state(work / name):
            vae.load_state_dict(state["average"])
            break
    return vae.requires_grad_(True)


@torch.no_grad()
def encode_pictures(recipe: Recipe, work: Path) -> None:
    """Write the mean latents of all training pictures: float16 [N, 4, h, w], unscaled."""
    if (work / LATENTS).exists():
        return
    vae = load_vae(recipe, work).eval()
    pictures = np.load(work / PICTURES, mmap_mode="r")
    parts = []
    for start in range(0, len(pictures), 128):
        batch = pixels(torch.from_numpy(pictures[start : start + 128].copy()))
        parts.append(vae.encode(batch).latent_dist.mean.half().numpy())
    temporary = work / f"part-{LATENTS}"
    np.save(temporary, np.concatenate(parts))
    temporary.replace(work / LATENTS)
