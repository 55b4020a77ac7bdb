"""Files beside a LoRA that A1111, Forge and ComfyUI's LoRA manager show: notes and a picture.

`NAME.json` fills A1111's card of the LoRA (and is trusted over the metadata), `NAME.preview.png`
is its picture.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import OutputError
from trainer.untrusted import read_json

# A1111's words for the families; what it does not know it shows with every base.
_VERSIONS = {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SidecarFacts:
    """What the card of a LoRA says.

    family: "sd1", "sd2" or "sdxl"; "" where it fits no released base. activation_text: what is
    added to the prompt when the card is clicked. preferred_weight: 0 is the program's own.
    preview_png: a PNG file.
    """

    description: str
    family: str
    activation_text: str
    preferred_weight: float = 0.0
    notes: str = ""
    preview_png: bytes | None = None


def write_sidecars(lora: Path, facts: SidecarFacts) -> tuple[Path, ...]:
    """Write the files beside a LoRA file, each whole or not at all, and return their paths.

    What is in an older `NAME.json` under other names (such as "negative text") stays, as the user
    or the program has written it.

    Raises:
        OutputError: a file cannot be written.
    """
    notes = lora.with_suffix(".json")
    preview = lora.with_suffix(".preview.png")
    written = [notes]
    try:
        card = _existing(notes) | _card(facts)
        text = json.dumps(card, indent=4, ensure_ascii=False) + "\n"
        _replace(notes, text.encode("utf-8", "replace"))
        if facts.preview_png is not None:
            _replace(preview, facts.preview_png)
            written.append(preview)
    except OSError as error:
        raise OutputError(
            f"A file beside the LoRA cannot be written: {error.strerror or error}",
            where=str(notes),
            fix="Check that the folder can be written and has room.",
        ) from error
    return tuple(written)


def _card(facts: SidecarFacts) -> dict[str, Any]:
    return {
        "description": facts.description,
        "sd version": _VERSIONS.get(facts.family, "Unknown"),
        "activation text": facts.activation_text,
        "preferred weight": facts.preferred_weight,
        "notes": facts.notes,
    }


def _existing(path: Path) -> dict[str, Any]:
    """What is in the card that is there; nothing if it is no table."""
    try:
        card = read_json(path)
    except (FileNotFoundError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def _replace(target: Path, content: bytes) -> None:
    temporary = target.with_name(f".likeness-{secrets.token_hex(6)}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
