"""Model families: what the trainer needs of a base model, and the table of those it knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from trainer.registry import Entry, Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Component = Literal["unet", "text_encoder"]


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """What is known of a base from its configuration files, before any weight is read.

    width: cross-attention width D (768 for SD 1.x).
    pixels_per_latent: side of the square of pixels that one latent stands for (8 in SD 1.x).
    fits_real: whether a LoRA made on it fits the released models of the family.
    """

    family: str
    name: str
    folder: Path
    resolution: int
    bucket_step_px: int
    width: int
    pixels_per_latent: int
    prediction: str
    fits_real: bool
    embedded: bool


@dataclass(frozen=True, slots=True)
class FamilyNames:
    """How files of a family name things, in the words of other programs.

    prefixes: for each component, the prefix of its keys and what is put before a module's path.
    architecture, implementation: ModelSpec's strings. version, v2: sd-scripts' strings.
    """

    prefixes: Mapping[str, tuple[str, str]]
    architecture: str
    implementation: str
    version: str
    v2: bool


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load a base: where to, in which number format, with which attention."""

    device: torch.device
    dtype: torch.dtype
    attention: str


class Backbone(Protocol):
    """A loaded base model.

    Shapes: B pictures, C latent channels, h and w latent sides, T tokens, D prompt width.
    """

    facts: BaseFacts
    names: FamilyNames

    @property
    def components(self) -> Mapping[str, nn.Module]:
        """The modules that can be trained: `unet` and `text_encoder`."""
        ...

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """The base's noise schedule, in diffusers' words."""
        ...

    def layer_names(self, component: str, targets: str) -> tuple[str, ...]:
        """Dotted paths in `component` of the layers that a target set stands for."""
        ...

    def encode_pixels(self, pixels_BCHW: Tensor, noise_BChw: Tensor) -> Tensor:
        """Pixels in [-1, 1] -> scaled latents float32, the posterior drawn with the given noise."""
        ...

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) of a picture's latents; sides in px."""
        ...

    def encode_prompts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> prompt embeddings [B, T, D]; differentiable."""
        ...

    def token_count(self, text: str) -> int:
        """Tokens of a text without start and end; more than 75 are cut off."""
        ...

    def predict(self, noisy_BChw: Tensor, timesteps_B: Tensor, prompt_BTD: Tensor) -> Tensor:
        """The UNet's output, float32 [B, C, h, w]."""
        ...

    def pipeline(self) -> Any:
        """A diffusers pipeline over the very modules of this backbone, for drawing."""
        ...


class Family(Protocol):
    """A module of this room: recognises a base of its family and loads it."""

    def read_facts(self, folder: Path) -> BaseFacts | None:
        """Facts of the base in `folder`, or None when it is not of this family."""
        ...

    def token_counter(self, facts: BaseFacts) -> Callable[[str], int]:
        """A function that counts the tokens of a text, without start and end, as the base does.

        Raises:
            ModelError: the base has no tokenizer.
        """
        ...

    def load(self, facts: BaseFacts, options: LoadOptions) -> Backbone:
        """Read the weights."""
        ...


FAMILIES = Registry(
    "model family",
    {"sd1": Entry("trainer.families.sd1:FAMILY", "Stable Diffusion 1.x and small models of it")},
)
