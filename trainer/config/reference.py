"""docs/settings.md, made from the settings themselves.

python -m trainer.config.reference docs/settings.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from trainer.config.settings import section_models

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
        parts.append("| setting | default | range | what it does |\n| --- | --- | --- | --- |")
        rows = [
            f"| `{section}.{name}` | {_default(field)} | {_range(field)} | {field.description} |"
            for name, field in model.model_fields.items()
        ]
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts).replace("|\n\n|", "|\n|")


def _default(field: FieldInfo) -> str:
    if field.default is None:
        return "decided later"
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
    limits = {
        sign: getattr(limit, name)
        for limit in field.metadata
        for name, sign in (("ge", "from"), ("gt", "over"), ("le", "to"), ("lt", "below"))
        if hasattr(limit, name)
    }
    words = " ".join(f"{sign} {value:g}" for sign, value in limits.items())
    return f"{words}{unit}".strip() or "text"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render_settings(), encoding="utf-8", newline="\n")
