"""How quickly photos are read, checked and encoded, in how much memory, beside a plain loop.

`python -m benchmarks.prepare_speed` draws a folder of small photos and does each part in a
process of its own, with an empty cache. The plain loop is what a script of an afternoon would do:
Pillow and a torch `DataLoader`, decode, resize, crop, to a tensor, the VAE one by one; it checks
nothing. Each part adds a row to `benchmarks/results/prepare-speed_<hardware>_<date>.csv`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parent.parent
SIZES = ((256, 256), (288, 224), (224, 288), (320, 200))
ENCODED = "encode", "plain loop, encode"
CHECKED = "check", "prepare", "prepare with page"


@dataclass(frozen=True, slots=True)
class Row:
    """What one part took.

    base: whose VAE encoded, "" for none. seconds: of the part itself; of a `prepare` the whole
    command, from the start of the process. peak_mb: the most memory that the process had, libraries
    and all (the plain loop's worker processes are not in it); nan where the system does not say.
    detector: what looks for faces, "" where none are looked for.
    """

    part: str
    base: str
    photos: int
    seconds: float
    photos_per_second: float
    peak_mb: float
    detector: str
    workers: int
    threads: int
    machine: str


@dataclass(frozen=True, slots=True)
class Asked:
    """detector: `data.face_detector`. workers: photos read at once. threads: of PyTorch."""

    detector: str
    workers: int
    threads: int


def draw_photos(folder: Path, count: int) -> None:
    """Small JPEGs of smooth noise, each another, in several shapes."""
    folder.mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize(SIZES[number % len(SIZES)], Image.Resampling.BICUBIC))
        grain = rng.integers(-12, 13, pixels.shape[:2])[..., None]
        photo = Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))
        photo.save(folder / f"{number:06}.jpg", quality=88)


# --- the parts: each returns how many photos it did, and the seconds


def read(folder: Path, base: str, asked: Asked) -> tuple[int, float]:
    from trainer.data.photos import scan_folder

    start = time.perf_counter()
    scan = scan_folder(folder, workers=asked.workers)
    return len(scan.photos), time.perf_counter() - start


def check(folder: Path, base: str, asked: Asked) -> tuple[int, float]:
    from trainer.data.photos import scan_folder
    from trainer.doctor.examine import examine
    from trainer.doctor.facts import FactStore
    from trainer.faces import open_finder

    photos = scan_folder(folder, workers=asked.workers).photos
    finder, _ = open_finder(asked.detector, "", "", download=False, drawings=False)
    start = time.perf_counter()
    examine(photos, finder, FactStore(None), workers=asked.workers)
    return len(photos), time.perf_counter() - start


def encode(folder: Path, base: str, asked: Asked) -> tuple[int, float]:
    from trainer.data.buckets import BucketPlan, place_photos
    from trainer.data.cache import TensorCache, cache_root
    from trainer.data.photos import scan_folder
    from trainer.training.encode import EncodeOptions, encode_photos
    from trainer.types import Captioned

    backbone = load_backbone(base)
    facts = backbone.facts
    photos = scan_folder(folder, workers=asked.workers).photos
    captioned = [Captioned(photo, ("ohwx person",), "template") for photo in photos]
    plan = BucketPlan((facts.resolution,), facts.bucket_step_px)
    placed = place_photos(captioned, plan, {})
    options = EncodeOptions(
        vae="",
        text="",
        background=(255, 255, 255),
        transparency="background",
        face_weight=1.0,
        cache_prompts=False,
        workers=asked.workers,
    )
    start = time.perf_counter()
    encode_photos(placed, backbone, TensorCache(cache_root()), options, lambda done, total: None)
    return len(photos), time.perf_counter() - start


class PlainPhotos(Dataset[Tensor]):
    """Squares cut from the middle, as tensors [3, side, side] in [-1, 1]."""

    def __init__(self, folder: Path, side: int) -> None:
        self.paths = sorted(folder.iterdir())
        self.side = side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Tensor:
        image = Image.open(self.paths[number]).convert("RGB")
        scale = self.side / min(image.size)
        size = round(image.width * scale), round(image.height * scale)
        image = image.resize(size, Image.Resampling.LANCZOS)
        left, top = (image.width - self.side) // 2, (image.height - self.side) // 2
        image = image.crop((left, top, left + self.side, top + self.side))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def plain_read(folder: Path, base: str, asked: Asked) -> tuple[int, float]:
    photos = PlainPhotos(folder, load_backbone(base).facts.resolution)
    start = time.perf_counter()
    for _ in DataLoader(photos, batch_size=None, num_workers=asked.workers):
        pass
    return len(photos), time.perf_counter() - start


def plain_encode(folder: Path, base: str, asked: Asked) -> tuple[int, float]:
    backbone = load_backbone(base)
    photos = PlainPhotos(folder, backbone.facts.resolution)
    latents = []
    start = time.perf_counter()
    with torch.no_grad():
        for pixels_CHW in DataLoader(photos, batch_size=None, num_workers=asked.workers):
            _, height, width = pixels_CHW.shape
            noise_BChw = torch.randn(1, *backbone.latent_shape(width, height))
            latents.append(backbone.encode_pixels(pixels_CHW[None], noise_BChw))
    return len(photos), time.perf_counter() - start


def prepare(folder: Path, base: str, asked: Asked) -> tuple[int, float]:
    return run_prepare(folder, base, asked, "--json")


def prepare_page(folder: Path, base: str, asked: Asked) -> tuple[int, float]:
    with tempfile.TemporaryDirectory() as place:
        return run_prepare(folder, base, asked, "--page", str(Path(place) / "page.html"))


def run_prepare(folder: Path, base: str, asked: Asked, *words: str) -> tuple[int, float]:
    """`likeness prepare` in this process, with what it prints counted and thrown away."""
    from contextlib import redirect_stderr, redirect_stdout

    from trainer.cli import main

    settings = (f"--set=data.workers={asked.workers}", f"--set=data.face_detector={asked.detector}")
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        code = main(["prepare", str(folder), "--base", base, *settings, *words])
    if code:
        raise RuntimeError(f"likeness prepare ended with {code}")
    return sum(1 for _ in folder.iterdir()), time.perf_counter() - STARTED


def load_backbone(base: str) -> Any:
    from trainer.commands.bases import base_facts
    from trainer.families import FAMILIES, LoadOptions

    facts = base_facts(base)
    options = LoadOptions(torch.device("cpu"), torch.float32, "sdpa")
    return FAMILIES.load(facts.family).load(facts, options)


PARTS: dict[str, Callable[[Path, str, Asked], tuple[int, float]]] = {
    "read": read,
    "check": check,
    "prepare": prepare,
    "prepare with page": prepare_page,
    "encode": encode,
    "plain loop, read": plain_read,
    "plain loop, encode": plain_encode,
}
STARTED = time.perf_counter()


def peak_mb() -> float:
    """The most memory that this process had, in units of 2**20 bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: its maximum on Linux is at least that of the process that started this one.
        words = status.read_text(encoding="utf-8").split()
        return int(words[words.index("VmHWM:") + 1]) / 2**10
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak / (2**20 if sys.platform == "darwin" else 2**10))


def measure(part: str, folder: Path, base: str, asked: Asked) -> Row:
    """A part in a process of its own, with an empty cache."""
    command = [sys.executable, "-m", "benchmarks.prepare_speed", "--folder", str(folder)]
    command += ["--parts", part, "--bases", base, "--detector", asked.detector]
    command += ["--workers", str(asked.workers), "--threads", str(asked.threads)]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"LIKENESS_CACHE": cache}
        result = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8"
        )
    if result.returncode:
        raise SystemExit(f"{part} failed:\n{result.stderr}")
    found = json.loads(result.stdout.splitlines()[-1])
    return Row(
        part=part,
        base=Path(base).name if part in ENCODED else "",
        photos=found["photos"],
        seconds=round(found["seconds"], 2),
        photos_per_second=round(found["photos"] / found["seconds"], 1),
        peak_mb=round(found["peak_mb"], 1),
        detector=asked.detector if part in CHECKED else "",
        workers=asked.workers,
        threads=asked.threads,
        machine=f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
    )


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Add rows to the file, which is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def show(rows: Sequence[Row]) -> None:
    table = Table(title=f"{rows[0].machine}; {rows[0].workers} workers, {rows[0].threads} threads")
    words = ("part", "base", "faces by")
    for name in (*words, "photos", "seconds", "photos/s", "peak MB"):
        table.add_column(name, justify="left" if name in words else "right")
    for row in rows:
        numbers = (f"{row.seconds:.1f}", f"{row.photos_per_second:.0f}", f"{row.peak_mb:.0f}")
        table.add_row(row.part, row.base, row.detector, f"{row.photos:,}", *numbers)
    Console().print(table)


def arguments_of(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--photos", type=int, default=10_000, help="how many are drawn")
    parser.add_argument("--encoded", type=int, default=1000, help="how many of them are encoded")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--bases", nargs="+", default=["tiny", "embedded"])
    parser.add_argument("--detector", default="auto", help="data.face_detector")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--hardware", default=f"cpu-{platform.machine()}", help="for file names")
    parser.add_argument("--output", type=Path, help="the CSV file")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # the part runs on it, here
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    arguments = arguments_of(words)
    asked = Asked(arguments.detector, arguments.workers, arguments.threads)
    if arguments.folder:
        torch.set_num_threads(asked.threads)
        base, part = arguments.bases[0], arguments.parts[0]
        count, seconds = PARTS[part](arguments.folder, base, asked)
        print(json.dumps({"photos": count, "seconds": seconds, "peak_mb": peak_mb()}))
        return
    rows = []
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        draw_photos(home / "photos", arguments.photos)
        draw_photos(home / "few", min(arguments.encoded, arguments.photos))
        for base in arguments.bases:
            path = tiny_base(home / "tiny") if base == "tiny" else base
            for part in arguments.parts:
                if part in ENCODED:
                    rows.append(measure(part, home / "few", path, asked))
                elif base == arguments.bases[0]:
                    rows.append(measure(part, home / "photos", path, asked))
    name = f"prepare-speed_{arguments.hardware}_{date.today().isoformat()}.csv"
    write_rows(rows, arguments.output or ROOT / "benchmarks" / "results" / name)
    show(rows)


def tiny_base(folder: Path) -> str:
    """A base of random weights, so that encoding is mostly reading and writing."""
    from tests.tiny import save_tiny_base

    return str(save_tiny_base(folder))


if __name__ == "__main__":
    main()
