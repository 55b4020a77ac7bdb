"""docs/settings.md, made from the settings themselves.

python -m trainer.config.reference docs/settings.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from trainer.config.fields import Section
from trainer.config.photo_settings import SetSettings
from trainer.config.settings import BlockSettings, section_models

# Settings that are lists of tables.
TABLES: dict[str, type[Section]] = {"data.sets": SetSettings, "adapter.blocks": BlockSettings}

HEAD = """# Settings

Every setting of a training run. Give them in a TOML file (`--config FILE.toml`) or one by one on
the command line (`--set section.name=value`). Later ones win: defaults, the preset of the kind of
training (`configs/`), your file, the command line.
"""


def render_settings() -> str:
    """All settings as Markdown tables, one for each section."""
    parts = [HEAD]
    for section, model in section_models().items():
        parts.append(f"## {section}\n\n{model.__doc__}\n")
        parts.append(_rows(f"{section}.", model))
        for name, table in TABLES.items():
            if name.startswith(f"{section}."):
                parts.append(f"### [[{name}]]\n\n{table.__doc__}\n")
                parts.append(_rows("", table))
    return "\n".join(parts).replace("|\n\n|", "|\n|")


def _rows(prefix: str, model: type[Section]) -> str:
    rows = ["| setting | default | range | what it does |", "| --- | --- | --- | --- |"]
    rows += [
        f"| `{prefix}{name}` | {_default(field)} | {_range(field)} | {_cell(field)} |"
        for name, field in model.model_fields.items()
    ]
    return "\n".join(rows) + "\n"


def _cell(field: FieldInfo) -> str:
    """The sentence; in a Markdown table a bar would end the cell."""
    return str(field.description).replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "to be given"
    if field.default is None:
        return "decided later"
    if field.default in ("", []):
        return "none"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return f"`{field.default}`"


def _range(field: FieldInfo) -> str:
    schema: Any = field.json_schema_extra or {}
    unit = f" {schema['unit']}" if schema.get("unit") else ""
    annotation = str(field.annotation)
    if annotation.startswith("typing.Literal"):
        return annotation.removeprefix("typing.Literal[").removesuffix("]").replace("'", "`")
    if field.annotation is bool:
        return "`true`, `false`"
    limits = _limits(field)
    words = " ".join(f"{sign} {value:g}" for sign, value in limits.items())
    if "list[" in annotation:
        if "Settings" in annotation:
            return "tables"
        return f"{words}{unit} each, or a list" if words else "texts"
    return f"{words}{unit}".strip() or "text"


def _limits(field: FieldInfo) -> dict[str, float]:
    marks = list(field.metadata)
    if field.annotation and "Annotated" in str(field.annotation):
        marks += [m for part in get_args(field.annotation) for m in _marks(part)]
    return {
        sign: getattr(limit, name)
        for limit in marks
        for name, sign in (("ge", "from"), ("gt", "over"), ("le", "to"), ("lt", "below"))
        if hasattr(limit, name)
    }


def _marks(part: Any) -> list[Any]:
    """The limits that an `Annotated` type carries."""
    found = getattr(part, "__metadata__", ())
    return [mark for field in found for mark in getattr(field, "metadata", [field])]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render_settings(), encoding="utf-8", newline="\n")
