"""The base model that a setting or flag names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trainer.config.presets import EMBEDDED_BASE
from trainer.families import BaseFacts
from trainer.families.detect import inspect_base

EMBEDDED_NAME = "likeness-embedded-base"


def is_embedded(base: str) -> bool:
    """Whether a base means the embedded one, by name or by path."""
    return base == "embedded" or Path(base).expanduser().resolve() == EMBEDDED_BASE


def base_facts(base: str) -> BaseFacts:
    """The facts of the base that `model.base` or `--base` names."""
    if is_embedded(base):
        return replace(inspect_base(EMBEDDED_BASE), name=EMBEDDED_NAME, embedded=True)
    return inspect_base(Path(base).expanduser())
