"""What each number format and attention costs in exactness and saves in memory.

`python -m benchmarks.precision` takes the loss of one batch and the gradients of all adapters (UNet
and text encoder) on a base of random weights, in a process of its own for every variant, and
compares them with those of eager fp32. Where a GPU is, it is used. Rows go to
`benchmarks/results/precision_<hardware>_<date>.csv`.

The variants called torchao keep the weights of linear layers with torchao's own layers, to show
what theirs take in training; they are left out where it is not installed.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.random_bases import BASES, base_folder
from tests.learners import Recipe, load_backbone, make_learner
from trainer.families.attention import AttentionShape, why_not
from trainer.training.device import PRECISIONS

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = "fp32 eager"
# Loss scaling, so that small gradients are there in fp16: a power of two, which changes no digit.
SCALED = 1024.0
CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compute a step."""

    precision: str = "fp32"
    attention: str = "sdpa"
    weights: str = "same"
    checkpointing: bool = False
    torchao: bool = False


VARIANTS: dict[str, Variant] = {
    REFERENCE: Variant(attention="eager"),
    "fp32 sdpa": Variant(),
    "fp32 sdpa-flash": Variant(attention="sdpa-flash"),
    "fp32 sdpa-efficient": Variant(attention="sdpa-efficient"),
    "fp32 sdpa-math": Variant(attention="sdpa-math"),
    "bf16 eager": Variant("bf16", "eager"),
    "bf16 sdpa": Variant("bf16"),
    "bf16 sdpa-flash": Variant("bf16", "sdpa-flash"),
    "bf16 sdpa-cudnn": Variant("bf16", "sdpa-cudnn"),
    "bf16 sdpa-efficient": Variant("bf16", "sdpa-efficient"),
    "bf16 xformers": Variant("bf16", "xformers"),
    "fp16 sdpa": Variant("fp16"),
    "bf16 sdpa checkpointing": Variant("bf16", checkpointing=True),
    "fp32 int8": Variant(weights="int8"),
    "bf16 int8": Variant("bf16", weights="int8"),
    "bf16 fp8": Variant("bf16", weights="fp8"),
    "bf16 nf4": Variant("bf16", weights="nf4"),
    "bf16 int8 checkpointing": Variant("bf16", weights="int8", checkpointing=True),
    "bf16 int8 torchao": Variant("bf16", weights="int8", torchao=True),
    "bf16 int8 torchao checkpointing": Variant(
        "bf16", weights="int8", checkpointing=True, torchao=True
    ),
}


@dataclass(frozen=True, slots=True)
class Row:
    """What one variant showed.

    loss_error: relative. angle: 1 - cosine of the gradients. length_error: relative, of their norm.
    gradient_error: norm of the difference by norm. loaded_mib: memory taken once base and adapters
    are there; peak_mib: the most during two steps (forward and backward): on a GPU of its memory,
    else of the process, libraries and all. seconds: of the second step.
    """

    base: str
    pixels: int
    device: str
    variant: str
    loss: float
    loss_error: float
    angle: float
    length_error: float
    gradient_error: float
    loaded_mib: float
    peak_mib: float
    seconds: float


def measure(base: Path, variant: Variant, pixels: int, device: torch.device) -> dict[str, Any]:
    """Loss, gradients, memory and time of one variant, in this process."""
    backbone = load_backbone(
        base,
        device=device,
        dtype=PRECISIONS[variant.precision],
        attention=variant.attention,
        checkpointing=variant.checkpointing,
        weights="same" if variant.torchao else variant.weights,
    )
    backbone.components["unet"].train()  # diffusers checkpoints in training mode only
    if variant.torchao:
        for component in backbone.components.values():
            pack_with_torchao(component)
    side = pixels // backbone.facts.pixels_per_latent
    learner = make_learner(backbone, Recipe(sizes=((side, side),) * 2, batch_size=1))
    draw = torch.Generator().manual_seed(1)
    for parameter in learner.parameters:
        if not parameter.any():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.05)
    factor = SCALED if variant.precision == "fp16" else 1.0
    loaded, peak = memory(device)
    for _ in range(2):  # the second is free of what is done once
        for parameter in learner.parameters:
            parameter.grad = None
        started = time.perf_counter()
        loss = learner.loss(0)
        (loss * factor).backward()
        value = loss.item()
        seconds = time.perf_counter() - started
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in learner.parameters]
    gradient = torch.cat([part.flatten() for part in parts]).cpu() / factor
    return {
        "loss": value,
        "gradient": gradient,
        "loaded_mib": loaded,
        "peak_mib": peak(),
        "seconds": seconds,
    }


def pack_with_torchao(model: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def memory(device: torch.device) -> tuple[float, Callable[[], float]]:
    """Memory taken now, and what asks for the most since now; MiB, nan where nobody says."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return (
            torch.cuda.memory_allocated() / 2**20,
            lambda: torch.cuda.max_memory_allocated() / 2**20,
        )
    if not CLEAR_REFS.exists():
        return float("nan"), lambda: float("nan")
    CLEAR_REFS.write_text("5", encoding="utf-8")  # the peak is that from here on

    return status("VmRSS"), lambda: status("VmHWM")


def status(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"))
    return int(found[1]) / 1024 if found else float("nan")


def usable(variant: Variant, device: torch.device) -> str:
    """Why a variant cannot be measured here; "" if it can."""
    if variant.torchao and importlib.util.find_spec("torchao") is None:
        return "torchao is not installed"
    if variant.attention in ("sdpa", "eager"):
        return ""
    return why_not(variant.attention, AttentionShape(), device, PRECISIONS[variant.precision])


def in_own_process(base: Path, name: str, pixels: int, folder: Path) -> dict[str, Any]:
    """`measure` in another process, so that no variant inherits another's memory."""
    command = [sys.executable, "-m", "benchmarks.precision", "--one", name, "--folder", str(base)]
    command += ["--pixels", str(pixels), "--result", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return {**result, "gradient": load_file(folder / "gradient.safetensors")["gradient"]}


def keep(result: dict[str, Any], folder: Path) -> None:
    gradient: Tensor = result.pop("gradient")
    save_file({"gradient": gradient}, folder / "gradient.safetensors")
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def compare(found: dict[str, Any], wanted: dict[str, Any], where: tuple[str, int, str, str]) -> Row:
    gradient, reference = found["gradient"].double(), wanted["gradient"].double()
    norm = reference.norm()
    base, pixels, device, variant = where
    return Row(
        base=base,
        pixels=pixels,
        device=device,
        variant=variant,
        loss=found["loss"],
        loss_error=abs(found["loss"] / wanted["loss"] - 1),
        angle=1 - float(gradient @ reference / (gradient.norm() * norm)),
        length_error=abs(float(gradient.norm() / norm) - 1),
        gradient_error=float((gradient - reference).norm() / norm),
        loaded_mib=found["loaded_mib"],
        peak_mib=found["peak_mib"],
        seconds=found["seconds"],
    )


def hardware() -> str:
    if torch.cuda.is_available():
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    return f"cpu-{platform.machine()}"


def append(path: Path, rows: list[Row]) -> None:
    fresh = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(Row.__dataclass_fields__), lineterminator="\n")
        if fresh:
            writer.writeheader()
        for row in rows:
            values = asdict(row).items()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values})


def table(rows: list[Row]) -> Table:
    shown = Table("variant", "loss error", "1 - cosine", "length", "loaded MiB", "peak MiB", "s")
    for row in rows:
        errors = [f"{value:.1e}" for value in (row.loss_error, row.angle, row.length_error)]
        shown.add_row(
            row.variant,
            *errors,
            f"{row.loaded_mib:.0f}",
            f"{row.peak_mib:.0f}",
            f"{row.seconds:.2f}",
        )
    return shown


def run(arguments: argparse.Namespace, console: Console) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        home = Path(arguments.home or name)
        base = base_folder(arguments.base, home)
        wanted: dict[str, Any] = {}
        rows = []
        for variant in dict.fromkeys([REFERENCE, *(arguments.variant or VARIANTS)]):
            if reason := usable(VARIANTS[variant], device):
                console.print(f"{variant} is left out: {reason}", highlight=False)
                continue
            found = in_own_process(base, variant, arguments.pixels, Path(name))
            wanted = wanted or found
            place = (arguments.base, arguments.pixels, hardware(), variant)
            rows.append(compare(found, wanted, place))
            append(arguments.results, rows[-1:])
        console.print(table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", choices=BASES, default="tiny")
    parser.add_argument("--pixels", type=int, default=32, help="side of the picture")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="default: all")
    parser.add_argument("--home", help="where bases are kept; default: made for this run")
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "benchmarks/results" / f"precision_{hardware()}_{date.today()}.csv",
    )
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        found = measure(arguments.folder, VARIANTS[arguments.one], arguments.pixels, device)
        keep(found, arguments.result)
    else:
        run(arguments, Console())


if __name__ == "__main__":
    main()
