"""Recognising and loading Stable Diffusion: what its families have in common.

A family is a table of what is its own (`sd1.py`, `sd2.py`, `sdxl.py`); everything is done here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import ModelError
from trainer.families import BaseFacts, FamilyNames, LoadOptions
from trainer.families.detect import (
    bucket_step,
    first_attention,
    identify_folder,
    read_json,
    same_architecture,
)
from trainer.families.diffusers_folder import (
    LOAD_ERRORS,
    TEXT_ENCODERS,
    not_loaded,
    own_scheduler,
    read_part,
    require_weights,
)
from trainer.families.prompts import Prompting, counter, open_tokenizer, require_layer
from trainer.families.single_file import make_scheduler, open_single_file
from trainer.families.sizes import shipped_config
from trainer.families.tokenizers import find_tokenizer

if TYPE_CHECKING:
    import torch

    from trainer.families.backbone import StableDiffusionBackbone

_LARGEST_PX = 16384  # of the side of a picture that a base can draw
# Clip skips that say nothing where a family keeps to one layer: A1111 calls it 1 whatever it is,
# ComfyUI calls the layer before the last 2.
_USUAL_SKIPS = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class StableDiffusion:
    """One family; see `trainer.families.Family`.

    name, words: in the settings, and in full. names, v_names: of files made on bases that predict
    noise, and on those that predict v. encoders: how many text encoders it has.
    prompting: from where prompt embeddings are taken. skips: whether another layer may be asked
    for. upcast_vae: whether its VAE goes beyond the range of float16 unless its files deny it.
    """

    name: str
    words: str
    names: FamilyNames
    v_names: FamilyNames
    encoders: int = 1
    prompting: Prompting = Prompting()
    skips: bool = False
    upcast_vae: bool = False

    def read_facts(self, folder: Path) -> BaseFacts | None:
        kind = identify_folder(folder)
        if kind.family != self.name:
            return None
        unet = read_json(folder / "unet" / "config.json")
        vae = read_json(folder / "vae" / "config.json")
        text = read_json(folder / self._encoder_names[-1] / "config.json")
        read_json(folder / "scheduler" / "scheduler_config.json")
        try:
            pixels_per_latent = 2 ** (len(vae["block_out_channels"]) - 1)
            resolution = int(unet["sample_size"]) * pixels_per_latent
            if not 0 < resolution <= _LARGEST_PX:
                raise ValueError("unet/config.json and vae/config.json tell no size of a picture")
            return BaseFacts(
                family=self.name,
                name=folder.name,
                folder=folder,
                resolution=resolution,
                bucket_step_px=bucket_step(resolution),
                width=int(unet["cross_attention_dim"]),
                pixels_per_latent=pixels_per_latent,
                prediction=kind.prediction,
                fits_real=same_architecture(unet, shipped_config(self.name, "unet")),
                embedded=False,
                pooled=int(text["projection_dim"]) if self.encoders > 1 else 0,
                zero_terminal_snr=kind.zero_terminal_snr,
                attention=first_attention(unet),
                latent_channels=int(vae.get("latent_channels", 4)),
            )
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise ModelError(
                f"The configuration of the base model is not complete: {error}",
                where=str(folder),
                fix="Copy or download the base again.",
            ) from error

    def token_counter(self, facts: BaseFacts) -> Callable[[str], int]:
        return counter(_tokenizer(facts))

    def load(self, facts: BaseFacts, options: LoadOptions) -> StableDiffusionBackbone:
        from trainer.families.backbone import StableDiffusionBackbone

        prompting, notices = self._prompting(options)
        said = list(notices)
        tokenizer = _tokenizer(facts)
        if facts.folder.is_file():
            single = open_single_file(facts)
            single.notices.extend(said)
            said = single.notices
            read, scheduler = single.read, make_scheduler(facts)
        else:
            require_weights(facts, self._encoder_names)
            read, scheduler = partial(read_part, facts), own_scheduler(facts)

        def ready(name: str) -> Any:
            return self._ready(name, read(name, options.dtype), prompting, options, said)

        return StableDiffusionBackbone(
            facts=facts,
            device=options.device,
            names=self.v_names if facts.prediction == "v_prediction" else self.names,
            prompting=prompting,
            tokenizer=tokenizer,
            encoders=tuple(self._encoder_names),
            read=ready,
            scheduler=scheduler,
            said=said,
            stream_blocks=options.stream_blocks,
        )

    def _ready(
        self, name: str, module: Any, prompting: Prompting, options: LoadOptions, said: list[str]
    ) -> Any:
        """A module that was just read, made as the options want it."""
        from trainer.families.direct import go_direct_in_text
        from trainer.families.quantize import pack_weights

        module.eval().requires_grad_(False)
        if name == "vae":
            if self._overflows(module, options.dtype):
                module.float()
                words = f"The VAE runs in fp32: that of {self.words} overflows in fp16."
                said += [] if words in said else [words]
            return module
        if options.weights != "same":
            pack_weights(module, options.weights, options.device)
        if name == "unet":
            _set_blocks(module, options)
        else:
            require_layer(module, prompting)
            if options.attention == "eager":
                module.set_attn_implementation("eager")
            if options.blocks != "plain":
                go_direct_in_text(module)
        if options.finish is not None:
            options.finish(module)
        return module

    @property
    def _encoder_names(self) -> list[str]:
        return list(TEXT_ENCODERS)[: self.encoders]

    def _prompting(self, options: LoadOptions) -> tuple[Prompting, tuple[str, ...]]:
        """How prompts are taken, and what is to be said of it."""
        own = replace(self.prompting, chunks=options.prompt_chunks)
        if self.skips and options.clip_skip:
            return replace(own, layer=options.clip_skip), ()
        if options.clip_skip in _USUAL_SKIPS:
            return own, ()
        return own, (
            f"Clip skip {options.clip_skip} is not used: {self.words} takes prompts from the layer "
            "before the last, in training and in the programs that draw with it.",
        )

    def _overflows(self, vae: Any, dtype: torch.dtype) -> bool:
        """Whether the numbers in a VAE go beyond what the number format holds."""
        import torch

        return self.upcast_vae and dtype == torch.float16 and bool(vae.config.force_upcast)


def _set_blocks(unet: Any, options: LoadOptions) -> None:
    """Let a UNet's blocks compute as the options want it."""
    from trainer.families.backbone import set_attention
    from trainer.families.checkpointing import checkpoint_blocks
    from trainer.families.compiling import compile_blocks
    from trainer.families.direct import go_direct
    from trainer.families.lean import keep_less, keep_less_of_norms

    set_attention(unet, options.attention)
    if options.checkpointing:
        checkpoint_blocks(unet, options.checkpoint_share)
    if options.blocks == "lean":
        # Of the transformer blocks a compiler decides itself what is kept.
        (keep_less_of_norms if options.compiling else keep_less)(unet)
    if options.blocks != "plain":
        go_direct(unet)
    if options.compiling:
        compile_blocks(unet)


def _tokenizer(facts: BaseFacts) -> Any:
    folder = find_tokenizer(facts, facts.tokenizer)
    try:
        return open_tokenizer(folder)
    except LOAD_ERRORS as error:
        raise not_loaded(folder, error) from error
