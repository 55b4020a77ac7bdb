"""Recognising and loading Stable Diffusion: what its families have in common.

A family is a table of what is its own (`sd1.py`, `sd2.py`, `sdxl.py`); everything is done here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
from trainer.families.hub import variant_of
from trainer.families.prompts import Prompting, counter, open_tokenizer, require_layer
from trainer.families.single_file import Parts, load_single_file, load_vae
from trainer.families.sizes import shipped_config
from trainer.families.tokenizers import find_tokenizer

if TYPE_CHECKING:
    import torch

    from trainer.families.backbone import StableDiffusionBackbone

# What the libraries raise on missing, damaged and foreign files.
LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError)
_LARGEST_PX = 16384  # of the side of a picture that a base can draw
# The text encoders in diffusers' folders, and the classes of transformers they are.
TEXT_ENCODERS = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
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
        from trainer.families.backbone import StableDiffusionBackbone, set_attention
        from trainer.families.quantize import pack_weights

        prompting, notices = self._prompting(options)
        tokenizer = _tokenizer(facts)
        if facts.folder.is_file():
            parts = load_single_file(facts, options.dtype)
        else:
            parts = self._folder_parts(facts, options.dtype)
        found = {"text_encoder": parts.text_encoder, "text_encoder_2": parts.text_encoder_2}
        encoders = {name: found[name] for name in self._encoder_names}
        if self._overflows(parts.vae, options.dtype):
            parts.vae.float()
            notices += (f"The VAE runs in fp32: that of {self.words} overflows in fp16.",)
        for module in (*encoders.values(), parts.unet, parts.vae):
            module.eval().requires_grad_(False)
        if options.weights != "same":
            for module in (*encoders.values(), parts.unet):
                pack_weights(module, options.weights, options.device)
        for encoder in encoders.values():
            require_layer(encoder, prompting)
            if options.attention == "eager":
                encoder.set_attn_implementation("eager")
        set_attention(parts.unet, options.attention)
        if options.checkpointing:
            parts.unet.enable_gradient_checkpointing()
        return StableDiffusionBackbone(
            facts=facts,
            device=options.device,
            names=self.v_names if facts.prediction == "v_prediction" else self.names,
            prompting=prompting,
            tokenizer=tokenizer,
            text_encoders=encoders,
            unet=parts.unet,
            vae=parts.vae,
            scheduler=parts.scheduler,
            notices=(*notices, *parts.notices),
        )

    def _folder_parts(self, facts: BaseFacts, dtype: torch.dtype) -> Parts:
        """The modules of a base in diffusers' folder format, each weight read straight into the
        number format that is wanted."""
        from diffusers import AutoencoderKL, UNet2DConditionModel

        folder = facts.folder
        try:
            encoders = {name: _text_encoder(folder, name, dtype) for name in self._encoder_names}
            return Parts(
                unet=_part(UNet2DConditionModel, folder, "unet", dtype),
                vae=load_vae(facts.vae, self.name, dtype)
                if facts.vae
                else _part(AutoencoderKL, folder, "vae", dtype),
                text_encoder=encoders["text_encoder"],
                text_encoder_2=encoders.get("text_encoder_2"),
                scheduler=_scheduler(facts),
            )
        except LOAD_ERRORS as error:
            raise _not_loaded(folder, error) from error

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


def _not_loaded(folder: Path, error: Exception) -> ModelError:
    return ModelError(
        f"The base model cannot be loaded: {error}",
        where=str(folder),
        fix="Copy or download the base again.",
    )


def _tokenizer(facts: BaseFacts) -> Any:
    folder = find_tokenizer(facts, facts.tokenizer)
    try:
        return open_tokenizer(folder)
    except LOAD_ERRORS as error:
        raise _not_loaded(folder, error) from error


def _text_encoder(folder: Path, name: str, dtype: torch.dtype) -> Any:
    import transformers

    encoder, report = getattr(transformers, TEXT_ENCODERS[name]).from_pretrained(
        str(folder),
        subfolder=name,
        dtype=dtype,
        variant=variant_of(folder / name),
        output_loading_info=True,
    )
    _require_all(name, sorted(report["missing_keys"]))
    return encoder


def _part(kind: Any, folder: Path, name: str, dtype: torch.dtype) -> Any:
    """The UNet or the VAE; weights that the files lack stay without content."""
    part = kind.from_pretrained(
        str(folder), subfolder=name, torch_dtype=dtype, variant=variant_of(folder / name)
    )
    _require_all(name, [key for key, weight in part.named_parameters() if weight.is_meta])
    return part


def _require_all(name: str, missing: list[str]) -> None:
    if missing:
        raise ValueError(f"{len(missing)} weights of {name} are missing, such as {missing[0]}")


def _scheduler(facts: BaseFacts) -> Any:
    """The base's own sampler, so that our samples are what a plain pipeline draws.

    Where the facts know better what the base predicts (a folder may not say it), they hold. A
    terminal SNR of zero is only reached when drawing begins at the last timestep
    (arXiv 2305.08891, section 3.3): "trailing" steps.
    """
    import diffusers

    folder = facts.folder
    sampler = read_json(folder / "scheduler" / "scheduler_config.json")["_class_name"]
    kind = getattr(diffusers, str(sampler), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ValueError(f"scheduler_config.json names {sampler}, which is no scheduler")
    loader: Any = kind
    scheduler = loader.from_pretrained(str(folder), subfolder="scheduler")
    changes: dict[str, Any] = {}
    if scheduler.config.get("prediction_type", "epsilon") != facts.prediction:
        changes["prediction_type"] = facts.prediction
    if bool(scheduler.config.get("rescale_betas_zero_snr")) != facts.zero_terminal_snr:
        changes["rescale_betas_zero_snr"] = facts.zero_terminal_snr
        changes["timestep_spacing"] = "trailing" if facts.zero_terminal_snr else "leading"
    return scheduler.from_config(scheduler.config, **changes) if changes else scheduler
