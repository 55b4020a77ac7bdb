"""The denoiser, trained together with the text encoder on cached latents.

With several processes each takes its share of every batch and the gradients are averaged once
per step in one flat buffer. One single-threaded process per core outruns one process with
several threads for nets this small, and does not stall when something else needs a core.
"""

import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from pretraining import text
from pretraining.data import TOKENS
from pretraining.recipe import Recipe
from pretraining.tokenizer import FOLDER, load_tokenizer
from pretraining.training import Average, generator, load_state, rate_share, save_state
from pretraining.vae import LATENTS

STATE = "unet.pt"
_REPORT_STEPS = 100


def new_unet(recipe: Recipe) -> UNet2DConditionModel:
    """An untrained denoiser with the module names of Stable Diffusion 1.x."""
    torch.manual_seed(recipe.seed)
    return UNet2DConditionModel(
        sample_size=recipe.resolution_px // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=recipe.unet_channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=recipe.text_width,
        # In this configuration format the "head dimension" is the number of heads.
        attention_head_dim=recipe.unet_heads,
        norm_num_groups=recipe.unet_norm_groups,
    )


def noise_schedule() -> DDPMScheduler:
    """The schedule of Stable Diffusion 1.x."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
    )


def scaling_factor(recipe: Recipe, latents: NDArray[np.float16]) -> float:
    """What latents are multiplied with so that their spread is `latent_std`.

    Below 1 on purpose: these pictures are flat, so their mean colour would otherwise shine
    through even the noisiest latents, and the denoiser would read it there, not in the words.
    """
    return round(recipe.latent_std / float(latents[:2000].astype(np.float32).std()), 5)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's share of one process."""

    latents_BChw: Tensor
    noise_BChw: Tensor
    timesteps_B: Tensor
    tokens_BT: Tensor


def draw_batch(
    recipe: Recipe,
    step: int,
    share: slice,
    latents: NDArray[np.float16],
    tokens: NDArray[np.uint16],
    empty: Tensor,
) -> Batch:
    """Draw a whole batch from (seed, step) and return the process's share of it."""
    rng = generator(recipe.seed, STATE, step)
    count = recipe.unet_batch
    rows = torch.randint(len(latents), (count,), generator=rng).numpy()
    columns = torch.randint(tokens.shape[1], (count,), generator=rng).numpy()
    clean = torch.from_numpy(latents[rows].astype(np.float32))
    ids = torch.from_numpy(tokens[rows, columns].astype(np.int64))
    ids[torch.rand(count, generator=rng) < recipe.empty_caption_share] = empty
    noise = torch.randn(clean.shape, generator=rng)
    offset = torch.randn((*clean.shape[:2], 1, 1), generator=rng)
    noise = noise + recipe.offset_noise * offset
    timesteps = torch.randint(1000, (count,), generator=rng)
    return Batch(clean[share], noise[share], timesteps[share], ids[share])


def face_weights(side: int, weight: float) -> Tensor:
    """Weights [side, side] of mean 1 that are `weight` times as high where faces are.

    Each place is predicted for itself, so what is best does not depend on them; but eyes and
    mouths, a fiftieth of the picture, are learned sooner.
    """
    weights = torch.ones(side, side)
    weights[side * 5 // 16 : side * 13 // 16, side // 4 : side * 3 // 4] = weight
    return weights / weights.mean()


def denoising_loss(
    modules: nn.ModuleDict,
    batch: Batch,
    schedule: DDPMScheduler,
    gamma: float,
    weights_hw: Tensor,
) -> Tensor:
    """Weighted squared error of the predicted noise, min-SNR as well (arXiv 2303.09556)."""
    noisy = schedule.add_noise(batch.latents_BChw, batch.noise_BChw, batch.timesteps_B)
    prompt_BTD = modules["text"](batch.tokens_BT).last_hidden_state
    predicted = modules["unet"](noisy, batch.timesteps_B, prompt_BTD).sample
    alpha = schedule.alphas_cumprod[batch.timesteps_B]
    snr = alpha / (1 - alpha)
    weight = snr.clamp(max=gamma) / snr
    error: Tensor = (weights_hw * (predicted - batch.noise_BChw).pow(2)).mean(dim=(1, 2, 3))
    return (weight * error).mean()


class Meeting:
    """Lets processes average tensors through shared memory.

    A general-purpose reduction over sockets took as long as a quarter of a step here.
    """

    def __init__(self, processes: int, numbers: int) -> None:
        self.processes = processes
        # Two slots each, used in turn: nobody overwrites what another still reads.
        self.slots = torch.zeros(2, processes, numbers).share_memory_()
        self.barrier = get_context("spawn").Barrier(processes)

    def average(self, rank: int, turn: int, values: Tensor) -> None:
        """Replace `values` by the mean over all processes."""
        slot = self.slots[turn % 2]
        slot[rank].copy_(values)
        self.barrier.wait()
        torch.mean(slot, dim=0, out=values)


class _Flat:
    """A module's parameters and gradients as views of two long tensors.

    One long tensor is averaged, clipped and stepped many times faster than 500 short ones.
    """

    def __init__(self, module: nn.Module) -> None:
        parameters = list(module.parameters())
        self.values = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
        self.values.grad = torch.zeros_like(self.values)
        start = 0
        for p in parameters:
            part = slice(start, start + p.numel())
            p.data = self.values.data[part].view_as(p)
            p.grad = self.values.grad[part].view_as(p)
            start = part.stop


@dataclass
class _Run:
    """What a process trains, and how far it is."""

    modules: nn.ModuleDict
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: Average
    step: int

    def save(self, path: Path) -> None:
        save_state(
            path,
            {
                "model": self.modules.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.values,
                "step": self.step,
            },
        )


def _start_or_resume(recipe: Recipe, work: Path) -> _Run:
    unet, encoder = new_unet(recipe), text.new_text_encoder(recipe, work)
    if warm := load_state(work / text.STATE):
        encoder.load_state_dict(warm["model"])
    modules = nn.ModuleDict({"unet": unet, "text": encoder})
    state = load_state(work / STATE)
    if state:
        modules.load_state_dict(state["model"])
    parameters = [_Flat(unet).values, _Flat(encoder).values]
    optimizer = torch.optim.AdamW(
        [{"params": [values]} for values in parameters],
        lr=recipe.unet_rate,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    run = _Run(modules, parameters, optimizer, Average(modules, recipe.ema_decay), 0)
    if state:
        optimizer.load_state_dict(state["optimizer"])
        run.average.values = state["average"]
        run.step = state["step"]
    return run


def _set_rates(run: _Run, recipe: Recipe) -> None:
    share = rate_share(
        run.step,
        recipe.unet_steps,
        recipe.unet_warmup_steps,
        recipe.unet_decay_share,
        recipe.unet_final_rate_share,
    )
    unet_group, text_group = run.optimizer.param_groups
    unet_group["lr"] = recipe.unet_rate * share
    text_group["lr"] = recipe.unet_rate * recipe.unet_text_rate_share * share


def train_unet(recipe: Recipe, work: Path, processes: int) -> None:
    """Train the denoiser and the text encoder, from the last saved state on."""
    numbers = sum(
        p.numel()
        for module in (new_unet(recipe), text.new_text_encoder(recipe, work))
        for p in module.parameters()
    )
    meeting = Meeting(processes, numbers)
    if processes == 1:
        _worker(0, recipe, work, meeting)
    else:
        spawn(_worker, (recipe, work, meeting), processes)


def _worker(rank: int, recipe: Recipe, work: Path, meeting: Meeting) -> None:
    torch.set_num_threads(1)
    stored = np.load(work / LATENTS)
    factor = scaling_factor(recipe, stored)
    latents = (stored.astype(np.float32) * factor).astype(np.float16)
    tokens = np.load(work / TOKENS)
    tokenizer = load_tokenizer(work / FOLDER)
    empty = torch.tensor(tokenizer("", padding="max_length", max_length=recipe.tokens).input_ids)

    run = _start_or_resume(recipe, work)
    schedule = noise_schedule()
    weights = face_weights(latents.shape[-1], recipe.face_weight)
    each = recipe.unet_batch // meeting.processes
    share = slice(rank * each, (rank + 1) * each)
    first, started = run.step, time.monotonic()
    losses: list[float] = []
    while run.step < recipe.unet_steps:
        batch = draw_batch(recipe, run.step, share, latents, tokens, empty)
        loss = denoising_loss(run.modules, batch, schedule, recipe.min_snr_gamma, weights)
        run.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        if meeting.processes > 1:
            _average_gradients(run, rank, meeting)
        nn.utils.clip_grad_norm_(run.parameters, recipe.clip_norm)
        _set_rates(run, recipe)
        run.optimizer.step()
        run.step += 1
        if rank:
            continue
        run.average.update(run.modules, run.step)
        losses.append(loss.item())
        if run.step % _REPORT_STEPS == 0:
            speed = recipe.unet_batch * (run.step - first) / (time.monotonic() - started)
            print(
                f"unet step {run.step}/{recipe.unet_steps} "
                f"samples {run.step * recipe.unet_batch} "
                f"loss {float(np.mean(losses[-500:])):.4f} {speed:.1f} samples/s",
                flush=True,
            )
        if run.step % recipe.save_every_steps == 0 or run.step == recipe.unet_steps:
            run.save(work / STATE)


def _average_gradients(run: _Run, rank: int, meeting: Meeting) -> None:
    flat = torch.cat([values.grad for values in run.parameters if values.grad is not None])
    meeting.average(rank, run.step, flat)
    unet_values, text_values = run.parameters
    for values, part in zip(
        run.parameters, flat.split([unet_values.numel(), text_values.numel()]), strict=True
    ):
        assert values.grad is not None
        values.grad.copy_(part)
