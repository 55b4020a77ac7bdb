"""The base model that a setting or flag names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trainer.config.presets import EMBEDDED_BASE
from trainer.families import BaseFacts
from trainer.families.detect import inspect_base
from trainer.families.hub import hub_folder, is_hub_id
from trainer.families.tokenizers import find_tokenizer

EMBEDDED_NAME = "likeness-embedded-base"


def is_embedded(base: str) -> bool:
    """Whether a base means the embedded one, by name or by path."""
    return base == "embedded" or Path(base).expanduser().resolve() == EMBEDDED_BASE


def base_facts(
    base: str,
    *,
    prediction: str = "auto",
    precision: str = "auto",
    vae: Path | None = None,
    tokenizer: Path | None = None,
    download: bool = True,
) -> BaseFacts:
    """The facts of the base that `model.base` or `--base` names.

    Args:
        base: `embedded`, a folder in diffusers format, a single file, or a model on the hub
            (`author/model`, `author/model@revision`).
        prediction: `objective.prediction`, for a base that does not say what it predicts.
        precision: `model.precision`; from the hub, weights in half precision are downloaded where
            there are any, but for fp32.
        vae: folder or file of a VAE to take in place of the base's own.
        tokenizer: folder of a tokenizer to take in place of the base's own.
        download: whether the network may be used.

    Raises:
        ModelError: there is no such base, or it cannot be trained; a single file has no tokenizer,
            and none is to be found.
    """
    if is_embedded(base):
        return replace(inspect_base(EMBEDDED_BASE), name=EMBEDDED_NAME, embedded=True)
    path = Path(base).expanduser()
    name = ""
    if not path.exists() and is_hub_id(base):
        variant = "" if precision == "fp32" else "fp16"
        path = hub_folder(base, variant=variant, download=download)
        name = base.partition("@")[0].split("/")[1]
    facts = inspect_base(path, prediction=prediction, vae=vae)
    if tokenizer or path.is_file():
        facts = replace(facts, tokenizer=find_tokenizer(facts, tokenizer, download=download))
    # The folder of a download is named by a hash.
    return replace(facts, name=name) if name else facts
