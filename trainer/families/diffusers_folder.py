"""A base in diffusers' folder format: its modules, each read from files of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import ModelError
from trainer.families import BaseFacts
from trainer.families.detect import read_json
from trainer.families.header import read_header
from trainer.families.hub import variant_of
from trainer.families.ldm import Source
from trainer.families.single_file import Plan, fill, load_vae

if TYPE_CHECKING:
    import torch

# What the libraries raise on missing, damaged and foreign files.
LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError)
# The text encoders in diffusers' folders, and the classes of transformers they are.
TEXT_ENCODERS = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}


def read_part(facts: BaseFacts, name: str, dtype: torch.dtype) -> Any:
    """A module of a base, each weight read straight into the number format that is wanted.

    Args:
        facts: of the base; its `folder` is one. name: `unet`, `vae`, or a name of `TEXT_ENCODERS`.

    Raises:
        ModelError: its files are missing, damaged, or do not belong to its configuration.
    """
    folder = facts.folder
    try:
        if name == "unet":
            return _unet(folder, dtype)
        if name != "vae":
            return _text_encoder(folder, name, dtype)
        if facts.vae:
            return load_vae(facts.vae, facts.family, dtype)
        return _vae(folder, dtype)
    except LOAD_ERRORS as error:
        raise not_loaded(folder, error) from error


def not_loaded(place: Path, reason: object) -> ModelError:
    """The error for a base that cannot be loaded for a reason that a library gave."""
    return ModelError(
        f"The base model cannot be loaded: {reason}",
        where=str(place),
        fix="Copy or download the base again.",
    )


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


def _unet(folder: Path, dtype: torch.dtype) -> Any:
    """The UNet, by our own reader where its file is as such files are now: diffusers' has the
    whole file in memory beside the module."""
    from diffusers import UNet2DConditionModel

    file = _weights_file(folder / "unet")
    if file is not None:
        header = read_header(file)
        config = UNet2DConditionModel.load_config(str(folder), subfolder="unet")
        sources = {name: Source(name) for name in header.tensors}
        plan = Plan(lambda: UNet2DConditionModel.from_config(config), sources)
        return fill(plan, header, dtype, [])
    return _part(UNet2DConditionModel, folder, "unet", dtype)


def _vae(folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL

    return _part(AutoencoderKL, folder, "vae", dtype)


def _part(kind: Any, folder: Path, name: str, dtype: torch.dtype) -> Any:
    """The UNet or the VAE; weights that the files lack stay without content."""
    part = kind.from_pretrained(
        str(folder), subfolder=name, torch_dtype=dtype, variant=variant_of(folder / name)
    )
    _require_all(name, [key for key, weight in part.named_parameters() if weight.is_meta])
    return part


def _weights_file(folder: Path) -> Path | None:
    """The one `.safetensors` file that the weights of a UNet or VAE are in; None where they are in
    several, or in files of other kinds."""
    variant = variant_of(folder)
    path = folder / f"diffusion_pytorch_model{'.' + variant if variant else ''}.safetensors"
    return path if path.is_file() else None


def require_weights(facts: BaseFacts, encoders: Sequence[str]) -> None:
    """Look at the files of all modules of a base in diffusers' folder format, without reading their
    weights: a download that was interrupted is found before anything is done.

    Raises:
        ModelError: a file is no model, is cut off or damaged.
    """
    parts = ["unet", *encoders, *([] if facts.vae else ["vae"])]
    for path in (path for part in parts for path in (facts.folder / part).glob("*.safetensors")):
        try:
            read_header(path)
        except ModelError as error:
            raise not_loaded(path, error.what) from error


def _require_all(name: str, missing: list[str]) -> None:
    if missing:
        raise ValueError(f"{len(missing)} weights of {name} are missing, such as {missing[0]}")


def own_scheduler(facts: BaseFacts) -> Any:
    """The base's own sampler, so that our samples are what a plain pipeline draws.

    Raises:
        ModelError: the base's folder names none, or one that is not known.
    """
    try:
        return _scheduler(facts)
    except LOAD_ERRORS as error:
        raise not_loaded(facts.folder, error) from error


def _scheduler(facts: BaseFacts) -> Any:
    """See `own_scheduler`.

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
