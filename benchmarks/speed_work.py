"""How much arithmetic a training step is, and how much the machine can do.

Operations are counted on tensors without content (the meta device) with PyTorch's counter, two for
each multiplication with addition: forward and backward of the UNet with LoRA layers, nothing of it
computed twice; of the text encoders too where they are trained. A VAE or frozen text encoder in the
step counts as nothing, for it need not be there. So model FLOP utilisation is the same measure for
all sides: useful operations per second over those of a large matrix product.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trainer.adapters.products import matmul

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENS = 77


def read_config(base: Path, part: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((base / part / "config.json").read_text(encoding="utf-8"))
    return values


def count_flops(
    base: Path, resolution: int, *, rank: int, targets: str, text_encoder: bool = False
) -> tuple[float, float]:
    """Operations of the UNet's forward pass with LoRA layers, and of a whole training step, for
    one picture.

    Args:
        base: folder in diffusers format; only its configurations are read.
        resolution: side of the picture in pixels.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from peft import LoraConfig

    from benchmarks.plain_baseline import TARGETS

    vae = read_config(base, "vae")
    side = resolution // 2 ** (len(vae["block_out_channels"]) - 1)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(read_config(base, "unet"))
        unet.requires_grad_(False)
        # Attention in single products, so that each of them is counted.
        unet.set_attn_processor(AttnProcessor())
        latents = torch.empty(1, unet.config.in_channels, side, side)
        prompt = torch.empty(1, TOKENS, unet.config.cross_attention_dim)
        extra = None
        if unet.config.addition_embed_type == "text_time":
            pooled = read_config(base, "text_encoder_2")["projection_dim"]
            extra = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        timesteps = torch.zeros(1, dtype=torch.long)

        def forward() -> Any:
            return unet(latents, timesteps, prompt, added_cond_kwargs=extra, return_dict=False)[0]

        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS[targets]))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            forward()
        alone = float(counter.get_total_flops())
        if text_encoder:
            prompt.requires_grad_(True)
        with FlopCounterMode(display=False) as counter:
            forward().sum().backward()
        step = float(counter.get_total_flops())
    return alone, step + (_text_flops(base, rank) if text_encoder else 0.0)


def _text_flops(base: Path, rank: int) -> float:
    """Operations of forward and backward of the text encoders of a base with LoRA layers."""
    from peft import LoraConfig
    from transformers import CLIPTextConfig, CLIPTextModel

    from benchmarks.plain_baseline import TEXT_TARGETS

    total = 0.0
    for folder in sorted(base.glob("text_encoder*")):
        with torch.device("meta"):
            config = CLIPTextConfig(**read_config(base, folder.name))
            encoder = CLIPTextModel._from_config(config, attn_implementation="eager")
            encoder.requires_grad_(False)
            targets = LoraConfig(r=rank, lora_alpha=rank, target_modules=TEXT_TARGETS)
            encoder.add_adapter(targets)
            ids = torch.zeros(1, TOKENS, dtype=torch.long)
            with FlopCounterMode(display=False) as counter:
                encoder(ids).last_hidden_state.sum().backward()
        total += float(counter.get_total_flops())
    return total


def matrix_rate(device: str, precision: str, threads: int) -> float:
    """Operations per second of a large matrix product on random numbers: the median of several.

    On a processor that of the quicker of two libraries, PyTorch's own choice and oneDNN.
    """
    torch.set_num_threads(threads)
    size, times = (8192, 20) if device == "cuda" else (2048, 7)
    left, right = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
    products: list[Callable[[Tensor, Tensor], Tensor]] = [torch.mm]
    if device != "cuda":
        products.append(matmul)
    seconds = min(_median_seconds(product, left, right, times) for product in products)
    # CPU seconds are those of all threads together.
    return 2 * size**3 / seconds * (1 if device == "cuda" else threads)


def _median_seconds(
    product: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor, times: int
) -> float:
    clock = time.perf_counter if left.is_cuda else time.process_time
    seconds = []
    for number in range(times + 3):
        _wait(left.device.type)
        start = clock()
        product(left, right)
        _wait(left.device.type)
        if number >= 3:  # the first ones warm up
            seconds.append(clock() - start)
    return median(seconds)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """`flops BASE RESOLUTION RANK TARGETS TEXT_ENCODER` or `rate DEVICE PRECISION THREADS`, in a
    process of its own; prints JSON."""
    what, *words = sys.argv[1:]
    if what == "flops":
        base, resolution, rank, targets, text = words
        found: Any = count_flops(
            Path(base),
            int(resolution),
            rank=int(rank),
            targets=targets,
            text_encoder=text == "True",
        )
    else:
        found = matrix_rate(words[0], words[1], int(words[2]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
