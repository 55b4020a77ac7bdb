"""The rows of `benchmarks.quality` as a table: every configuration of a set, mean over its seeds.

`python -m benchmarks.quality_table benchmarks/results/quality_*.csv --output benchmarks/quality.md`
"""

import argparse
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

COLUMNS = {
    "likeness": "likeness",
    "leak": "leak",
    "drift": "drift",
    "following": "following",
    "looks": "own looks",
    "copying": "copies",
}
HEAD = """# What settings do

Means over the seeds of the last step of each run, as `python -m benchmarks.quality` measured them
(24 prompts and seeds that training never sees; in brackets the lowest and the highest seed).
Likeness and leak: with and without the trigger, 0 = other avatars, 1 = unseen true pictures. Drift:
how far prompts without the trigger moved. Following: share of the looks named in prompts that are
found. Own looks: share of the subject's looks that the reader finds; no choice saw it.
Made by `python -m benchmarks.quality_table`.
"""


def read_rows(paths: Iterable[Path]) -> list[dict[str, str]]:
    """The rows of several results, of the last step of each run."""
    rows = []
    for path in paths:
        with path.open(encoding="utf-8", newline="") as stream:
            rows += [row for row in csv.DictReader(stream) if row["checkpoint"] == "last"]
    return rows


def table(rows: Sequence[dict[str, str]], name: str) -> str:
    """The configurations of one set, those first that learn the subject's looks best."""
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if row["set"] == name:
            groups.setdefault(row["configuration"], []).append(row)
    face = any(row["looks"] != "nan" for group in groups.values() for row in group)
    by = "looks" if face else "likeness"
    columns = [column for column in COLUMNS if face or column != "looks"]
    lines = [
        f"## {name}",
        "",
        "| configuration | seeds | " + " | ".join(COLUMNS[column] for column in columns) + " |",
        "| --- |" + " --- |" * (len(columns) + 1),
    ]
    for configuration, group in sorted(groups.items(), key=lambda item: -_mean(item[1], by)):
        cells = [_cell(group, column) for column in columns]
        lines.append(f"| {configuration} | {len(group)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean(rows: Sequence[dict[str, str]], column: str) -> float:
    return fmean(float(row[column]) for row in rows)


def _cell(rows: Sequence[dict[str, str]], column: str) -> str:
    values = [float(row[column]) for row in rows]
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
