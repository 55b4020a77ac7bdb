"""Which device, number formats and attention a run uses; checked by trying, never by hoping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from trainer.adapters.attach import attach
from trainer.adapters.frozen import quicken
from trainer.errors import DeviceError
from trainer.families import quantize
from trainer.families.attention import NAMES, AttentionShape, milliseconds, why_not
from trainer.training import processor
from trainer.training.trials import answer

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What is measured on a GPU; "sdpa" is what PyTorch makes of the same kernels without measuring,
# "sdpa-math" and "eager" are slower than all of them and take far more memory.
MEASURED = ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "xformers")
# Two measurements of one kernel differ by so much: within it the first of `MEASURED` is taken.
_ALIKE = 1.05
# Of a transformer block.
_PROJECTIONS = tuple(f"attn{n}.to_{name}" for n in (1, 2) for name in ("q", "k", "v"))
# From this width on a base is large enough for its number format to decide over its speed; Stable
# Diffusion's narrowest layers have 320 channels.
_LARGE = 256
# Work everywhere: nothing to try.
_ALWAYS = ("sdpa", "sdpa-fp32", "eager")


@dataclass(frozen=True, slots=True)
class Kept:
    """What a run goes on with as it was begun, so that its numbers stay the same; "": nothing, it
    begins now. See `Device`."""

    attention: str = ""
    precision: str = ""
    products: str = ""

    @staticmethod
    def of(facts: Mapping[str, Any]) -> Kept:
        """As a checkpoint has it; earlier versions knew only oneDNN's products."""
        names = {"attention": "", "precision": "", "products": "onednn"}
        return Kept(*(str(facts.get(name, before)) for name, before in names.items()))


@dataclass(frozen=True, slots=True)
class Device:
    """What was chosen.

    notices: what the user asked for and does not get, in sentences. attention_words: how the
    attention was chosen, where that was measured. compiling: the UNet's transformer blocks are
    compiled. products: whose products of float32 frozen layers take on a processor, "onednn" or
    "pytorch", its own library's; "wide-" before that: in a bfloat16 run too, where there is much to
    compute.
    """

    device: torch.device
    precision: str
    attention: str
    notices: tuple[str, ...] = ()
    weights: str = "same"
    attention_words: str = ""
    compiling: bool = False
    products: str = "onednn"

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @property
    def numbers(self) -> str:
        """What names the number formats that the frozen UNet and text encoders compute with."""
        return self.precision if self.weights == "same" else f"{self.precision} {self.weights}"

    @property
    def kept(self) -> Kept:
        return Kept(self.attention, self.precision, self.products)


def blocks_for(fast: str, device: torch.device) -> Literal["plain", "direct", "lean"]:
    """How the UNet's blocks compute, by `model.fast`."""
    if fast == "off":
        return "plain"
    # On a processor lean blocks cost time; small pictures and models keep little anyway.
    return "direct" if fast == "on" and device.type == "cpu" else "lean"


def finish_for(fast: str, device: Device) -> Callable[[nn.Module], None] | None:
    """What is done with a frozen model that has been loaded, by `model.fast`."""
    if fast == "off":
        return None
    how = device.products
    # A compiler is given the plain layers, with the weights that they were read with.
    widen = fast == "on" and how.startswith(processor.WIDE) and not device.compiling
    return partial(quicken, pack=fast == "on", onednn=how.endswith("onednn"), widen=widen)


def choose_device(
    device: str,
    precision: str,
    attention: str,
    *,
    weights: str = "same",
    shape: AttentionShape = AttentionShape(),  # noqa: B008
    width: int = 0,
    kept: Kept = Kept(),  # noqa: B008
    compiling: bool = False,
) -> Device:
    """Turn the settings into what is really there.

    Args:
        device, precision, attention, weights: as in the settings.
        shape: of the attention over the most tokens in this run.
        width: of the UNet's narrowest layers, in channels; 0: nothing is known of the base.
        kept: what this run was begun with; "auto" keeps to it, so that it goes on with the same
            numbers.
        compiling: whether the UNet's transformer blocks are to be compiled.

    Raises:
        DeviceError: a device or number format was asked for by name and is not to be had.
    """
    chosen = _device(device)
    precision = _precision(precision, chosen, width, kept.precision)
    dtype = PRECISIONS[precision]
    if weights != "same" and (reason := quantize.why_not(weights, chosen, dtype)):
        raise DeviceError(
            f"Frozen weights in {weights} cannot be used on '{chosen.type}': {reason}",
            where="model.weights",
            fix="Use same." if weights == "int8" else "Use model.weights=int8 or same.",
        )
    if attention == "auto":
        name, words, notices = _best_attention(shape, chosen, dtype, kept.attention)
    else:
        name, words, notices = attention, "", []
        if reason := _fails(attention, shape, chosen, dtype):
            name = "sdpa"
            notices = [f"{attention} was asked for but cannot be used ({reason}); using sdpa."]
    if compiling and (reason := _fails_to_compile(name, chosen, dtype)):
        compiling = False
        notices.append(f"The UNet's blocks cannot be compiled here ({reason}); going on without.")
    products = _products(chosen, dtype, width, kept.products)
    return Device(chosen, precision, name, tuple(notices), weights, words, compiling, products)


def _device(name: str) -> torch.device:
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "No NVIDIA GPU can be used.",
            where=f"model.device = 'cuda'; PyTorch is {torch.__version__}",
            fix="Install the CUDA build of PyTorch (README, 'A GPU'), or set model.device=cpu.",
        )
    if name == "mps" and not has_mps:
        raise DeviceError(
            "No Apple GPU can be used.", where="model.device = 'mps'", fix="Set model.device=cpu."
        )
    return torch.device(name)


def _precision(name: str, device: torch.device, width: int, kept: str) -> str:
    if name == "auto":
        if device.type == "cuda":
            able = torch.cuda.is_bf16_supported()
            usable = bool(kept) and (able or kept != "bf16")
            return kept if usable else "bf16" if able else "fp16"
        if kept in ("fp32", "bf16"):
            return kept
        on_processor = device.type == "cpu" and width >= _LARGE
        return "bf16" if on_processor and processor.quicker_format() == "bf16" else "fp32"
    if name == "fp16" and device.type != "cuda":
        raise DeviceError(
            f"fp16 needs an NVIDIA GPU; this run is on '{device.type}'.",
            where="model.precision",
            fix="Use model.precision=bf16 or fp32.",
        )
    return name


def _products(device: torch.device, dtype: torch.dtype, width: int, kept: str) -> str:
    """In other formats than float32 PyTorch asks oneDNN itself."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return "onednn"
    if kept:
        return kept
    if dtype == torch.float32:
        return processor.quicker_products()
    wide = width >= _LARGE and processor.quicker_format() == "fp32"
    return processor.WIDE + processor.quicker_products() if wide else "onednn"


def _best_attention(
    shape: AttentionShape, device: torch.device, dtype: torch.dtype, kept: str
) -> tuple[str, str, list[str]]:
    """The attention to take where none is asked for, how it was chosen, and notices."""
    notices = []
    if kept in NAMES:
        reason = _fails(kept, shape, device, dtype)
        if not reason:
            return kept, "", []
        notices = [
            f"The run was begun with the attention {kept}, which cannot be used here ({reason}). "
            "Another goes on in its place; the last digits of the numbers will differ."
        ]
    if device.type != "cuda":
        return processor.quicker_attention(dtype) if device.type == "cpu" else "sdpa", "", notices
    words: dict[str, str] = {}

    def trial() -> str:
        try:
            words.update([measured_attention(shape, device, dtype)])
        except torch.OutOfMemoryError:
            words["sdpa"] = "Attention sdpa: the GPU has too little memory free to try others"
            return ""
        return next(iter(words))

    def holds(name: str) -> bool:
        try:
            return name in _ALWAYS or not why_not(name, shape, device, dtype)
        except torch.OutOfMemoryError:
            return True

    # It no longer holds under a driver that lacks it.
    name = answer(f"attention, {shape!r}, {dtype}", device, NAMES, trial, holds) or "sdpa"
    return name, words.get(name, f"Attention {name}, the fastest when that was measured"), notices


def measured_attention(
    shape: AttentionShape, device: torch.device, dtype: torch.dtype
) -> tuple[str, str]:
    """The fastest of `MEASURED` that works, "sdpa" where none does; and a line that says so.

    Raises:
        torch.OutOfMemoryError: the device is full.
    """
    times: dict[str, float] = {}
    missing: list[str] = []
    for name in MEASURED:
        reason = why_not(name, shape, device, dtype)
        if reason:
            missing.append(f"{name} ({reason})")
        else:
            times[name] = milliseconds(name, shape, device, dtype)
    limit = _ALIKE * min(times.values(), default=0.0)
    best = next((name for name, time in times.items() if time <= limit), "sdpa")
    parts = [f"{name} {time:.2f} ms" for name, time in times.items()]
    line = f"Attention {best}; forward and backward over {shape}: {', '.join(parts) or 'none'}"
    if missing:
        line += f"; not usable: {', '.join(missing)}"
    return best, line


def _fails(attention: str, shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> str:
    try:
        return "" if attention in _ALWAYS else why_not(attention, shape, device, dtype)
    except torch.OutOfMemoryError:
        return "the device's memory does not suffice"


def _fails_to_compile(attention: str, device: torch.device, dtype: torch.dtype) -> str:
    # With all of diffusers, which takes seconds.
    from trainer.families.compiling import why_not

    adapt = partial(attach, names=_PROJECTIONS, rank=4, alpha=4.0, seed=0)
    return why_not(attention, device, dtype, adapt)
