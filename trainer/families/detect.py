"""Which family a base belongs to, from its configuration files or its header alone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer import untrusted
from trainer.errors import ModelError
from trainer.families import FAMILIES, AttentionFacts, BaseFacts
from trainer.families.header import Header, read_header
from trainer.families.kinds import NEEDED, Kind, identify, identify_configs
from trainer.families.ldm import UNET_PREFIX, VAE_PREFIX, Source, unet_sources, vae_sources
from trainer.families.sizes import Shapes, shipped_config, unet_config, vae_config

_PARTS = {"unet": "UNet", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
_WHAT_A_BASE_IS = (
    "Give after --base: the folder of a Stable Diffusion model in diffusers format, a single file "
    "(.safetensors, .ckpt), or the name of a repository on the Hugging Face hub (author/model)."
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: it is missing or is not a JSON object.
    """
    try:
        value = untrusted.read_json(path, untrusted.CONFIG_BYTES)
    except FileNotFoundError:
        raise ModelError(
            "A file of the base model is missing.",
            where=str(path),
            fix="Copy or download the base again; every sub-folder needs its config.json.",
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"A file of the base model cannot be read: {error}", where=str(path)
        ) from error
    if not isinstance(value, dict):
        raise ModelError("A file of the base model is not what it should be.", where=str(path))
    return value


def inspect_base(path: Path, *, prediction: str = "auto", vae: Path | None = None) -> BaseFacts:
    """The facts of the base in a folder or file.

    Args:
        path: a folder in diffusers format, or a single file.
        prediction: the setting `objective.prediction`; for bases that do not say it themselves.
        vae: folder or file of a VAE given separately.

    Raises:
        ModelError: there is no base, or none of a family that can be trained, or it cannot be
            known what it predicts.
    """
    if not path.exists():
        raise ModelError("There is no such base model.", where=str(path), fix=_WHAT_A_BASE_IS)
    if vae and not vae.exists():
        raise ModelError(
            "There is no such VAE.",
            where=str(vae),
            fix="Give a VAE's folder in diffusers format or its file after --vae.",
        )
    if path.is_file():
        return replace(_file_facts(path, prediction, vae), vae=vae)
    return replace(_folder_facts(path), vae=vae)


def _require_trainable(kind: Kind, path: Path) -> None:
    """Raises: ModelError: a model of this kind is not for training, or not yet."""
    can = f"Families that can: {', '.join(entry.help for entry in FAMILIES.values())}."
    if kind.obstacle:
        raise ModelError(kind.obstacle, where=str(path), fix=kind.advice or can)
    if kind.family not in tuple(FAMILIES):
        raise ModelError(
            f"The base is recognised as {kind.what}, which cannot be trained yet.",
            where=str(path),
            fix=can,
        )


# --- folders


def identify_folder(folder: Path) -> Kind:
    """What a folder in diffusers format is.

    Raises:
        ModelError: it is no such folder, or a configuration file is missing or damaged.
    """
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            "This folder is not a base model in diffusers format.",
            where=f"{folder} (it has no model_index.json)",
            fix=_advice_for_plain_folder(folder),
        )
    index = read_json(folder / "model_index.json")
    if "unet" not in index:
        return identify_configs(index, {"addition_embed_type": "none"}, {}, {})
    unet = read_json(folder / "unet" / "config.json")
    text, scheduler = ({}, {})
    if (folder / "text_encoder" / "config.json").is_file():
        text = read_json(folder / "text_encoder" / "config.json")
    if (folder / "scheduler" / "scheduler_config.json").is_file():
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    return identify_configs(index, unet, text, scheduler)


def _advice_for_plain_folder(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".ckpt"))
    if files:
        return f"If the model is the file '{files[0].name}' in it, give that file after --base."
    return "Its sub-folders should be unet, vae, text_encoder, tokenizer and scheduler."


def _folder_facts(folder: Path) -> BaseFacts:
    kind = identify_folder(folder)
    _require_trainable(kind, folder)
    facts: BaseFacts | None = FAMILIES.load(kind.family).read_facts(folder)
    if facts is None:
        pipeline = read_json(folder / "model_index.json").get("_class_name", "unknown")
        raise ModelError(
            f"A base of this kind ({pipeline}) cannot be trained yet.",
            where=str(folder),
            fix=f"Families that can: {', '.join(entry.help for entry in FAMILIES.values())}.",
        )
    return replace(facts, zero_terminal_snr=kind.zero_terminal_snr)


# --- single files


def _file_facts(path: Path, prediction: str, vae: Path | None) -> BaseFacts:
    header = read_header(path)
    kind = identify(header)
    _require_trainable(kind, path)
    _require_parts(kind, path, vae)
    known = prediction if prediction != "auto" else kind.prediction
    if not known:
        raise ModelError(
            f"This is {kind.what}, and its file does not say what it predicts: the models for 512 "
            "px predict noise, those for 768 px predict v, and both look the same inside.",
            where=str(path),
            fix="Add --set objective.prediction=v_prediction for a 768 px model, "
            "or --set objective.prediction=epsilon for a 512 px model.",
        )
    return file_facts(header, kind, known)


def _require_parts(kind: Kind, path: Path, vae: Path | None) -> None:
    missing = [_PARTS[part] for part in NEEDED[kind.family] if part not in kind.parts]
    if missing:
        raise ModelError(
            f"The file is recognised as {kind.what}, but it has no {' and no '.join(missing)}.",
            where=str(path),
            fix="Training needs the whole model: download the complete checkpoint, or its folder "
            "in diffusers format.",
        )
    if "vae" not in kind.parts and vae is None:
        raise ModelError(
            f"The file is recognised as {kind.what}, but it has no VAE.",
            where=str(path),
            fix="Give the VAE of the family after --vae (a folder in diffusers format or a file).",
        )


def file_facts(header: Header, kind: Kind, prediction: str) -> BaseFacts:
    """The facts of a base that is a single file.

    Args:
        header: of the file. kind: what it is. prediction: `epsilon` or `v_prediction`.

    Raises:
        ModelError: tensors are missing that its sizes are read from.
    """
    released = shipped_config(kind.family, "unet", prediction)
    names = header.tensors.keys()
    try:
        unet = unet_config(shapes_of(header, unet_sources(names, UNET_PREFIX)), released)
        vae = shipped_config(kind.family, "vae")
        if "vae" in kind.parts:
            vae = vae_config(shapes_of(header, vae_sources(names, VAE_PREFIX)), vae)
    except (KeyError, IndexError) as error:
        raise ModelError(
            f"The file is recognised as {kind.what}, but tensors are missing in it: {error}.",
            where=str(header.path),
            fix="Download it again; if it was merged or cut down, use the model it came from.",
        ) from error
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    resolution = _said_resolution(header) or int(released["sample_size"]) * factor
    return BaseFacts(
        family=kind.family,
        name=header.path.stem,
        folder=header.path,
        resolution=resolution,
        bucket_step_px=bucket_step(resolution),
        width=unet["cross_attention_dim"],
        pixels_per_latent=factor,
        prediction=prediction,
        fits_real=same_architecture(unet, released),
        embedded=False,
        # OpenCLIP's projection is [hidden, P].
        pooled=(header.shape("conditioner.embedders.1.model.text_projection") or (0,))[-1],
        zero_terminal_snr=kind.zero_terminal_snr,
        attention=first_attention(unet),
        latent_channels=int(vae.get("latent_channels", 4)),
    )


def shapes_of(header: Header, sources: dict[str, Source]) -> Shapes:
    """The shapes of tensors by the names that our modules have for them."""
    return {name: source.shape(header.shape(source.name)) for name, source in sources.items()}


def same_architecture(unet: dict[str, Any], released: dict[str, Any]) -> bool:
    """Whether a LoRA made on a UNet fits that of the released model: two UNet configurations."""
    keys = ("cross_attention_dim", "block_out_channels", "layers_per_block")
    return all(unet.get(key) == released[key] for key in keys)


def first_attention(unet: dict[str, Any]) -> AttentionFacts:
    """The attention of the UNet's first level that has one.

    Args:
        unet: its configuration, in which `attention_head_dim` is the number of heads whatever its
            name says, unless that is given as `num_attention_heads`. What it leaves out is that of
            Stable Diffusion 1.

    Raises:
        IndexError, TypeError, ZeroDivisionError: the configuration contradicts itself.
    """
    shipped = shipped_config("sd1", "unet")
    kinds, widths, given = (
        unet.get(key) or shipped[key]
        for key in ("down_block_types", "block_out_channels", "attention_head_dim")
    )
    levels = [number for number, kind in enumerate(kinds) if "CrossAttn" in kind]
    level = levels[0] if levels else len(widths) - 1
    heads = unet.get("num_attention_heads") or given
    count = heads[level] if isinstance(heads, list | tuple) else heads
    return AttentionFacts(count, max(widths[level] // count, 1), 2**level)


def bucket_step(resolution: int) -> int:
    """Step of bucket sides in px: 64 as everywhere; a quarter of a small base's picture."""
    return 64 if resolution >= 256 else max(resolution // 4, 8)


def _said_resolution(header: Header) -> int:
    """The side in px that ModelSpec's metadata name; 0 where they do not."""
    width, _, height = header.metadata.get("modelspec.resolution", "").partition("x")
    return int(width) if re.fullmatch(r"\d{2,4}", width) and width == height else 0
