"""Model families: what the trainer needs of a base model, and the table of those it knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from trainer.registry import Entry, Registry
from trainer.types import Prompts

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Component = Literal["unet", "text_encoder", "text_encoder_2"]


@dataclass(frozen=True, slots=True)
class AttentionFacts:
    """The UNet's attention over the most tokens, which takes the most time and memory.

    latents_per_token: side of the square of latents that one token stands for.
    """

    heads: int = 8
    head_width: int = 40
    latents_per_token: int = 1

    @property
    def width(self) -> int:
        """Of a token, in channels."""
        return self.heads * self.head_width


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """What is known of a base from its configuration files, before any weight is read.

    folder: that of the base, or its single file.
    width: cross-attention width D (768 for SD 1.x).
    pixels_per_latent: side of the square of pixels that one latent stands for (8 in SD 1.x).
    fits_real: whether a LoRA made on it fits the released models of the family.
    pooled: width P of the pooled prompt embeddings, 0 in families without.
    zero_terminal_snr: whether its noise schedule ends in pure noise (arXiv 2305.08891).
    vae: folder or file of a VAE to take in place of the base's own.
    tokenizer: folder of a tokenizer to take in place of the base's own.
    attention: of its UNet.
    latent_channels: of its VAE.
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
    pooled: int = 0
    zero_terminal_snr: bool = False
    vae: Path | None = None
    tokenizer: Path | None = None
    attention: AttentionFacts = AttentionFacts()
    latent_channels: int = 4


@dataclass(frozen=True, slots=True)
class FamilyNames:
    """How files of a family name things, in the words of other programs.

    prefixes: for each component, the prefix of its keys and what is put before a module's path.
    architecture, implementation: ModelSpec's strings. version, v2: sd-scripts' strings.
    ldm: whether layers of the UNet go by LDM's names, as in sd-scripts' files of SDXL.
    """

    prefixes: Mapping[str, tuple[str, str]]
    architecture: str
    implementation: str
    version: str
    v2: bool
    ldm: bool = False


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load a base: where to, in which number format, with which attention.

    clip_skip: which layer of the text encoder prompts are taken from, counted from the end as
        A1111 does (1: the last); 0: the family's own. Families that were trained on one layer
        only keep to it and say so.
    prompt_chunks: 75 tokens each, 1 to 3; text beyond is cut off.
    checkpointing: the UNet's activations are computed again in the backward pass instead of kept
        (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174).
    checkpoint_share: of the UNet's blocks that are checkpointed then, 0 to 1.
    blocks: how the UNet's blocks compute: "plain" as diffusers has them; "direct" without what they
        have no use for (`trainer.families.direct`); "lean" so, and keeping less for the backward
        pass (`trainer.families.lean`).
    weights: number format in which the frozen weights are kept: "same" as they compute in, or one
        of `trainer.families.quantize.FORMATS`.
    stream_blocks: the weights of the UNet's blocks stay in main memory and come to the device when
        they compute (`trainer.families.streaming`).
    compiling: the UNet's transformer blocks are compiled for this machine, in training
        (`trainer.families.compiling`); not together with checkpointing, packed weights or
        streaming.
    finish: called with each of `Backbone.components` when its weights have been read, each time.
    """

    device: torch.device
    dtype: torch.dtype
    attention: str
    clip_skip: int = 0
    prompt_chunks: int = 1
    checkpointing: bool = False
    checkpoint_share: float = 1.0
    blocks: Literal["plain", "direct", "lean"] = "plain"
    weights: str = "same"
    stream_blocks: bool = False
    compiling: bool = False
    finish: Callable[[nn.Module], object] | None = None


class Backbone(Protocol):
    """A loaded base model.

    Shapes: B pictures, C latent channels, h and w latent sides, T tokens, D prompt width, P pooled
    width.
    """

    facts: BaseFacts
    names: FamilyNames

    @property
    def device(self) -> torch.device:
        """Where it computes. Each part is there only from its first use on."""
        ...

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know of how it was loaded, of the parts that were needed so far:
        sentences, each to be said once."""
        ...

    @property
    def components(self) -> Mapping[str, nn.Module]:
        """The modules that can be trained: `unet`, `text_encoder` and, if any, `text_encoder_2`.
        Each is read from its files when it is asked for."""
        ...

    @property
    def held(self) -> Mapping[str, nn.Module]:
        """Those of `components` that are in memory."""
        ...

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """The base's noise schedule, in diffusers' words."""
        ...

    def encode_pixels(self, pixels_BCHW: Tensor, noise_BChw: Tensor) -> Tensor:
        """Pixels in [-1, 1] -> scaled latents float32, the posterior drawn with the given noise."""
        ...

    def decode_latents(self, latents_BChw: Tensor, *, tiled: bool = False) -> Tensor:
        """Scaled latents -> pixels float32 in [-1, 1], or a little beyond.

        tiled: in overlapping parts of at most `TILE` latents a side, which takes far less memory
        and gives nearly the same.
        """
        ...

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) of a picture's latents; sides in px."""
        ...

    def encode_prompts(self, texts: Sequence[str]) -> Prompts:
        """Texts -> their embeddings; differentiable.

        Each text takes as many chunks of 75 tokens as it needs, up to `LoadOptions.prompt_chunks`;
        T is 77 for each chunk of the longest, the others are filled up with empty chunks.
        """
        ...

    def token_count(self, text: str) -> int:
        """Tokens of a text without start and end; what no chunk has room for is cut off."""
        ...

    def predict(
        self,
        noisy_BChw: Tensor,
        timesteps_B: Tensor,
        prompts: Prompts,
        sizes_B6: Tensor | None = None,
    ) -> Tensor:
        """The UNet's output, float32 [B, C, h, w].

        sizes_B6: `CachedSample.sizes` of each picture, for families that are told of them; None:
        pictures that were never another size.
        """
        ...

    def pipeline(self) -> Any:
        """A diffusers pipeline over the very UNet of this backbone, for drawing latents by prompt
        embeddings: without text encoders and VAE, which need not be there meanwhile."""
        ...

    def hold(self, *parts: str) -> None:
        """Move parts onto the device, before something is attached to them or in good time; again
        after that, so that where weights are streamed what was attached is there as well.

        parts: "vae", or as in `components`.
        """
        ...

    def release(self, *parts: str) -> None:
        """Let go of parts that are not needed for a while: they leave the device. What computes on
        the processor is forgotten and read from its files again.

        parts: "vae", or text encoders as in `components` to which nothing was attached. Each comes
        back when it is next used.
        """
        ...

    def complete(self, *parts: str) -> AbstractContextManager[None]:
        """Inside the `with` block the parts (or all) are on the device; text encoders and VAE that
        were not there before leave it again afterwards."""
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
    {
        "sd1": Entry("trainer.families.sd1:FAMILY", "Stable Diffusion 1.x and small models of it"),
        "sd2": Entry("trainer.families.sd2:FAMILY", "Stable Diffusion 2.x, epsilon and v"),
        "sdxl": Entry("trainer.families.sdxl:FAMILY", "Stable Diffusion XL and its relatives"),
    },
)
