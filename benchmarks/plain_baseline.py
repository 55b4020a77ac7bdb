"""The usual recipe for a LoRA, as plain as it can be: what our own training is compared with.

diffusers, peft and accelerate, used as their examples use them: `add_adapter` for the layers,
frozen parts in the precision of the training, LoRA in float32 under accelerate's autocast, torch's
`AdamW`, a `DataLoader`, and the VAE and the text encoder in every step. With `cached`, latents and
prompt embeddings are made once before the first step, and the VAE and the frozen text encoder are
dropped. Nothing in it is slowed down on purpose; nothing of `trainer` is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params, compute_snr
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks.speed_task import RATE, Task

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
CONVOLUTIONS = [
    "conv1",
    "conv2",
    "time_emb_proj",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
]
TARGETS = {
    "attention": ATTENTION,
    "attention+ff": ATTENTION + FEED_FORWARD,
    "all": ATTENTION + FEED_FORWARD + CONVOLUTIONS,
    "cross-attention": [f"attn2.{name}" for name in ATTENTION],
    "cross-kv": ["attn2.to_k", "attn2.to_v"],
}
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


class Pictures(Dataset[dict[str, Tensor]]):
    """Pictures and captions of a folder, read anew each time they come up."""

    def __init__(self, folder: Path, resolution: int, tokenizers: list[Any]) -> None:
        self.paths = sorted(folder.glob("*.png"))
        self.resolution = resolution
        self.tokenizers = tokenizers

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        path = self.paths[index]
        with Image.open(path) as opened:
            image = opened.convert("RGB").resize((self.resolution, self.resolution))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        item = {"pixels": pixels}
        caption = path.with_suffix(".txt").read_text(encoding="utf-8")
        for number, tokenizer in enumerate(self.tokenizers):
            tokens = tokenizer(
                caption,
                max_length=tokenizer.model_max_length,
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            )
            item[f"ids_{number}"] = tokens.input_ids[0]
        return item


class Kept(Dataset[dict[str, Tensor]]):
    """Latents and embeddings that were made before."""

    def __init__(self, items: list[dict[str, Tensor]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.items[index]


@dataclass
class Training:
    """A training that is ready; `steps` does one step for each loss that is taken from it."""

    task: Task
    accelerator: Accelerator
    unet: Any
    vae: Any
    encoders: list[Any]
    scheduler: Any
    loader: Any
    optimizer: Any
    rate: Any
    trained: list[nn.Parameter] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.trained)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def steps(self) -> Iterator[float]:
        done = 0
        while done < self.task.steps:
            for batch in self.loader:
                yield self.step(batch)
                done += 1
                if done == self.task.steps:
                    break

    def step(self, batch: dict[str, Tensor]) -> float:
        with self.accelerator.accumulate(self.unet):
            latents = batch["latents"] if "latents" in batch else encode(self, batch["pixels"])
            noise = torch.randn_like(latents)
            steps = self.scheduler.config.num_train_timesteps
            timesteps = torch.randint(0, steps, (len(latents),), device=latents.device).long()
            noisy = self.scheduler.add_noise(latents, noise, timesteps)
            hidden, extra = prompts(self, batch)
            predicted = self.unet(
                noisy, timesteps, hidden, added_cond_kwargs=extra, return_dict=False
            )[0]
            target = noise
            if self.scheduler.config.prediction_type == "v_prediction":
                target = self.scheduler.get_velocity(latents, noise, timesteps)
            loss = self.loss(predicted, target, timesteps)
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.rate.step()
            self.optimizer.zero_grad()
        # What every such script shows in its progress bar.
        return float(loss.detach().item())

    def loss(self, predicted: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        if self.task.min_snr_gamma == 0:
            return F.mse_loss(predicted.float(), target.float(), reduction="mean")
        snr = compute_snr(self.scheduler, timesteps)
        weights = snr.clamp(max=self.task.min_snr_gamma)
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        weights = weights / (snr + 1) if velocity else weights / snr
        error = F.mse_loss(predicted.float(), target.float(), reduction="none")
        return (error.mean(dim=(1, 2, 3)) * weights).mean()

    def save(self) -> Path:
        """Write the file as the examples do: float32, in diffusers' names."""
        pipeline = StableDiffusionXLPipeline if len(self.encoders) > 1 else StableDiffusionPipeline
        layers = {"unet_lora_layers": lora_of(self.accelerator.unwrap_model(self.unet))}
        if self.task.text_encoder:
            for number, encoder in enumerate(self.encoders):
                name = "text_encoder" + ("" if number == 0 else f"_{number + 1}")
                layers[f"{name}_lora_layers"] = lora_of(self.accelerator.unwrap_model(encoder))
        pipeline.save_lora_weights(self.task.output, **layers, safe_serialization=True)
        return self.task.output_folder / "pytorch_lora_weights.safetensors"


def open_training(task: Task, *, cached: bool) -> Training:
    """Load, attach and prepare. cached: latents and frozen embeddings are made here, once."""
    accelerator = Accelerator(
        mixed_precision="no" if task.precision == "fp32" else task.precision,
        cpu=task.device == "cpu",
    )
    torch.set_num_threads(task.threads)
    set_seed(task.seed)
    base, dtype = task.base, DTYPES[task.precision]
    double = (Path(base) / "text_encoder_2").is_dir()
    tokenizers = [CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")]
    encoders = [CLIPTextModel.from_pretrained(base, subfolder="text_encoder")]
    if double:
        tokenizers.append(CLIPTokenizer.from_pretrained(base, subfolder="tokenizer_2"))
        second = CLIPTextModelWithProjection.from_pretrained(base, subfolder="text_encoder_2")
        encoders.append(second)
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    for module in (unet, vae, *encoders):
        module.requires_grad_(False)
        module.to(accelerator.device, dtype=dtype)
    if double:
        vae.to(dtype=torch.float32)  # that of SDXL overflows in half precision
    trained_models = [unet, *(encoders if task.text_encoder else [])]
    for module in trained_models:
        targets = TARGETS[task.targets] if module is unet else TEXT_TARGETS
        module.add_adapter(
            LoraConfig(
                r=task.rank,
                lora_alpha=task.rank,
                init_lora_weights="gaussian",
                target_modules=targets,
            )
        )
    cast_training_params(trained_models, dtype=torch.float32)
    set_attention(unet, task.attention)
    if task.checkpointing:
        unet.enable_gradient_checkpointing()
    trained = [p for module in trained_models for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=1e-2)
    rate = get_scheduler("constant", optimizer=optimizer)
    pictures = Pictures(Path(task.photos), task.resolution, tokenizers)
    scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    training = Training(
        task, accelerator, unet, vae, encoders, scheduler, None, optimizer, rate, trained
    )
    data: Dataset[dict[str, Tensor]] = kept(training, pictures) if cached else pictures
    loader = DataLoader(data, batch_size=task.batch, shuffle=True)
    unet.train()
    training.unet, training.optimizer, training.loader, training.rate = accelerator.prepare(
        unet, optimizer, loader, rate
    )
    if task.text_encoder:
        training.encoders = [accelerator.prepare(encoder.train()) for encoder in encoders]
    return training


def kept(training: Training, pictures: Pictures) -> Kept:
    """What the VAE and the frozen text encoders make of each picture; then they are dropped."""
    items: list[dict[str, Tensor]] = []
    device = training.device
    for number in range(len(pictures)):
        batch = {name: tensor[None].to(device) for name, tensor in pictures[number].items()}
        item = {"latents": encode(training, batch["pixels"])[0].cpu()}
        if training.task.text_encoder:
            item |= {name: batch[name][0].cpu() for name in batch if name.startswith("ids_")}
        else:
            with torch.no_grad():
                hidden, extra = prompts(training, batch)
            item["hidden"] = hidden[0].cpu()
            if extra is not None:
                item["pooled"] = extra["text_embeds"][0].cpu()
        items.append(item)
    training.vae = None
    if not training.task.text_encoder:
        training.encoders = [None for _ in training.encoders]
    return Kept(items)


def encode(training: Training, pixels: Tensor) -> Tensor:
    """Latents of pictures, in the precision of the training."""
    vae = training.vae
    with torch.no_grad():
        latents = vae.encode(pixels.to(vae.dtype)).latent_dist.sample()
    return (latents * vae.config.scaling_factor).to(DTYPES[training.task.precision])


def prompts(training: Training, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any] | None]:
    """Embeddings of the captions, and what SDXL's UNet takes beside them."""
    pooled = batch.get("pooled")
    if "hidden" in batch:
        hidden = batch["hidden"]
    elif len(training.encoders) == 1:
        hidden = training.encoders[0](batch["ids_0"], return_dict=False)[0]
    else:
        found = [
            encoder(batch[f"ids_{number}"], output_hidden_states=True)
            for number, encoder in enumerate(training.encoders)
        ]
        hidden = torch.cat([output.hidden_states[-2] for output in found], dim=-1)
        pooled = found[-1].text_embeds
    if pooled is None:
        return hidden, None
    side = training.task.resolution
    sizes = torch.tensor([[side, side, 0, 0, side, side]], device=hidden.device)
    sizes = sizes.to(hidden.dtype).repeat(len(hidden), 1)
    return hidden, {"text_embeds": pooled, "time_ids": sizes}


def set_attention(unet: Any, attention: str) -> None:
    """diffusers takes PyTorch's own unless another is asked for."""
    if attention == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    elif attention == "eager":
        from diffusers.models.attention_processor import AttnProcessor

        unet.set_attn_processor(AttnProcessor())


def lora_of(module: nn.Module) -> dict[str, Tensor]:
    tensors = get_peft_model_state_dict(module, save_embedding_layers=False)
    named: dict[str, Tensor] = convert_state_dict_to_diffusers(tensors)
    return named
