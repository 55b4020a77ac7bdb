"""`likeness inspect FILE`: show what is in a LoRA file of any program."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from unicodedata import category

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.adapters.file import FileHashes, LoraFile, file_hashes, read_lora
from trainer.adapters.summary import LoraSummary, summarize

_SETTINGS_KEY = "likeness.settings"

Section = tuple[str, list[tuple[str, str]]]


def run(path: Path, *, as_json: bool = False) -> None:
    """Print what is in a LoRA file: layers, the base it fits, metadata, hashes.

    Args:
        path: of the file.
        as_json: print one JSON object with everything, for other programs.

    Raises:
        FileFormatError: there is no such file, or it is damaged or no LoRA.
    """
    file = read_lora(path)
    summary = summarize(file)
    hashes = file_hashes(path)
    if as_json:
        everything = {
            "file": str(path),
            "bytes": path.stat().st_size,
            "summary": dataclasses.asdict(summary),
            "hashes": dataclasses.asdict(hashes),
            "metadata": dict(file.metadata),
        }
        print(json.dumps(everything, indent=2))
        return
    sections = [
        ("File", _file_rows(path, summary)),
        ("Hashes", _hash_rows(hashes)),
        ("Metadata", _metadata_rows(file)),
    ]
    settings = file.metadata.get(_SETTINGS_KEY, "").strip()
    if settings:
        sections.append(("Settings", [("", line) for line in settings.splitlines()]))
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
        ("naming", summary.naming),
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
    rows = [
        (key, _picture(value) if value.startswith("data:image/") else value)
        for key, value in sorted(file.metadata.items())
        if key != _SETTINGS_KEY
    ]
    return rows or [("none", "")]


def _picture(value: str) -> str:
    kind, _, data = value.partition(",")
    return f"a picture ({kind.removeprefix('data:')}, {len(data) * 3 // 4:,} bytes)"


def _printable(text: str) -> str:
    """Control characters as escapes: a file's metadata must not steer the terminal."""
    return "".join(
        c if c.isprintable() or category(c) == "Zs" else c.encode("unicode_escape").decode()
        for c in text
    )


def _print_plain(sections: list[Section]) -> None:
    for title, rows in sections:
        print(title)
        for name, value in rows:
            print(
                f"  {_printable(name)}: {_printable(value)}" if name else f"  {_printable(value)}"
            )


def _print_rich(sections: list[Section]) -> None:
    console = Console()
    for title, rows in sections:
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        table.add_column(overflow="fold", style="cyan")
        table.add_column(overflow="fold", ratio=1)
        for name, value in rows:
            # Text, not str: square brackets in metadata are no colours.
            table.add_row(Text(_printable(name)), Text(_printable(value)))
        console.print(table)
