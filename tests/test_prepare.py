"""What the doctor says in words and as JSON, and the command that shows it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from tests.diagnoses import ANIMATION, BLURRED, EMPTY, SAME, anna, diagnosis, verdict
from tests.runs import Outcome
from trainer.commands import prepare
from trainer.doctor import words
from trainer.doctor.as_json import as_json
from trainer.doctor.findings import Diagnosis, Finding, PhotoVerdict
from trainer.errors import OutputError, UsageError
from trainer.report.doctor_page import is_doctor_page
from trainer.types import Size

Cli = Callable[..., Outcome]
Doctor = Callable[[Diagnosis], None]


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """Lets the doctor find what a test wants: `doctor(diagnosis)`."""

    def found(made: Diagnosis) -> None:
        def check(request: prepare.Request, console: Console) -> Diagnosis:
            console.print("looking at the photos")
            return made

        module = SimpleNamespace(check=check)
        monkeypatch.setitem(sys.modules, "trainer.commands.checkup", module)

    return found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def screen(found: Diagnosis, width: int) -> str:
    console = Console(width=width, color_system=None, force_terminal=True)
    with console.capture() as captured:
        console.print(words.table(found, width))
    return captured.get()


def test_plain_lines_name_everything_unabridged(tmp_path: Path) -> None:
    lines = words.lines(anna(tmp_path))
    assert lines[:4] == [
        "ok       anna 01.jpg  120x80",
        "note     anna 02.gif  120x80  is an animation; its first picture is used.",
        "warning  anna 03.jpg  120x80  is blurred. Take a sharper one. | "
        "has the same picture as anna 02.jpg. Keep one of them.",
        "bad      anna 10.png  -  is empty (0 bytes). Copy it again, or remove it.",
    ]
    assert lines[4:] == [
        "warning  all photos  There are only 4 photos. Ten or more give a better likeness.",
        "size     64x64  4 photos, 2 batches, 1 empty place, 3 enlarged, 12% cropped",
        "4 photos x 25 epochs = 100 steps of 1 photo.",
        "Faces were looked for with the basic detector, which misses many.",
    ]


def test_a_long_name_stays_whole_and_a_sub_folder_is_named(tmp_path: Path) -> None:
    name = "IMG " * 60 + ".jpg"
    found = diagnosis(tmp_path, verdict(tmp_path / "below" / name), verdict(Path("/else/b.png")))
    first, second = words.lines(found)[:2]
    assert first == f"ok       below/{name}  120x80"
    assert second == f"ok       {Path('/else/b.png').as_posix()}  120x80"


def test_nothing_of_the_users_files_steers_the_terminal(tmp_path: Path) -> None:
    evil = "a\x1b]0;mine\x07\nb\u202e[red].png"
    photo = verdict(tmp_path / evil, [Finding("x", "bad", f"is like {evil}", f"See {evil}.")])
    found = replace(
        diagnosis(tmp_path / evil, photo), whole=photo.findings, steps=(evil,), faces_by=evil
    )
    outputs = [*words.lines(found), *words.brief(found), words.counts(found)]
    for output in [*outputs, *screen(found, 200).splitlines()]:
        assert not re.search("[\x00-\x1f\u202e]", output), ascii(output)
    assert "[red]" in screen(found, 200)


@pytest.mark.parametrize("width", [80, 100, 140, 200])
def test_the_table_fits_the_terminal_and_keeps_every_word(tmp_path: Path, width: int) -> None:
    name = "Photo of Anna at the beach exported from the phone (edited) copy 3.jpg"
    found = diagnosis(tmp_path, verdict(tmp_path / name, [BLURRED, SAME], size=Size(12000, 9000)))
    shown = screen(found, width)
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= width
    letters = re.sub(r"\s", "", shown)
    assert "warning" in letters
    assert "12000x9000" in letters
    for word in [*name.split(), "blurred.", "sharper", "picture"]:
        assert word in letters, word


def test_in_a_large_folder_the_table_counts_what_is_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "LISTED", 3)
    shown = screen(anna(tmp_path), 100)
    assert "anna 01.jpg" not in shown
    assert "anna 03.jpg" in shown
    assert "1 more" in shown
    monkeypatch.setattr(words, "LISTED", 4)
    assert "anna 01.jpg" in screen(anna(tmp_path), 100)


def test_counts_leave_out_what_there_is_none_of(tmp_path: Path) -> None:
    assert words.counts(anna(tmp_path)) == (
        "4 photos: 1 fine, 1 with a note, 1 with a warning, 1 that cannot be used."
    )
    assert words.counts(diagnosis(tmp_path, verdict(tmp_path / "a.png"))) == "1 photo: 1 fine."
    assert words.counts(diagnosis(tmp_path)) == "No photos."


def test_the_brief_form_names_the_worst_and_says_where_the_rest_is(tmp_path: Path) -> None:
    assert words.brief(anna(tmp_path)) == (
        "4 photos: 1 fine, 1 with a note, 1 with a warning, 1 that cannot be used.",
        "anna 10.png is empty (0 bytes). Copy it again, or remove it.",
        "anna 03.jpg is blurred. Take a sharper one. | "
        "has the same picture as anna 02.jpg. Keep one of them.",
        "There are only 4 photos. Ten or more give a better likeness.",
        "4 photos x 25 epochs = 100 steps of 1 photo.",
    )


def test_the_brief_form_stays_brief(tmp_path: Path) -> None:
    photos = [verdict(tmp_path / f"{n}.png", [BLURRED, ANIMATION]) for n in range(90)]
    found = replace(diagnosis(tmp_path, *photos), whole=(BLURRED,) * 9)
    lines = words.brief(found)
    assert len(lines) == 13
    assert lines[1] == "0.png is blurred. Take a sharper one."
    assert lines[6] == f'and 85 more: likeness prepare "{tmp_path}"'
    assert lines[11] == f'and 5 more about all photos: likeness prepare "{tmp_path}"'


def test_the_brief_form_names_every_photo_that_is_left_out(tmp_path: Path) -> None:
    broken = Finding("unreadable", "bad", "is empty (0 bytes)", "Remove it.")
    photos = [verdict(tmp_path / f"{n}.png", [broken]) for n in range(20)]
    photos += [verdict(tmp_path / "soft.png", [BLURRED])]
    lines = words.brief(diagnosis(tmp_path, *photos))
    assert [line for line in lines if "is empty" in line] == [
        f"{n}.png is empty (0 bytes). Remove it." for n in range(20)
    ]
    assert f'and 1 more: likeness prepare "{tmp_path}"' in lines


def test_a_finding_is_one_sentence_and_its_fix() -> None:
    assert words.sentence(BLURRED) == "is blurred. Take a sharper one."
    assert words.sentence(Finding("x", "note", "Is it?", "")) == "Is it?"
    assert words.sentence(ANIMATION) == "is an animation; its first picture is used."


def test_json_holds_everything(tmp_path: Path) -> None:
    found = anna(tmp_path)
    read = json.loads(as_json(found))
    assert read["version"] == 1
    assert read["folder"] == tmp_path.as_posix()
    assert read["counts"] == {"ok": 1, "note": 1, "warning": 1, "bad": 1}
    first, _, third, last = read["photos"]
    assert first["path"] == (tmp_path / "anna 01.jpg").as_posix()
    assert (first["set"], first["level"], first["size"]) == ("anna", "ok", [120, 80])
    assert (first["captions"], first["origin"]) == (["ohwx person", "another text"], "sidecar")
    assert (first["tokens"], first["mask"], first["notices"]) == (12, None, [])
    assert first["facts"]["hash"] == "f" * 16
    assert first["facts"]["mirrored_hash"] == "0" * 15 + "3"
    assert first["facts"]["background"] == [10.0, 20.5, 30.0]
    assert first["facts"]["faces"] == [
        {"box": [40, 20, 70, 60], "score": 0.9, "landmarks": [[50.0, 30.0], [62.0, 31.5]]}
    ]
    assert third["facts"]["faces"] is None
    assert [finding["code"] for finding in third["findings"]] == ["blurred", "duplicate"]
    assert third["findings"][0] == {
        "code": "blurred",
        "level": "warning",
        "what": "is blurred",
        "fix": "Take a sharper one.",
    }
    assert third["crops"] == [
        {"bucket": [64, 64], "resized": [96, 64], "left": 16, "top": 0},
        {"bucket": [96, 64], "resized": [96, 64], "left": 0, "top": 0},
    ]
    assert last["level"] == "bad"
    empty = ("size", "digest", "captions", "origin", "tokens", "facts")
    assert [last[name] for name in empty] == [None] * len(empty)
    assert read["whole"][0]["code"] == "few"
    assert read["buckets"] == [
        {"size": [64, 64], "photos": 4, "batches": 2, "short": 1, "enlarged": 3, "cropped": 0.125}
    ]
    assert read["steps"] == list(found.steps)
    assert read["faces_by"] == found.faces_by


def test_json_takes_any_name_and_any_number(tmp_path: Path) -> None:
    photo = verdict(tmp_path / "写真\n\udcff.png")
    assert photo.facts is not None
    photo = replace(photo, facts=replace(photo.facts, sharpness=float("nan"), mean=float("inf")))
    text = as_json(diagnosis(tmp_path, photo))
    assert text.isascii()
    (read,) = json.loads(text)["photos"]
    assert read["path"].endswith("写真\n\udcff.png")
    assert (read["facts"]["sharpness"], read["facts"]["mean"]) == (None, None)


def test_the_command_prints_lines_and_writes_a_page(
    cli: Cli, doctor: Doctor, here: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "anna"
    found = anna(folder, written=True)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    doctor(found)
    outcome = cli("prepare", folder)
    assert outcome.code == 1  # one of the files cannot be used
    lines = outcome.out.splitlines()
    assert lines[:-1] == words.lines(found)
    assert lines[-1] == f"{words.counts(found)} The page: anna-doctor.html"
    assert "looking at the photos" in outcome.err
    assert [path.name for path in here.iterdir()] == ["anna-doctor.html"]
    assert is_doctor_page(here / "anna-doctor.html")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_real_folder_is_examined_and_left_as_it_is(
    cli: Cli, here: Path, tmp_path: Path, base: Path
) -> None:
    """The whole way, from files to words, with nothing made up."""
    folder = tmp_path / "anna"
    anna(folder, written=True)
    (folder / "anna 10.png").write_bytes(b"")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    outcome = cli("prepare", folder, "--base", base)
    assert outcome.code == 1
    listed = [line[9:].partition("  ")[0] for line in outcome.out.splitlines()[:4]]
    assert listed == sorted(path.name for path in before)
    assert outcome.out.splitlines()[3].startswith("bad      anna 10.png  -  is empty (0 bytes).")
    assert is_doctor_page(here / "anna-doctor.html")
    read = json.loads(cli("prepare", folder, "--base", base, "--json").out)
    assert [photo["size"] for photo in read["photos"]] == [[120, 80]] * 3 + [None]
    assert all(photo["facts"] and photo["crops"] for photo in read["photos"][:3])
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_json_prints_one_object_and_writes_no_page(
    cli: Cli, doctor: Doctor, here: Path, tmp_path: Path
) -> None:
    found = anna(tmp_path / "anna", written=True)
    doctor(found)
    outcome = cli("prepare", tmp_path / "anna", "--json")
    assert json.loads(outcome.out) == json.loads(as_json(found))
    assert list(here.iterdir()) == []
    cli("prepare", tmp_path / "anna", "--json", "--page", here / "new" / "mine.html")
    assert is_doctor_page(here / "new" / "mine.html")


def test_the_exit_code(cli: Cli, doctor: Doctor, here: Path, tmp_path: Path) -> None:
    good, bad = anna(tmp_path, written=True).photos[:2], PhotoVerdict(tmp_path / "x", "", (EMPTY,))
    skip = ("--set", "data.skip_bad=true")
    for photos, arguments, code in (
        (good, (), 0),
        ((*good, bad), (), 1),
        ((*good, bad), skip, 0),
        ((bad,), skip, 1),
        ((), (), 1),
    ):
        doctor(diagnosis(tmp_path, *photos))
        assert cli("prepare", tmp_path, *arguments).code == code, (len(photos), arguments)
    config = here / "mine.toml"
    config.write_text("[data]\nskip_bad = true\n", encoding="utf-8")
    doctor(diagnosis(tmp_path, *good, bad))
    assert cli("prepare", tmp_path, "--config", config).code == 0


def test_a_wrong_setting_is_said_before_anything_is_read(
    cli: Cli, doctor: Doctor, here: Path, tmp_path: Path
) -> None:
    doctor(anna(tmp_path))
    outcome = cli("prepare", tmp_path, "--set", "data.skip_bad=perhaps")
    assert outcome.code == 2
    assert "data.skip_bad" in outcome.err
    assert "looking" not in outcome.err


def test_a_page_of_ours_is_replaced_and_nothing_else_is(
    cli: Cli, doctor: Doctor, here: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "anna"
    doctor(anna(folder, written=True))
    cli("prepare", folder)
    (here / "anna-doctor-2.html").mkdir()
    cli("prepare", folder)
    assert not (here / "anna-doctor-3.html").exists()
    (here / "anna-doctor.html").write_text("my own", encoding="utf-8")
    outcome = cli("prepare", folder)
    assert "The page: anna-doctor-3.html" in outcome.out
    assert (here / "anna-doctor.html").read_text(encoding="utf-8") == "my own"
    assert not [path for path in here.iterdir() if path.name.startswith(".")]


def test_from_inside_the_photo_folder_the_page_goes_above_it(
    cli: Cli, doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set" / "anna"
    doctor(anna(folder, written=True))
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    outcome = cli("prepare", ".")
    assert sorted(folder.iterdir()) == before
    assert f"The page: {folder.parent / 'anna-doctor.html'}" in outcome.out
    assert is_doctor_page(folder.parent / "anna-doctor.html")


def test_a_page_never_goes_into_the_folder_of_another_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    found = diagnosis(tmp_path / "anna", verdict(other / "b.png"))
    assert prepare.free_page(tmp_path / "anna", found) == tmp_path / "anna-doctor.html"


def test_a_place_that_will_not_do_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "anna"
    folder.mkdir()
    taken = tmp_path / "taken.html"
    taken.write_text("my own", encoding="utf-8")
    for page, kind, said in (
        (folder / "page.html", UsageError, "photo folder"),
        (folder / "below" / ".." / "page.html", UsageError, "photo folder"),
        (tmp_path / "page.png", UsageError, "ends in .html"),
        (taken, OutputError, "another file"),
    ):
        with pytest.raises(kind, match=said):
            prepare.require_page_place(page, folder)
    prepare.require_page_place(tmp_path / "new" / "Page.HTML", folder)
    assert taken.read_text(encoding="utf-8") == "my own"


def test_a_folder_with_the_longest_name_gets_a_page(
    cli: Cli, doctor: Doctor, here: Path, tmp_path: Path
) -> None:
    folder = tmp_path / ("写" * 80)
    doctor(anna(folder, written=True))
    cli("prepare", folder)
    (page,) = here.iterdir()
    assert page.name == "写" * 60 + "-doctor.html"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_a_place_that_cannot_be_written_to_is_said(
    cli: Cli, doctor: Doctor, here: Path, tmp_path: Path
) -> None:
    doctor(anna(tmp_path / "anna", written=True))
    here.chmod(0o500)
    outcome = cli("prepare", tmp_path / "anna")
    here.chmod(0o700)
    assert outcome.code == 1
    assert "--page" in outcome.err


def test_a_page_where_a_file_is_in_the_way_is_said(
    cli: Cli, doctor: Doctor, here: Path, tmp_path: Path
) -> None:
    doctor(anna(tmp_path / "anna", written=True))
    (here / "file").write_text("", encoding="utf-8")
    outcome = cli("prepare", tmp_path / "anna", "--page", here / "file" / "page.html")
    assert outcome.code == 1
    assert "The page cannot be written" in outcome.err


def test_in_a_terminal_there_are_tables(
    cli: Cli,
    doctor: Doctor,
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")
    doctor(anna(tmp_path / "anna", written=True))
    monkeypatch.setattr(prepare, "_in_terminal", lambda: True)
    shown = cli("prepare", tmp_path / "anna").out
    for word in ("Verdict", "What was found", "All photos together", "Trained at", "12%"):
        assert word in shown, word
    assert max(map(len, shown.splitlines()[:-1])) <= 100
    assert shown.splitlines()[-1].endswith("The page: anna-doctor.html")
