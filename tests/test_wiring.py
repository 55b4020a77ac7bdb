"""Every setting does something: one short run for each, compared with a run without it.

The list comes from the settings themselves, so a new setting fails here until it is wired.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.captioners import save_tiny_captioner
from tests.conftest import QUICK
from tests.runs import files_in, metrics_of, run_cli, save_photos
from tests.tiny import save_tiny_sdxl
from trainer.adapters.file import read_lora
from trainer.config.settings import section_models
from trainer.errors import OutputError
from trainer.families.checkpointing import checkpoint_blocks
from trainer.training.learner import Learner
from trainer.training.state import save_checkpoint

ALL_SETTINGS = [
    f"{section}.{name}"
    for section, model in section_models().items()
    for name in model.model_fields
]

# Each setting with another value, and with what else has to be set for it to matter.
PRIOR = ("objective.prior_weight=1",)
DRAWN = ("preview.every_steps=2",)
DESCRIBED = ("caption.captioner_folder={captioner}",)
FURTHER = "data.sets=[{folder='{below}'}]"
# A seed whose third batch has a loss that is not a number (`spoilt_batch`).
SPOILT_SEED = 13
SPOILT = f"run.seed={SPOILT_SEED}"
SHUFFLED = ("caption.shuffle_tags=true",)
# Settings whose other value here is refused, since the machine or the set lacks what it names.
REFUSED = {
    "adapter.kind",
    "optimizer.name",
    "model.device",
    "model.stream_blocks",
    "model.memory",
    "data.face_detector_file",
    "data.face_recognizer_file",
    "data.face_download",
    "model.vae",
    "model.tokenizer",
    "preview.scorer",
    "preview.scorer_folder",
    "adapter.init",
}
CHANGES: dict[str, tuple[str, ...]] = {
    "data.resolution": ("data.resolution=48",),
    "data.bucket_step_px": ("data.bucket_step_px=32",),
    "data.max_aspect": ("data.max_aspect=1",),
    "data.enlarge": ("data.enlarge=true", "data.resolution=64"),
    "data.recursive": ("data.recursive=true",),
    "data.weight": ("data.weight=3", FURTHER),
    "data.sets": (FURTHER,),
    "data.skip_bad": ("data.skip_bad=true",),
    "data.flip": ("data.flip=true",),
    "data.repeats": ("data.repeats=3",),
    "data.batch_size": ("data.batch_size=1",),
    "data.background": ("data.background=#ff0000",),
    "data.transparency": ("data.transparency=mask",),
    "data.masks": ("data.masks=false",),
    "data.maximum_megapixels": ("data.maximum_megapixels=0.003", "data.skip_bad=true"),
    "data.variants": ("data.variants=2", "data.colour=0.3"),
    "data.zoom": ("data.zoom=0.4", "data.variants=1", "data.resolution=32"),
    "data.shift": ("data.shift=1", "data.variants=1", "data.max_aspect=1"),
    "data.colour": ("data.colour=0.5", "data.variants=1"),
    "data.face_detector": ("data.face_detector=none", "data.face_weight=9"),
    "data.face_detector_file": ("data.face_detector_file=missing.onnx",),
    "data.face_recognizer_file": ("data.face_recognizer_file=missing.onnx",),
    "data.face_download": ("data.face_download=true",),
    "data.face_crop": ("data.face_crop=false", "data.max_aspect=1"),
    "data.face_weight": ("data.face_weight=9",),
    "data.workers": ("data.workers=3",),
    "data.cache": ("data.cache=false",),
    "caption.trigger": ("caption.trigger=zqx",),
    "caption.class_noun": ("caption.class_noun=dog",),
    "caption.template": ("caption.template=a {class}",),
    "caption.use_sidecars": ("caption.use_sidecars=false",),
    "caption.captioner": ("caption.captioner=none", *DESCRIBED),
    "caption.captioner_folder": ("caption.captioner_folder={captioner}",),
    "caption.prefix": ("caption.prefix=photo of",),
    "caption.suffix": ("caption.suffix=outside",),
    "caption.separator": ("caption.separator=;", *SHUFFLED),
    "caption.shuffle_tags": SHUFFLED,
    "caption.keep_tags": ("caption.keep_tags=9", *SHUFFLED),
    "caption.tag_dropout": ("caption.tag_dropout=1",),
    "caption.wildcards": ("caption.wildcards=true",),
    "caption.several_lines": ("caption.several_lines=true",),
    "caption.dropout": ("caption.dropout=1",),
    "model.base": ("model.base={other_base}",),
    "model.vae": ("model.vae=missing",),
    "model.tokenizer": ("model.tokenizer=missing",),
    "model.download": ("model.download=false", "model.base=author/model"),
    "model.clip_skip": ("model.clip_skip=2",),
    "model.prompt_chunks": ("model.prompt_chunks=1", f"caption.prefix={'word ' * 90}"),
    "model.device": ("model.device=cuda",),
    "model.precision": ("model.precision=bf16",),
    "model.checkpointing": ("model.checkpointing=true",),
    "model.checkpoint_share": ("model.checkpoint_share=0.5", "model.checkpointing=true"),
    "model.weights": ("model.weights=int8",),
    "model.stream_blocks": ("model.stream_blocks=true",),
    "model.memory": ("model.memory=8gb",),
    "model.attention": ("model.attention=eager",),
    "model.fast": ("model.fast=off",),
    "model.compile": ("model.compile=true",),
    "adapter.kind": ("adapter.kind=nothing",),
    "adapter.rank": ("adapter.rank=3",),
    "adapter.alpha": ("adapter.alpha=1",),
    "adapter.targets": ("adapter.targets=attention+ff",),
    "adapter.text_encoder": ("adapter.text_encoder=false",),
    "adapter.text_encoder_targets": ("adapter.text_encoder_targets=attention+mlp",),
    "adapter.text_encoder_rank": ("adapter.text_encoder_rank=3",),
    "adapter.text_encoder_alpha": ("adapter.text_encoder_alpha=1",),
    "adapter.include": ("adapter.include=['*attn2*']",),
    "adapter.exclude": ("adapter.exclude=['*attn2*']",),
    "adapter.blocks": ("adapter.blocks=[{pattern='*attn2*', rank=3, rate=0.5}]",),
    "adapter.strength": ("adapter.strength=0.5",),
    "adapter.save_precision": ("adapter.save_precision=fp32",),
    "adapter.init": ("adapter.init=missing.safetensors",),
    "optimizer.name": ("optimizer.name=nothing",),
    "optimizer.learning_rate": ("optimizer.learning_rate=0.001",),
    "optimizer.text_encoder_learning_rate": ("optimizer.text_encoder_learning_rate=0.001",),
    "optimizer.text_encoder_2_learning_rate": (
        "optimizer.text_encoder_2_learning_rate=0.001",
        "model.base={sdxl}",
    ),
    "optimizer.weight_decay": ("optimizer.weight_decay=1",),
    "optimizer.beta1": ("optimizer.beta1=0.1",),
    "optimizer.beta2": ("optimizer.beta2=0.1",),
    "optimizer.schedule": ("optimizer.schedule=constant",),
    "optimizer.warmup_steps": ("optimizer.warmup_steps=0", "run.total_steps=20"),
    "optimizer.max_grad_norm": ("optimizer.max_grad_norm=1e-9",),
    "optimizer.accumulate_steps": ("optimizer.accumulate_steps=2",),
    "objective.prediction": ("objective.prediction=v_prediction",),
    "objective.min_snr_gamma": ("objective.min_snr_gamma=0.01",),
    "objective.noise_offset": ("objective.noise_offset=0.5",),
    "objective.prior_weight": ("objective.prior_weight=1",),
    "objective.prior_target": ("objective.prior_target=noise", *PRIOR),
    "objective.prior_pictures": ("objective.prior_pictures=5", *PRIOR),
    "objective.prior_batch_size": ("objective.prior_batch_size=2", *PRIOR),
    "objective.prior_guidance_scale": ("objective.prior_guidance_scale=2", *PRIOR),
    "objective.prior_prompts": ("objective.prior_prompts=face", *PRIOR),
    "run.kind": ("run.kind=style",),
    "run.name": ("run.name=other",),
    "run.total_steps": ("run.total_steps=3",),
    "run.stop_at_step": ("run.stop_at_step=1",),
    "run.save_every_steps": ("run.save_every_steps=1",),
    "run.save_every_minutes": ("run.save_every_minutes=1e-9", "run.keep_checkpoints=9"),
    "run.keep_checkpoints": ("run.keep_checkpoints=1",),
    "run.save_retry_minutes": ("run.save_retry_minutes=0",),
    "run.fallback_folder": ("run.fallback_folder={away}", "run.save_retry_minutes=0"),
    "run.tolerated_bad_steps": ("run.tolerated_bad_steps=1", SPOILT),
    "run.log_every_steps": ("run.log_every_steps=2", "run.stop_at_step=3"),
    "run.seed": ("run.seed=1",),
    "run.threads": ("run.threads=2", "run.total_steps=1"),
    "run.tensorboard": ("run.tensorboard=true",),
    "run.sidecars": ("run.sidecars=true",),
    "preview.every_steps": ("preview.every_steps=1",),
    "preview.prompts": ("preview.prompts={other_prompts}", *DRAWN),
    "preview.sampling_steps": ("preview.sampling_steps=3", *DRAWN),
    "preview.guidance_scale": ("preview.guidance_scale=1.5", *DRAWN),
    "preview.seed": ("preview.seed=5", *DRAWN),
    "preview.scorer": ("preview.scorer=own", *DRAWN),
    "preview.scorer_folder": ("preview.scorer_folder=missing", *DRAWN),
}


def test_every_setting_is_on_the_list() -> None:
    assert list(CHANGES) == ALL_SETTINGS


Runner = Callable[..., dict[str, Any]]

# Tags, a choice, and a second line.
CAPTIONS = "{trigger} {class}, smiling, {red|blue}, hat\nat the sea, from above\n"


def save_face(path: Path) -> None:
    """A wide photograph with a face at its left, for the middle to miss."""
    from skimage import data

    Image.fromarray(data.astronaut()).crop((140, 20, 500, 220)).save(path)


@pytest.fixture(scope="module")
def observe(base: Path, v_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Runs settings and tells what can be seen of them; equal settings run once."""
    home = tmp_path_factory.mktemp("wiring")
    whole, broken_set = home / "whole" / "anna", home / "broken" / "anna"
    for folder in (whole, broken_set):
        save_photos(folder)
        save_photos(folder / "below", 1)
        Image.new("RGBA", (40, 40), (9, 9, 9, 90)).save(folder / "clear.png")
        (folder / "0.txt").write_text(CAPTIONS, encoding="utf-8")
        mask = Image.new("L", (48, 48), 255)
        mask.paste(0, (0, 0, 24, 48))
        mask.save(folder / "2-mask.png")
        save_face(folder / "face.png")
    (broken_set / "broken.jpg").write_text("no picture", encoding="utf-8")
    prompts, other = home / "own.txt", home / "other.txt"
    prompts.write_text("{trigger}\n", encoding="utf-8")
    other.write_text("a {trigger} {class}\n", encoding="utf-8")
    captioner = save_tiny_captioner(home / "captioner")
    sdxl = save_tiny_sdxl(home / "sdxl")
    seen: dict[tuple[object, ...], dict[str, Any]] = {}

    def run(*settings: str, broken: bool = False) -> dict[str, Any]:
        key = (broken, *settings)
        if key in seen:
            return seen[key]
        output, cache = home / f"out-{len(seen)}", home / f"cache-{len(seen)}"
        words = [*QUICK, f"model.base={base}", f"preview.prompts={prompts}", *settings]
        words = [
            word.replace("{other_base}", str(v_base))
            .replace("{other_prompts}", str(other))
            .replace("{captioner}", str(captioner))
            .replace("{sdxl}", str(sdxl))
            .replace("{away}", str(home / "away"))
            .replace("{below}", ((broken_set if broken else whole) / "below").as_posix())
            for word in words
        ]
        away = len([*(home / "away").glob("*")])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LIKENESS_CACHE", str(cache))
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            workers, downloads = counted_workers(patch), counted_downloads(patch, base)
            checkpointed, compiled = counted_checkpointing(patch), counted_compiling(patch)
            fail_first_saves(patch)
            spoilt_batch(patch)
            code = run_cli(
                *("train", broken_set if broken else whole, "--output", output),
                *(f"--set={word}" for word in words),
            )
        seen[key] = {"code": code, "threads": torch.get_num_threads(), "cached": cache.exists()}
        seen[key] |= {
            "workers": workers,
            "downloads": downloads,
            "checkpointed": checkpointed,
            "compiled": compiled,
            "saved away": len([*(home / "away").glob("*")]) > away,
        }
        torch.set_num_threads(1)
        seen[key] |= observed(output)
        return seen[key]

    return run


def counted_workers(patch: pytest.MonkeyPatch) -> set[int | None]:
    """How many threads examine photos, filled in while a run goes on."""
    counted: set[int | None] = set()

    class Counted(ThreadPoolExecutor):
        def __init__(self, workers: int | None) -> None:
            counted.add(workers)
            super().__init__(workers)

    patch.setattr("trainer.doctor.examine.ThreadPoolExecutor", Counted)
    return counted


def counted_downloads(patch: pytest.MonkeyPatch, base: Path) -> list[bool]:
    """Whether a base on the hub might be downloaded, whenever one is asked for."""
    asked: list[bool] = []

    def folder(text: str, *, variant: str, download: bool) -> Path:
        asked.append(download)
        return base

    patch.setattr("trainer.commands.bases.hub_folder", folder)
    return asked


def counted_checkpointing(patch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks were told to compute their activations again; that shows in no result."""
    told: list[int] = []

    def count(unet: torch.nn.Module, share: float) -> None:
        told.append(checkpoint_blocks(unet, share))

    patch.setattr("trainer.families.checkpointing.checkpoint_blocks", count)
    return told


def counted_compiling(patch: pytest.MonkeyPatch) -> list[str]:
    """The attention with which blocks were to be compiled; that would take long."""
    told: list[str] = []

    def refuse(attention: str, *_: object) -> str:
        told.append(attention)
        return "not here"

    patch.setattr("trainer.families.compiling.why_not", refuse)
    return told


def spoilt_batch(patch: pytest.MonkeyPatch) -> None:
    """The third batch of runs with `SPOILT_SEED` has a loss that is not a number."""
    loss_of = Learner.loss

    def loss(learner: Learner, index: int) -> torch.Tensor:
        spoilt = learner.objective.seed == SPOILT_SEED and index == 2
        return loss_of(learner, index) * (math.nan if spoilt else 1.0)

    patch.setattr(Learner, "loss", loss)


def fail_first_saves(patch: pytest.MonkeyPatch) -> None:
    """Every save fails at first, as on a disk that is full for a moment."""
    tried: set[int] = set()

    def save(folder: Path, learner: Learner, step: int, *rest: Any, **options: Any) -> Path:
        if step not in tried:
            tried.add(step)
            raise OutputError("The disk is full.", where=str(folder))
        return save_checkpoint(folder, learner, step, *rest, **options)

    patch.setattr("trainer.training.saving.save_checkpoint", save)
    patch.setattr("trainer.training.saving.RETRY_SECONDS", 0.0)


def observed(output: Path) -> dict[str, Any]:
    """Everything of a run's output that a setting may change, but for times and the settings."""
    files = files_in(output) if output.exists() else set()
    result: dict[str, Any] = {"files": {name.split(".out.")[0] for name in files}}
    if "metrics.jsonl" in files:
        rows = metrics_of(output)
        result["metrics"] = [[row["step"], row["loss"], row["rate"]] for row in rows]
    for name in sorted(files):
        if name.endswith(".safetensors") and "checkpoints" not in name:
            lora = load_file(output / name)
            result[name] = {key: (str(t.dtype), t.tolist()) for key, t in lora.items()}
            metadata = read_lora(output / name).metadata
            kept = ("ss_network_dim", "ss_network_alpha", "modelspec.description")
            result[f"{name} metadata"] = {key: metadata[key] for key in kept}
        if name.startswith("previews/"):
            with Image.open(output / name) as image:
                result[name] = (image.info["parameters"], image.tobytes())
    return result


@pytest.mark.slow
@pytest.mark.parametrize("dotted", ALL_SETTINGS)
def test_a_setting_changes_something(dotted: str, observe: Runner) -> None:
    own, *needed = CHANGES[dotted]
    assert own.startswith(f"{dotted}=")
    if dotted == "model.device" and torch.cuda.is_available():
        needed = ["model.device=cpu"]
    broken = dotted == "data.skip_bad"
    changed, unchanged = observe(*needed, own, broken=broken), observe(*needed, broken=broken)
    assert changed != unchanged
    if dotted not in REFUSED:
        assert changed["code"] == 0


@pytest.mark.slow
def test_the_same_settings_change_nothing(observe: Runner) -> None:
    """The comparison itself: a run and its like show no difference."""
    assert observe() == observe("adapter.kind=lora")
