"""What every section of settings is made of."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

# A word without what means something else in a prompt.
TRIGGER = r"^[^\s,{}()<>:\[\]]+$"


def setting(default: Any, sentence: str, unit: str = "", **limits: Any) -> Any:
    """A pydantic field with its sentence and unit."""
    extra: Any = {"unit": unit} if unit else None
    return Field(default, description=sentence, json_schema_extra=extra, **limits)


class Section(BaseModel):
    """Frozen and strict: an unknown name, `true` for a number or a number in quotes is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True
    )
