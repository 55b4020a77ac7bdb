"""What the doctor found, in words: a table for a terminal, plain lines for a pipe, a brief form.

Names, captions and messages come from the user's files, so each goes through `plain`: nothing in
them can steer the terminal or break a line in two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from trainer.data.decode import shown
from trainer.doctor.findings import LEVELS, BucketRow, Diagnosis, Finding, Level, PhotoVerdict

LEVEL_STYLES: dict[Level, str] = {
    "ok": "green",
    "note": "cyan",
    "warning": "yellow",
    "bad": "bold red",
}
LEVEL_WORDS: dict[Level, str] = {
    "ok": "fine",
    "note": "with a note",
    "warning": "with a warning",
    "bad": "that cannot be used",
}
WIDTHS = (80, 200)  # columns between which the table is laid out
LISTED = 200  # from so many photos on, those that are fine are counted in the table, not listed
BRIEF_PHOTOS = 5
BRIEF_WHOLE = 4


def plain(text: Path | str) -> str:
    """A name or message from the user's files on one line, unable to steer a terminal."""
    return shown(text)


def name_of(diagnosis: Diagnosis, verdict: PhotoVerdict) -> str:
    """The photo's path within the folder, unabridged; of another set's photo its whole path."""
    path = verdict.path
    if path.is_relative_to(diagnosis.folder):
        path = path.relative_to(diagnosis.folder)
    return plain(path.as_posix())


def sentence(finding: Finding) -> str:
    """What was found and what to do: "is blurred. Take a sharper one." """
    what = plain(finding.what)
    if not what.endswith((".", "!", "?")):
        what += "."
    return f"{what} {plain(finding.fix)}".rstrip()


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: -LEVELS.index(finding.level))


def size_of(verdict: PhotoVerdict) -> str:
    return str(verdict.photo.size) if verdict.photo else "-"


def counts(diagnosis: Diagnosis) -> str:
    """ "24 photos: 20 fine, 3 with a warning, 1 that cannot be used." """
    total = len(diagnosis.photos)
    found = [(diagnosis.count(level), LEVEL_WORDS[level]) for level in LEVELS]
    parts = ", ".join(f"{number:,} {words}" for number, words in found if number)
    return f"{_plural(total, 'photo')}: {parts}." if total else "No photos."


def lines(diagnosis: Diagnosis) -> list[str]:
    """One line for each photo, then everything else that is to be said; nothing is shortened."""
    return [*(_photo_line(diagnosis, verdict) for verdict in diagnosis.photos), *tail(diagnosis)]


def tail(diagnosis: Diagnosis) -> list[str]:
    """The lines after the photos: the set's findings, the buckets, the steps, the face finder."""
    return [
        *(f"{f.level:<7}  all photos  {sentence(f)}" for f in worst_first(diagnosis.whole)),
        *(_bucket_line(row) for row in diagnosis.buckets),
        *closing(diagnosis),
    ]


def closing(diagnosis: Diagnosis) -> list[str]:
    """The sentences that stand below everything: the steps, and what looked for faces."""
    return [plain(text) for text in (*diagnosis.steps, diagnosis.faces_by) if text]


def brief(diagnosis: Diagnosis) -> tuple[str, ...]:
    """The lines for the start of a training: the counts, the worst photos, the set, the steps.

    Every photo that is left out has a line, so that none goes in silence; of those with a warning
    the first few. Each line is plain text on its own, without a margin.
    """
    left_out = [verdict for verdict in diagnosis.photos if verdict.level == "bad"]
    doubtful = [verdict for verdict in diagnosis.photos if verdict.level == "warning"]
    shown_ones = [*left_out, *doubtful[: max(0, BRIEF_PHOTOS - len(left_out))]]
    said = [
        f"{name_of(diagnosis, verdict)} {_join(_serious(verdict.findings))}"
        for verdict in shown_ones
    ]
    more = len(left_out) + len(doubtful) - len(said)
    whole = [sentence(finding) for finding in _serious(diagnosis.whole)]
    more_whole = len(whole) - BRIEF_WHOLE
    command = f'likeness prepare "{plain(diagnosis.folder)}"'
    return (
        counts(diagnosis),
        *said,
        *([f"and {more:,} more: {command}"] if more > 0 else []),
        *whole[:BRIEF_WHOLE],
        *([f"and {more_whole} more about all photos: {command}"] if more_whole > 0 else []),
        *([" ".join(plain(text) for text in diagnosis.steps)] if diagnosis.steps else []),
    )


def table(diagnosis: Diagnosis, width: int) -> Table:
    """The photos as a table for a terminal of `width` columns (80 to 200 are made use of).

    In a large folder the photos that are fine are counted in the last row instead of listed.
    """
    grid = _grid(min(max(width, WIDTHS[0]), WIDTHS[1]))
    grid.add_column("Verdict", no_wrap=True)
    grid.add_column("Photo", ratio=2, overflow="fold")
    grid.add_column("Size", justify="right", no_wrap=True)
    grid.add_column("What was found, and what to do", ratio=5, overflow="fold")
    verdicts, fine = diagnosis.photos, 0
    if len(verdicts) > LISTED:
        verdicts = tuple(verdict for verdict in verdicts if verdict.level != "ok")
        fine = len(diagnosis.photos) - len(verdicts)
    for verdict in verdicts:
        grid.add_row(
            _level(verdict.level),
            Text(name_of(diagnosis, verdict)),
            Text(size_of(verdict)),
            _found(verdict.findings),
        )
    if fine:
        grid.add_row(_level("ok"), Text(f"{fine:,} more"), Text(""), Text(""))
    return grid


def whole_table(diagnosis: Diagnosis, width: int) -> Table | None:
    """The set's findings as a table; None where there are none."""
    if not diagnosis.whole:
        return None
    grid = _grid(min(max(width, WIDTHS[0]), WIDTHS[1]))
    grid.add_column("Verdict", no_wrap=True)
    grid.add_column("All photos together", ratio=1, overflow="fold")
    for finding in worst_first(diagnosis.whole):
        grid.add_row(_level(finding.level), _found([finding]))
    return grid


def bucket_table(diagnosis: Diagnosis) -> Table | None:
    """The training sizes as a table; None where there are none."""
    if not diagnosis.buckets:
        return None
    grid = Table(box=box.SIMPLE_HEAD)
    grid.add_column("Trained at")
    for title in ("Photos", "Batches", "Empty places", "Enlarged", "Cropped"):
        grid.add_column(title, justify="right")
    for row in diagnosis.buckets:
        numbers = (row.photos, row.batches, row.short, row.enlarged)
        grid.add_row(f"{row.size} px", *(f"{number:,}" for number in numbers), f"{row.cropped:.0%}")
    return grid


def _photo_line(diagnosis: Diagnosis, verdict: PhotoVerdict) -> str:
    start = f"{verdict.level:<7}  {name_of(diagnosis, verdict)}  {size_of(verdict)}"
    return f"{start}  {_join(worst_first(verdict.findings))}".rstrip()


def _bucket_line(row: BucketRow) -> str:
    return (
        f"size     {row.size}  {_plural(row.photos, 'photo')}, "
        f"{_plural(row.batches, 'batch', 'batches')}, "
        f"{_plural(row.short, 'empty place')}, {row.enlarged:,} enlarged, "
        f"{row.cropped:.0%} cropped"
    )


def _join(findings: Sequence[Finding]) -> str:
    return " | ".join(sentence(finding) for finding in findings)


def _serious(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in worst_first(findings) if finding.level in ("bad", "warning")]


def _plural(number: int, word: str, many: str = "") -> str:
    return f"{number:,} {word if number == 1 else many or word + 's'}"


def _grid(width: int) -> Table:
    return Table(box=box.SIMPLE_HEAD, width=width, show_edge=False)


def _level(level: Level) -> Text:
    return Text(level, style=LEVEL_STYLES[level])


def _found(findings: Iterable[Finding]) -> Text:
    """Each finding on a line of its own, what to do in a softer tone."""
    text = Text()
    for number, finding in enumerate(worst_first(findings)):
        what = sentence(finding)
        fix = plain(finding.fix)
        text.append("\n" if number else "")
        text.append(what.removesuffix(fix))
        text.append(fix, style="dim")
    return text
