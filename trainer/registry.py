"""Names that users write in settings, and the code each stands for, loaded when first used."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Entry:
    """One choice: where it lives (`"module:object"`), what it is, and the pip extra it needs."""

    target: str
    help: str
    extra: str = ""


class Registry(Mapping[str, Entry]):
    """A table from name to `Entry`; adding a choice is one line in the table.

    Args:
        kind: what the names are ("optimizer"), for messages.
        entries: the table.
    """

    def __init__(self, kind: str, entries: Mapping[str, Entry]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ConfigError(
                f"There is no {self.kind} named '{name}'.{hint}",
                fix=f"Choose one of: {', '.join(self._entries)}.",
            )
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def load(self, name: str) -> Any:
        """Import what `name` stands for.

        Raises:
            ConfigError: the name is unknown, or the package it needs is not installed.
        """
        entry = self[name]
        module_name, _, attribute = entry.target.partition(":")
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            if not entry.extra:
                raise
            raise ConfigError(
                f"The {self.kind} '{name}' needs a package that is not installed ({error}).",
                fix=f'Install it with: pip install "likeness[{entry.extra}]"',
            ) from error
        return getattr(module, attribute)
