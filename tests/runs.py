"""Photos, runs of the command line and what they leave behind, for the tests of whole runs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from trainer.cli import main


@dataclass(frozen=True, slots=True)
class Outcome:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    def done(self) -> Outcome:
        """Itself; fails where the command did."""
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self


def run_cli(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def save_photos(folder: Path, count: int = 3) -> Path:
    """Pictures of random blocks, the second of them wide; the first has a caption."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for number in range(count):
        blocks = draw.integers(0, 255, (4, 8 if number == 1 else 4, 3), dtype=np.uint8)
        picture = Image.fromarray(blocks.repeat(12, axis=0).repeat(12, axis=1))
        picture.save(folder / f"{number}.png")
    (folder / "0.txt").write_text("{trigger} {class}, smiling", encoding="utf-8")
    return folder


def files_in(folder: Path) -> set[str]:
    """Paths of all files below a folder, with `/`."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def state_of(folder: Path) -> dict[str, str]:
    """Everything below a folder with its content's hash, to see whether anything has changed."""
    return {
        path.relative_to(folder).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        )
        for path in sorted(folder.rglob("*"))
    }


def lora_of(folder: Path) -> Path:
    """The finished LoRA file of a run."""
    ends = {path: path.stem.split("-")[-1] for path in folder.glob("*.safetensors")}
    (path,) = [path for path, end in ends.items() if not (end.isdigit() or end == "best")]
    return path


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a run's finished LoRA file."""
    return load_file(lora_of(folder))


def checkpoint_of(folder: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint: adapter and optimizer."""
    place = folder / "checkpoints" / f"step-{step:06d}"
    adapter = load_file(place / "adapter.safetensors")
    optimizer = load_file(place / "optimizer.safetensors")
    return adapter | {f"optimizer {name}": tensor for name, tensor in optimizer.items()}


def same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether names, types and every bit are equal."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
