"""The small convolutional net behind the two scores that were trained on the drawings.

Every pixel of the 64 px picture goes in: blocks of 2 x 2 pixels become one place with twelve
channels, so that fine lines are kept while the expensive layers work at 32 x 32 and below. Heads
are at about the same place in every avatar, so the last layer sees a grid of 4 x 4 places and knows
where what is.

Shapes: B pictures, F features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.errors import ModelError

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "likeness"
SIDE_PX = 64
# Pictures that go through a net at once.
BATCH = 64


class AvatarNet(nn.Module):
    """Pictures [B, 3, 64, 64] in -1 to 1 to outputs [B, F].

    Args:
        widths: channels at 32, 16, 8 and 4 px.
        hidden: width of the layer that sees the whole picture.
        outputs: F.
    """

    def __init__(self, widths: Sequence[int], hidden: int, outputs: int) -> None:
        super().__init__()
        first, second, third, fourth = widths
        self.body = nn.Sequential(
            nn.PixelUnshuffle(2),
            *_convolution(12, first, stride=1),
            *_convolution(first, second, stride=2),
            _Residual(second),
            *_convolution(second, third, stride=2),
            _Residual(third),
            *_convolution(third, fourth, stride=2),
            nn.Flatten(),
        )
        self.mix = nn.Sequential(
            nn.Linear(16 * fourth, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()
        )
        self.head = nn.Linear(hidden, outputs)

    def forward(self, pictures_B3hw: Tensor) -> Tensor:
        result: Tensor = self.head(self.mix(self.body(pictures_B3hw)))
        return result


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            *_convolution(width, width, stride=1),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, values: Tensor) -> Tensor:
        return F.relu(values + self.inner(values))


def _convolution(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


def load_net(folder: Path, name: str, outputs: int | None = None) -> tuple[AvatarNet, Any]:
    """The net `<name>.safetensors` in single precision, and what `<name>.json` says of it.

    Args:
        outputs: how many outputs it must have; None takes those of the file.

    Raises:
        ModelError: a file is missing or damaged.
    """
    weights, description = folder / f"{name}.safetensors", folder / f"{name}.json"
    try:
        facts = json.loads(description.read_text(encoding="utf-8"))
        state = {key: value.float() for key, value in load_file(weights).items()}
        layout = facts["net"]
        net = AvatarNet(layout["widths"], layout["hidden"], outputs or len(state["head.bias"]))
        # Batch norm's count of batches is for training only and is not in the file.
        missing = net.load_state_dict(state, strict=False).missing_keys
    except FileNotFoundError as error:
        raise ModelError(
            f"The weights of the {name} net are missing.",
            where=str(error.filename or weights),
            fix=f"Install again, or make them: python -m pretraining.{name}",
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"The weights of the {name} net cannot be read: {error}",
            where=str(weights),
            fix=f"Install again, or make them: python -m pretraining.{name}",
        ) from error
    if any(not key.endswith("num_batches_tracked") for key in missing):
        raise ModelError(f"The weights of the {name} net are not complete.", where=str(weights))
    return net.eval().requires_grad_(False), facts


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Centre squares as the nets want them: [B, 3, 64, 64] in -1 to 1."""
    size = (SIDE_PX, SIDE_PX)
    squares = [ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BOX) for image in images]
    pictures = torch.from_numpy(np.stack([np.asarray(square) for square in squares]))
    return pictures.permute(0, 3, 1, 2).float().div(127.5).sub(1)


@torch.no_grad()
def run_net(net: AvatarNet, images: Sequence[Image.Image], mirrored: bool = False) -> Tensor:
    """The outputs for all pictures, on one thread: [N, F].

    Args:
        mirrored: take the mean with the mirrored picture's outputs.
    """
    if not images:
        return torch.empty((0, net.head.out_features))
    threads = torch.get_num_threads()
    # Several threads stall each other on a net this small.
    torch.set_num_threads(1)
    try:
        parts = []
        for start in range(0, len(images), BATCH):
            pictures = to_tensor(images[start : start + BATCH])
            outputs = net(pictures)
            parts.append((outputs + net(pictures.flip(3))) / 2 if mirrored else outputs)
        return torch.cat(parts)
    finally:
        torch.set_num_threads(threads)
