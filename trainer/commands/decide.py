"""The first half of `likeness train`: what was asked for is checked and becomes a `Job`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from trainer.adapters import ADAPTERS
from trainer.commands.bases import base_facts, is_embedded
from trainer.commands.describe import OWN, describer_of
from trainer.config.presets import preset_path, prompts_path
from trainer.config.reader import (
    Layer,
    Resolved,
    build_config,
    chosen,
    fill_unset,
    override_layer,
    parse_override,
    read_toml,
)
from trainer.config.settings import TrainConfig
from trainer.data.buckets import bucket_counts, bucket_photos, make_buckets
from trainer.data.captions import caption_photos
from trainer.data.photos import PhotoScan, require_usable, scan_folder
from trainer.errors import ConfigError, UsageError
from trainer.families import BaseFacts
from trainer.optim import OPTIMIZERS
from trainer.training.device import choose_device
from trainer.training.finish import base_title
from trainer.training.job import Job
from trainer.training.run_folder import (
    SETTINGS_FILE,
    RunFolder,
    choose_root,
    file_stem,
    holds_run,
    open_root,
    require_free,
)

RUNS = Path("runs")


@dataclass(frozen=True, slots=True)
class Request:
    """The command line of `likeness train`; None where nothing was given."""

    photos: Path
    kind: str | None = None
    trigger: str | None = None
    class_noun: str | None = None
    base: str | None = None
    config: Path | None = None
    overrides: tuple[str, ...] = ()
    output: Path | None = None
    resume: bool = False
    overwrite: bool = False
    command: str = ""


def decide(request: Request, console: Console) -> Job:
    """Check the request and settle what is to be done; only the output folder is created."""
    if request.resume and request.overwrite:
        raise UsageError("--resume and --overwrite exclude each other.")
    root = choose_root(
        request.photos,
        request.output,
        resume=request.resume,
        overwrite=request.overwrite,
        runs=RUNS,
    )
    resolved, facts = _settings(request, root)
    config = resolved.config
    scan = scan_folder(request.photos, recursive=config.data.recursive)
    photos = require_usable(scan, skip_bad=config.data.skip_bad)
    resolved = fill_unset(
        resolved,
        {"data.resolution": facts.resolution, "data.bucket_step_px": facts.bucket_step_px},
        "by base",
    )
    resolved = fill_unset(
        resolved, {"run.name": file_stem(request.photos.resolve().name)}, "the photo folder"
    )
    config = resolved.config
    _check_choices(config, facts)
    folder = RunFolder(root, config.run.name or file_stem(request.photos.resolve().name))
    if not (request.overwrite or holds_run(root)):
        require_free(folder)
    captioned = caption_photos(
        photos,
        trigger=config.caption.trigger,
        class_noun=config.caption.class_noun,
        template=config.caption.template,
        use_sidecars=config.caption.use_sidecars,
        describe=describer_of(config, facts, console),
    )
    buckets = make_buckets(
        config.data.resolution or facts.resolution,
        step_px=config.data.bucket_step_px or facts.bucket_step_px,
        max_aspect=config.data.max_aspect,
    )
    job = Job(
        source=request.photos,
        config=config,
        origins=resolved.origins,
        facts=facts,
        folder=folder,
        photos=bucket_photos(captioned, buckets),
        command=request.command,
    )
    open_root(root)
    _say_what(job, scan, console)
    return job


def _settings(request: Request, root: Path) -> tuple[Resolved, BaseFacts]:
    """The settings in their layers, and the facts of the base they name."""
    typed: list[tuple[str, Any]] = [
        (name, value)
        for name, value in (
            ("run.kind", request.kind),
            ("caption.trigger", request.trigger),
            ("caption.class_noun", request.class_noun),
            ("model.base", request.base),
        )
        if value is not None
    ]
    layers: list[Layer] = []
    if request.resume and (root / SETTINGS_FILE).is_file():
        layers.append(_saved_settings(root / SETTINGS_FILE))
    if request.config:
        layers.append(read_toml(request.config, request.config.name))
    typed += [parse_override(text) for text in request.overrides]
    layers.append(override_layer(typed, "command line"))
    kind = chosen(layers, "run.kind", "face")
    base = chosen(layers, "model.base", "embedded")
    embedded = is_embedded(base)
    preset = preset_path(kind, embedded=embedded)
    if preset.is_file():  # a kind that does not exist is explained with the other settings
        layers.insert(0, read_toml(preset, f"preset {preset.stem}"))
    resolved = build_config(layers)
    return resolved, base_facts(base)


def _check_choices(config: TrainConfig, facts: BaseFacts) -> None:
    """Everything that is named by a text or depends on the base, before anything is loaded.

    Raises:
        UsageError, DeviceError, DataError: a name, file or size is wrong.
    """
    OPTIMIZERS[config.optimizer.name]
    ADAPTERS[config.adapter.kind]
    choose_device(config.model.device, config.model.precision, "auto")
    unit = max(8, facts.pixels_per_latent)
    if (config.data.bucket_step_px or unit) % unit:
        raise ConfigError(
            f"data.bucket_step_px ({config.data.bucket_step_px}) is not a multiple of {unit} px, "
            "which the base needs.",
            where="data.bucket_step_px",
            fix=f"Set it to a multiple of {unit}; the default is {facts.bucket_step_px}.",
        )
    names = [config.objective.prior_prompts]
    names += [config.preview.prompts] if config.preview.every_steps else []
    for name in names:
        prompts_path(name)


def _saved_settings(path: Path) -> Layer:
    """The settings of a run that goes on, except where it was asked to end early."""
    layer = read_toml(path, "the run so far")
    layer.values.get("run", {}).pop("stop_at_step", None)
    return layer


def _say_what(job: Job, scan: PhotoScan, console: Console) -> None:
    config, caption = job.config, job.config.caption

    def say(line: str, style: str = "") -> None:
        console.print(line, style=style, highlight=False, soft_wrap=True, markup=False)

    origins = Counter(photo.captioned.origin for photo in job.photos)
    captions = f"{origins['sidecar']} captions from .txt files"
    if origins["captioner"]:
        captions += f", {origins['captioner']} by the captioner"
    if origins["template"]:
        captions += f", {origins['template']} are '{_template_words(job)}'"
    buckets = ", ".join(f"{n} at {size}" for size, n in sorted(bucket_counts(job.photos).items()))
    say(f"Photos    {len(job.photos)} in {job.source} ({captions}); {buckets} px")
    skipped = [
        f"{count} {words}"
        for count, words in (
            (len(scan.problems), "that cannot be used"),
            (scan.hidden, "hidden"),
            (scan.other, "that are no pictures"),
        )
        if count
    ]
    if skipped:
        say(f"          skipped files: {', '.join(skipped)}")
    for problem in scan.problems:
        say(f"          {problem.path.name} {problem.reason}. {problem.fix}", "yellow")
    for group in scan.duplicates:
        say(f"          the same picture: {', '.join(path.name for path in group)}", "yellow")
    if origins["captioner"]:
        say(f"          the captioner's are in the report; to edit them first: {_edit_words(job)}")
    say(
        f"Words     trigger '{caption.trigger}' ({job.origins['caption.trigger']}), class "
        f"'{caption.class_noun}' ({job.origins['caption.class_noun']}): prompt with "
        f"'{caption.trigger} {caption.class_noun}'"
    )
    say(f"Base      {base_title(job)}" + (f": the LoRA is {job.note}" if job.note else ""))
    say(
        f"Training  {config.run.kind}, {config.run.total_steps} steps, batch "
        f"{config.data.batch_size}, rank {config.adapter.rank}, rate "
        f"{config.optimizer.learning_rate:g} ({_preset_words(job)})"
    )
    say(f"Output    {job.folder.root}")


def _preset_words(job: Job) -> str:
    """Where the settings came from, the last layer first."""
    return ", ".join(dict.fromkeys(reversed([o for o in job.origins.values() if o != "default"])))


def _edit_words(job: Job) -> str:
    """The command that writes the captioner's captions beside the photos."""
    words = f'likeness caption "{job.source}"'
    if job.config.run.kind != "face":
        words += f" --kind {job.config.run.kind}"
    if job.config.caption.captioner_folder != OWN:
        words += f' --captioner "{job.config.caption.captioner_folder}"'
    return words


def _template_words(job: Job) -> str:
    return next(
        photo.captioned.text for photo in job.photos if photo.captioned.origin == "template"
    )
