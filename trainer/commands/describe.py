"""The captioner that settings or flags name, as a function of a photo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from trainer.captioners import CAPTIONERS, Captioner, CaptionerOptions
from trainer.config.presets import OWN_CAPTIONER, shipped_folder
from trainer.config.settings import TrainConfig
from trainer.data.decode import decode_upright, shown
from trainer.errors import ConfigError, UsageError
from trainer.families import BaseFacts
from trainer.training.device import choose_device
from trainer.types import Photo

# Our own captioner: a name among the captioners, and as well where a folder could be given.
OWN = "own"
# Those that are told where their model is.
WITH_MODEL = ("transformers", "tagger")


def describer_of(
    config: TrainConfig, facts: BaseFacts, console: Console
) -> Callable[[Photo], str] | None:
    """What describes a run's photos without a sidecar, if anything.

    It is loaded when it is first asked: most folders have all their captions.

    Raises:
        ConfigError: there is no such captioner, it lacks its folder, or it is our own for a base
            that is not ours.
    """
    name = captioner_of(config, facts)
    if name == "none":
        return None
    options = CaptionerOptions(model=config.caption.captioner_folder)
    loaded: list[Captioner] = []

    def describe(photo: Photo) -> str:
        if not loaded:
            loaded.append(
                open_captioner(
                    name, options, console, kind=config.run.kind, device=config.model.device
                )
            )
        return loaded[0].caption(
            photo,
            lambda: decode_upright(photo.path, background=config.data.background_rgb),
            config.run.kind,
        )

    return describe


def captioner_of(config: TrainConfig, facts: BaseFacts) -> str:
    """The name of a run's captioner, or "none", where the template is the caption.

    Raises:
        ConfigError: as `describer_of`.
    """
    name, folder = config.caption.captioner, config.caption.captioner_folder
    if name == "auto":
        name = _kind_of(folder)
        if folder == OWN:
            name = OWN if facts.embedded else "none"
    # `caption.template` is what describes the photos that nothing else does.
    if name in ("none", "template"):
        return "none"
    CAPTIONERS[name]
    if name == "transformers" and folder == OWN:
        name = OWN
    where = f"caption.captioner = {config.caption.captioner!r}"
    if name == "tagger" and folder == OWN:
        raise ConfigError(
            "The tagger needs its folder.",
            where=where,
            fix="Give the folder with its model.onnx and selected_tags.csv: "
            "--set caption.captioner_folder=FOLDER",
        )
    if name == OWN and not facts.embedded:
        raise ConfigError(
            "Our own captioner knows the embedded base's drawings only.",
            where=where,
            fix="Give the folder of a captioning model for photos, such as BLIP: "
            "--set caption.captioner=transformers --set caption.captioner_folder=FOLDER",
        )
    return name


def caption_flags(config: TrainConfig, facts: BaseFacts) -> str:
    """What `likeness caption` needs for the captioner of a run: " --captioner ...", or "".

    Raises:
        ConfigError: as `describer_of`.
    """
    name = captioner_of(config, facts)
    if name in ("none", OWN):
        return ""
    model = f' --model "{config.caption.captioner_folder}"' if name in WITH_MODEL else ""
    return f" --captioner {name}{model}"


def open_captioner(
    name: str, options: CaptionerOptions, console: Console, *, kind: str, device: str
) -> Captioner:
    """Load a captioner, and say that photos are described with it.

    Args:
        name: of the captioner, in `CAPTIONERS`.
        options: what the user asked for; device and number format are filled in here, and the
            model of those that bring theirs.
        console: where it is said; large captioners take seconds for a photo.
        kind: what is learned from the photos: `face` or `style`.
        device: where it runs, as in `model.device`.

    Raises:
        UsageError: there is no such captioner, or it needs a package that is not installed.
        TrainerError: it cannot be used; see the captioners.
    """
    whose = f"the captioner '{name}'"
    load = CAPTIONERS.load(name)
    if name == OWN:
        whose, options = "our own captioner", replace(options, model=str(OWN_CAPTIONER))
    elif name == "template" and not options.model:
        lines = shipped_folder("prompts") / "captions" / f"{kind}.txt"
        options = replace(options, model=str(lines))
    if name in WITH_MODEL:
        there = Path(options.model).expanduser().is_dir()
        fetched = "" if there else ", fetched from the Hugging Face hub if it is not here yet"
        whose = f"the {name} captioner in {shown(options.model)}{fetched}"
    console.print(f"Describing photos with {whose}", markup=False, highlight=False, soft_wrap=True)
    if name in (OWN, *WITH_MODEL):
        chosen = choose_device(device, "fp32" if name == OWN else "auto", "sdpa")
        options = replace(options, device=chosen.device, half=chosen.dtype)
    return load(options)


def require_captioner(name: str, model: str) -> None:
    """Refuse a folder in the place of a captioner's name, saying what to type.

    Raises:
        UsageError: the name is a folder's or of no captioner, or the model is missing or of no use.
    """
    if name not in tuple(CAPTIONERS) and ("/" in name or "\\" in name or Path(name).is_dir()):
        raise UsageError(
            "--captioner takes a captioner's name; its folder goes after --model.",
            where=f"--captioner {shown(name)}",
            fix=f'Type: --captioner {_kind_of(name)} --model "{shown(name)}"',
        )
    CAPTIONERS[name]
    if name in WITH_MODEL and not model:
        raise UsageError(
            f"The captioner '{name}' needs its model.",
            where="--model is missing",
            fix="Give its folder, or its name on the Hugging Face hub, after --model.",
        )
    if model and name in (OWN, "filename"):
        raise UsageError(
            f"The captioner '{name}' takes no model.",
            where=f"--model {shown(model)}",
            fix="Leave out --model, or choose --captioner transformers or tagger.",
        )


def _kind_of(folder: str) -> str:
    """`tagger` for a folder with a tagger's list of tags, else `transformers`."""
    tags = Path(folder).expanduser() / "selected_tags.csv"
    return "tagger" if tags.is_file() else "transformers"
