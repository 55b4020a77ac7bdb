"""Builds the embedded base: `python -m pretraining.build` runs every stage in order.

Each stage saves as it goes and picks up where it stopped; finished stages do nothing.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pretraining import data, export, text, unet, vae
from pretraining.recipe import Recipe

TARGET = Path("trainer/assets/base")


def stages(
    recipe: Recipe, work: Path, target: Path, processes: int
) -> dict[str, Callable[[], None]]:
    """All stages by name, in the order in which they build on one another."""

    def run_vae() -> None:
        vae.train_vae(recipe, work)
        vae.encode_pictures(recipe, work)

    return {
        "draw": lambda: data.draw(recipe, work, processes),
        "tokenizer": lambda: data.tokenize(recipe, work),
        "vae": run_vae,
        "text": lambda: text.train_text(recipe, work),
        "unet": lambda: unet.train_unet(recipe, work, processes),
        "polish": lambda: vae.polish_vae(recipe, work),
        "export": lambda: export.export(recipe, work, target),
    }


def main() -> None:
    """Run the stages named on the command line, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", help="draw tokenizer vae text unet polish export")
    parser.add_argument("--work", type=Path, default=Path("pretraining/work"))
    parser.add_argument("--output", type=Path, default=TARGET)
    parser.add_argument("--processes", type=int, default=1, help="single-threaded processes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    table = stages(Recipe(), arguments.work, arguments.output, arguments.processes)
    unknown = set(arguments.stages) - set(table)
    if unknown:
        parser.error(f"unknown stages {sorted(unknown)}; there are {', '.join(table)}")
    for name in arguments.stages or table:
        started = time.monotonic()
        print(f"{name} ...", flush=True)
        table[name]()
        print(f"{name} done in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
