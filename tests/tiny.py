"""Stable Diffusion bases of a few thousand random weights, of each family, made in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

RESOLUTION = 32
# The noise schedule of all released models.
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tiny_tokenizer(folder: Path, **options: Any) -> CLIPTokenizer:
    """CLIP's tokenizer with bytes for words: 514 entries. `pad_token="!"` is that of OpenCLIP."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=77,
        **options,
    )


def tiny_pipeline(folder: Path, *, prediction: str = "epsilon") -> StableDiffusionPipeline:
    """A pipeline with the module names of SD 1.x; 32 px pictures, four pixels a latent."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder / "words")
    text_encoder = CLIPTextModel(text_config())
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return put_together(tokenizer, text_encoder, unet, tiny_vae(), prediction=prediction)


def text_config(**changes: Any) -> CLIPTextConfig:
    """A text encoder of two layers, 16 wide."""
    values = {
        "vocab_size": 514,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "projection_dim": 16,
        "bos_token_id": 512,
        "eos_token_id": 513,
        "pad_token_id": 513,
    }
    return CLIPTextConfig(**{**values, **changes})


def tiny_vae() -> AutoencoderKL:
    """Four pixels a latent."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=RESOLUTION,
    )


def tiny_sd2_pipeline(folder: Path, *, prediction: str = "v_prediction") -> StableDiffusionPipeline:
    """A pipeline with the module names of SD 2.x."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        norm_num_groups=4,
    )
    text_encoder = CLIPTextModel(text_config(num_hidden_layers=3, hidden_act="gelu"))
    tokenizer = tiny_tokenizer(folder / "words", pad_token="!")
    return put_together(tokenizer, text_encoder, unet, tiny_vae(), prediction=prediction)


def tiny_sdxl_pipeline(folder: Path, **scheduler: Any) -> StableDiffusionXLPipeline:
    """A pipeline with the module names of SDXL: text encoders 16 and 24 wide."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=16 + 24,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
        norm_num_groups=4,
    )
    # As in the released configurations: 2 means "the highest number among the tokens".
    first = text_config(eos_token_id=2)
    second = text_config(
        hidden_size=24, num_hidden_layers=3, projection_dim=24, hidden_act="gelu", eos_token_id=2
    )
    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(first),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tiny_tokenizer(folder / "words"),
        tokenizer_2=tiny_tokenizer(folder / "words_2", pad_token="!"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            **{**SCHEDULE, "timestep_spacing": "leading", "steps_offset": 1, **scheduler}
        ),
        add_watermarker=False,
    )


def put_together(
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    *,
    prediction: str = "epsilon",
) -> StableDiffusionPipeline:
    """A pipeline with the noise schedule of SD 1.x."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            **SCHEDULE,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


# Bases of every family, by what they are: how `save_tiny` makes them.
TINY_BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd1": ("sd1", {}),
    "sd2": ("sd2", {"prediction": "epsilon"}),
    "sd2-v": ("sd2", {"prediction": "v_prediction"}),
    "sdxl": ("sdxl", {}),
    # What NoobAI's v-prediction models say in their scheduler's configuration.
    "sdxl-v": (
        "sdxl",
        {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
    ),
}


def save_tiny(folder: Path, name: str) -> Path:
    """Write one of `TINY_BASES` as a diffusers folder and return it."""
    family, options = TINY_BASES[name]
    if family == "sdxl":
        return save_tiny_sdxl(folder, **options)
    return (save_tiny_sd2 if family == "sd2" else save_tiny_base)(folder, **options)


def save_tiny_base(folder: Path, *, prediction: str = "epsilon") -> Path:
    """Write the tiny base as a diffusers folder and return it."""
    tiny_pipeline(folder.parent / f".{folder.name}-parts", prediction=prediction).save_pretrained(
        folder
    )
    return folder


def save_tiny_sd2(folder: Path, *, prediction: str = "v_prediction") -> Path:
    """Write the tiny base of SD 2.x as a diffusers folder and return it."""
    parts = folder.parent / f".{folder.name}-parts"
    tiny_sd2_pipeline(parts, prediction=prediction).save_pretrained(folder)
    return folder


def save_tiny_sdxl(folder: Path, **scheduler: Any) -> Path:
    """Write the tiny base of SDXL as a diffusers folder and return it."""
    parts = folder.parent / f".{folder.name}-parts"
    tiny_sdxl_pipeline(parts, **scheduler).save_pretrained(folder)
    return folder
