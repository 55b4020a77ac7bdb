"""The two factors of a layer's update, brought into the shape that another program expects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from trainer.adapters.foreign import Layer

_CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "conv", "conv_in", "conv_out")
_PROJECTIONS = ("proj_in", "proj_out")
_WRITTEN = (torch.float16, torch.bfloat16, torch.float32)


def alpha_of(layer: Layer) -> float:
    """The stated alpha; without one the rank, which is scale 1 for all programs but diffusers."""
    return float(layer.rank or 1) if layer.alpha is None else layer.alpha


def plain_factors(layer: Layer, parts: Mapping[str, Tensor], family: str) -> tuple[Tensor, Tensor]:
    """Float32 `down` [R, I] or [R, I, kh, kw] and `up` [O, R] or [O, R, 1, 1] of a LoRA layer.

    A middle factor (Tucker form: d[o,i,k,l] = sum up[o,n] mid[n,m,k,l] down[m,i]) is multiplied
    into `down`, which makes a plain LoRA of the same rank.
    """
    down, up = parts["down"].float(), parts["up"].float()
    if "mid" in parts:
        down = torch.einsum("nmkl,mi->nikl", parts["mid"].float(), down.flatten(1))
        up = up.flatten(1)[:, :, None, None]
    return as_declared(down, layer, family), as_declared(up, layer, family)


def as_declared(factor: Tensor, layer: Layer, family: str) -> Tensor:
    """A factor with two axes for a linear layer and four for a convolution.

    The projections of SD 1 are 1x1 convolutions, those of SD 2 and SDXL are linear; programs that
    flatten both also write them either way. Unchanged where the family is not known.
    """
    end = layer.path.rpartition(".")[2]
    if end in _PROJECTIONS:
        if family not in ("sd1", "sd2", "sdxl"):
            return factor
        is_convolution = family == "sd1"
    else:
        is_convolution = layer.component == "unet" and end in _CONVOLUTIONS
    if is_convolution and factor.ndim == 2:
        return factor[:, :, None, None]
    if not is_convolution and factor.ndim == 4 and tuple(factor.shape[2:]) == (1, 1):
        return factor[:, :, 0, 0]
    return factor


def dora_column(magnitude: Tensor, up: Tensor) -> Tensor:
    """peft's magnitudes of the rows of a weight as LyCORIS writes them: [O, 1] or [O, 1, 1, 1]."""
    return magnitude.reshape(-1, *[1] * (up.ndim - 1))


def narrowest(originals: Iterable[Tensor], made: Iterable[Tensor]) -> torch.dtype:
    """The number format of the original tensors, if all new ones can be written in it exactly."""
    formats = {tensor.dtype for tensor in originals}
    dtype = formats.pop() if len(formats) == 1 else torch.float32
    if dtype in _WRITTEN and all(_fits(tensor, dtype) for tensor in made):
        return dtype
    return torch.float32


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype or torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)
