"""Memory that does not suffice: noticed wherever it happens, and explained with what would help.

How much a setting saves is estimated from a simple model: the weights as they lie in memory, and
for each latent of a training picture a number of values that the backward pass needs, in proportion
to the width of the UNet's first block. An estimate; `--preflight` measures.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.errors import DeviceError
from trainer.families import Backbone
from trainer.training.device import Device
from trainer.training.job import FREE_ON_RESUME, Job

# Values kept for the backward pass by latent and by channel of the UNet's first block: counted for
# the attention layers of the published configurations, with attention that keeps no matrix.
KEPT_VALUES = {"sd1": 310, "sd2": 290, "sdxl": 535}
# What is left of them with checkpointing: the blocks' inputs, and one block while it is computed.
CHECKPOINTED = 0.35
# Values that are there at once for each pixel while the VAE encodes: four times its first block's
# 128 channels.
VAE_VALUES = 512
# Beside the UNet's activations those of a trained text encoder.
TEXT_SHARE = 0.04
# fp32 value, gradient and the optimizer's two memories of each trained number.
TRAINED_BYTES = 16
# What the system's own words for it have in common (PyTorch on CPU, Windows, CUDA, Metal, cuBLAS).
FULL_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed")
MOST_NAMED = 3
# Of the frozen weights at most so many are in blocks that can be streamed.
STREAMED_SHARE = 0.85


@dataclass(frozen=True, slots=True)
class Saving:
    """A setting as it is typed, and about how many bytes it would save."""

    setting: str
    size: int

    @property
    def words(self) -> str:
        name = self.setting.partition("=")[0]
        size = f"about {self.size / 2**30:.1f} GB" if self.size >= 2**30 // 10 else "a little"
        later = ", also when going on with --resume" if name in FREE_ON_RESUME else ""
        return f"--set {self.setting} saves {size}{later}"


def is_memory_full(error: BaseException) -> bool:
    """Whether an error says that memory, of whatever device, does not suffice."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in FULL_WORDS
    )


def let_go(error: BaseException) -> None:
    """Give back what an error still holds: the tensors of the functions it came through."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def explained(doing: str, helps: Callable[[], Sequence[Saving]]) -> Iterator[None]:
    """Inside the `with` block, full memory becomes an error that says what to do.

    Args:
        doing: completes "The memory was full while ...".
        helps: what would have helped, the most first; called only then.

    Raises:
        DeviceError: the memory was full.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory_full(error):
            raise
        let_go(error)
        raise memory_error(doing, helps(), error) from error


@contextmanager
def left_out(what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Inside the `with` block, full memory only means that the rest of it is left out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory_full(error):
            raise
        let_go(error)
        say(
            f"The memory is too full for {what}: left out, training goes on. Smaller samples need "
            "less (--w and --h in the prompts file)."
        )


def memory_error(
    doing: str, helps: Sequence[Saving], error: BaseException, saved: str = ""
) -> DeviceError:
    """The error that explains full memory; `saved`: a sentence about what is safe."""
    lines = [saved] if saved else []
    if helps:
        lines.append("What helps most (estimates; --preflight measures):")
        lines += [f"  {saving.words}" for saving in helps]
    lines.append("Closing other programs that use this memory helps as well.")
    reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    return DeviceError(f"The memory was full while {doing}.", where=reason, fix="\n".join(lines))


def helps_loading(job: Job, device: Device) -> list[Saving]:
    """What makes the base smaller, before it is there: estimated from the sizes of its files."""
    size = sum(
        path.stat().st_size
        for path in ([job.facts.folder] if job.facts.folder.is_file() else _weights(job))
    )
    model = job.config.model
    found = []
    if device.precision == "fp32":
        found.append(Saving("model.precision=bf16", size // 2))
    if model.weights == "same" and model.device in ("auto", "cuda") and torch.cuda.is_available():
        found.append(Saving("model.weights=int8", size // 2))
    return found


def helps_encoding(job: Job, device: Device, backbone: Backbone) -> list[Saving]:
    """The settings that would save the most while photos become latents."""
    pixels = max(picture.bucket.area for picture in (*job.pictures, *job.class_pictures))
    kept = VAE_VALUES * pixels * _value_bytes(device)
    found = [*_smaller(job, kept), *_narrower(job, device, _weight_bytes(backbone), kept)]
    return sorted(found, key=lambda saving: -saving.size)[:MOST_NAMED]


def helps_training(job: Job, device: Device, backbone: Backbone) -> list[Saving]:
    """The settings that would save the most in training, at most three."""
    config = job.config
    side = job.facts.pixels_per_latent
    latents = max(p.bucket.area for p in (*job.pictures, *job.class_pictures)) // side**2
    unet: Any = backbone.components["unet"]
    values = KEPT_VALUES[job.facts.family] * int(unet.config.block_out_channels[0])
    pictures = config.data.batch_size
    if config.objective.prior_weight:
        pictures += config.objective.prior_batch_size
    kept = values * latents * pictures * _value_bytes(device)
    found = []
    if config.model.checkpointing:
        kept = int(kept * CHECKPOINTED)
    else:
        found.append(Saving("model.checkpointing=true", int(kept * (1 - CHECKPOINTED))))
    if config.data.batch_size > 1:
        found.append(Saving("data.batch_size=1", kept * (config.data.batch_size - 1) // pictures))
    weights = _weight_bytes(backbone)
    found += [*_smaller(job, kept), *_narrower(job, device, weights, kept)]
    if device.device.type == "cuda" and not config.model.stream_blocks:
        found.append(Saving("model.stream_blocks=true", int(STREAMED_SHARE * weights)))
    if config.adapter.text_encoder:
        found.append(Saving("adapter.text_encoder=false", _text_bytes(kept, device, backbone)))
    return sorted(found, key=lambda saving: -saving.size)[:MOST_NAMED]


def _smaller(job: Job, kept: int) -> list[Saving]:
    """Three quarters of the resolution. kept: bytes in proportion to its square."""
    side = job.square_px * 3 // 4 // 64 * 64
    share = (side / job.square_px) ** 2
    return [Saving(f"data.resolution={side}", int(kept * (1 - share)))] if side else []


def _narrower(job: Job, device: Device, weights: int, kept: int) -> list[Saving]:
    """Other number formats. weights, kept: bytes of what is frozen and of activations."""
    found = []
    if device.precision == "fp32":
        found.append(Saving("model.precision=bf16", (weights + kept) // 2))
    if job.config.model.weights == "same" and device.device.type == "cuda":
        found.append(Saving("model.weights=int8", weights - weights // _value_bytes(device)))
    return found


def _value_bytes(device: Device) -> int:
    return torch.finfo(device.dtype).bits // 8


def _weight_bytes(backbone: Backbone) -> int:
    parameters = [p for part in backbone.held.values() for p in part.parameters()]
    return sum(p.numel() * p.element_size() for p in parameters)


def _text_bytes(kept: int, device: Device, backbone: Backbone) -> int:
    """What the training of the text encoders takes: on a GPU their weights are there for it."""
    size = int(kept * TEXT_SHARE)
    for name, encoder in backbone.held.items():
        if name != "unet":
            numbers = [p.numel() for p in encoder.parameters() if p.requires_grad]
            size += sum(numbers) * TRAINED_BYTES
            if device.device.type != "cpu":
                size += sum(p.numel() * p.element_size() for p in encoder.parameters())
    return size


def _weights(job: Job) -> list[Path]:
    return [
        path
        for part in ("unet", "text_encoder", "text_encoder_2")
        for path in sorted((job.facts.folder / part).glob("*.safetensors"))
    ]
