"""Stable Diffusion 1.x in diffusers folder format, at any size: UNet, CLIP text encoder, VAE."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import DeviceError, ModelError
from trainer.families import BaseFacts, FamilyNames, LoadOptions
from trainer.families.detect import read_json

if TYPE_CHECKING:
    from torch import Tensor, nn

# Cross-attention width and UNet channels of the released SD 1.x models.
REAL_WIDTH = 768
REAL_CHANNELS = [320, 640, 1280, 1280]

NAMES = FamilyNames(
    prefixes={"unet": ("lora_unet", ""), "text_encoder": ("lora_te", "text_model.")},
    architecture="stable-diffusion-v1/lora",
    implementation="diffusers",
    version="sd_v1",
    v2=False,
)

# Ends of the dotted paths of the layers that each target set stands for.
UNET_ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
UNET_FEED_FORWARD = (".ff.net.0.proj", ".ff.net.2", ".proj_in", ".proj_out")
UNET_TARGETS = {
    "attention": UNET_ATTENTION,
    "attention+ff": UNET_ATTENTION + UNET_FEED_FORWARD,
    # attn2 is the attention from the picture to the prompt; keys and values are all that it takes
    # from the prompt (Custom Diffusion, arXiv 2212.04488, section 3.1).
    "cross-attention": tuple(f".attn2{end}" for end in UNET_ATTENTION),
    "cross-kv": (".attn2.to_k", ".attn2.to_v"),
}
# What the libraries raise on missing, damaged and foreign files.
LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError)
TEXT_TARGETS = (".q_proj", ".k_proj", ".v_proj", ".out_proj")


class StableDiffusion1:
    """Recognises and loads the family; see `trainer.families.Family`."""

    def read_facts(self, folder: Path) -> BaseFacts | None:
        index = read_json(folder / "model_index.json")
        if index.get("_class_name") != "StableDiffusionPipeline":
            return None
        unet = read_json(folder / "unet" / "config.json")
        text = read_json(folder / "text_encoder" / "config.json")
        vae = read_json(folder / "vae" / "config.json")
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        if unet.get("use_linear_projection") or text.get("hidden_act") == "gelu":
            return None  # SD 2.x
        if unet.get("in_channels") != unet.get("out_channels"):
            raise ModelError(
                f"The UNet takes {unet.get('in_channels')} channels: this is an inpainting model.",
                where=str(folder),
                fix="Train on the ordinary model it was made from; the LoRA will work in both.",
            )
        try:
            pixels_per_latent = 2 ** (len(vae["block_out_channels"]) - 1)
            width = int(unet["cross_attention_dim"])
            real = width == REAL_WIDTH and list(unet["block_out_channels"]) == REAL_CHANNELS
            resolution = int(unet["sample_size"]) * pixels_per_latent
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"The configuration of the base model is not complete: {error}",
                where=str(folder),
                fix="Copy or download the base again.",
            ) from error
        return BaseFacts(
            family="sd1",
            name=folder.name,
            folder=folder,
            resolution=resolution,
            # A quarter of a small base's picture; 64 px as everywhere for real ones.
            bucket_step_px=64 if resolution >= 256 else max(resolution // 4, 8),
            width=width,
            pixels_per_latent=pixels_per_latent,
            prediction=str(scheduler.get("prediction_type", "epsilon")),
            fits_real=real,
            embedded=False,
        )

    def token_counter(self, facts: BaseFacts) -> Callable[[str], int]:
        from transformers import CLIPTokenizer

        _require_tokenizer(facts.folder / "tokenizer")
        try:
            tokenizer = CLIPTokenizer.from_pretrained(str(facts.folder), subfolder="tokenizer")
        except LOAD_ERRORS as error:
            raise _not_loaded(facts.folder, error) from error
        return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def load(self, facts: BaseFacts, options: LoadOptions) -> StableDiffusion1Backbone:
        import diffusers
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        folder = str(facts.folder)
        loaded: dict[str, Any] = {}
        _require_tokenizer(facts.folder / "tokenizer")
        try:
            loaded["tokenizer"] = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
            loaded["text_encoder"] = CLIPTextModel.from_pretrained(
                folder,
                subfolder="text_encoder",
                dtype=options.dtype,
                attn_implementation="eager" if options.attention == "eager" else "sdpa",
            )
            loaded["unet"] = UNet2DConditionModel.from_pretrained(
                folder, subfolder="unet", torch_dtype=options.dtype, low_cpu_mem_usage=False
            )
            loaded["vae"] = AutoencoderKL.from_pretrained(
                folder, subfolder="vae", torch_dtype=options.dtype, low_cpu_mem_usage=False
            )
            # The base's own sampler, so that our samples are what a plain pipeline draws.
            sampler = read_json(facts.folder / "scheduler" / "scheduler_config.json")["_class_name"]
            scheduler = getattr(diffusers, sampler).from_pretrained(folder, subfolder="scheduler")
        except LOAD_ERRORS as error:
            raise _not_loaded(facts.folder, error) from error
        for name in ("text_encoder", "unet", "vae"):
            loaded[name].to(options.device).eval().requires_grad_(False)
        set_attention(loaded["unet"], options.attention)
        return StableDiffusion1Backbone(facts=facts, scheduler=scheduler, **loaded)


FAMILY = StableDiffusion1()


def _not_loaded(folder: Path, error: Exception) -> ModelError:
    return ModelError(
        f"The base model cannot be loaded: {error}",
        where=str(folder),
        fix="Copy or download the base again.",
    )


def _require_tokenizer(folder: Path) -> None:
    """transformers makes up a tokenizer without words where there is none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ModelError(
            "A file of the base model is missing: it has no words.",
            where=str(folder / "tokenizer.json"),
            fix="Copy or download the base again; tokenizer.json, or vocab.json and merges.txt, "
            "belong there.",
        )


def set_attention(unet: Any, attention: str) -> None:
    """Choose the UNet's attention; xformers must have been probed before."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    if attention == "xformers":
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ValueError, RuntimeError, ImportError) as error:
            raise DeviceError(
                f"xformers cannot be used: {error}", where="model.attention"
            ) from error
    elif attention == "eager":
        unet.set_attn_processor(AttnProcessor())
    else:
        unet.set_attn_processor(AttnProcessor2_0())


@dataclass(kw_only=True)
class StableDiffusion1Backbone:
    """A loaded SD 1.x model; see `trainer.families.Backbone` for shapes."""

    facts: BaseFacts
    tokenizer: Any
    text_encoder: Any
    unet: Any
    vae: Any
    scheduler: Any
    names: FamilyNames = NAMES

    @property
    def components(self) -> Mapping[str, nn.Module]:
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        return dict(self.scheduler.config)

    def layer_names(self, component: str, targets: str) -> tuple[str, ...]:
        ends = UNET_TARGETS[targets] if component == "unet" else TEXT_TARGETS
        # Only inside transformer blocks: the names also fit nothing else in SD 1.x, and the dot in
        # front keeps `proj_in` from matching a longer name.
        return tuple(
            name for name, _ in self.components[component].named_modules() if name.endswith(ends)
        )

    def encode_pixels(self, pixels_BCHW: Tensor, noise_BChw: Tensor) -> Tensor:
        posterior = self.vae.encode(pixels_BCHW.to(self.vae.device, self.vae.dtype)).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        return (mean + std * noise_BChw.to(mean.device)) * self.vae.config.scaling_factor

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        factor = self.facts.pixels_per_latent
        return int(self.vae.config.latent_channels), height // factor, width // factor

    def encode_prompts(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        # No attention mask: SD 1.x was trained attending to the padding too.
        return self.text_encoder(tokens.input_ids.to(self.text_encoder.device))[0]

    def token_count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def predict(self, noisy_BChw: Tensor, timesteps_B: Tensor, prompt_BTD: Tensor) -> Tensor:
        dtype = self.unet.dtype
        prediction = self.unet(
            noisy_BChw.to(dtype),
            timesteps_B,
            encoder_hidden_states=prompt_BTD.to(dtype),
            return_dict=False,
        )[0]
        return prediction.float()

    @cached_property
    def _pipeline(self) -> Any:
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def pipeline(self) -> Any:
        return self._pipeline
