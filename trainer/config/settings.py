"""Every setting of a training run: name, type, default, unit, range and one sentence.

This is the only place where a default stands. `--set`, TOML files, `docs/settings.md` and the
settings stored in a LoRA file all come from here. `None` means "decided by the base model or the
photo folder" and is filled in once those are known (`trainer.config.reader.fill_unset`).
"""

from __future__ import annotations

from typing import Literal, cast

from pydantic import BaseModel, ConfigDict, model_validator

from trainer.config.fields import Section, setting
from trainer.config.photo_settings import CaptionSettings, DataSettings
from trainer.config.run_settings import RunSettings


class ModelSettings(Section):
    """The base model and how it is run."""

    base: str = setting(
        "embedded",
        "a Stable Diffusion 1.x, 2.x or SDXL model: a folder in diffusers format, a single "
        ".safetensors or .ckpt file, or a name on the Hugging Face hub ('org/name', "
        "'org/name@revision'); 'embedded' for our own",
        min_length=1,
    )
    vae: str = setting("", "another VAE: a folder or a single file; unset: the base's own")
    tokenizer: str = setting(
        "", "folder of the CLIP tokenizer, for single files; unset: the base's or the hub's"
    )
    download: bool = setting(True, "let a base or tokenizer that is not here be downloaded")
    clip_skip: int | None = setting(
        None,
        "which layer of the text encoder is read, counted from the last (1), as A1111 does; "
        "default by base; SDXL always reads the last but one",
        ge=1,
        le=12,
    )
    prompt_chunks: int = setting(
        3, "captions are read up to so many times 75 tokens", "chunks", ge=1, le=3
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "where to train")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto",
        "number format of the frozen base; the LoRA itself is always trained in fp32; "
        "auto: bf16 on a GPU that has it, else fp16 on a GPU; on a CPU bf16 for a base of Stable "
        "Diffusion's size where that is quicker, else fp32",
    )
    checkpointing: bool = setting(
        False,
        "compute the UNet's activations twice instead of keeping them: less memory, slower, the "
        "same result",
    )
    checkpoint_share: float = setting(
        1.0,
        "with model.checkpointing: of the UNet's blocks, the share that is computed twice; first "
        "those that save the most memory for the least work",
        ge=0,
        le=1,
    )
    weights: Literal["same", "int8", "fp8", "nf4"] = setting(
        "same",
        "number format in which the frozen weights of UNet and text encoders are kept: same = that "
        "of model.precision; int8 or fp8 = one byte each, for small GPUs: less exact (int8 the "
        "more exact of the two) and slower; nf4 = half a byte each, the least exact",
    )
    stream_blocks: bool = setting(
        False,
        "keep the weights of the UNet's blocks in main memory and bring each to the GPU when it "
        "computes: far less GPU memory, slower, the same result; NVIDIA GPUs only, for the "
        "smallest of them",
    )
    memory: Literal["auto", "off", "4gb", "6gb", "8gb", "12gb", "24gb"] = setting(
        "auto",
        "memory of the GPU that the run is to fit into: what is not set of model.weights, "
        "model.checkpointing, model.checkpoint_share, model.stream_blocks and optimizer.name is "
        "chosen for it, the fastest that fits; auto = what an NVIDIA GPU has free; off = nothing "
        "is chosen",
    )
    attention: Literal[
        "auto",
        "xformers",
        "sdpa",
        "sdpa-flash",
        "sdpa-cudnn",
        "sdpa-efficient",
        "sdpa-math",
        "sdpa-fp32",
        "blockwise",
        "eager",
    ] = setting(
        "auto",
        "what computes the UNet's attention: xformers, PyTorch's own (sdpa, which chooses among "
        "its kernels, or one of these; sdpa-fp32 computes in fp32 in any precision), our own for "
        "processors (blockwise) or plain steps (eager); auto = the fastest of those that work, "
        "measured at the start, on an NVIDIA GPU and in bf16, else sdpa",
    )
    fast: Literal["on", "lean", "off"] = setting(
        "on",
        "how the frozen layers are computed: lean = little is kept for the backward pass; on = so "
        "too on a GPU, while on a processor their weights are brought once into the order that it "
        "wants, which takes more memory; off = as PyTorch does by itself; the same result but for "
        "rounding",
    )
    compile: bool = setting(
        False,
        "compile the UNet's transformer blocks for this machine: a step takes long where it is the "
        "first of a size, later ones may be quicker; needs a GPU (Linux) or a C++ compiler",
    )


class BlockSettings(Section):
    """Layers of the UNet with a rank or rate of their own: `[[adapter.blocks]]`; where several of
    these tables fit a layer, later ones win."""

    pattern: str = setting(
        ..., "which layers, by their dotted path: 'up_blocks.1.*', '*.attn2.*'", min_length=1
    )
    rank: int | None = setting(None, "their rank", ge=1, le=256)
    alpha: float | None = setting(None, "their alpha", gt=0, le=1024)
    rate: float | None = setting(
        None, "their learning rate as a factor of the others'", gt=0, le=100
    )


class AdapterSettings(Section):
    """What is trained."""

    kind: str = setting("lora", "type of adapter")
    rank: int = setting(
        16, "inner dimension of the update; larger learns more and weighs more", ge=1, le=256
    )
    alpha: float = setting(
        16.0, "strength of the update is alpha / rank; equal to rank means 1", gt=0, le=1024
    )
    targets: Literal["attention", "attention+ff", "all", "cross-attention", "cross-kv"] = setting(
        "attention",
        "layers of the UNet that are trained: attention; attention+ff = all of its transformer "
        "blocks; all = the convolutions around them as well; cross-attention = only the attention "
        "that reads the prompt; cross-kv = of that only keys and values, which changes least where "
        "the trigger is not named",
    )
    text_encoder: bool = setting(True, "train the text encoders as well")
    text_encoder_targets: Literal["attention", "attention+mlp"] = setting(
        "attention", "layers of the text encoders that are trained"
    )
    text_encoder_rank: int | None = setting(
        None, "rank in the text encoders; unset: adapter.rank", ge=1, le=256
    )
    text_encoder_alpha: float | None = setting(
        None, "alpha in the text encoders; unset: adapter.alpha", gt=0, le=1024
    )
    include: list[str] = setting(
        [], "of the UNet's layers only those whose dotted path fits a pattern such as 'mid_block*'"
    )
    exclude: list[str] = setting([], "layers of the UNet left out, by patterns of their path")
    blocks: list[BlockSettings] = setting(
        [], "other ranks and rates for some layers, each an [[adapter.blocks]] table"
    )
    strength: float = setting(
        1.0,
        "how much of what was learned samples and LoRA files apply; training itself goes on at "
        "full strength; below 1 prompts are followed better and the look is weaker",
        gt=0,
        le=1,
    )
    save_precision: Literal["fp16", "bf16", "fp32"] = setting(
        "fp16", "number format of the LoRA file"
    )
    init: str = setting(
        "", "LoRA file of any trainer that the training starts from; rank and targets are its own"
    )


class OptimizerSettings(Section):
    """How the weights move."""

    name: str = setting(
        "adamw", "optimizer: adamw, or adamw8bit, the same in a quarter of its memory"
    )
    learning_rate: float = setting(1e-4, "step size for the UNet's layers", gt=0, le=1)
    text_encoder_learning_rate: float = setting(
        5e-5, "step size for the text encoder's layers", gt=0, le=1
    )
    text_encoder_2_learning_rate: float | None = setting(
        None, "step size for SDXL's second text encoder; unset: as the first's", gt=0, le=1
    )
    weight_decay: float = setting(0.01, "pull of the weights towards zero", ge=0, le=1)
    beta1: float = setting(0.9, "memory of the gradient's mean", ge=0, lt=1)
    beta2: float = setting(0.999, "memory of the gradient's square", ge=0, lt=1)
    schedule: Literal["constant", "cosine"] = setting(
        "cosine", "course of the learning rate after the warm-up"
    )
    warmup_steps: int = setting(
        0,
        "steps in which the rate rises from zero, at most a tenth of run.total_steps",
        "optimizer steps",
        ge=0,
        le=100_000,
    )
    max_grad_norm: float = setting(
        1.0, "gradients longer than this are shortened to it; 0 = never", ge=0, le=1000
    )
    accumulate_steps: int = setting(
        1, "batches whose gradients are averaged for one optimizer step", ge=1, le=256
    )


class ObjectiveSettings(Section):
    """What counts as an error."""

    prediction: Literal["auto", "epsilon", "v_prediction"] = setting(
        "auto", "what the UNet predicts; auto reads it from the base"
    )
    min_snr_gamma: float = setting(
        5.0, "limit of the weight of nearly clean steps (min-SNR); 0 = off", ge=0, le=100
    )
    noise_offset: float = setting(
        0.0, "share of noise that is constant over a picture; helps dark and bright", ge=0, le=1
    )
    prior_weight: float = setting(
        0.0,
        "weight of pictures of the class that the base draws itself, so that the class keeps "
        "its looks without the trigger; 0 = off",
        ge=0,
        le=10,
    )
    prior_target: Literal["base", "noise"] = setting(
        "base",
        "what the adapters learn on them: base = to predict what the base predicts, which "
        "keeps all pictures without the trigger as they were; noise = to draw the class "
        "pictures (DreamBooth)",
    )
    prior_pictures: int = setting(
        48, "how many of them are drawn before training", "pictures", ge=4, le=1000
    )
    prior_batch_size: int = setting(
        1, "how many of them come with each batch", "pictures", ge=1, le=64
    )
    prior_guidance_scale: float = setting(
        7.5,
        "how closely they follow their prompt; 1 keeps closest to what the base knows",
        ge=1.0,
        le=30.0,
    )
    prior_prompts: str = setting(
        "prior", "prompts file they are drawn from: a path, or a name in prompts/", min_length=1
    )


class PreviewSettings(Section):
    """Sample images during training, and the scores taken from them."""

    every_steps: int = setting(
        250,
        "draw and score samples this often, besides the start and every save; 0 = none at all, so "
        "no score and no best step",
        "optimizer steps",
        ge=0,
    )
    prompts: str = setting(
        "face", "prompts file: a path, or the name of one in prompts/", min_length=1
    )
    sampling_steps: int = setting(20, "denoising steps of a sample", ge=1, le=200)
    guidance_scale: float = setting(6.0, "how closely samples follow the prompt", ge=1.0, le=30.0)
    seed: int = setting(1000, "seed of the first sample; others count up", ge=0, le=2**31 - 1)
    scorer: Literal["auto", "own", "plain", "face", "folder"] = setting(
        "auto",
        "what likeness is measured by: own = our identity net, for the embedded base; plain = "
        "without a network; face = SFace, which needs data.face_recognizer_file; folder = a CLIP "
        "or DINO model in preview.scorer_folder; auto = own on the embedded base, else folder "
        "where one is given, else plain",
    )
    scorer_folder: str = setting(
        "", "folder of a CLIP or DINOv2 model in transformers format that likeness is measured by"
    )


class TrainConfig(BaseModel):
    """All settings of one run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: DataSettings = DataSettings()
    caption: CaptionSettings = CaptionSettings()
    model: ModelSettings = ModelSettings()
    adapter: AdapterSettings = AdapterSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    run: RunSettings = RunSettings()
    preview: PreviewSettings = PreviewSettings()

    @model_validator(mode="after")
    def _settings_that_depend_on_each_other(self) -> TrainConfig:
        run, data = self.run, self.data
        problems = []
        if run.stop_at_step > run.total_steps:
            problems.append(
                f"run.stop_at_step ({run.stop_at_step}) is beyond run.total_steps "
                f"({run.total_steps})"
            )
        for side in data.resolutions:
            if data.bucket_step_px and side < data.bucket_step_px:
                problems.append(
                    f"data.resolution ({side}) is smaller than data.bucket_step_px "
                    f"({data.bucket_step_px})"
                )
        if problems:
            raise ValueError("\n".join(problems))
        return self


def section_models() -> dict[str, type[Section]]:
    """The sections in their order, by name."""
    return {
        name: cast(type[Section], field.annotation)
        for name, field in TrainConfig.model_fields.items()
    }
