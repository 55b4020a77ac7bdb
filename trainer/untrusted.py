"""What comes from a file that somebody else may have made: read up to a limit, shown harmlessly.

A file's size is bounded before it is read, so that none can fill the memory; and text out of it
(names of files, captions, metadata) is shown without what would steer a terminal or a page.
"""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 2**20
# More than any settings file, list of prompts or description of a run needs.
TEXT_BYTES = 4_000_000
# The safetensors library reads headers up to 100 MB; those of full-size models are below 1 MB, with
# pictures in their metadata a few, and every byte becomes many in memory.
HEADER_BYTES = 25_000_000
# Of a tensor: more than any model's, and few enough that nothing computed from them overflows.
_AXES, _NUMBERS = 8, 2**48
# More than any configuration or vocabulary of a model needs.
CONFIG_BYTES = 50_000_000

# Control characters but for tab and line feed, and those that turn the direction of writing
# (Unicode Bidi_Control): with them "gpj.exe" is shown for "exe.jpg".
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)
_SURROGATES = re.compile("[\ud800-\udfff]")
# Windows keeps these names for devices, whatever their ending.
_DEVICES = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9\u00b9\u00b2\u00b3])(?![^.])", re.IGNORECASE)


def printable(text: str) -> str:
    """Text in which characters that steer what is shown are written as escapes instead.

    Line feeds and tabs stay. Halves of characters, which cannot be encoded, become the replacement
    character.
    """
    text = _STEERING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    return _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text)


def on_one_line(text: str) -> str:
    """`printable`, with line feeds and tabs as escapes too: for names, and values in a table."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def shortened(text: str, characters: int) -> str:
    """At most so many characters of a text, with a sign where more followed."""
    return text if len(text) <= characters else text[: characters - 1] + "\N{HORIZONTAL ELLIPSIS}"


def is_device_name(stem: str) -> bool:
    """Whether Windows would take a file of this name for a device ("con", "nul.old")."""
    return _DEVICES.match(stem) is not None


def read_bounded(path: Path, most_bytes: int = TEXT_BYTES) -> bytes:
    """The content of a file that is not larger than it can sensibly be.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger.
    """
    content = bytearray()
    # In pieces: for a single read, Python asks for the memory of all that it may read.
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            content += chunk
            if len(content) > most_bytes:
                raise ValueError(f"it is larger than {most_bytes // 1_000_000} MB")
    return bytes(content)


def read_text(path: Path, most_bytes: int = TEXT_BYTES) -> str:
    """The text of a file in UTF-8, with or without a mark at its start; lines end in line feeds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than that, or no UTF-8 (UnicodeDecodeError).
    """
    text = read_bounded(path, most_bytes).decode("utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str | bytes) -> Any:
    """A value from JSON.

    Raises:
        ValueError: it is no JSON, or nested so deeply that it is no description of anything.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, most_bytes: int = TEXT_BYTES) -> Any:
    """A value from a JSON file in UTF-8.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than that, or no JSON.
    """
    return parse_json(read_text(path, most_bytes))


def tensor_shape(stated: Any) -> tuple[int, ...]:
    """A tensor's shape as a file's header states it.

    An empty tensor has no data that its other sides would have to fit, so these are bounded too.

    Raises:
        ValueError: it is no list of a few counts, or of more numbers than any file holds.
    """
    if not isinstance(stated, list) or len(stated) > _AXES:
        raise ValueError("not a list of a few counts")
    if not all(type(side) is int and 0 <= side <= _NUMBERS for side in stated):
        raise ValueError("not a list of counts")
    if prod(side or 1 for side in stated) > _NUMBERS:
        raise ValueError("more numbers than any file holds")
    return tuple(stated)
