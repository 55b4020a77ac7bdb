"""The first half of `likeness train`: what was asked for is checked and becomes a `Job`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from trainer.adapters import ADAPTERS
from trainer.commands.bases import base_facts, is_embedded
from trainer.commands.describe import caption_flags
from trainer.commands.fitting import fitted, require_gpu
from trainer.commands.material import Material, gather
from trainer.commands.sets import SO_FAR, with_words_of
from trainer.commands.starts import chosen_start, start_layer
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
from trainer.data.buckets import bucket_counts
from trainer.data.photos import PhotoScan
from trainer.doctor.words import brief
from trainer.errors import ConfigError, UsageError
from trainer.families import BaseFacts, early
from trainer.optim import OPTIMIZERS
from trainer.training.checkpoint_files import STATE
from trainer.training.device import Device, choose_device
from trainer.training.finish import base_title
from trainer.training.job import Job
from trainer.training.run_folder import (
    SETTINGS_FILE,
    RunFolder,
    choose_root,
    file_stem,
    holds_run,
    open_root,
    refuse_run,
    require_free,
    run_of,
)
from trainer.training.scorer import check_scorer

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
    resume_from: Path | None = None
    init: Path | None = None
    overwrite: bool = False
    preflight: bool = False
    command: str = ""


def decide(request: Request, console: Console, processes: int = 1) -> Job:
    """Check the request and settle what is to be done; only the output folder is created.

    processes: that train together, each of them on as many batches in a step.
    """
    if request.resume and request.overwrite:
        raise UsageError("--resume and --overwrite exclude each other.")
    resumed = _resumed_place(request)
    root = choose_root(
        request.photos,
        request.output or (resumed and run_of(resumed)),
        resume=request.resume,
        overwrite=request.overwrite,
        runs=RUNS,
    )
    numbered = not (request.output or holds_run(root))
    resolved, facts = settings_of(request, root)
    config = resolved.config
    device = _check_choices(config, facts)
    check_scorer(config, facts)
    folder = RunFolder(root, config.run.name or file_stem(request.photos.resolve().name))
    require_own(request, folder)
    early.begin()
    material = gather(request.photos, resolved, facts, console, strict=True, processes=processes)
    class_pictures = material.pictures_of("class")
    if class_pictures:
        resolved = fill_unset(resolved, {"objective.prior_weight": 1.0}, "the class set")
        _require_prior(resolved.config)
    if not request.preflight:
        root = open_root(root, numbered=numbered)
    job = Job(
        source=request.photos,
        config=resolved.config,
        origins=resolved.origins,
        facts=facts,
        folder=RunFolder(root, folder.name),
        photos=material.photos_of("subject"),
        pictures=material.pictures_of("subject"),
        class_pictures=class_pictures,
        styles=material.styles,
        command=request.command,
        resume_from=resumed,
        start=chosen_start(resolved.config, facts, resume=request.resume),
    )
    job, memory = fitted(job, device, processes)
    _say_what(job, material, console, processes)
    if memory:
        console.print(memory, highlight=False, soft_wrap=True, markup=False)
    return job


def require_own(request: Request, folder: RunFolder) -> None:
    """Make sure that nothing in the output folder is replaced that was not to be.

    Raises:
        OutputError: there is a run in it, or files that are none of a run.
    """
    if request.overwrite:
        return
    if not holds_run(folder.root):
        require_free(folder)
    elif not request.resume:
        refuse_run(folder.root)


def _resumed_place(request: Request) -> Path | None:
    """Where the checkpoint is to be looked for, if the user says that.

    Raises:
        UsageError: there is none at all.
    """
    place = request.resume_from
    if place is None:
        return None
    inside = run_of(place)
    if not ((place / STATE).is_file() or (inside and holds_run(inside))):
        raise UsageError(
            f"There is no run and no checkpoint in '{place}'.",
            fix="Give the folder of a run, or one of those in its checkpoints/.",
        )
    return place


def settings_of(request: Request, root: Path | None = None) -> tuple[Resolved, BaseFacts]:
    """The settings in their layers, complete, and the facts of the base they name.

    root: the folder of the run, whose own settings come first when it goes on.
    """
    typed: list[tuple[str, Any]] = [
        (name, value)
        for name, value in (
            ("run.kind", request.kind),
            ("caption.trigger", request.trigger),
            ("caption.class_noun", request.class_noun),
            ("model.base", request.base),
            ("adapter.init", str(request.init) if request.init else None),
        )
        if value is not None
    ]
    layers: list[Layer] = []
    saved: list[Path] = []
    if root and request.resume:
        places = [run_of(request.resume_from) if request.resume_from else None, root]
        files = [place / SETTINGS_FILE for place in places if place]
        saved = [path for path in files if path.is_file()][:1]
        layers += [_saved_settings(path) for path in saved]
    if request.config:
        layers.append(read_toml(request.config, request.config.name))
    typed += [parse_override(text) for text in request.overrides]
    layers.append(override_layer(typed, "command line"))
    init = chosen(layers, "adapter.init", "")
    if init and not saved:
        layers.insert(0, start_layer(Path(init).expanduser()))
    kind = chosen(layers, "run.kind", "face")
    base = chosen(layers, "model.base", "embedded")
    embedded = is_embedded(base)
    preset = preset_path(kind, embedded=embedded)
    if preset.is_file():  # a kind that does not exist is explained with the other settings
        layers.insert(0, read_toml(preset, f"preset {preset.stem}"))
    resolved = build_config(layers)
    model = resolved.config.model
    facts = base_facts(
        base,
        prediction=resolved.config.objective.prediction,
        precision=model.precision,
        vae=Path(model.vae).expanduser() if model.vae else None,
        tokenizer=Path(model.tokenizer).expanduser() if model.tokenizer else None,
        download=model.download,
    )
    by_base = {"data.resolution": facts.resolution, "data.bucket_step_px": facts.bucket_step_px}
    resolved = fill_unset(resolved, by_base, "by base")
    resolved = with_words_of(request.photos, resolved)
    name = file_stem(request.photos.resolve().name)
    return fill_unset(resolved, {"run.name": name}, "the photo folder"), facts


def _require_prior(config: TrainConfig) -> None:
    if not config.objective.prior_weight:
        raise ConfigError(
            "There is a class set, but class pictures are switched off.",
            where="objective.prior_weight = 0",
            fix="Set it to 1, or take the class set out of data.sets.",
        )


def _check_choices(config: TrainConfig, facts: BaseFacts) -> Device:
    """Everything that is named by a text or depends on the base, before anything is loaded; the
    device that will be used.

    Raises:
        UsageError, DeviceError, DataError: a name, file or size is wrong.
    """
    OPTIMIZERS[config.optimizer.name]
    ADAPTERS[config.adapter.kind]
    model, width = config.model, facts.attention.width
    named = model.device, model.precision, "sdpa"
    device = choose_device(*named, weights=model.weights, width=width)
    require_gpu(config, device)
    unit = max(8, facts.pixels_per_latent)
    if (config.data.bucket_step_px or unit) % unit:
        raise ConfigError(
            f"data.bucket_step_px ({config.data.bucket_step_px}) is not a multiple of {unit} px, "
            "which the base needs.",
            where="data.bucket_step_px",
            fix=f"Set it to a multiple of {unit}; the default is {facts.bucket_step_px}.",
        )
    drawn = [config.preview.prompts] if config.preview.every_steps else []
    for name in (config.objective.prior_prompts, *drawn):
        prompts_path(name)
    return device


def _saved_settings(path: Path) -> Layer:
    """The settings of a run that goes on, except where it was asked to end early."""
    layer = read_toml(path, SO_FAR)
    run = layer.values.get("run")
    if isinstance(run, dict):
        run.pop("stop_at_step", None)
    return layer


def _say_what(job: Job, material: Material, console: Console, processes: int) -> None:
    config, caption = job.config, job.config.caption

    def say(line: str, style: str = "") -> None:
        console.print(line, style=style, highlight=False, soft_wrap=True, markup=False)

    origins = Counter(photo.origin for photo in job.photos)
    captions = f"{origins['sidecar']} captions from .txt files"
    if origins["captioner"]:
        captions += f", {origins['captioner']} by the captioner"
    if origins["template"]:
        captions += f", {origins['template']} are '{_template_words(job)}'"
    counts = bucket_counts(job.plain_pictures)
    buckets = ", ".join(f"{n} at {size}" for size, n in sorted(counts.items()))
    say(f"Photos    {len(job.photos)} in {job.source} ({captions}); {buckets} px")
    if skipped := _skipped([kept.scan for kept in material.sets]):
        say(f"          skipped files: {skipped}")
    for line in brief(material.diagnosis):
        say(f"          {line}")
    if origins["captioner"]:
        say(f"          the captioner's are in the report; to edit them first: {_edit_words(job)}")
    say(
        f"Words     trigger '{caption.trigger}' ({job.origins['caption.trigger']}), class "
        f"'{caption.class_noun}' ({job.origins['caption.class_noun']}): prompt with "
        f"'{caption.trigger} {caption.class_noun}'"
    )
    say(f"Base      {base_title(job)}" + (f": the LoRA is {job.note}" if job.note else ""))
    shared = f" in each of {processes} processes" if processes > 1 else ""
    say(
        f"Training  {config.run.kind}, {config.run.total_steps} steps, batch "
        f"{config.data.batch_size}{shared}, rank {config.adapter.rank}, rate "
        f"{config.optimizer.learning_rate:g} ({_preset_words(job)})"
    )
    say(f"Output    {job.folder.root}")


def _skipped(scans: Sequence[PhotoScan]) -> str:
    """What else is in the folders, counted."""
    counts = (
        (sum(scan.hidden for scan in scans), "hidden"),
        (sum(scan.other for scan in scans), "that are no pictures"),
        (sum(len(scan.linked) for scan in scans), "that are links to folders"),
    )
    return ", ".join(f"{count} {words}" for count, words in counts if count)


def _preset_words(job: Job) -> str:
    """Where the settings came from, the last layer first."""
    return ", ".join(dict.fromkeys(reversed([o for o in job.origins.values() if o != "default"])))


def _edit_words(job: Job) -> str:
    """The command that writes the captioner's captions beside the photos."""
    words = f'likeness caption "{job.source}"'
    if job.config.run.kind != "face":
        words += f" --kind {job.config.run.kind}"
    words += caption_flags(job.config, job.facts)
    return words


def _template_words(job: Job) -> str:
    return next(photo.text for photo in job.photos if photo.origin == "template")
