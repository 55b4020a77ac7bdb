"""Look for inputs that break a reader, guided by what they reach in its code (atheris, libFuzzer).

    pip install atheris        (Linux)
    python -m tests.fuzz.atheris_run --seconds 60

Each reader has a process of its own, with the good files of `seeds` to begin with. What breaks one
is printed, is left as `crash-*` in the current folder, and belongs into `cases`.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.fuzz import seeds
from tests.fuzz.bounds import SECONDS

MEGABYTES = 4000  # of a process, with PyTorch and what finds the way
LONGEST = 65_536

# Readers of bytes, with the files that the search begins from.
READERS: dict[str, Callable[[], Sequence[bytes]]] = {
    "settings file": seeds.settings,
    "captions": lambda: (b"ohwx, {red|blue} hat\nphoto of {trigger} {class}", b"\xff\xfea\0"),
    "prompts file": lambda: (b"# x\n{trigger} {class} --n bad --w 64 --h 64 --d 1 --l 7 --s 20\n",),
    "LoRA inspected": seeds.loras,
    "LoRA converted": seeds.loras,
    "base file": seeds.bases,
    "pickle": seeds.pickles,
    "picture": seeds.pictures,
}


def installed() -> bool:
    return importlib.util.find_spec("atheris") is not None


def search(name: str, seconds: int) -> int:
    """Look for so long for what breaks a reader; the exit code is 0 where nothing did."""
    with tempfile.TemporaryDirectory() as place:
        corpus = Path(place)
        for number, content in enumerate(READERS[name]()):
            (corpus / f"{number}").write_bytes(content)
        command = [sys.executable, "-m", "tests.fuzz.atheris_reader", name, place]
        limits = [f"-max_total_time={seconds}", f"-timeout={int(SECONDS)}", "-print_final_stats=1"]
        limits += [f"-rss_limit_mb={MEGABYTES}", f"-max_len={LONGEST}"]
        return subprocess.run([*command, *limits], check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60, help="for each reader")
    parser.add_argument("--only", choices=READERS, help="one reader instead of all")
    options = parser.parse_args()
    if not installed():
        print("atheris is not installed: pip install atheris (Linux)", file=sys.stderr)
        return 2
    broken = [n for n in READERS if options.only in (None, n) and search(n, options.seconds)]
    print(f"Broken: {', '.join(broken) or 'none'}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
