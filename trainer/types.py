"""The data that flows through a training run, one frozen dataclass per stage.

    folder -> Photo -> Captioned -> Bucketed -> CachedSample -> Batch -> loss

Sizes are always (width, height) as a `Size`; tensors are always (height, width).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.transfer import to_device

if TYPE_CHECKING:
    import torch
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


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """A rectangle of a picture, in pixels; `right` and `bottom` are just outside it."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top


@dataclass(frozen=True, slots=True)
class Face:
    """A face in a photo.

    box: in pixels of the upright photo at its full size. score: of the detector, 0..1.
    landmarks: (x, y) of the right and the left eye as the person has them, the nose, the right and
    the left corner of the mouth; () where the detector finds none.
    """

    box: Box
    score: float
    landmarks: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Photo:
    """A readable picture: its upright size and the SHA-256 of its file.

    mask: the picture beside it that says which parts are trained (white: yes).
    mask_digest: SHA-256 of that file; "" without one.
    notices: what was unusual in reading it, each going on from the file's name ("is an animation;
    its first picture is used").
    """

    path: Path
    size: Size
    digest: str
    mask: Path | None = None
    mask_digest: str = ""
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Captioned:
    """A photo with the texts it is trained on, one of them at a time.

    texts: at least one. origin: "sidecar", "captioner" or "template". set_name: of its set of
    photos, whose trigger and class the texts name.
    """

    photo: Photo
    texts: tuple[str, ...]
    origin: str
    set_name: str = ""

    @property
    def text(self) -> str:
        """The first of its texts: what is shown where there is room for one."""
        return self.texts[0]


@dataclass(frozen=True, slots=True)
class Variant:
    """How a training picture differs from the plain photo, so that no two epochs are alike.

    number: 0 is the photo as it is. flip: mirrored left and right. brightness, contrast,
    saturation: factors, 1 leaves them. (The crop of a variant is in its `Bucketed`.)
    """

    number: int = 0
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0


@dataclass(frozen=True, slots=True)
class Bucketed:
    """Where a photo is trained: resized to `resized`, then cropped at (`left`, `top`) to `bucket`.

    All integers, in pixels: enough to redo the crop exactly.
    variant: what else is done to the picture. repeats: how often it comes in an epoch.
    weight: of its loss beside that of other sets, 1 for a single set.
    faces: those found in the photo, the largest first.
    group: the training pictures of one photo at one size share it: each epoch takes one of them.
    """

    captioned: Captioned
    bucket: Size
    resized: Size
    left: int
    top: int
    variant: Variant = Variant()
    repeats: int = 1
    weight: float = 1.0
    faces: tuple[Face, ...] = ()
    group: str = ""

    @property
    def size_conditioning(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's size and crop conditioning (arXiv 2307.01952, section 2.2), each as (height,
        width): of the photo as it came, of the crop's upper left corner, of the picture trained."""
        size, bucket = self.captioned.photo.size, self.bucket
        # Of a mirrored picture the corner is that of the mirrored photo's crop.
        right = self.resized.width - self.left - bucket.width
        left = right if self.variant.flip else self.left
        return (size.height, size.width, self.top, left, bucket.height, bucket.width)


@dataclass(frozen=True, slots=True)
class Prompts:
    """Texts as a base's text encoders tell them to its UNet.

    embeddings_BTD: of each token. pooled_BP: of each text as a whole, which SDXL takes beside
    them; None in families that do not.
    """

    embeddings_BTD: Tensor
    pooled_BP: Tensor | None = None

    def to(self, device: torch.device) -> Prompts:
        """The same on a device."""
        pooled_BP = None if self.pooled_BP is None else to_device(self.pooled_BP, device)
        return Prompts(to_device(self.embeddings_BTD, device), pooled_BP)

    def kept(self) -> Prompts:
        """The same as float32 in main memory."""
        pooled_BP = None if self.pooled_BP is None else self.pooled_BP.float().cpu()
        return Prompts(self.embeddings_BTD.float().cpu(), pooled_BP)


@dataclass(frozen=True, slots=True)
class CachedSample:
    """One training picture, ready for training.

    key: names the sample in every random draw (the photo's digest, with `+flip` when mirrored and
    the like: unique for each training picture).
    latents_Chw: float32, already scaled as the UNet expects.
    texts: the captions, one of which is used at a time.
    prompt_TD: prompt embeddings float32 of the caption, or None while the text encoder is trained
    or captions vary. pooled_P: its pooled embeddings float32, in families that have them.
    weights_hw: float32 weight of each latent in the loss, of mean 1; None: all alike.
    group: samples of one photo at one size share it; each epoch takes one of them. "": its key.
    repeats: how often its photo comes in an epoch. weight: of its loss.
    sizes: `Bucketed.size_conditioning`. set_name: of its set of photos.
    """

    key: str
    latents_Chw: Tensor
    texts: tuple[str, ...]
    prompt_TD: Tensor | None = None
    weights_hw: Tensor | None = None
    pooled_P: Tensor | None = None
    group: str = ""
    repeats: int = 1
    weight: float = 1.0
    sizes: tuple[int, int, int, int, int, int] = (0, 0, 0, 0, 0, 0)
    set_name: str = ""

    @property
    def text(self) -> str:
        """The first of its texts."""
        return self.texts[0]


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of one bucket, stacked.

    latents_BChw: float32. samples: the B samples themselves. prompt_BTD: prompt embeddings, or
    None while the text encoder is trained or captions vary. weights_Bhw: float32 weight of each
    latent, of mean 1 for each sample; None: all alike. pooled_BP: pooled embeddings, in families
    that have them.
    """

    latents_BChw: Tensor
    samples: tuple[CachedSample, ...]
    prompt_BTD: Tensor | None = None
    weights_Bhw: Tensor | None = None
    pooled_BP: Tensor | None = None

    @property
    def prompts(self) -> Prompts | None:
        """The embeddings of its captions, where samples have them."""
        return None if self.prompt_BTD is None else Prompts(self.prompt_BTD, self.pooled_BP)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(sample.key for sample in self.samples)
