"""Alphas that stand outside of a LoRA file's tensors: peft's `adapter_config.json`, and the
`lora_adapter_metadata` that diffusers writes into the header.

Patterns in them are regular expressions of a stranger, so they are compared as plain names; one
that is more than a name makes the alphas of the file unknown rather than guessed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.adapters.file import LoraFile
from trainer.adapters.foreign import COMPONENTS, Foreign, Layer, read_names
from trainer.errors import FileFormatError
from trainer.untrusted import parse_json, read_text

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_METADATA_KEY = "lora_adapter_metadata"
_MAX_CONFIG_BYTES = 4_000_000


@dataclass(frozen=True, slots=True)
class Ranks:
    """What a peft configuration says of ranks and alphas.

    usual_rank, usual_alpha: of layers that no pattern names. ranks, alphas: by name or its end.
    rooted: the scale is alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732) instead of alpha / rank.
    """

    usual_rank: int
    usual_alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rooted: bool

    def alpha_of(self, path: str, rank: int | None) -> float:
        """The alpha of a layer, in the sense of scale = alpha / rank."""
        alpha = self.alphas.get(_named(path, self.alphas), self.usual_alpha)
        stated = self.ranks.get(_named(path, self.ranks), self.usual_rank)
        return alpha * math.sqrt(rank or stated) if self.rooted else alpha


def read_foreign(file: LoraFile) -> Foreign:
    """All names of a file taken apart, with the alphas that stand outside of its tensors.

    Raises:
        FileFormatError: a configuration is there, but cannot be understood.
    """
    names = read_names(file)
    tables = _tables(file, names)
    return replace(names, layers=tuple(_with_alpha(layer, tables) for layer in names.layers))


def _with_alpha(layer: Layer, tables: Mapping[str, Ranks]) -> Layer:
    ranks = tables.get(layer.component)
    if ranks is None or layer.style not in ("peft", "diffusers"):
        return layer
    # The path as the file has it: with or without "text_model", as in the patterns.
    path = layer.name.removeprefix(f"{layer.prefix}.")
    return replace(layer, alpha=ranks.alpha_of(path, layer.rank))


def peft_config(layers: Sequence[tuple[str, int, float]], *, dora: bool) -> dict[str, Any]:
    """The content of an `adapter_config.json`.

    Args:
        layers: (dotted path, rank, alpha) of each layer.
        dora: all layers have a magnitude vector.
    """
    rank = Counter(rank for _, rank, _ in layers).most_common(1)[0][0]
    alpha = Counter(alpha for _, _, alpha in layers).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: r for path, r, _ in layers if r != rank},
        "alpha_pattern": {path: a for path, _, a in layers if a != alpha},
        "target_modules": [path for path, _, _ in layers],
        "task_type": None,
        "use_dora": dora,
        "use_rslora": False,
    }


def _tables(file: LoraFile, names: Foreign) -> dict[str, Ranks]:
    """{component: what is said of it}."""
    where = file.path.parent / CONFIG_NAME
    if names.layers and names.layers[0].style == "peft" and where.is_file():
        table = _read(where)
        return dict.fromkeys(COMPONENTS, _ranks(table, where))
    text = file.metadata.get(_METADATA_KEY)
    if not text:
        return {}
    packed = _parsed(text, file.path)
    tables = {}
    for component in COMPONENTS:
        start = f"{component}."
        own = {k.removeprefix(start): v for k, v in packed.items() if k.startswith(start)}
        if own:
            tables[component] = _ranks(own, file.path)
    return tables


def _read(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path, _MAX_CONFIG_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise _unclear(path, "it cannot be read") from error
    except ValueError as error:
        raise _unclear(path, str(error)) from error
    return _parsed(text, path)


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        table = parse_json(text)
    except ValueError as error:
        raise _unclear(path, "it is not valid JSON") from error
    if not isinstance(table, dict):
        raise _unclear(path, "it is not a table")
    return table


def _ranks(table: Mapping[str, Any], path: Path) -> Ranks:
    rank, alpha = table.get("r", 8), table.get("lora_alpha", 8)
    patterns = [table.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    numbers = [rank, alpha]
    for pattern in patterns:
        if not isinstance(pattern, dict):
            raise _unclear(path, "its patterns are no tables")
        numbers += pattern.values()
    if not all(isinstance(n, int | float) and 0 < n < 1e6 for n in numbers):
        raise _unclear(path, "its ranks or alphas are no numbers above 0")
    ranks, alphas = ({_plain(key, path): v for key, v in p.items()} for p in patterns)
    return Ranks(int(rank), float(alpha), ranks, alphas, bool(table.get("use_rslora")))


def _plain(pattern: str, path: Path) -> str:
    """A pattern that is a name; a dot stands for itself, "^" for the beginning."""
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not all(c.isalnum() or c in "._" for c in name):
        raise _unclear(path, f"the pattern '{name[:60]}' is more than a layer's name")
    return name


def _named(path: str, names: Mapping[str, object]) -> str:
    """The name that is this path or its end, as peft looks it up: the first that fits."""
    steps = path.split(".")
    fitting = [end for n in range(len(steps)) if (end := ".".join(steps[n:])) in names]
    # A stranger's table may be long, so it is gone through only where it says two things.
    return next((n for n in names if n in fitting), "") if len(fitting) > 1 else "".join(fitting)


def _unclear(path: Path, why: str) -> FileFormatError:
    return FileFormatError(
        f"The strength of the LoRA's layers cannot be told: {why}.",
        where=str(path),
        fix="Save it once more with the program that it was trained with.",
    )
