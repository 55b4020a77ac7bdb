"""Products and convolutions of a processor, by oneDNN's own operators or as PyTorch has them.

T rows; I, O input and output width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# What oneDNN's operators raise where they are not built in or do not know the number format.
_NOT_THERE = (AttributeError, NotImplementedError, RuntimeError)


@functools.cache
def onednn_computes(dtype: torch.dtype) -> bool:
    """Whether this processor computes with oneDNN's own operators in a number format: by trying."""
    x_TI, w_OI = torch.ones(4, 16, dtype=dtype), torch.ones(16, 16, dtype=dtype)
    image, kernel = torch.ones(1, 16, 4, 4, dtype=dtype), torch.ones(16, 16, 1, 1, dtype=dtype)
    at_once, how = ((0, 0), (1, 1)), ((0, 0), (0, 0), (1, 1))
    try:
        y_TO = torch.ops.mkldnn._linear_pointwise(x_TI, w_OI.t(), None, "none", [], "")
        drawn = convolution(image, reordered(kernel, image.shape, *at_once), None, *at_once)
        grad = transposed(image, transposed_order(kernel, image.shape, *how), *how)
    except _NOT_THERE:
        return False
    return all(bool((result == 16).all()) for result in (y_TO, drawn, grad))


def matmul(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, *, onednn: bool = True
) -> Tensor:
    """x W^T + b, [T, O]; not differentiable. On processors by oneDNN where it is to be had, which
    takes half the time of other libraries on some; or, without `onednn`, as PyTorch has it."""
    if onednn and x_TI.device.type == "cpu" and onednn_computes(x_TI.dtype):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "none", [], "")
        return result
    if bias_O is None or x_TI.device.type != "cpu":
        return F.linear(x_TI, weight_OI, bias_O)
    # As part of the product it would first be copied into each row, of memory as yet unused.
    return F.linear(x_TI, weight_OI).add_(bias_O)


def reordered(weight: Tensor, shape: torch.Size, padding: Any, stride: Any) -> Tensor:
    """A convolution's weight in the order that oneDNN wants for inputs of a shape. In that order
    it serves those of other shapes just as well, as far as could be measured."""
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight.detach(), padding, stride, (1, 1), 1, list(shape)
    )
    return packed


def convolution(
    x: Tensor, packed: Tensor, bias: Tensor | None, padding: Any, stride: Any
) -> Tensor:
    """By oneDNN, with a weight that is `reordered`; not differentiable."""
    y: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, packed, bias, padding, stride, (1, 1), 1, "none", [], ""
    )
    return y


def transposed_order(
    weight: Tensor, shape: torch.Size, padding: Any, output_padding: Any, stride: Any
) -> Tensor:
    """`reordered` for `transposed`, for gradients of a shape."""
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_transpose_weight(
        weight.detach(), padding, output_padding, stride, (1, 1), 1, list(shape)
    )
    return packed


def transposed(x: Tensor, packed: Tensor, padding: Any, output_padding: Any, stride: Any) -> Tensor:
    """A transposed convolution by oneDNN, with a weight in `transposed_order`; not
    differentiable."""
    y: Tensor = torch.ops.mkldnn._convolution_transpose_pointwise(
        x, packed, None, padding, output_padding, stride, (1, 1), 1, "none", [], ""
    )
    return y
