"""The doctor's page: complete, escaped, sufficient to itself, and right in a real browser."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.diagnoses import BLURRED, anna, diagnosis, place, save_picture, verdict
from tests.test_report import Page
from trainer.data.decode import decode_upright
from trainer.data.pixels import crop_image
from trainer.doctor import page as doctor_page
from trainer.doctor.findings import Finding, PhotoVerdict
from trainer.doctor.page import headline, page_of, trained_area
from trainer.report.doctor_page import (
    TEXT_CHARACTERS,
    DoctorPage,
    PhotoCard,
    is_doctor_page,
    picture_uri,
    render_doctor,
)
from trainer.types import Box, Photo, Size
from trainer.untrusted import printable

EVIL = "<script>alert(1)</script>.png"
CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)


def addresses(html: str) -> list[str]:
    return [
        value or ""
        for _, attributes in Page(html).tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action", "poster")
    ]


def picture_of(uri: str) -> Image.Image:
    head, _, data = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_the_page_is_well_formed_and_says_everything(tmp_path: Path) -> None:
    page = Page(render_doctor(page_of(anna(tmp_path / "anna", written=True))))
    assert page.open == []
    for word in (
        *("The doctor on anna", "3 of 4 photos can be trained on.", "1 cannot be used"),
        *("1 with a warning", "1 with a note", "1 fine", "4 photos x 25 epochs = 100 steps"),
        *("basic detector, which misses many", "There are only 4 photos. Ten or more give"),
        *("anna 01.jpg", "anna 02.gif", "anna 03.jpg", "anna 10.png", "120 × 80 px"),
        *("Is blurred. Take a sharper one.", "Has the same picture as anna 02.jpg.", "Keep one"),
        *("Is an animation; its first picture is used.", "Is empty (0 bytes).", "Copy it again"),
        *("trained at 64 × 64", "trained at 64 × 64 and 96 × 64", "ohwx person"),
        *("caption from its .txt file, 12 tokens", "Empty places", "12 %"),
    ):
        assert word in page.text, word


def test_the_worst_photos_come_first_and_the_contact_sheet_keeps_the_order(tmp_path: Path) -> None:
    page = page_of(anna(tmp_path, written=True))
    assert [card.level for card in page.cards] == ["bad", "warning", "note", "ok"]
    names = ["anna 01.jpg", "anna 02.gif", "anna 03.jpg", "anna 03.jpg"]
    assert [tile.name for tile in page.sheet] == names
    assert list(page.counts) == ["bad", "warning", "note", "ok"]


def test_the_contact_sheet_shows_the_very_crops_that_are_trained(tmp_path: Path) -> None:
    tiles = [t for t in page_of(anna(tmp_path, written=True)).sheet if "03" in t.name]
    photo = Photo(tmp_path / "anna 03.jpg", Size(120, 80), "")
    for tile, size in zip(tiles, (Size(64, 64), Size(96, 64)), strict=True):
        assert tile.size == size
        trained = crop_image(place(photo, size), decode_upright(photo.path))
        shown = np.asarray(picture_of(tile.picture)).astype(int)
        assert shown.shape == (size.height, size.width, 3)
        assert np.abs(shown - np.asarray(trained).astype(int)).mean() < 3


def test_sizes_that_show_the_same_of_a_photo_share_a_tile(tmp_path: Path) -> None:
    sizes = [Size(96, 64), Size(64, 64), Size(32, 32)]
    found = diagnosis(tmp_path, verdict(tmp_path / "a.png", buckets=sizes))
    save_picture(tmp_path / "a.png", Size(120, 80))
    page = page_of(found)
    assert [tile.trained_at.replace("\xa0", "") for tile in page.sheet] == [
        "32×32 and 64×64",
        "96×64",
    ]
    assert page.cards[0].crops == (Box(20, 0, 100, 80), Box(0, 0, 120, 80))


def test_the_frame_is_where_the_crop_is(tmp_path: Path) -> None:
    photo = Photo(tmp_path / "a.jpg", Size(1200, 800), "")
    assert trained_area(place(photo, Size(512, 512))) == Box(200, 0, 1000, 800)
    assert trained_area(place(photo, Size(96, 64))) == Box(0, 0, 1200, 800)
    found = diagnosis(tmp_path, verdict(tmp_path / "a.jpg", size=Size(120, 80), face=True))
    save_picture(tmp_path / "a.jpg", Size(120, 80))
    html = render_doctor(page_of(found))
    assert '<rect class="frame" x="20" y="0" width="80" height="80"' in html
    assert '<rect class="face" x="40" y="20" width="30" height="40"' in html
    assert "M0 0H120V80H0ZM20 0H100V80H20Z" in html


def test_nothing_is_fetched_and_nothing_can_run(tmp_path: Path) -> None:
    html = render_doctor(page_of(anna(tmp_path, written=True)))
    assert addresses(html)
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in addresses(html))
    own_words = re.sub("base64,[A-Za-z0-9+/=]+", "", html)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", own_words)
    tags = {tag for tag, _ in Page(html).tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    policy = next(a["content"] for t, a in Page(html).tags if t == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


def test_names_captions_and_findings_are_escaped(tmp_path: Path) -> None:
    evil = f"{EVIL}\"><img src=x onerror=alert(2)>'{{{{ 7 * 7 }}}}"
    photo = verdict(tmp_path / EVIL, [Finding("x", "warning", evil, evil)], caption=evil)
    found = replace(
        diagnosis(tmp_path, photo), whole=(Finding("y", "bad", evil, evil),), steps=(evil,)
    )
    html = render_doctor(replace(page_of(replace(found, faces_by=evil)), folder=evil))
    page = Page(html)
    assert page.open == []
    assert {tag for tag, _ in page.tags if tag in ("script", "img")} == set()
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert EVIL in page.text
    assert "{{ 7 * 7 }}" in page.text


def test_characters_that_steer_the_text_are_written_out(tmp_path: Path) -> None:
    assert printable("a\u202egpj\x1b[31m\x00.exe") == "a\\u202egpj\\x1b[31m\\x00.exe"
    assert printable("\udcff.png") == "\N{REPLACEMENT CHARACTER}.png"
    kept = "zoë 写真 👩‍🚀\nשלום"
    assert printable(kept) == kept
    photo = verdict(tmp_path / "a\u202egnp.exe", caption="dark\u2066side\x07")
    html = render_doctor(page_of(diagnosis(tmp_path, photo)))
    assert not re.search("[\u202e\u2066\x07]", html)
    html.encode("utf-8")


def test_the_page_of_a_large_folder_is_bounded_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_page, "CARDS", 5)
    names = [f"{number}.png" for number in range(8)]
    for name in names:
        save_picture(tmp_path / name, Size(120, 80))
    photos = [verdict(tmp_path / name, [BLURRED] if name >= "6" else []) for name in names]
    page = page_of(diagnosis(tmp_path, *photos))
    assert [card.name for card in page.cards] == ["6.png", "7.png", "0.png", "1.png", "2.png"]
    assert [card.name for card in page.sheet] == ["0.png", "1.png", "2.png", "6.png", "7.png"]
    assert page.left_out == 3
    assert page.counts == {"warning": 2, "ok": 6}
    assert "so many photos that 3 of them are not on this page" in Page(render_doctor(page)).text
    assert "so many photos" not in render_doctor(replace(page, left_out=0))


def test_a_caption_as_long_as_a_book_is_shortened(tmp_path: Path) -> None:
    card = page_of(diagnosis(tmp_path, verdict(tmp_path / "a.jpg", caption="word " * 9999)))
    html = render_doctor(card)
    assert len(html) < 30_000
    assert ("word " * 9999)[: TEXT_CHARACTERS - 1] + "…" in html


def test_thumbnails_are_small_whatever_they_show() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 700, 3), np.uint8))
    uri = picture_uri(noise, 160)
    assert picture_of(uri).size == (124, 160)
    assert len(uri) < 17_000
    assert picture_of(picture_uri(Image.new("RGB", (40, 30)), 160)).size == (40, 30)


def test_a_photo_that_went_away_has_a_card_without_a_picture(tmp_path: Path) -> None:
    page = page_of(diagnosis(tmp_path, verdict(tmp_path / "gone.png", [BLURRED])))
    assert (page.cards[0].picture, page.sheet) == ("", ())
    assert "no picture" in Page(render_doctor(page)).text


@pytest.mark.parametrize(
    ("good", "bad", "sentence"),
    [
        (1, 0, "The photo can be trained on."),
        (3, 0, "All 3 photos can be trained on."),
        (3, 1, "3 of 4 photos can be trained on."),
        (0, 2, "No photo can be trained on."),
        (0, 0, "No photo can be trained on."),
    ],
)
def test_the_headline(tmp_path: Path, good: int, bad: int, sentence: str) -> None:
    broken = PhotoVerdict(tmp_path / "x.png", "", (Finding("x", "bad", "is empty", ""),))
    photos = [verdict(tmp_path / f"{n}.png") for n in range(good)] + [broken] * bad
    assert headline(diagnosis(tmp_path, *photos)) == sentence


def test_our_own_pages_are_recognised(tmp_path: Path) -> None:
    ours, other = tmp_path / "a.html", tmp_path / "b.html"
    ours.write_text(render_doctor(DoctorPage("anna", "All.", {})), encoding="utf-8")
    other.write_text('<html><meta name="generator" content="Likeness">', encoding="utf-8")
    assert is_doctor_page(ours)
    assert not is_doctor_page(other)


def test_an_empty_page_holds_no_empty_sections() -> None:
    html = render_doctor(DoctorPage("anna", "No photo can be trained on.", {}))
    assert Page(html).open == []
    assert "<section" not in html


@dataclass(frozen=True)
class Browsed:
    """What a real browser makes of a page: its elements afterwards, and what it complains of."""

    dom: str
    console: list[str]


def browse(page: Path, *flags: str) -> Browsed:
    assert CHROMIUM
    profile = page.parent / "profile"
    words = (CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}")
    more = ("--enable-logging=stderr", "--dump-dom", *flags, page.as_uri())
    done = subprocess.run([*words, *more], capture_output=True, timeout=100, check=True)
    log = done.stderr.decode("utf-8", "replace").splitlines()
    return Browsed(done.stdout.decode("utf-8"), [line for line in log if ":CONSOLE" in line])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed here")
def test_a_real_browser_shows_the_whole_page_and_has_nothing_to_block(tmp_path: Path) -> None:
    found = anna(tmp_path / "anna", written=True)
    file, shot = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(render_doctor(page_of(found)), encoding="utf-8")
    browsed = browse(file, "--hide-scrollbars", "--window-size=900,1600", f"--screenshot={shot}")
    assert browsed.console == []
    assert browsed.dom.count('class="card ') == len(found.photos)
    assert browsed.dom.count("<figure>") == 4
    picture = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert picture.shape == (1600, 900, 3)
    # The photos are red on their left: the policy lets the page's own pictures through.
    red = (picture[..., 0] > 190) & (picture[..., 1] < 120) & (picture[..., 2] < 120)
    assert red.sum() > 5000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed here")
def test_the_policy_stops_what_would_get_past_the_escaping(tmp_path: Path) -> None:
    """Were there a hole in the page, neither a script nor an address would get through it."""
    card = PhotoCard("a.png", "ok", ())
    html = render_doctor(DoctorPage("anna", "All.", {"ok": 1}, cards=(card,)))
    hole = '<script>document.title = "ran"</script><img src="other.png" onerror="ran()">'
    file = tmp_path / "page.html"
    file.write_text(html.replace("</header>", f"{hole}</header>"), encoding="utf-8")
    browsed = browse(file)
    assert "<title>anna · Likeness doctor</title>" in browsed.dom
    complaints = " ".join(browsed.console)
    assert "Content Security Policy" in complaints
    assert "other.png" in complaints
