"""Give every reader its share of very many inputs, within limits of time and memory.

    python -m tests.fuzz.run                          100,000 inputs, the same ones each time
    python -m tests.fuzz.run --seed 7 --only picture  others, of one reader

Prints a row for each reader; an input that breaks one is printed and ends the run with code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.bounds import limit_memory, peak_bytes, time_bound
from tests.fuzz.targets import TARGETS, Target, try_one

# Inputs drawn at a time: hypothesis takes longer for an example than most readers do.
BATCH = 20


@dataclass(slots=True)
class Tally:
    """inputs: how many there were. taken: how many the reader took. slowest: processor seconds of
    the slowest one. seconds: processor time of all, with the making of the inputs."""

    inputs: int = 0
    taken: int = 0
    slowest: float = 0.0
    seconds: float = 0.0


def fuzz(target: Target, count: int, folder: Path, seed: int) -> Tally:
    """Give a reader so many inputs; the error of the first that breaks it comes through."""
    tally = Tally()
    started = time.process_time()

    @hypothesis.seed(seed)
    @settings(
        max_examples=-(-count // BATCH),
        database=None,
        deadline=None,
        derandomize=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(target.draw, min_size=BATCH, max_size=BATCH))
    def give(contents: list[object]) -> None:
        for content in contents:
            began = time.process_time()
            with time_bound():
                tally.taken += try_one(target, content, folder)
            tally.inputs += 1
            tally.slowest = max(tally.slowest, time.process_time() - began)

    give()
    tally.seconds = time.process_time() - started
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=101_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS, help="one reader instead of all")
    options = parser.parse_args()
    logging.disable()  # Pillow's and PyTorch's words on damaged files
    warnings.simplefilter("ignore")
    chosen = {options.only: TARGETS[options.only]} if options.only else TARGETS
    whole = sum(target.share for target in chosen.values())
    total = 0
    with tempfile.TemporaryDirectory() as place:
        for target in chosen.values():  # libraries and good files first, outside of the limit
            with contextlib.redirect_stderr(io.StringIO()):
                fuzz(target, 30, Path(place), options.seed)
        before = peak_bytes()
        limit_memory()
        print(f"{'reader':16}{'inputs':>9}{'taken':>9}{'slowest':>10}{'in all':>9}")
        for name, target in chosen.items():
            count = -(-options.inputs * target.share // whole)
            tally = fuzz(target, count, Path(place), options.seed)
            total += tally.inputs
            row = f"{name:16}{tally.inputs:9,}{tally.taken:9,}{tally.slowest * 1000:7.0f} ms"
            print(f"{row}{tally.seconds:7.1f} s", flush=True)
    print(
        f"{total:,} inputs, peak memory {(peak_bytes() - before) / 1e6:.0f} MB above the readers'"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
