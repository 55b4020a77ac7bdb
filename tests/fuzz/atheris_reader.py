"""The process in which atheris gives one reader inputs; `atheris_run` starts it.

python -m tests.fuzz.atheris_reader NAME CORPUS [libFuzzer's options]
"""

from __future__ import annotations

import importlib
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any


def main() -> None:
    name, *options = sys.argv[1:]
    atheris: Any = importlib.import_module("atheris")
    # Only what is imported in here counts for where an input leads.
    with atheris.instrument_imports(include=["trainer"]):
        targets = importlib.import_module("tests.fuzz.targets")
    logging.disable()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:

        def give(content: bytes) -> None:
            targets.try_one(targets.TARGETS[name], content, Path(place))

        atheris.Setup([sys.argv[0], *options], give)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
