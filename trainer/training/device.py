"""Which device, number format and attention a run uses; checked by trying, never by hoping."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainer.errors import DeviceError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Device:
    """What was chosen; `notices` are sentences for the user."""

    device: torch.device
    precision: str
    attention: str
    notices: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]


def choose_device(device: str, precision: str, attention: str) -> Device:
    """Turn the settings into what is really there.

    Raises:
        DeviceError: a device or number format was asked for by name and is not to be had.
    """
    notices: list[str] = []
    chosen = _device(device)
    kind = chosen.type
    if precision == "auto":
        precision = "fp32"
        if kind == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if precision == "fp16" and kind != "cuda":
        raise DeviceError(
            f"fp16 needs an NVIDIA GPU; this run is on '{kind}'.",
            where="model.precision",
            fix="Use model.precision=bf16 or fp32.",
        )
    if attention == "xformers":
        reason = _xformers_fails(chosen, PRECISIONS[precision])
        if reason:
            attention = "sdpa"
            notices.append(f"xformers was asked for but cannot be used ({reason}); using sdpa.")
    if attention == "auto":
        attention = "sdpa"
    return Device(chosen, precision, attention, tuple(notices))


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


def _xformers_fails(device: torch.device, dtype: torch.dtype) -> str:
    """Why xformers does not work here, or nothing: only a forward and backward pass tells."""
    try:
        from xformers.ops import memory_efficient_attention
    except (ImportError, OSError) as error:
        return str(error).splitlines()[0]
    probe = torch.zeros(1, 16, 1, 64, device=device, dtype=dtype, requires_grad=True)
    try:
        memory_efficient_attention(probe, probe, probe).sum().backward()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error).strip().splitlines()[0]
    return ""
