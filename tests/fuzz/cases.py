"""What broke a reader once, or would have: a name, the reader, and its input.

Each is made when it is asked for, as some are large.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

import torch

from tests.fuzz.seeds import BLOCK, container, pickles

_ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
_LAYER = f"lora_unet_{BLOCK}_attn1_to_q"
_FACTS = {"check": "0" * 64, "digest": "0" * 64}


def _tensor(shape: Any, **changes: Any) -> bytes:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0], **changes}
    return container({f"{_LAYER}.lora_down.weight": entry}, b"")


def _header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def _unet(**more: Any) -> bytes:
    """Enough of a single file for its kind to be told."""
    prefix = "model.diffusion_model."
    entries = {
        f"{prefix}input_blocks.0.0.weight": {**_ONE, "shape": [1, 4, 1, 1]},
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": _ONE,
        "first_stage_model.encoder.conv_in.weight": _ONE,
    }
    for name, shape in more.items():
        empty = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        entries[prefix + name.replace("__", ".")] = empty
    entries[f"{prefix}input_blocks.0.0.weight"]["data_offsets"] = [0, 16]
    return container(entries, bytes(16), {"modelspec.resolution": "9" * 5000 + "x" + "9" * 5000})


def _packed_bomb() -> bytes:
    """A checkpoint in which a part that is read as a whole is small on disk and large in memory."""
    source = zipfile.ZipFile(io.BytesIO(pickles()[0]))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for part in source.infolist():
            if not part.filename.endswith("/byteorder"):
                made.writestr(part.filename, source.read(part))
        order = next(n for n in source.namelist() if n.endswith("/byteorder"))
        made.writestr(order, bytes(200_000_000), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _tables_in_tables() -> bytes:
    """A checkpoint of three tables whose every entry is the next one."""
    inner: dict[str, Any] = {"weight": torch.ones(1)}
    for _ in range(3):
        inner = {f"{number}": inner for number in range(3000)}
    buffer = io.BytesIO()
    torch.save(inner, buffer)
    return buffer.getvalue()


def _folder(place: str, value: Any) -> tuple[str, bytes]:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return place, content


def alpha_alone() -> bytes:
    """A LoRA file without a layer."""
    return container({f"{_LAYER}.alpha": {**_ONE, "shape": []}}, bytes(4))


CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "settings nested 100,000 deep": ("settings file", lambda: b"a = " + b"[" * 100_000),
    "a number of 5,000 digits": ("settings file", lambda: b"[run]\nseed = " + b"9" * 5000),
    "20,000 unknown settings": (
        "settings file",
        lambda: b"[run]\n" + b"".join(b"total_step_%d = 1\n" % n for n in range(20_000)),
    ),
    "settings of 20 MB": ("settings file", lambda: b"#" * 20_000_000),
    "a wrong line of 1 MB": ("settings file", lambda: b"x" * 1_000_000),
    "a value nested 100,000 deep": ("--set", lambda: "run.seed=" + "[" * 100_000),
    "a value of 5,000 digits": ("--set", lambda: "run.seed=" + "9" * 5000),
    "a value that steers the terminal": ("--set", lambda: "run.kind=\x1b[2J\u202e"),
    "prompts of 20 MB": ("prompts file", lambda: b"a\n" * 10_000_000),
    "an option that steers the terminal": ("prompts file", lambda: b"a --w \x1b]0;x\x07\x9b"),
    "an empty tensor of 2^63 rows": ("LoRA inspected", lambda: _tensor([0, 2**63])),
    "an empty tensor of 2^62 x 4": ("LoRA converted", lambda: _tensor([0, 2**62, 4])),
    "a tensor of 2^40 numbers": ("LoRA inspected", lambda: _tensor([2**40])),
    "a tensor of a thousand axes": ("LoRA inspected", lambda: _tensor([0] * 1000)),
    "complex numbers": ("LoRA converted", lambda: _tensor([0], dtype="C64")),
    "a number format that is a list": ("LoRA inspected", lambda: _tensor([0], dtype=["F32"])),
    "a header of 2^60 bytes": ("LoRA inspected", lambda: _header(b"{}", 2**60)),
    "a header nested 100,000 deep": ("LoRA inspected", lambda: _header(b'{"a":' * 100_000)),
    "the same as a base": ("base file", lambda: _header(b'{"a":' * 100_000)),
    "a block without a number": ("base file", lambda: _unet(input_blocks__x__0__y=[0])),
    "a block with a long number": (
        "base file",
        lambda: _unet(**{"input_blocks__" + "9" * 5000 + "__0__op__weight": [0]}),
    ),
    "a base's tensor of 2^63 rows": ("base file", lambda: _unet(input_blocks__1=[2**63, 0])),
    "a part that is packed": ("pickle", _packed_bomb),
    "tables in tables": ("pickle", _tables_in_tables),
    "a configuration nested 100,000 deep": (
        "base folder",
        lambda: _folder("unet/config.json", b"[" * 100_000),
    ),
    "a picture without a size": (
        "base folder",
        lambda: _folder(
            "unet/config.json",
            b'{"sample_size": 1e999, "cross_attention_dim": 16, "in_channels": 4}',
        ),
    ),
    "a number of millions of levels": (
        "base folder",
        lambda: _folder("vae/config.json", {"block_out_channels": [0] * 1_000_000}),
    ),
    "a line of metrics nested deeply": ("records", lambda: (0, b"[" * 100_000)),
    "metrics in no encoding": ("records", lambda: (0, b'\xff{"step": 1}\n{"step": 2}\n')),
    "a card nested deeply": ("records", lambda: (1, b"[" * 100_000)),
    "a cache entry of an empty tensor": ("records", lambda: (2, _tensor([0, 2**63]))),
    "facts nested deeply": ("records", lambda: (3, b"[" * 100_000)),
    "facts with an infinite number": (
        "records",
        lambda: (3, json.dumps({**_FACTS, "hash": float("inf")}).encode()),
    ),
    "an adapter's configuration nested deeply": ("records", lambda: (4, b"[" * 100_000)),
    "30,000 patterns of alphas": (
        "records",
        lambda: (
            4,
            json.dumps(
                {"r": 2, "lora_alpha": 2, "alpha_pattern": {f"a{n}": 1 for n in range(30_000)}}
            ).encode(),
        ),
    ),
}
