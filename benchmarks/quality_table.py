"""The rows of `benchmarks.quality` as a table: every configuration of a set, mean over its seeds.

`python -m benchmarks.quality_table benchmarks/results/quality_*.csv --output benchmarks/quality.md`
"""

import argparse
import csv
from collections.abc import Iterable, Sequence
from math import isnan
from pathlib import Path
from statistics import fmean

_COMMON = {"likeness": "likeness", "leak": "leak", "drift": "drift"}
FACE_COLUMNS = _COMMON | {
    "following": "following",
    "looks": "own looks",
    "copying": "copies",
}
STYLE_COLUMNS = _COMMON | {
    "style_following": "following",
    "style_base": "the base's",
    "style_true": "true drawings'",
    "following": "all looks",
    "copying": "copies",
}
HEAD = """# What settings do

Means over the seeds of the last step of each run, as `python -m benchmarks.quality` measured them
(24 prompts and seeds that training never sees; in brackets the lowest and the highest seed).
Likeness and leak: with and without the trigger, 0 = other avatars, 1 = unseen true pictures. Drift:
how far prompts without the trigger moved. Following: share of the looks named in prompts that are
found. Own looks: share of the subject's looks that the reader finds; no choice saw it.
In a style, following asks only for looks that a reader of this style reads right in at least nine
of ten true drawings of it (`benchmarks/style_reader.py`); beside it stands what the base shows of
the same looks without trigger and style, and what is found in true drawings. Rows without these
three were not read by such a reader. All looks: what the trainer's reader finds of every look
named; it misreads styles that it does not know, so this only compares rows of one set.
Made by `python -m benchmarks.quality_table`.
"""


def read_rows(paths: Iterable[Path]) -> list[dict[str, str]]:
    """The rows of several results, of the last step of each run; of a run that was made again the
    newer one, by the files' names."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for path in sorted(paths):
        with path.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                if row["checkpoint"] == "last":
                    rows[row["set"], row["configuration"], row["seed"]] = row
    return list(rows.values())


def table(rows: Sequence[dict[str, str]], name: str) -> str:
    """The configurations of one set, those first that learn the subject's looks best."""
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if row["set"] == name:
            groups.setdefault(row["configuration"], []).append(row)
    face = any(row["looks"] != "nan" for group in groups.values() for row in group)
    by, columns = ("looks", FACE_COLUMNS) if face else ("likeness", STYLE_COLUMNS)
    lines = [
        f"## {name}",
        "",
        "| configuration | seeds | " + " | ".join(columns.values()) + " |",
        "| --- |" + " --- |" * (len(columns) + 1),
    ]
    for configuration, group in sorted(groups.items(), key=lambda item: -_mean(item[1], by)):
        cells = [_cell(group, column) for column in columns]
        lines.append(f"| {configuration} | {len(group)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean(rows: Sequence[dict[str, str]], column: str) -> float:
    return fmean(float(row[column]) for row in rows)


def _cell(rows: Sequence[dict[str, str]], column: str) -> str:
    values = [value for row in rows if not isnan(value := float(row[column]))]
    if not values:
        return ""
    text = f"{fmean(values):.2f}"
    if len(values) > 1 and column != "copying":
        text += f" ({min(values):.2f} to {max(values):.2f})"
    return text.replace("-0.00", "0.00")


def main() -> None:
    """Write the table of every set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows = read_rows(arguments.results)
    names = dict.fromkeys(row["set"] for row in rows)
    text = "\n".join([HEAD, *(table(rows, name) for name in names)])
    arguments.output.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
