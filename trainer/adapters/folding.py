"""Ranks and alphas that differ between layers, written so that every program agrees on them.

diffusers takes the most frequent rank and alpha of a component for all of its attention layers: a
file with others fails to load or, worse, is applied with the wrong strength. So when layers differ,
the scale is multiplied into `up` (alpha = rank is written, which is scale 1), and smaller ranks are
filled up with zeros, which add nothing. Where all are alike nothing is touched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from trainer.adapters.lora import LoRALayer


@dataclass(frozen=True, slots=True)
class WrittenForm:
    """The rank and alpha with which a layer stands in a file."""

    rank: int
    alpha: float


def written_forms(layers: Mapping[str, LoRALayer]) -> dict[str, WrittenForm]:
    """How each layer of one component is written; its own rank and alpha where all are alike.

    Layers of wider kernels (3x3) keep their rank, as diffusers honours it there and padding would
    cost nine times as much, as long as they do not outnumber the others: the most frequent rank
    is the one that diffusers gives to attention layers.
    """
    own = {path: WrittenForm(layer.rank, layer.alpha) for path, layer in layers.items()}
    if len(set(own.values())) <= 1:
        return own
    kept = {path: layer.rank for path, layer in layers.items() if _is_wide(layer)}
    most_frequent = max(Counter(kept.values()).values(), default=0)
    if len(layers) - len(kept) <= most_frequent and len(kept) < len(layers):
        kept = {}
    common = max((own[path].rank for path in own if path not in kept), default=0)
    ranks = {path: kept.get(path, common) for path in layers}
    return {path: WrittenForm(rank, float(rank)) for path, rank in ranks.items()}


def in_form(down: Tensor, up: Tensor, layer: LoRALayer, form: WrittenForm) -> tuple[Tensor, Tensor]:
    """A layer's factors with the form's rank, so that they give the same update with its alpha.

    Args:
        down: [R, ...], of the layer.
        up: [O, R, ...], of the layer.
        layer: whose rank and alpha they have.
        form: see `written_forms`.
    """
    if form == WrittenForm(layer.rank, layer.alpha):
        return down, up
    return _filled(down, 0, form.rank), _filled(up * layer.scale, 1, form.rank)


def without_filling(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Undo the filling up to a larger rank; as they are if what is too much is not all zeros."""
    surplus_is_zero = not down[rank:].any() and not up[:, rank:].any()
    return (down[:rank], up[:, :rank]) if surplus_is_zero else (down, up)


def _is_wide(layer: LoRALayer) -> bool:
    return layer.down.ndim == 4 and tuple(layer.down.shape[2:]) != (1, 1)


def _filled(factor: Tensor, axis: int, size: int) -> Tensor:
    """Zeros behind a factor along an axis, up to a size."""
    if factor.shape[axis] == size:
        return factor
    shape = list(factor.shape)
    shape[axis] = size
    filled = factor.new_zeros(shape)
    filled.narrow(axis, 0, factor.shape[axis]).copy_(factor)
    return filled
