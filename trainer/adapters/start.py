"""A LoRA file of any trainer as the start of a training: its layers, ranks and alphas are taken.

What a plain LoRA cannot say (LoHa, LoKr, OFT, DoRA, embeddings) and names that are not understood
are refused by name: a training that begins with a part of a file would begin with another LoRA.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.adapters.attach import Attached
from trainer.adapters.convert import lora_files, read_source
from trainer.adapters.factors import alpha_of, plain_factors
from trainer.adapters.forms import problem
from trainer.adapters.lora import LoRALayer
from trainer.adapters.targets import TEXT_TARGETS, UNET_TARGETS
from trainer.errors import ConfigError, FileFormatError

MOST_BYTES = 8 * 2**30
HIGHEST_RANK = 256
HIGHEST_ALPHA = 1024.0
_SHOWN = 5
# From the narrowest to the widest.
_UNET_SETS = ("cross-kv", "cross-attention", "attention", "attention+ff", "all")
_TEXT_SETS = ("attention", "attention+mlp")


@dataclass(frozen=True, slots=True, eq=False)
class StartLayer:
    """One layer of the file; down [R, ...] and up [O, R, ...] are float32, scale is alpha / R.

    path: dotted, as diffusers and transformers 4 name the module.
    """

    component: str
    path: str
    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """What a training starts from. digest: SHA-256 of the files. family: "unknown" if not told."""

    path: Path
    digest: str
    family: str
    layers: tuple[StartLayer, ...]


def read_start(path: Path) -> Start:
    """Read a LoRA file, or a folder that peft has saved.

    Raises:
        FileFormatError: it cannot be read, or holds what a training cannot start from.
    """
    digest = hashlib.sha256()
    for file in lora_files(path):
        _require_size(file)
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    source = read_source(path)
    problems = Counter(p for layer in source.layers if (p := problem(layer, "diffusers")))
    problems += Counter({"an embedding (bundle_emb)": len(source.embeddings)})
    paths = Counter((layer.component, layer.path) for layer in source.layers)
    problems += Counter(f"two updates of one layer ({p})" for (_, p), n in paths.items() if n > 1)
    if problems or not source.layers:
        raise FileFormatError(
            "A training cannot start from this LoRA.",
            where="\n".join(
                [str(path), *(f"{text}: {count} times" for text, count in problems.most_common(5))]
            ),
            fix="Only a plain LoRA can be trained on; 'likeness inspect FILE' says what this is.",
        )
    layers = []
    for layer, parts in source.tensors.items():
        down, up = plain_factors(layer, parts, source.family)
        if not down.numel() or not up.numel():  # of any rank, then, and without any content
            raise FileFormatError(
                "A layer of the LoRA is empty.", where=f"{path}\n{layer.path}", fix="Take another."
            )
        layers.append(_layer(layer.component, layer.path, down, up, alpha_of(layer)))
    return Start(path, digest.hexdigest(), source.family, tuple(layers))


def start_settings(start: Start) -> dict[str, Any]:
    """The settings of section `adapter` with which every layer of the file is trained.

    The narrowest set of targets that holds them all; the most frequent rank and alpha, and rules
    for the layers of the UNet that have others. Text encoders get the highest rank in them.

    Raises:
        FileFormatError: a layer is in none of the sets, or its rank is too high.
    """
    unet = [layer for layer in start.layers if layer.component == "unet"]
    text = [layer for layer in start.layers if layer.component != "unet"]
    too_high = [layer for layer in start.layers if layer.rank > HIGHEST_RANK]
    if too_high:
        raise _not_to_train(
            start, too_high, f"are of a rank above {HIGHEST_RANK}, which is the highest"
        )
    settings: dict[str, Any] = {"text_encoder": bool(text)}
    if unet:
        (rank, alpha), _ = Counter((x.rank, x.alpha) for x in unet).most_common(1)[0]
        settings |= {"rank": rank, "alpha": alpha, "include": [], "exclude": []}
        settings["targets"] = _narrowest(start, unet, _UNET_SETS, UNET_TARGETS)
        settings["blocks"] = _rules(unet, rank, alpha)
    if text:
        settings["text_encoder_rank"] = max(layer.rank for layer in text)
        settings["text_encoder_alpha"] = max(text, key=lambda layer: layer.rank).alpha
        settings["text_encoder_targets"] = _narrowest(start, text, _TEXT_SETS, TEXT_TARGETS)
    return settings


@torch.no_grad()
def put_start(start: Start, adapters: Mapping[str, Attached]) -> int:
    """Put the file's updates into attached layers, exactly: ranks are filled up, alphas folded in.

    Layers that the file lacks stay as they are, without an effect.

    Args:
        adapters: by component.

    Returns:
        How many attached layers the file lacks.

    Raises:
        FileFormatError: a layer of the file has another shape than the base's.
        ConfigError: a layer is not trained, or of a lower rank than the file's; nothing is put.
    """
    found: list[tuple[LoRALayer, StartLayer]] = []
    missing: list[StartLayer] = []
    for layer in start.layers:
        target = _place(adapters, layer)
        if target is None or target.rank < layer.rank:
            missing.append(layer)
        else:
            found.append((target, layer))
    if missing:
        raise ConfigError(
            f"{len(missing)} of the {len(start.layers)} layers of the LoRA are not trained, or of "
            "a lower rank, with these settings.",
            where="\n".join([str(start.path), *(_name(layer) for layer in missing[:_SHOWN])]),
            fix="Leave adapter.rank, targets, text_encoder, include, exclude and blocks to the "
            "file, and use a base of its family.",
        )
    fitted = [(target, layer, *_fitted(start, target, layer)) for target, layer in found]
    for target, layer, down, up in fitted:
        # Where the rank is filled up, `down` keeps its own start, so that all of it can learn.
        target.down[: layer.rank] = down.to(target.down)
        target.up.zero_()
        target.up[:, : layer.rank] = up.to(target.up)
    return sum(len(attached.layers) for attached in adapters.values()) - len(fitted)


def _layer(component: str, path: str, down: Tensor, up: Tensor, alpha: float) -> StartLayer:
    """A layer without the zeros that only fill its rank up, and with an alpha that can be set."""
    scale = alpha / down.shape[0]
    used = (down.flatten(1) != 0).any(1) | (up.flatten(1) != 0).any(0)
    rank = int(used.nonzero().max()) + 1 if used.any() else 1
    down, up, alpha = down[:rank], up[:, :rank], scale * rank
    if not 0 < alpha <= HIGHEST_ALPHA:
        up, alpha = up * scale, float(rank)
    return StartLayer(component, path, down.contiguous(), up.contiguous(), alpha)


def _narrowest(
    start: Start,
    layers: Iterable[StartLayer],
    names: Iterable[str],
    table: Mapping[str, tuple[str, ...]],
) -> str:
    paths = list(layers)
    for name in names:
        strangers = [layer for layer in paths if not layer.path.endswith(table[name])]
        if not strangers:
            return name
    raise _not_to_train(start, strangers, "are of a kind that is not trained here")


def _rules(layers: Iterable[StartLayer], rank: int, alpha: float) -> list[dict[str, Any]]:
    """Rules for the layers with another rank or alpha: one for all of a kind where they agree."""
    kinds: dict[str, list[StartLayer]] = {}
    for layer in layers:
        end = next(end for end in UNET_TARGETS["all"] if layer.path.endswith(end))
        kinds.setdefault(end, []).append(layer)
    rules = []
    for end, alike in kinds.items():
        forms = {(layer.rank, layer.alpha) for layer in alike}
        # With a dot in front, so that no longer name is meant.
        named = {f"*{end}": forms.pop()} if len(forms) == 1 else {x.path: _form(x) for x in alike}
        rules += [
            {"pattern": pattern, "rank": form[0], "alpha": form[1]}
            for pattern, form in named.items()
            if form != (rank, alpha)
        ]
    return rules


def _form(layer: StartLayer) -> tuple[int, float]:
    return layer.rank, layer.alpha


def _place(adapters: Mapping[str, Attached], layer: StartLayer) -> LoRALayer | None:
    """The attached layer of this path; transformers 5 has no "text_model." in some encoders."""
    attached = adapters.get(layer.component)
    if attached is None:
        return None
    for path in (layer.path, layer.path.removeprefix("text_model."), f"text_model.{layer.path}"):
        if path in attached.layers:
            return attached.layers[path]
    return None


def _fitted(start: Start, target: LoRALayer, layer: StartLayer) -> tuple[Tensor, Tensor]:
    """The factors in the shapes of the attached layer, with its alpha."""
    down, up = layer.down.flatten(1), layer.up.flatten(1)
    wanted = (layer.rank, target.down[0].numel()), (target.up.shape[0], layer.rank)
    if (tuple(down.shape), tuple(up.shape)) != wanted:
        raise _not_to_train(start, [layer], "have other shapes than the base's")
    scale = layer.alpha / layer.rank
    if scale != target.scale:
        up = up * (scale / target.scale)
    return down.unflatten(1, target.down.shape[1:]), up.unflatten(
        1, (layer.rank, *target.up.shape[2:])
    )


def _name(layer: StartLayer) -> str:
    return f"{layer.component}: {layer.path} (rank {layer.rank})"


def _not_to_train(start: Start, layers: list[StartLayer], why: str) -> FileFormatError:
    return FileFormatError(
        f"A training cannot start from this LoRA: {len(layers)} of its layers {why}.",
        where="\n".join([str(start.path), *(_name(layer) for layer in layers[:_SHOWN])]),
        fix="Give another file after --init, or start without one.",
    )


def _require_size(path: Path) -> None:
    if path.stat().st_size > MOST_BYTES:
        raise FileFormatError("This file is larger than any LoRA.", where=str(path))
