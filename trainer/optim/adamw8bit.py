"""AdamW that remembers in eight bits: a quarter of the state's memory for the same course.

Block-wise dynamic quantization of Dettmers et al., "8-bit Optimizers via Block-wise Quantization"
(arXiv 2110.02861, sections 2.1 to 2.3): of every block of numbers the largest is kept in float32,
of each number in it a code of one byte, dense near zero and near the largest.

Parameters are taken together, a few million numbers at a time: a LoRA has hundreds of small ones,
and a GPU would wait for each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

# Numbers that share a scale.
BLOCK = 256
# Smaller parameters keep float32: there is nothing to save (section 2.3 and the authors' library).
SMALL = 4096
# So many numbers are unpacked at once.
TOGETHER = 2**22


@functools.cache
def levels(signed: bool, device: torch.device) -> Tensor:
    """What the 256 codes stand for, rising, float32 (the paper's section 1.3 and figure 2).

    Seven decades up to 1. The highest has the most codes, each lower one half as many; numbers
    without a sign have twice as many. 0 and 1 themselves have one each.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power * (1 if signed else 2) + 1, dtype=torch.float64)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (power - 6)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values.float().to(device)


@functools.cache
def _limits(signed: bool, device: torch.device) -> Tensor:
    """From where on the next code is nearer, [255]."""
    values = levels(signed, device)
    return (values[1:] + values[:-1]) / 2


def pack(numbers_N: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes [N] in uint8 and the scale of each block [N / BLOCK]; N is a whole number of blocks.

    A number is about its level times its block's scale.
    """
    blocks = numbers_N.view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    # A block of zeros has codes of zero, whatever it is divided by.
    shares = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(shares, _limits(signed, numbers_N.device), out_int32=True)
    return codes.to(torch.uint8).view(-1), scales


def unpack(codes_N: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """The numbers [N] in float32."""
    shares = levels(signed, codes_N.device).index_select(0, codes_N.int())
    return (shares.view(-1, BLOCK) * scales[:, None]).view(-1)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with both memories in eight bits.

    The gradient's square is remembered by its root, which is what a step divides by: of small
    gradients beside large ones more is kept than the square's own codes would keep.

    Args:
        params: of float32, or groups of them, as every optimizer takes them.
        lr: learning rate. betas: memories of the gradient's mean and of its square.
        eps: added to the root of the square. weight_decay: decoupled.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # PyTorch brings all of a state into the number format of its parameter.
        for state in self.state.values():
            for name in ("mean_codes", "root_codes"):
                if name in state:
                    state[name] = state[name].to(torch.uint8)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameters in self._together(group["params"]):
                self._step(parameters, group)
        return loss

    def _together(self, parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """Those with a gradient; of one kind, one step and one device each time."""
        moved = [parameter for parameter in parameters if parameter.grad is not None]
        for parameter in moved:
            self.state[parameter].setdefault("step", 0)

        def kind(parameter: nn.Parameter) -> tuple[bool, int, torch.device]:
            step = self.state[parameter]["step"]
            return parameter.numel() < SMALL, step, parameter.device

        # Sorted by all but the device, which has no order and is nearly always one.
        for _, alike in groupby(sorted(moved, key=lambda p: kind(p)[:2]), key=kind):
            held: list[nn.Parameter] = []
            count = 0
            for parameter in alike:
                if held and count + parameter.numel() > TOGETHER:
                    yield held
                    held, count = [], 0
                held.append(parameter)
                count += parameter.numel()
            yield held

    def _step(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        small = parameters[0].numel() < SMALL
        beta1, beta2 = group["betas"]
        states = [self.state[parameter] for parameter in parameters]
        step = states[0]["step"] + 1
        gradient = torch.cat([_flat(p.grad, whole=not small) for p in parameters])
        mean = _remembered(states, "mean", gradient, small)
        square = _remembered(states, "root", gradient, small).square_()
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = square.sqrt_()
        change = mean / (root / math.sqrt(1 - beta2**step)).add_(group["eps"])
        sizes = [_length(parameter, whole=not small) for parameter in parameters]
        changes = [
            part[: parameter.numel()].view_as(parameter)
            for part, parameter in zip(change.split(sizes), parameters, strict=True)
        ]
        torch._foreach_mul_([*parameters], 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_([*parameters], changes, alpha=-group["lr"] / (1 - beta1**step))
        _remember(states, "mean", mean, sizes, small)
        _remember(states, "root", root, sizes, small)
        for state in states:
            state["step"] = step


def _length(parameter: Tensor, *, whole: bool) -> int:
    """How many numbers a parameter takes; with `whole`, in whole blocks."""
    count = parameter.numel()
    return -(-count // BLOCK) * BLOCK if whole else count


def _flat(tensor: Tensor | None, *, whole: bool) -> Tensor:
    """In a row, float32, filled up with zeros to whole blocks."""
    assert tensor is not None
    missing = _length(tensor, whole=whole) - tensor.numel()
    row = tensor.float().flatten()
    return nn.functional.pad(row, (0, missing)) if missing else row


def _remembered(states: list[dict[str, Any]], name: str, like: Tensor, small: bool) -> Tensor:
    """What is remembered of all these parameters, in a row; zeros before the first step."""
    if states[0]["step"] == 0:
        return torch.zeros_like(like)
    if small:
        return torch.cat([state[name].flatten() for state in states])
    codes = torch.cat([state[f"{name}_codes"] for state in states])
    scales = torch.cat([state[f"{name}_scales"] for state in states])
    return unpack(codes, scales, signed=name == "mean")


def _remember(
    states: list[dict[str, Any]], name: str, numbers: Tensor, sizes: list[int], small: bool
) -> None:
    """Give each parameter its part; copies, so that none holds on to all of them."""
    if small:
        for state, part in zip(states, numbers.split(sizes), strict=True):
            state[name] = part.clone()
        return
    codes, scales = pack(numbers, signed=name == "mean")
    counts = [size // BLOCK for size in sizes]
    for state, own, scale in zip(states, codes.split(sizes), scales.split(counts), strict=True):
        state[f"{name}_codes"], state[f"{name}_scales"] = own.clone(), scale.clone()
