"""The data that flows through a training run, one frozen dataclass per stage.

    folder -> Photo -> Captioned -> Bucketed -> CachedSample -> Batch -> loss

Sizes are always (width, height) as a `Size`; tensors are always (height, width).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, order=True)
class Size:
    """Width and height in pixels."""

    width: int
    height: int

    @property
    def area(self) -> int:
        return self.width * self.height

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True, slots=True)
class Photo:
    """A readable picture: its upright size and the SHA-256 of its file."""

    path: Path
    size: Size
    digest: str


@dataclass(frozen=True, slots=True)
class Captioned:
    """A photo with the text it is trained on; `origin` is "sidecar", "captioner" or "template"."""

    photo: Photo
    text: str
    origin: str


@dataclass(frozen=True, slots=True)
class Bucketed:
    """Where a photo is trained: resized to `resized`, then cropped at (`left`, `top`) to `bucket`.

    All integers, in pixels: enough to redo the crop exactly.
    """

    captioned: Captioned
    bucket: Size
    resized: Size
    left: int
    top: int


@dataclass(frozen=True, slots=True)
class CachedSample:
    """One photo, ready for training.

    key: names the sample in every random draw (the photo's digest, with `+flip` when mirrored).
    latents_Chw: float32, already scaled as the UNet expects.
    text: the caption.
    prompt_TD: prompt embeddings float32, or None while the text encoder is trained.
    """

    key: str
    latents_Chw: Tensor
    text: str
    prompt_TD: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of one bucket, stacked.

    latents_BChw: float32. texts: B captions. keys: B sample keys.
    prompt_BTD: prompt embeddings, or None while the text encoder is trained.
    """

    latents_BChw: Tensor
    texts: tuple[str, ...]
    keys: tuple[str, ...]
    prompt_BTD: Tensor | None = None
