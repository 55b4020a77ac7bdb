"""`likeness inspect FILE`: show what is in a LoRA file of any program."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from trainer.adapters.file import FileHashes, LoraFile, file_hashes
from trainer.adapters.flaws import flaws
from trainer.adapters.loaders import LoaderVerdict, verdicts
from trainer.adapters.outline import check_values, read_outline
from trainer.adapters.outside import read_foreign
from trainer.adapters.summary import LoraSummary, summarize
from trainer.commands.terminal import Terminal
from trainer.untrusted import on_one_line

_SETTINGS_KEY = "likeness.settings"
# What is shown of a stranger's metadata: names, and characters of a name and of a value.
_SHOWN_ENTRIES = 200
_SHOWN_NAME = 100
_SHOWN_VALUE = 4000
_SHOWN_SETTINGS_LINES = 500
_JSON_VALUE = 2**20

Section = tuple[str, list[tuple[str, str]]]


def run(path: Path, *, as_json: bool = False) -> None:
    """Print what is in a LoRA file: layers, the base it fits, who loads it, metadata, hashes.

    Args:
        path: of the file.
        as_json: print one JSON object with everything, for other programs.

    Raises:
        FileFormatError: there is no such file, or it is damaged or no LoRA.
    """
    outline = read_outline(path)
    file = outline.file
    names = read_foreign(file)
    summary = summarize(file, names)
    hashes = file_hashes(path)
    loaders = verdicts(file, names)
    warnings = flaws(outline, names, check_values(outline), hashes)
    if as_json:
        everything = {
            "file": str(path),
            "bytes": path.stat().st_size,
            "summary": dataclasses.asdict(summary),
            "unknown": list(names.unknown),
            "loaders": [_loader_table(verdict) for verdict in loaders],
            "warnings": list(warnings),
            "hashes": dataclasses.asdict(hashes),
            "metadata": {key: _cut(value, _JSON_VALUE) for key, value in file.metadata.items()},
        }
        print(json.dumps(everything, indent=2))
        return
    sections = [
        ("File", _file_rows(path, summary)),
        ("Programs", [(verdict.loader, _in_words(verdict)) for verdict in loaders]),
        ("Warnings", [("", text) for text in warnings or ("none",)]),
        ("Hashes", _hash_rows(hashes)),
        ("Metadata", _metadata_rows(file)),
    ]
    settings = file.metadata.get(_SETTINGS_KEY, "").strip()
    if settings:
        lines = settings.splitlines()[:_SHOWN_SETTINGS_LINES]
        sections.append(("Settings", [("", _cut(line, _SHOWN_VALUE)) for line in lines]))
    if sys.stdout.isatty():
        _print_rich(sections)
    else:
        _print_plain(sections)


def _file_rows(path: Path, summary: LoraSummary) -> list[tuple[str, str]]:
    rows = [
        ("path", str(path)),
        ("size", f"{path.stat().st_size:,} bytes"),
        ("family", summary.family),
        ("fits", summary.fits),
        ("naming", _naming(summary)),
        ("kind", _counts(summary.kinds)),
        ("layers", str(summary.modules)),
        ("parameters", f"{summary.parameters:,}"),
        ("rank", _counts(summary.ranks)),
        ("alpha", _counts(summary.alphas)),
        ("number type", _counts(summary.dtypes)),
    ]
    rows += [(f"layers in {target}", str(count)) for target, count in summary.targets.items()]
    rows += [
        (f"of all SD 1 layers, {group}", f"{there} of {wanted}")
        for group, (there, wanted) in summary.coverage.items()
    ]
    if summary.other_parts:
        rows.append(("not plain LoRA", _counts(summary.other_parts)))
    return rows


def _naming(summary: LoraSummary) -> str:
    """ "kohya", with the styles where they say more: "kohya (kohya-ldm: 722, kohya: 264)"."""
    if list(summary.styles) in ([], [summary.naming]):
        return summary.naming
    styles = ", ".join(f"{style}: {count}" for style, count in summary.styles.items())
    return f"{summary.naming} ({styles})"


def _in_words(verdict: LoaderVerdict) -> str:
    """One line: "takes all 792 tensors", with the reason where there is one."""
    count = len(verdict.taken) + len(verdict.dropped)
    words = {
        "all": f"takes all {count} tensors",
        "partly": f"takes {len(verdict.taken)} of {count} tensors",
        "refused": "does not take the file",
    }[verdict.outcome]
    return f"{words}: {verdict.reason}" if verdict.reason else words


def _loader_table(verdict: LoaderVerdict) -> dict[str, object]:
    return {
        "loader": verdict.loader,
        "outcome": verdict.outcome,
        "taken": len(verdict.taken),
        "dropped": list(verdict.dropped),
        "reason": verdict.reason,
    }


def _counts(counts: Mapping[str, int]) -> str:
    """ "8" where all are alike, else "8 (48 of them), 4 (2 of them)"."""
    if len(counts) <= 1:
        return next(iter(counts), "none")
    return ", ".join(f"{value} ({count} of them)" for value, count in counts.items())


def _hash_rows(hashes: FileHashes) -> list[tuple[str, str]]:
    return [
        ("SHA-256 of the file", hashes.sha256),
        ("AutoV1", hashes.autov1 or "none (the file is below 2 MiB)"),
        ("AutoV2", hashes.autov2),
        ("AutoV3 (12 digits)", hashes.autov3[:12]),
        ("SHA-256 of the tensors", hashes.autov3),
    ]


def _metadata_rows(file: LoraFile) -> list[tuple[str, str]]:
    """All metadata but the settings, which have a section of their own."""
    keys = sorted(key for key in file.metadata if key != _SETTINGS_KEY)
    rows = [(_cut(key, _SHOWN_NAME), _shown(file.metadata[key])) for key in keys[:_SHOWN_ENTRIES]]
    if len(keys) > _SHOWN_ENTRIES:
        rows.append((f"and {len(keys) - _SHOWN_ENTRIES} more", "--json shows all"))
    return rows or [("none", "")]


def _shown(value: str) -> str:
    return _picture(value) if value.startswith("data:image/") else _cut(value, _SHOWN_VALUE)


def _cut(text: str, length: int) -> str:
    more = len(text) - length
    return text if more <= 0 else f"{text[:length]}... ({more:,} more characters)"


def _picture(value: str) -> str:
    kind, _, data = value.partition(",")
    kind = _cut(kind.removeprefix("data:"), _SHOWN_NAME)
    return f"a picture ({kind}, {len(data) * 3 // 4:,} bytes)"


def _print_plain(sections: list[Section]) -> None:
    for title, rows in sections:
        print(title)
        for name, value in rows:
            line = f"  {name}: {value}" if name else f"  {value}"
            print(on_one_line(line))


def _print_rich(sections: list[Section]) -> None:
    console = Terminal()
    for title, rows in sections:
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        table.add_column(overflow="fold", style="cyan")
        table.add_column(overflow="fold", ratio=1)
        for name, value in rows:
            table.add_row(on_one_line(name), on_one_line(value))
        console.print(table)
