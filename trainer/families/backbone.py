"""A loaded Stable Diffusion model: what 1.x, 2.x and XL have in common, which is nearly all.

They differ in their text encoders, in the layer that prompts are taken from, and in what the UNet
is told beside the prompt; the family hands all of that over as values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from trainer.errors import DeviceError
from trainer.families import BaseFacts, FamilyNames
from trainer.families.attention import KERNELS, WithKernel
from trainer.families.blockwise import BlockwiseProcessor
from trainer.families.prompts import Prompting, counter, embed, token_ids
from trainer.families.tokenizers import padding_id
from trainer.types import Prompts

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(kw_only=True)
class StableDiffusionBackbone:
    """A loaded model of Stable Diffusion; see `trainer.families.Backbone` for shapes.

    text_encoders: by their names in diffusers' folders; one tokenizer serves them all.
    device: where it computes. All parts come loaded in main memory, and each goes to the device
        when it is first used: photos are encoded before the UNet takes its room there.
    """

    facts: BaseFacts
    device: torch.device
    names: FamilyNames
    prompting: Prompting
    tokenizer: Any
    text_encoders: Mapping[str, Any]
    unet: Any
    vae: Any
    scheduler: Any
    notices: tuple[str, ...] = ()
    _released: set[str] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        if self.device.type != "cpu":
            self._released = {"vae", *self.components}

    @property
    def components(self) -> Mapping[str, nn.Module]:
        return {"unet": self.unet, **self.text_encoders}

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        return dict(self.scheduler.config)

    def encode_pixels(self, pixels_BCHW: Tensor, noise_BChw: Tensor) -> Tensor:
        vae = self._at_hand("vae")
        posterior = vae.encode(pixels_BCHW.to(vae.device, vae.dtype)).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        return (mean + std * noise_BChw.to(mean.device)) * vae.config.scaling_factor

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        factor = self.facts.pixels_per_latent
        return int(self.vae.config.latent_channels), height // factor, width // factor

    def encode_prompts(self, texts: Sequence[str]) -> Prompts:
        """The text without a caption is the empty one, encoded like any other, in training and in
        drawing: so A1111 and ComfyUI draw with SDXL. (diffusers' pipeline of SDXL takes zeros
        where no negative prompt is given.)"""
        embeddings, pooled = [], None
        for name in self.text_encoders:
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
        dtype = unet.dtype
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

    @cached_property
    def _pipeline(self) -> Any:
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

        parts = {"vae": self.vae, "unet": self.unet, "scheduler": self.scheduler}
        parts |= {"tokenizer": self.tokenizer, **self.text_encoders}
        if self.facts.pooled:
            pipeline = StableDiffusionXLPipeline(
                **parts, tokenizer_2=self.tokenizer, add_watermarker=False
            )
        else:
            pipeline = StableDiffusionPipeline(
                **parts,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def pipeline(self) -> Any:
        return self._pipeline

    def hold(self, *parts: str) -> None:
        for name in parts:
            self._at_hand(name)

    def release(self, *parts: str) -> None:
        if self.device.type == "cpu":
            return
        for name in parts:
            self._part(name).to("cpu")
            self._released.add(name)

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
        return self.vae if name == "vae" else self.components[name]

    def _at_hand(self, name: str) -> Any:
        """A part, on the device if it was not there."""
        part = self._part(name)
        if name in self._released:
            part.to(self.device)
            self._released.discard(name)
        return part


def set_attention(unet: Any, attention: str) -> None:
    """Choose the UNet's attention; that it works here must have been tried before."""
    from diffusers.models import attention_processor as processors
    from diffusers.utils import is_xformers_available

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
    elif attention == "sdpa":
        unet.set_attn_processor(processors.AttnProcessor2_0())
    else:
        kernel = KERNELS[attention]
        unet.set_attn_processor(WithKernel(processors.AttnProcessor2_0(), kernel))
