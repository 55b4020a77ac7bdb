"""Which family a base folder belongs to, from its configuration files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.errors import ModelError
from trainer.families import FAMILIES, BaseFacts


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: it is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
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


def inspect_base(folder: Path) -> BaseFacts:
    """The facts of the base in a folder.

    Raises:
        ModelError: there is no base, or none of a family that can be trained.
    """
    if not folder.exists():
        raise ModelError(
            "There is no such base model.",
            where=str(folder),
            fix="Give the folder of a Stable Diffusion 1.x model in diffusers format after --base.",
        )
    if folder.is_file():
        raise ModelError(
            "The base model is a single file; a folder in diffusers format is needed.",
            where=str(folder),
            fix="Convert it once with diffusers: StableDiffusionPipeline.from_single_file(file)"
            ".save_pretrained(folder)",
        )
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            "This folder is not a base model in diffusers format.",
            where=f"{folder} (it has no model_index.json)",
            fix="Its sub-folders should be unet, vae, text_encoder, tokenizer and scheduler.",
        )
    for name in FAMILIES:
        facts: BaseFacts | None = FAMILIES.load(name).read_facts(folder)
        if facts is not None:
            return facts
    pipeline = read_json(folder / "model_index.json").get("_class_name", "unknown")
    raise ModelError(
        f"A base of this kind ({pipeline}) cannot be trained yet.",
        where=str(folder),
        fix=f"Families that can: {', '.join(entry.help for entry in FAMILIES.values())}.",
    )
