"""How quickly a LoRA is trained and in how much memory, beside the usual recipe on the same work.

`python -m benchmarks.train_speed --base sd15 --resolution 256 --precision bf16 --threads 1` makes a
base of random weights and a few photos, and trains on them with our own command (`ours`) and with
`plain_baseline.py`: as it is (`plain`), and with latents and prompt embeddings cached
(`plain-cached`). Each side is a process of its own that is kept through the whole run; the sides
take turns with blocks of steps, so that what else the machine does falls on each alike and what a
start costs is paid once. Where they do not fit into memory beside each other, `--fresh` starts a
process for each block instead. `--variant "model.attention=eager"` adds our side once more with
other settings, `--variant run.threads=2` in another number of threads (ratios are then by the
clock on the wall). Every run adds rows to `benchmarks/results/train-speed_<hardware>_<date>.csv`;
`--grow` measures how cost grows with the work instead of one configuration (`speed_growth.py`).
"""

from __future__ import annotations

import argparse
import math
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from benchmarks.speed_blocks import SIDES
from benchmarks.speed_growth import AXES, grow
from benchmarks.speed_rows import append_rows, show
from benchmarks.speed_run import Plan, SpeedError, Variant, prepared, run_plan
from benchmarks.speed_task import Task
from trainer.machine import processor_name

ROOT = Path(__file__).resolve().parent.parent
HOME = Path(tempfile.gettempdir()) / "likeness-train-speed"
BASES = ("tiny", "embedded", "sd15", "sd21", "sdxl")
RESOLUTIONS = {"tiny": 32, "embedded": 64, "sd15": 512, "sd21": 768, "sdxl": 1024}
# Of these the baseline knows xformers and eager; otherwise it takes what PyTorch takes.
ATTENTIONS = ("auto", "xformers", "sdpa", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "eager")
TARGETS = ("attention", "attention+ff", "all", "cross-attention", "cross-kv")


@dataclass(frozen=True, slots=True)
class Asked:
    """The command line: a plan, and where its rows go."""

    plan: Plan
    output: Path
    grow: tuple[str, ...] = ()
    prepare: bool = False


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_speed", description=__doc__, allow_abbrev=False
    )
    work = parser.add_argument_group("the work, the same for all sides")
    work.add_argument("--base", choices=BASES, default="tiny")
    work.add_argument("--resolution", type=int, help="in pixels (default: the base's)")
    work.add_argument("--batch", type=int, default=1)
    work.add_argument("--rank", type=int, default=16)
    work.add_argument("--targets", choices=TARGETS, default="attention")
    work.add_argument("--text-encoder", action="store_true", help="train it too")
    work.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    work.add_argument("--attention", choices=ATTENTIONS, default="auto")
    work.add_argument("--checkpointing", action="store_true")
    work.add_argument("--min-snr-gamma", type=float, default=0.0, help="0: plain squared error")
    work.add_argument("--photos", type=int, help="a multiple of --batch (default: 8 or more)")
    work.add_argument("--threads", type=int, default=1, help="of PyTorch, on the processor")
    work.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    ours = parser.add_argument_group("our side")
    ours.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE")
    ours.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar='"NAME=VALUE ..."',
        help="ours once more, with these settings; may be given several times",
    )
    how = parser.add_argument_group("the measuring")
    how.add_argument("--only", nargs="+", choices=SIDES, default=list(SIDES))
    how.add_argument("--steps", type=int, default=4, help="in a block")
    how.add_argument("--rounds", type=int, default=5, help="blocks of each side")
    how.add_argument("--warmup", type=int, default=2, help="steps before the first round")
    how.add_argument("--fresh", action="store_true", help="a new process for each block")
    how.add_argument("--together", action="store_true", help="start all sides at once")
    how.add_argument("--cold", action="store_true", help="start with an empty cache of latents")
    how.add_argument("--profile", type=int, default=0, metavar="STEPS", help="trace so many more")
    how.add_argument("--home", type=Path, default=HOME, help="where bases and caches are kept")
    how.add_argument("--prepare", action="store_true", help="only make what is needed and kept")
    how.add_argument("--hardware", help="for file names")
    how.add_argument("--output", type=Path, help="the CSV file")
    how.add_argument(
        "--grow",
        nargs="*",
        choices=AXES,
        help="measure along these (default: all), and draw a plot beside the CSV file",
    )
    return parser


def asked_of(words: Sequence[str] | None) -> Asked:
    """Read the command line.

    Raises:
        SystemExit: it makes no sense.
    """
    reader = parser()
    given = reader.parse_args(words)
    device = given.device if given.device != "auto" else _device()
    photos = given.photos or given.batch * max(1, math.ceil(8 / given.batch))
    for name in ("steps", "rounds", "batch", "rank", "threads"):
        if getattr(given, name) < 1:
            reader.error(f"--{name} must be at least 1")
    if photos % given.batch:
        reader.error(f"--photos {photos} is not a multiple of --batch {given.batch}")
    task = Task(
        base="",
        photos="",
        output="",
        steps=0,
        resolution=given.resolution or RESOLUTIONS[given.base],
        batch=given.batch,
        rank=given.rank,
        targets=given.targets,
        text_encoder=given.text_encoder,
        precision=given.precision,
        attention=given.attention,
        checkpointing=given.checkpointing,
        threads=given.threads,
        device=device,
        min_snr_gamma=given.min_snr_gamma,
    )
    plan = Plan(
        base=given.base,
        task=task,
        variants=_variants(given.only, given.settings, given.variant),
        photos=photos,
        steps=given.steps,
        rounds=given.rounds,
        warmup=given.warmup,
        fresh=given.fresh,
        together=given.together,
        cold=given.cold,
        profile=given.profile,
        home=given.home,
    )
    output = given.output or results_file(given.hardware or hardware_name(device))
    grow = () if given.grow is None else tuple(given.grow) or AXES
    return Asked(plan, output, grow, given.prepare)


def _variants(
    only: Sequence[str], settings: Sequence[str], further: Sequence[str]
) -> tuple[Variant, ...]:
    """The sides in their order; ours come first."""
    sides = [Variant(side, side, ()) for side in SIDES if side in only]
    found = []
    for side in sides:
        if side.side != "ours":
            found.append(side)
            continue
        found.append(replace(side, settings=tuple(settings)))
        for text in further:
            words = tuple(text.split())
            found.append(Variant(f"ours {text}", "ours", (*settings, *words)))
    return tuple(found)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def results_file(hardware: str) -> Path:
    name = f"train-speed_{hardware}_{date.today().isoformat()}.csv"
    return ROOT / "benchmarks" / "results" / name


def hardware_name(device: str) -> str:
    """A short name of what this runs on, for file names."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name().removeprefix("NVIDIA ").replace(" ", "-").lower()
    plain = re.sub(r"\((r|tm|c)\)", "", processor_name().lower())
    words = re.findall(r"[a-z0-9]+", plain)
    return "-".join([*words, str(os.cpu_count()), "cores"])


def main(words: Sequence[str] | None = None) -> None:
    asked = asked_of(words)
    try:
        if asked.prepare:
            prepared(asked.plan)
            return
        if asked.grow:
            grow(asked.plan, asked.grow, asked.output)
            return
        rows = run_plan(asked.plan)
    except SpeedError as error:
        raise SystemExit(str(error)) from error
    append_rows(rows, asked.output)
    show(rows)
    print(f"Rows added to {asked.output}")


if __name__ == "__main__":
    main()
