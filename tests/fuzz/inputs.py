"""Strategies that draw what the readers are given.

Most inputs are good files with a few alterations: noise alone is refused at the first byte and
shows nothing. Alterations are drawn as one number each and spelled out by a small generator, so
that a hundred thousand of them take minutes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.seeds import METADATA, MODULES, container
from trainer.config.settings import section_models

# What stands in texts that mean something to a reader, and what steers a terminal.
PIECES = (
    *("{trigger}", "{class}", "{red|blue}", "{a|{b|c}}", "{", "}", "|", "\\{", "{|}", "ohwx"),
    *("Ohwx's", "ohwx-", "(ohwx)", ",", ", ,", " . ", "\n", "\r\n", "\t", " ", "a", "hat", "é"),
    *("e\u0301", "\x00", "\x1b[31m", "\x9b", "\u202e", "\u2028", "\ufeff", "\ud800", "𝕏", "“”"),
    *(
        "#",
        "--n",
        " --w 64",
        " --h",
        " --d -1",
        " --l nan",
        " --s 1e9",
        " --x",
        " --",
        "1",
        "9" * 20,
    ),
    *("inf", "-0", "<script>", "[red]", "../", "CON", "%s", "\\", '"', "'", "=", "[", "]", "[["),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("inf")),
    *(float("nan"), "", "a", "1", "../../x", "\x1b[2J", "\u202e", [], [1], {}, {"a": 1}, [[]] * 3),
    *("float32", "F32", "auto", "embedded", "x" * 5000, [2**40], [0, 2**60], "F16", "4", 4, 8, 512),
)
_BYTES = (0, 1, 0x7F, 0x80, 0xFF, ord("{"), ord("}"), ord('"'), ord("9"), ord("["))
_DTYPES = ("F32", "F16", "BF16", "I64", "U8", "F8_E4M3", "F8_E8M0", "C64", "F4", "X", 3)
_ITEM = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "F8_E4M3": 1, "C64": 8}

Seeds = Callable[[], Sequence[bytes]]

# One number stands for a whole alteration.
_numbers = st.integers(0, 2**48)


def texts(pieces: Sequence[str] = PIECES, most: int = 24) -> st.SearchStrategy[str]:
    """Pieces one after the other, now and then one of them thousands of times."""

    def joined(number: int) -> str:
        draw = random.Random(number)
        chosen = [draw.choice(pieces) for _ in range(draw.randrange(most + 1))]
        if chosen and draw.random() < 0.01:
            chosen[0] *= draw.choice((50, 500, 5000))
        return "".join(chosen)

    return _numbers.map(joined)


def encoded_texts(pieces: Sequence[str] = PIECES) -> st.SearchStrategy[bytes]:
    """Texts in the encodings of the world, and some in none."""
    encodings = ("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1")

    def spelled(text: str, number: int) -> bytes:
        raw = text.encode(encodings[number % len(encodings)], "replace")
        return raw if number % 11 else altered(raw, number)

    return st.builds(spelled, texts(pieces), _numbers)


def altered(content: bytes, number: int) -> bytes:
    """A file with one to five alterations."""
    draw = random.Random(number)
    raw = bytearray(content)
    for _ in range(draw.randint(1, 5)):
        at = draw.randrange(len(raw) + 1)
        # Most of what decides over a file stands at its beginning.
        at = at if draw.random() < 0.5 else min(at, draw.randrange(200))
        match draw.randrange(7):
            case 0:
                del raw[at:]
            case 1:
                raw[at : at + draw.randrange(1, 9)] = b""
            case 2:
                raw[at:at] = bytes(draw.choice(_BYTES) for _ in range(draw.randrange(1, 9)))
            case 3:
                size = draw.choice((2, 4, 8))
                value = draw.choice(
                    (0, 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1, draw.randrange(999))
                )
                order = draw.choice(("big", "little"))
                raw[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, order)
            case 4:
                raw[at:at] = raw[at : at + draw.randrange(200)] * draw.choice((1, 3, 50))
            case _:
                if at < len(raw):
                    raw[at] = draw.choice((raw[at] ^ (1 << draw.randrange(8)), draw.choice(_BYTES)))
    return bytes(raw)


def files(seeds: Seeds) -> st.SearchStrategy[bytes]:
    """Good files, altered; these are made when the first input is drawn."""
    return st.deferred(lambda: st.builds(altered, st.sampled_from(seeds()), _numbers))


def headers(names: Sequence[str]) -> st.SearchStrategy[bytes]:
    """Safetensors files with a header of known names and of any shapes, types and places."""

    def made(number: int) -> bytes:
        draw = random.Random(number)
        entries: dict[str, Any] = {}
        end = 0
        for name in draw.sample(names, draw.randrange(1, min(8, len(names)))):
            shape: Any = [
                draw.choice((0, 1, 2, 4, 8)) for _ in range(draw.choice((0, 1, 2, 2, 2, 4)))
            ]
            dtype = draw.choice(_DTYPES[: 6 if draw.random() < 0.8 else None])
            size = _ITEM.get(str(dtype), 1)
            for side in shape:
                size *= side
            entry = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
            if draw.random() < 0.1:
                entry[draw.choice(list(entry))] = draw.choice(VALUES)
            entries[name if draw.random() < 0.95 else f"{name}.{draw.choice(PIECES)}"] = entry
        if draw.random() < 0.05:
            entries[draw.choice(names)] = draw.choice(VALUES)
        data = draw.choice((bytes(end), b"\x3c" * end, b"\xff" * end, bytes(draw.randrange(64))))
        return container(entries, data, _metadata(draw))

    return _numbers.map(made)


def _metadata(draw: random.Random) -> Any:
    if draw.random() < 0.2:
        return draw.choice((*VALUES, None, None))
    chosen: dict[str, Any] = {key: METADATA[key] for key in METADATA if draw.random() < 0.4}
    for key in list(chosen):
        if draw.random() < 0.3:
            chosen[key] = "".join(draw.choice(PIECES) for _ in range(draw.randrange(6)))
    if draw.random() < 0.05:
        chosen[draw.choice(PIECES)] = draw.choice(VALUES)
    return chosen


def lora_files() -> st.SearchStrategy[bytes]:
    """LoRA files that are in order but for one thing, or for nothing."""

    def made(number: int) -> bytes:
        draw = random.Random(number)
        rank, wide = draw.choice((1, 2, 4)), draw.choice((4, 320, 768))
        shapes: dict[str, list[int]] = {}
        for down, up, alpha in draw.sample(MODULES, draw.randrange(1, 4)):
            shapes |= {down: [rank, wide], up: [wide, rank]}
            shapes |= {alpha: []} if alpha and draw.random() < 0.8 else {}
        if draw.random() < 0.6:
            shapes[draw.choice(list(shapes))] = draw.choice(([], [0, 4], [rank], [2, 2, 1, 1], [9]))
        entries, end = {}, 0
        for name, shape in shapes.items():
            size = 4 * prod(shape)
            entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
            end += size
        return container(entries, draw.choice((b"\0\0\x80\x3f", b"\0\0\0\x40")) * (end // 4))

    return _numbers.map(made)


def tables_of(seeds: Seeds) -> st.SearchStrategy[bytes]:
    """Safetensors files with values of their header replaced."""

    def made(content: bytes, number: int) -> bytes:
        end = 8 + int.from_bytes(content[:8], "little")
        table, draw = json.loads(content[8:end]), random.Random(number)
        for name in draw.choices(list(table), k=draw.randrange(4)):
            table[name] = _replaced(table.get(name), draw, 0.2)
        text = json.dumps(table).encode()
        return len(text).to_bytes(8, "little") + text + content[end:]

    return st.deferred(lambda: st.builds(made, st.sampled_from(seeds()), _numbers))


def json_like(value: Any, number: int, share: float = 0.08) -> bytes:
    """A JSON value with a share of its parts replaced, as bytes, sometimes altered once more."""
    draw = random.Random(number)
    text = json.dumps(_replaced(value, draw, share)).encode()
    return text if number % 4 else altered(text, number)


def _replaced(value: Any, draw: random.Random, share: float) -> Any:
    if draw.random() < share:
        return draw.choice(VALUES)
    if isinstance(value, dict):
        return {
            key: _replaced(inner, draw, share)
            for key, inner in value.items()
            if draw.random() > share / 4
        }
    if isinstance(value, list):
        return [_replaced(inner, draw, share) for inner in value]
    return value


def json_files(seeds: Sequence[Any]) -> st.SearchStrategy[bytes]:
    """JSON files, altered in their values and in their bytes."""
    return st.builds(json_like, st.sampled_from(list(seeds)), _numbers)


def _setting_names() -> list[str]:
    return [f"{s}.{name}" for s, model in section_models().items() for name in model.model_fields]


def overrides() -> st.SearchStrategy[str]:
    """Values of `--set`."""
    names = _setting_names()

    def made(number: int, piece: str) -> str:
        draw = random.Random(number)
        name = draw.choice(names) if draw.random() < 0.95 else draw.choice((piece[:40], "a.b", "x"))
        value = draw.choice(VALUES)
        spelled = draw.choice((piece, repr(value), json.dumps(value), f"'{piece}'", f"[{piece}]"))
        return f"{name}{'=' if draw.random() < 0.97 else ''}{spelled}"

    return st.builds(made, _numbers, texts(most=6))


def tables() -> st.SearchStrategy[bytes]:
    """Settings files of known names and any values."""
    names = _setting_names()

    def made(number: int) -> bytes:
        draw = random.Random(number)
        lines = []
        for dotted in draw.sample(names, draw.randrange(1, 5)):
            value = draw.choice(VALUES)
            spelled = json.dumps(value).replace("null", "''").replace("NaN", "nan")
            lines.append(f"{dotted} = {spelled.replace('Infinity', 'inf')}")
        if draw.random() < 0.1:
            lines.append(draw.choice(PIECES))
        if draw.random() < 0.01:
            lines.append("deep = " + "[" * draw.choice((10, 500, 100_000)))
        return "\n".join(lines).encode("utf-8", "replace")

    return _numbers.map(made)
