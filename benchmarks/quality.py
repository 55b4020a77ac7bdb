"""Trains sets with many settings and measures every result the same way.

`python -m benchmarks.quality` runs what `quality.toml` lists: every configuration on every set with
every seed, one row per run, into `benchmarks/results/quality_<hardware>_<date>.csv`. Rows that are
there already are not run again. What is measured uses prompts, seeds and drawings that training
and its own samples never see; the truth is known because the sets are drawn.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.quality_rows import Row, append, done, hardware
from benchmarks.sets import FaceSet, StyleSet, all_sets
from benchmarks.style_reader import (
    StyleReader,
    StyleRecipe,
    follow,
    judge,
    plain_contexts,
    style_reader,
)
from pretraining.captions import describe_context
from pretraining.looks import Context, Identity
from trainer.adapters.file import read_lora
from trainer.commands.bases import base_facts
from trainer.commands.sample import load_lora
from trainer.families import FAMILIES, Backbone, LoadOptions
from trainer.scoring import SCORERS, Scorer
from trainer.scoring.copying import CopyFinder
from trainer.scoring.drift import drift
from trainer.scoring.reader import PromptReader
from trainer.training.device import choose_device
from trainer.training.preview import PreviewPrompt, decode, draw
from trainer.types import Size

ROOT = Path(__file__).resolve().parent.parent
TRIGGER = "zqx"
PROMPTS = 24
_SAMPLE_SEED = 900_000
_OTHER_SEED = 500_000


@dataclass(frozen=True, slots=True)
class Configuration:
    """A name and the settings that differ from the preset."""

    name: str
    settings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is to be run."""

    configurations: tuple[Configuration, ...]
    seeds: tuple[int, ...]
    sets: tuple[str, ...]


def read_plan(path: Path) -> Plan:
    """Read `quality.toml`."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    configurations = tuple(
        Configuration(name, tuple(f"{key}={_text(value)}" for key, value in settings.items()))
        for name, settings in table["configurations"].items()
    )
    return Plan(configurations, tuple(table["seeds"]), tuple(table["sets"]))


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def contexts() -> list[Context]:
    """What the evaluation prompts ask for: plain backgrounds and places, in no set's photos."""
    return plain_contexts(random.Random("quality prompts"), PROMPTS)


def prompts(*, triggered: bool, shown: str = "avatar") -> list[PreviewPrompt]:
    """The evaluation prompts, each with a seed of its own."""
    name = f"{TRIGGER} {shown}" if triggered else shown
    return [
        PreviewPrompt(
            text=f"{name}, {describe_context(context)}",
            negative="",
            size=Size(64, 64),
            seed=_SAMPLE_SEED + number,
            guidance=4.0,
            steps=25,
            triggered=triggered,
        )
        for number, context in enumerate(contexts())
    ]


def load_backbone() -> Backbone:
    """A fresh embedded base."""
    facts = base_facts("embedded")
    device = choose_device("auto", "auto", "sdpa")
    backbone: Backbone = FAMILIES.load(facts.family).load(
        facts, LoadOptions(device.device, device.dtype, device.attention)
    )
    return backbone


@dataclass(frozen=True, slots=True)
class BasePictures:
    """What the base draws for the evaluation prompts before any training."""

    plain: tuple[Image.Image, ...]
    reseeded: tuple[Image.Image, ...]
    triggered: tuple[Image.Image, ...]


@cache
def base_pictures() -> BasePictures:
    """Drawn once: all runs start from the same base."""
    backbone = load_backbone()
    plain = prompts(triggered=False)
    reseeded = [replace(prompt, seed=prompt.seed + _OTHER_SEED) for prompt in plain]
    return BasePictures(
        tuple(draw(backbone, plain)),
        tuple(draw(backbone, reseeded)),
        tuple(draw(backbone, prompts(triggered=True))),
    )


@torch.no_grad()
def softened(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures sent through the base's VAE, so that its softness is no difference."""
    backbone = load_backbone()
    made = []
    for image in images:
        values = torch.from_numpy(np.asarray(image.convert("RGB").resize((64, 64)), np.float32))
        pixels_BCHW = values.permute(2, 0, 1)[None] / 127.5 - 1
        shape = backbone.latent_shape(64, 64)
        latents = backbone.encode_pixels(pixels_BCHW, torch.zeros(1, *shape))
        made += decode(backbone, latents)
    return made


@dataclass(frozen=True, slots=True)
class Ruler:
    """The scale of one set's subject, and what finds copies of its photos."""

    scorer: Scorer
    copies: CopyFinder


@cache
def ruler(name: str) -> Ruler:
    """The scale: 0 = other avatars, 1 = true pictures of the subject in unseen contexts."""
    chosen = all_sets()[name]
    others = softened(chosen.others(60))
    scorer = SCORERS.load(chosen.score).fit(softened(chosen.unseen(24)), others)
    return Ruler(scorer, CopyFinder.fit(softened(chosen.photos()), others))


@cache
def reader() -> PromptReader:
    """The one that comes with the trainer."""
    return PromptReader.load()


def following(images: Sequence[Image.Image]) -> float:
    """Share of the looks named in the evaluation prompts that the reader finds."""
    shares = reader().follow(images, [prompt.text for prompt in prompts(triggered=False)])
    return float(np.mean([share for share in shares if share is not None]))


def style_set(name: str) -> StyleSet:
    """A style set by name."""
    chosen = all_sets()[name]
    assert isinstance(chosen, StyleSet)
    return chosen


@cache
def reader_of(style: str) -> StyleReader:
    """The reader of a style set."""
    return style_reader(style, style_set(style).paint)


def style_scores(chosen: StyleSet, triggered: Sequence[Image.Image]) -> dict[str, float]:
    """How well samples in a style follow their prompts, beside the base and true drawings."""
    own = reader_of(chosen.name)
    asked = [prompt.text for prompt in prompts(triggered=False)]
    return {
        "style_following": follow(own.reader, triggered, asked, own.looks),
        "style_base": follow(reader(), base_pictures().plain, asked, own.looks),
        "style_true": own.share,
    }


def said_of(style: str) -> str:
    """Which looks count in a style, as one line."""
    theirs = judge(reader(), style_set(style).paint, StyleRecipe().fresh)
    own = reader_of(style)
    parts = [
        f"{look} {theirs.by_look[look]:.2f} -> {share:.2f}{'' if look in own.looks else ' (out)'}"
        for look, share in sorted(own.by_look.items())
    ]
    return f"{style}: {', '.join(parts)}; those that count: {own.share:.2f}"


def looks_found(images: Sequence[Image.Image], identity: Identity) -> float:
    """Share of the subject's looks that the reader finds."""
    right: list[bool] = []
    for seen in reader().read(images):
        right += reader().compare(seen, asdict(identity)).values()
    return float(np.mean(right))


def measure(chosen: FaceSet | StyleSet, file: Path) -> dict[str, float]:
    """All scores of one LoRA file."""
    base, scale = base_pictures(), ruler(chosen.name)
    backbone = load_backbone()
    load_lora(backbone, read_lora(file))
    triggered = draw(backbone, prompts(triggered=True))
    plain = draw(backbone, prompts(triggered=False))
    own: dict[str, float] = {"looks": float("nan")}
    if isinstance(chosen, FaceSet):
        own["looks"] = looks_found(triggered, chosen.identity)
    else:
        own |= style_scores(chosen, triggered)
    return own | {
        "likeness": float(np.mean(scale.scorer.score(triggered))),
        "leak": float(np.mean(scale.scorer.score(plain))),
        "base_likeness": float(np.mean(scale.scorer.score(base.triggered))),
        "following": following(triggered),
        "base_following": following(base.triggered),
        "drift": drift(base.plain, plain, base.reseeded),
        "copying": float(np.mean(scale.copies.copies(triggered))),
    }


def run(chosen: FaceSet | StyleSet, configuration: Configuration, seed: int) -> list[Row]:
    """Train as the command line does, in a process of its own, and measure both files."""
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / chosen.name
        chosen.write(photos)
        output = Path(folder) / "run"
        command = [sys.executable, "train.py", str(photos), "--output", str(output)]
        command += ["--kind", chosen.kind, "--trigger", TRIGGER]
        for setting in (f"run.seed={seed}", *configuration.settings):
            command += ["--set", setting]
        started = time.monotonic()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds = round(time.monotonic() - started, 1)
        names = {"last": chosen.name, "best": f"{chosen.name}-best"}
        files = {kind: output / f"{name}.safetensors" for kind, name in names.items()}
        steps = {kind: int(read_lora(file).metadata["ss_steps"]) for kind, file in files.items()}
        scores = {"last": measure(chosen, files["last"])}
        same = steps["best"] == steps["last"]
        scores["best"] = scores["last"] if same else measure(chosen, files["best"])
    common = {"set": chosen.name, "configuration": configuration.name, "seed": seed}
    rows = []
    for kind, found in scores.items():
        rounded: dict[str, Any] = {name: round(value, 4) for name, value in found.items()}
        rounded |= common | {"checkpoint": kind, "step": steps[kind], "seconds": seconds}
        rows.append(Row(**rounded))
    return rows


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=Path, default=ROOT / "benchmarks" / "quality.toml")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--only", nargs="*", help="configurations by name")
    parser.add_argument("--sets", nargs="*", help="sets by name, instead of the plan's")
    parser.add_argument("--seeds", nargs="*", type=int, help="instead of the plan's")
    parser.add_argument(
        "--readable", action="store_true", help="only say what can be read in styles"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.readable:
        for name, chosen in all_sets().items():
            if isinstance(chosen, StyleSet):
                print(said_of(name))
        return
    today = date.today().isoformat()
    results = arguments.results or ROOT / "benchmarks/results" / f"quality_{hardware()}_{today}.csv"
    plan = read_plan(arguments.plan)
    for configuration in plan.configurations:
        if arguments.only and configuration.name not in arguments.only:
            continue
        for name in arguments.sets or plan.sets:
            for seed in arguments.seeds or plan.seeds:
                if (name, configuration.name, seed) in done(results):
                    continue
                for row in run(all_sets()[name], configuration, seed):
                    append(results, row)
                    print(row, flush=True)


if __name__ == "__main__":
    main()
