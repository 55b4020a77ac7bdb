"""What a run needs of a GPU's memory, estimated; and what makes it fit into a card of some size.

A memory class is the size of a card. Of the settings that save memory without changing what is
learned from, those are taken with which a step is the quickest among those that fit. All numbers
here are counted on the published configurations or follow from the number formats; `--preflight`
measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from trainer.families import BaseFacts
from trainer.training.device import Device
from trainer.training.job import Job
from trainer.training.memory import TRAINED_BYTES

GIB = 2**30
# Classes by their names in the settings: all memory of a card, in GiB.
CLASSES = {"4gb": 4, "6gb": 6, "8gb": 8, "12gb": 12, "24gb": 24}
# Of it the driver, PyTorch's kernels and a desktop take this much in GiB, and this share is lost
# between pieces.
CONTEXT_GIB = 0.6
LOST = 0.05
# What a class chooses, by the names of the settings.
CHOSEN = (
    "model.weights",
    "model.checkpointing",
    "model.checkpoint_share",
    "model.stream_blocks",
    "optimizer.name",
)
# By how much of a step each makes it slower. Checkpointing: counted operations, all blocks. The
# others are ranks more than times: int8 weights come after all that leaves the numbers as they are
# (their gradients are off by 4 % instead of 2 %), then streaming, since it waits for the bus, and
# nf4 where all that is not enough: it is far less exact.
CHECKPOINTING, EIGHT_BITS, STREAMED = 0.37, 0.02, 1.0
PACKED = {"same": 0.0, "int8": 0.4, "fp8": 0.4, "nf4": 2.0}
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Channels of the first block of the published UNets.
WIDTH = 320
# Values kept for the backward pass by latent and by channel of the first block, for each of SHARES:
# counted (`python -m benchmarks.saved_bytes`), first for adapters on attention alone, then on all
# layers.
KEPT = {
    "sd1": ((205, 76, 38, 34, 33), (276, 138, 90, 68, 59)),
    "sd2": ((202, 74, 38, 34, 33), (268, 131, 85, 65, 58)),
    "sdxl": ((414, 267, 170, 72, 40), (482, 326, 222, 118, 54)),
}
ATTENTION_ALONE = ("attention", "cross-attention", "cross-kv")
# With checkpointing the largest block is there once more, while it is computed again.
AGAIN = 25
# PyTorch's own layers (model.fast=off) keep at most so much more.
PLAIN_LAYERS = 1.5
# Values that are there at once beside what is kept, by latent and by channel of the first block;
# and what libraries take for their own work, in GiB.
AT_ONCE, WORKSPACE_GIB = 12, 0.25
# Of the AdamW in eight bits: fp32 value and gradient, two codes with their scales.
EIGHT_BIT_TRAINED_BYTES = 10.1
# Of a packed number, with its part of the scales where that counts: 64 numbers share one in nf4.
PACKED_BYTES = {"int8": 1.0, "fp8": 1.0, "nf4": 0.5 + 4 / 64}


@dataclass(frozen=True, slots=True)
class Released:
    """A family's published configuration: numbers in its parts.

    text: of the text encoders. packed: the share of UNet and text encoders that is packed in int8,
    fp8 or nf4.
    in_place: of the UNet, what is not streamed. block: the largest that is.
    by_rank: of adapters of rank 1, by targets of the UNet. text_by_rank: of the text encoders'.
    """

    unet: int
    text: int
    packed: tuple[float, float]
    in_place: int
    block: int
    by_rank: Mapping[str, int]
    text_by_rank: Mapping[str, int]


def _targets(attention: int, ff: int, whole: int, cross: int, cross_kv: int) -> dict[str, int]:
    names = ("attention", "attention+ff", "all", "cross-attention", "cross-kv")
    return dict(zip(names, (attention, ff, whole, cross, cross_kv), strict=True))


RELEASED = {
    "sd1": Released(
        *(859_520_964, 123_060_480, (0.99, 0.69), 27_295_684, 49_152_000),
        _targets(199_296, 423_936, 1_050_816, 99_456, 49_536),
        {"attention": 73_728, "attention+mlp": 165_888},
    ),
    "sd2": Released(
        *(865_910_724, 340_387_840, (0.99, 0.85), 27_295_684, 49_152_000),
        _targets(207_488, 432_128, 1_059_008, 107_648, 57_728),
        {"attention": 188_416, "attention+mlp": 423_936},
    ),
    "sdxl": Released(
        *(2_567_463_684, 817_720_320, (0.99, 0.87), 32_654_084, 49_152_000),
        _targets(1_451_520, 2_659_840, 3_074_240, 785_920, 453_120),
        {"attention": 401_408, "attention+mlp": 903_168},
    ),
}


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be trained, as far as it takes memory.

    latents: of all pictures of the largest batch. size: the base's numbers as a share of the
    published ones'. width: channels of its first block. text_targets: of the text encoders; "":
    they are not trained. text_there: whether they are on the GPU in training.
    """

    family: str
    latents: int
    rank: int = 16
    text_rank: int = 16
    targets: str = "attention"
    text_targets: str = "attention"
    text_there: bool = True
    value_bytes: int = 2
    plain_layers: bool = False
    size: float = 1.0
    width: int = WIDTH


@dataclass(frozen=True, slots=True)
class Choice:
    """Settings that save memory. share: of the blocks that are checkpointed, 0 for none."""

    weights: str = "same"
    share: float = 0.0
    stream: bool = False
    optimizer: str = "adamw"

    @property
    def slower(self) -> float:
        """By how much of a step, about; the order in which choices are tried."""
        return (
            CHECKPOINTING * self.share
            + EIGHT_BITS * (self.optimizer == "adamw8bit")
            + PACKED[self.weights]
            + STREAMED * self.stream
        )

    @property
    def settings(self) -> dict[str, Any]:
        """As they are set."""
        values = (self.weights, self.share > 0, self.share or 1.0, self.stream, self.optimizer)
        return dict(zip(CHOSEN, values, strict=True))

    @property
    def words(self) -> str:
        parts = []
        if self.optimizer == "adamw8bit":
            parts.append("AdamW in 8 bits")
        if self.share:
            share = "all" if self.share == 1 else f"{self.share:.0%}"
            parts.append(f"{share} of the blocks checkpointed")
        if self.weights != "same":
            parts.append(f"frozen weights in {self.weights}")
        if self.stream:
            parts.append("blocks streamed from main memory")
        return ", ".join(parts) or "nothing has to be saved"


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes on the GPU in a step: of frozen weights, of what is trained, of what is kept for the
    backward pass, and of what is there for a moment."""

    frozen: float
    trained: float
    kept: float
    beside: float

    @property
    def all(self) -> float:
        return self.frozen + self.trained + self.kept + self.beside


def need(work: Work, choice: Choice) -> Need:
    """What a step takes."""
    base = RELEASED[work.family]
    unet = base.in_place + 2 * base.block if choice.stream else base.unet
    text = base.text if work.text_there else 0
    frozen = sum(
        numbers * work.size * _number_bytes(work, choice, packed)
        for numbers, packed in zip((unet, text), base.packed, strict=True)
    )
    numbers = work.rank * base.by_rank[work.targets]
    if work.text_targets:
        numbers += work.text_rank * base.text_by_rank[work.text_targets]
    each = EIGHT_BIT_TRAINED_BYTES if choice.optimizer == "adamw8bit" else TRAINED_BYTES
    # Shares in between save at least what the next lower one does.
    step = max(number for number, share in enumerate(SHARES) if share <= choice.share)
    row = KEPT[work.family][work.targets not in ATTENTION_ALONE]
    values: float = row[step] + (AGAIN if step else 0)
    values *= PLAIN_LAYERS if work.plain_layers else 1
    channel = work.latents * work.width * work.value_bytes
    return Need(
        frozen,
        numbers * work.size * each,
        values * channel,
        AT_ONCE * channel + WORKSPACE_GIB * GIB,
    )


def _number_bytes(work: Work, choice: Choice, packed: float) -> float:
    """Of a frozen number, over the packed and the others."""
    if choice.weights == "same":
        return work.value_bytes
    return packed * PACKED_BYTES[choice.weights] + (1 - packed) * work.value_bytes


def room_of(gib: float) -> float:
    """Bytes that a card of that size has for a step."""
    return (gib * (1 - LOST) - CONTEXT_GIB) * GIB


def choose(work: Work, room: float, fixed: Mapping[str, Any]) -> tuple[Choice, bool]:
    """The quickest choice that fits into `room` bytes, and whether it does; else the smallest.

    fixed: settings of `CHOSEN` that are what they are.
    """
    choices = sorted(_choices(fixed), key=lambda choice: choice.slower)
    fitting = (choice for choice in choices if need(work, choice).all <= room)
    found = next(fitting, None)
    return found or min(choices, key=lambda choice: need(work, choice).all), found is not None


def _choices(fixed: Mapping[str, Any]) -> Iterator[Choice]:
    """All that leave what is fixed as it is."""

    def open_to(name: str, *values: Any) -> tuple[Any, ...]:
        return (fixed[name],) if name in fixed else values

    shares: tuple[float, ...] = SHARES
    if "model.checkpoint_share" in fixed:
        shares = (0.0, float(fixed["model.checkpoint_share"]))
    if "model.checkpointing" in fixed:
        on = fixed["model.checkpointing"]
        shares = tuple(share for share in shares if share) or shares if on else (0.0,)
    for values in product(
        open_to("model.weights", "same", "int8", "nf4"),
        shares,
        open_to("model.stream_blocks", False, True),
        open_to("optimizer.name", "adamw", "adamw8bit"),
    ):
        yield Choice(*values)


def work_of(job: Job, device: Device) -> Work:
    """What a job trains."""
    config, adapter = job.config, job.config.adapter
    pictures = config.data.batch_size
    if config.objective.prior_weight:
        pictures += config.objective.prior_batch_size
    largest = max(picture.bucket.area for picture in (*job.pictures, *job.class_pictures))
    ranks = [adapter.rank, *(block.rank or 0 for block in adapter.blocks)]
    attention = job.facts.attention
    return Work(
        family=job.facts.family,
        latents=pictures * largest // job.facts.pixels_per_latent**2,
        rank=max(ranks),
        text_rank=adapter.text_encoder_rank or adapter.rank,
        targets=adapter.targets,
        text_targets=adapter.text_encoder_targets if adapter.text_encoder else "",
        # Captions that vary are encoded as they come.
        text_there=adapter.text_encoder or job.captions_vary,
        value_bytes=torch.finfo(device.dtype).bits // 8,
        plain_layers=config.model.fast == "off",
        size=_size(job.facts),
        width=attention.heads * attention.head_width // attention.latents_per_token,
    )


def _size(facts: BaseFacts) -> float:
    """The base's numbers as a share of the published ones'; of other sizes at most, by its files,
    which have two bytes or four for each."""
    if facts.fits_real:
        return 1.0
    folder = facts.folder / "unet"
    files = [facts.folder] if facts.folder.is_file() else [*folder.glob("*.safetensors")]
    size = sum(path.stat().st_size for path in files) / 2
    return min(1.0, size / RELEASED[facts.family].unet) if size else 1.0


def room_now(device: Device, processes: int) -> float:
    """Bytes that the GPU has for this process; of several that train together each takes the same,
    so what is free now on one of them does not count."""
    free, total = torch.cuda.mem_get_info(device.device)
    room = room_of(total / GIB)
    # In steps of a quarter of a GiB, so that small changes change nothing.
    return min(room, free * (1 - LOST) // (GIB / 4) * GIB / 4) if processes == 1 else room
