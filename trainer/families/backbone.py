"""A loaded Stable Diffusion model: what 1.x, 2.x and XL have in common, which is nearly all.

They differ in their text encoders, in the layer that prompts are taken from, and in what the UNet
is told beside the prompt; the family hands all of that over as values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from trainer.errors import DeviceError
from trainer.families import BaseFacts, FamilyNames
from trainer.families.attention import KERNELS, WithKernel
from trainer.families.blockwise import BlockwiseProcessor
from trainer.families.prompts import Prompting, counter, embed, token_ids
from trainer.families.streaming import Streamer, stream
from trainer.families.tokenizers import padding_id
from trainer.types import Prompts

if TYPE_CHECKING:
    from torch import Tensor, nn


# A VAE takes about 512 numbers for each pixel while it encodes: 4 GB in fp32 at this size. Pictures
# beyond it are encoded in tiles of the size that the VAE was trained on.
MOST_WHOLE_PIXELS = 2 * 2**20
# Latents a side of the tiles that pictures are decoded in where memory is short.
TILE = 64


class Components(Mapping[str, Any]):
    """Modules by name, each read when it is asked for."""

    def __init__(self, names: Sequence[str], part: Callable[[str], Any]) -> None:
        self._names, self._part = tuple(names), part

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._part(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(kw_only=True)
class StableDiffusionBackbone:
    """A model of Stable Diffusion; see `trainer.families.Backbone` for shapes.

    encoders: the text encoders' names in diffusers' folders; one tokenizer serves them all.
    read: reads a part from its files, "vae" or as in `components`; each is read when it is first
        needed.
    said: gets a sentence when something was unusual in reading.
    device: where it computes. Each part goes there when it is first used: photos are encoded
        before the UNet takes its room.
    stream_blocks: of the UNet's blocks each goes there whenever it computes, and no longer.
    """

    facts: BaseFacts
    device: torch.device
    names: FamilyNames
    prompting: Prompting
    tokenizer: Any
    encoders: tuple[str, ...]
    read: Callable[[str], Any]
    scheduler: Any
    said: list[str] = field(default_factory=list)
    stream_blocks: bool = False
    _there: dict[str, Any] = field(init=False, default_factory=dict)
    _released: set[str] = field(init=False, default_factory=set)
    _unet_dtype: torch.dtype | None = field(init=False, default=None)
    _drawing: Any = field(init=False, default=None)
    _streamer: Streamer | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.device.type != "cpu":
            self._released = {"vae", *self.components}

    @property
    def components(self) -> Mapping[str, nn.Module]:
        return Components(("unet", *self.encoders), self._part)

    @property
    def held(self) -> Mapping[str, nn.Module]:
        return {name: part for name, part in self._there.items() if name != "vae"}

    @property
    def notices(self) -> tuple[str, ...]:
        return tuple(self.said)

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        return dict(self.scheduler.config)

    def encode_pixels(self, pixels_BCHW: Tensor, noise_BChw: Tensor) -> Tensor:
        vae = self._at_hand("vae")
        vae.use_tiling = encodes_in_tiles(pixels_BCHW.shape[3], pixels_BCHW.shape[2])
        posterior = vae.encode(pixels_BCHW.to(vae.device, vae.dtype)).latent_dist
        vae.use_tiling = False
        mean, std = posterior.mean.float(), posterior.std.float()
        return (mean + std * noise_BChw.to(mean.device)) * vae.config.scaling_factor

    def decode_latents(self, latents_BChw: Tensor, *, tiled: bool = False) -> Tensor:
        vae = self._at_hand("vae")
        scaled = latents_BChw.to(vae.device, vae.dtype) / vae.config.scaling_factor
        with _tiles(vae, self.facts.pixels_per_latent) if tiled else nullcontext():
            pixels_BCHW: Tensor = vae.decode(scaled, return_dict=False)[0]
        return pixels_BCHW.float()

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        factor = self.facts.pixels_per_latent
        return self.facts.latent_channels, height // factor, width // factor

    def encode_prompts(self, texts: Sequence[str]) -> Prompts:
        """The text without a caption is the empty one, encoded like any other, in training and in
        drawing: so A1111 and ComfyUI draw with SDXL. (diffusers' pipeline of SDXL takes zeros
        where no negative prompt is given.)"""
        embeddings, pooled = [], None
        for name in self.encoders:
            encoder = self._at_hand(name)
            ids_BnL = token_ids(
                self.tokenizer,
                texts,
                length=int(encoder.config.max_position_embeddings),
                chunks=self.prompting.chunks,
                pad=padding_id(self.facts.family, name, self.tokenizer.eos_token_id),
            )
            # SDXL takes the pooled embeddings of its second encoder.
            embeddings_BTD, pooled = embed(encoder, ids_BnL, self.prompting)
            embeddings.append(embeddings_BTD)
        return Prompts(torch.cat(embeddings, dim=-1), pooled)

    def token_count(self, text: str) -> int:
        return counter(self.tokenizer)(text)

    def predict(
        self,
        noisy_BChw: Tensor,
        timesteps_B: Tensor,
        prompts: Prompts,
        sizes_B6: Tensor | None = None,
    ) -> Tensor:
        unet = self._at_hand("unet")
        # Finding it takes a walk over all modules: once is enough.
        self._unet_dtype = dtype = self._unet_dtype or unet.dtype
        added = None
        if prompts.pooled_BP is not None:
            if sizes_B6 is None:
                sizes_B6 = self._own_sizes(noisy_BChw)
            # The sizes stay in float32: bfloat16 knows only each eighth whole number above 1024.
            added = {"text_embeds": prompts.pooled_BP.to(dtype), "time_ids": sizes_B6.float()}
        prediction = unet(
            noisy_BChw.to(dtype),
            timesteps_B,
            encoder_hidden_states=prompts.embeddings_BTD.to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return prediction.float()

    def _own_sizes(self, latents_BChw: Tensor) -> Tensor:
        """[B, 6] sizes of pictures that are whole and were never of another size."""
        height, width = (side * self.facts.pixels_per_latent for side in latents_BChw.shape[2:])
        sizes_6 = torch.tensor((height, width, 0, 0, height, width), device=latents_BChw.device)
        return sizes_6.expand(len(latents_BChw), 6)

    def pipeline(self) -> Any:
        if self._drawing is None:
            self._drawing = self._new_pipeline()
        return self._drawing

    def _new_pipeline(self) -> Any:
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

        parts = {"unet": self._part("unet"), "scheduler": self.scheduler}
        parts |= dict.fromkeys(("vae", "tokenizer", "text_encoder"))
        if self.facts.pooled:
            pipeline = StableDiffusionXLPipeline(
                **parts, tokenizer_2=None, text_encoder_2=None, add_watermarker=False
            )
        else:
            pipeline = StableDiffusionPipeline(
                **parts,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        # It takes this from a VAE.
        pipeline.vae_scale_factor = self.facts.pixels_per_latent
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def hold(self, *parts: str) -> None:
        for name in parts:
            self._at_hand(name)
        if "unet" in parts and self._streamer is not None:
            self._streamer.settle()

    def release(self, *parts: str) -> None:
        for name in parts:
            self._released.add(name)
            if name in self._there and self.device.type != "cpu":
                self._there[name].to("cpu")
            elif name in self._there:
                # There is no other place: it is read again from its files.
                del self._there[name]
                if name == "unet":
                    self._drawing = None

    @contextmanager
    def complete(self, *parts: str) -> Iterator[None]:
        released = sorted(self._released & set(parts) if parts else self._released)
        for name in released:
            self._at_hand(name)
        try:
            yield
        finally:
            # The UNet stays where it is needed all the time.
            self.release(*(name for name in released if name != "unet"))

    def _part(self, name: str) -> Any:
        """A part in main memory or on the device, read from its files if it was not there."""
        if name not in self._there:
            self._there[name] = self.read(name)
            if self.device.type == "cpu":
                self._released.discard(name)
        return self._there[name]

    def _at_hand(self, name: str) -> Any:
        """A part, on the device if it was not there."""
        part = self._part(name)
        if name in self._released:
            if name == "unet" and self.stream_blocks:
                self._streamer = stream(part, self.device)
            else:
                part.to(self.device)
            self._released.discard(name)
        return part


@contextmanager
def _tiles(vae: Any, pixels_per_latent: int) -> Iterator[None]:
    """Inside the `with` block a VAE decodes in tiles."""
    sizes = {"tile_latent_min_size": TILE, "tile_sample_min_size": TILE * pixels_per_latent}
    before = {name: getattr(vae, name) for name in sizes}
    try:
        for name, size in sizes.items():
            setattr(vae, name, size)
        vae.use_tiling = True
        yield
    finally:
        vae.use_tiling = False
        for name, size in before.items():
            setattr(vae, name, size)


def encodes_in_tiles(width: int, height: int) -> bool:
    """Whether a picture of that size in pixels is too large to be encoded as a whole."""
    return width * height > MOST_WHOLE_PIXELS


def set_attention(unet: Any, attention: str) -> None:
    """Choose the UNet's attention; that it works here must have been tried before."""
    from diffusers.models import attention_processor as processors
    from diffusers.utils import is_xformers_available

    from trainer.families.direct import SdpaProcessor

    if attention == "xformers":
        if not is_xformers_available():
            raise DeviceError(
                "xformers is not installed.",
                where="model.attention",
                fix='Install it with: pip install "likeness[xformers]"',
            )
        unet.set_attn_processor(processors.XFormersAttnProcessor())
    elif attention == "blockwise":
        unet.set_attn_processor(BlockwiseProcessor())
    elif attention == "eager":
        unet.set_attn_processor(processors.AttnProcessor())
    elif attention in ("sdpa", "sdpa-fp32"):
        unet.set_attn_processor(SdpaProcessor(in_float32=attention == "sdpa-fp32"))
    else:
        kernel = KERNELS[attention]
        unet.set_attn_processor(WithKernel(SdpaProcessor(), kernel))
