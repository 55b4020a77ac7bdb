"""The terminal as it is written to: names and texts of the user's files cannot steer it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from trainer.untrusted import printable


class Terminal(Console):
    """Rich's console, for texts with names, captions and metadata of any files in them.

    Square brackets are no colours, and control characters are written as escapes. It is for plain
    texts alone: `Text` objects are printed as they are.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every plain text that is printed comes through here."""
        return super().render_str(printable(text), **options)
