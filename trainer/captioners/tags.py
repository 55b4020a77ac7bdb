"""The tags of a WD14 tagger: its `selected_tags.csv`, and which of them are written."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import ModelError

# Danbooru's categories, as the public taggers' files have them.
GENERAL, CHARACTER, RATING = 0, 4, 9
_CATEGORIES = range(10)

# In these an underscore is part of a face.
_FACES = "0_0 (o)_(o) +_+ +_- ._. <o>_<o> <|>_<|> =_= >_< 3_3 6_9 >_o @_@ ^_^ o_o u_u x_x |_| ||_||"
_KAOMOJI = frozenset(_FACES.split())
MAXIMUM_FILE_BYTES = 20_000_000


@dataclass(frozen=True, slots=True)
class Tag:
    """A tag as it is written, and its category."""

    name: str
    category: int


@dataclass(frozen=True, slots=True)
class TagChoice:
    """Which tags are written: those as probable as this, and not excluded.

    character: None leaves the names of characters out.
    """

    general: float
    character: float | None
    exclude: frozenset[str] = frozenset()
    rating: bool = False


def read_tags(path: Path) -> tuple[Tag, ...]:
    """The tags in the order of the model's output.

    Raises:
        ModelError: the file is not there, or is no list of tags.
    """
    try:
        if path.stat().st_size > MAXIMUM_FILE_BYTES:
            raise ValueError(f"it is larger than {MAXIMUM_FILE_BYTES // 10**6} MB")
        with path.open(encoding="utf-8-sig", newline="") as file:
            tags = tuple(_tag(row) for row in csv.DictReader(file, strict=True))
        if not tags:
            raise ValueError("it has no lines")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        reason = f"it has no column {error}" if isinstance(error, KeyError) else str(error)
        raise ModelError(
            f"The tagger's list of tags cannot be used: {reason}",
            where=str(path),
            fix="It has to be the selected_tags.csv that came with model.onnx, with the columns "
            "name and category. Download it again.",
        ) from error
    return tags


def choose_tags(tags: Sequence[Tag], probabilities: Sequence[float], choice: TagChoice) -> str:
    """The tags of a picture, the most probable first: characters, then what else there is.

    Args:
        tags: of the model, in the order of its output.
        probabilities: of each tag, 0..1.
        choice: which of them are written.

    Returns:
        Tags with ", " between them; "" where none is probable enough.
    """
    limits = {GENERAL: choice.general, CHARACTER: choice.character}
    order = sorted(range(len(tags)), key=lambda index: (-probabilities[index], index))
    chosen: dict[int, list[str]] = {CHARACTER: [], GENERAL: [], RATING: []}
    for index in order:
        tag = tags[index]
        limit = limits.get(tag.category)
        if tag.name.casefold() in choice.exclude:
            continue
        if limit is not None and probabilities[index] >= limit:
            chosen[tag.category].append(tag.name)
        elif choice.rating and tag.category == RATING and not chosen[RATING]:
            chosen[RATING].append(tag.name)
    return ", ".join(name for names in chosen.values() for name in dict.fromkeys(names))


def spoken(name: str) -> str:
    """A tag as it is written: with blanks for underscores, except in a kaomoji such as `^_^`."""
    name = name.strip()
    return name if name in _KAOMOJI else " ".join(name.replace("_", " ").split())


def excluded(names: Iterable[str]) -> frozenset[str]:
    """Tags that a user does not want, comparable with those of the model."""
    return frozenset(spoken(name).casefold() for name in names) - {""}


def _tag(row: dict[str, str]) -> Tag:
    name, category = spoken(row["name"]), int(row["category"])
    if not name or not name.isprintable():
        raise ValueError("a tag has no name")
    if category not in _CATEGORIES:
        raise ValueError(f"the tag '{name}' is of the unknown category {category}")
    return Tag(name, category)
