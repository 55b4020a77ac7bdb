"""Captions: sidecars in every encoding, the trigger exactly once, writing, and tag counts."""

from __future__ import annotations

import os
import re
import stat
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import unhurried
from trainer.data.caption_text import mentions, one_line, with_word_once, without_word
from trainer.data.caption_variants import CaptionStyle
from trainer.data.captions import (
    caption_photos,
    find_sidecars,
    orphan_sidecars,
    read_lines,
    read_sidecar,
    write_sidecar,
)
from trainer.errors import DataError
from trainer.types import Captioned, Photo, Size


def photo(path: Path) -> Photo:
    return Photo(path, Size(64, 64), "0" * 64)


def caption(folder: Path, content: bytes, name: str = "a.txt", trigger: str = "zqx") -> Captioned:
    (folder / name).write_bytes(content)
    (result,) = caption_photos([photo(folder / "a.jpg")], trigger=trigger, class_noun="avatar")
    return result


def test_a_photo_without_a_sidecar_gets_the_template(tmp_path: Path) -> None:
    photos = [photo(tmp_path / "a.jpg")]
    (plain,) = caption_photos(photos, trigger="zqx", class_noun="avatar")
    assert plain == Captioned(photos[0], ("zqx avatar",), "template")
    (other,) = caption_photos(
        photos, trigger="zqx", class_noun="avatar", template="a {class} {mood}, by {trigger}"
    )
    assert other.text == "a avatar {mood}, by zqx"


def test_a_word_that_looks_like_a_placeholder_is_not_replaced_again(tmp_path: Path) -> None:
    photos = [photo(tmp_path / "a.jpg")]
    (result,) = caption_photos(photos, trigger="{class}", class_noun="{trigger}")
    assert result.text == "{class} {trigger}"


@pytest.mark.parametrize(
    ("sidecar", "expected"),
    [
        ("smiling, red hat", "zqx avatar, smiling, red hat"),
        ("a photo of zqx on a beach", "a photo of zqx on a beach"),
        ("ZQX, smiling", "zqx, smiling"),
        ("zqxy at home", "zqx avatar, zqxy at home"),
        ("a {class} named {trigger}", "a avatar named zqx"),
        ("the {class} smiles", "zqx avatar, the avatar smiles"),
        ("zqx, red hat, zqx, smiling", "zqx, red hat, smiling"),
        ("zqx, red hat, ZQX", "zqx, red hat"),
        ("a photo of zqx, Zqx's hat is red", "a photo of zqx, hat is red"),
        ("zqx-style, non-zqx, by zqx.", "zqx-style, non, by."),
        ("zqx zqx zqxy zqx zqx_a", "zqx zqxy zqx_a"),
        ('zqx smiles (zqx), and "zqx" waves', "zqx smiles, and waves"),
        ("zqx-zqx in a hat", "zqx in a hat"),
        ("{trigger}, {trigger}, {trigger}", "zqx"),
        ("zqxe\u0301 at home", "zqx avatar, zqx\u00e9 at home"),
        ("zqx\u0301 at home", "zqx avatar, zqx\u0301 at home"),
    ],
)
def test_a_caption_names_the_trigger_exactly_once(
    tmp_path: Path, sidecar: str, expected: str
) -> None:
    result = caption(tmp_path, sidecar.encode())
    assert (result.text, result.origin) == (expected, "sidecar")


def test_a_trigger_with_signs_of_its_own_is_matched_as_written(tmp_path: Path) -> None:
    assert caption(tmp_path, b"a.b smiles", trigger="a.b").text == "a.b smiles"
    assert caption(tmp_path, b"axb smiles", trigger="a.b").text == "a.b avatar, axb smiles"
    assert caption(tmp_path, b"(me)", trigger="(me)").text == "(me)"


def test_a_trigger_of_other_scripts_is_a_word_like_any_other(tmp_path: Path) -> None:
    text = "\u0430\u043d\u043d\u0430"
    assert caption(tmp_path, f"{text.title()}, {text}!".encode(), trigger=text).text == f"{text}!"
    hindi = "\u0905\u0928"
    longer = f"{hindi}\u0940"  # goes on with a vowel sign, which is no letter of its own
    expected = f"{hindi} avatar, {longer}"
    assert caption(tmp_path, longer.encode(), trigger=hindi).text == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("a {class}", "zqx avatar, a avatar"),
        ("{trigger} by {trigger}", "zqx by"),
        ("", "zqx avatar"),
    ],
)
def test_the_template_names_the_trigger_exactly_once_too(
    tmp_path: Path, template: str, expected: str
) -> None:
    photos = [photo(tmp_path / "a.jpg")]
    (result,) = caption_photos(photos, trigger="zqx", class_noun="avatar", template=template)
    assert (result.texts, result.origin) == ((expected,), "template")


def test_a_captioner_is_asked_about_photos_without_a_sidecar(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"red hat")
    words = {"b.jpg": "zqx waves \n at zqx", "c.jpg": "a {class} on a beach", "d.jpg": " \n"}
    photos = [photo(tmp_path / name) for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg")]
    results = caption_photos(
        photos, trigger="zqx", class_noun="man", describe=lambda asked: words[asked.path.name]
    )
    assert [(result.text, result.origin) for result in results] == [
        ("zqx man, red hat", "sidecar"),
        ("zqx waves at", "captioner"),
        ("zqx man, a man on a beach", "captioner"),
        ("zqx man", "template"),
    ]


@pytest.mark.parametrize(
    ("prefix", "suffix", "sidecar", "expected"),
    [
        ("a photo", "film grain", "red hat", "a photo, zqx man, red hat, film grain"),
        ("a photo,", ", film grain", "zqx, hat,", "a photo, zqx, hat, film grain"),
        ("a photo of {trigger}", "", "zqx, hat", "a photo of zqx, hat"),
        ("a photo of ZQX", "", "hat", "a photo of zqx, hat"),
        ("", "by {trigger}", "a {class}", "a man, by zqx"),
        ("", "{trigger}, grain", "zqx smiles", "zqx smiles, grain"),
        ("{class}", "", "", "man, zqx man"),
    ],
)
def test_prefix_and_suffix_stand_around_the_trigger(
    tmp_path: Path, prefix: str, suffix: str, sidecar: str, expected: str
) -> None:
    (tmp_path / "a.txt").write_text(sidecar, encoding="utf-8")
    style = CaptionStyle("other", "words", prefix=prefix, suffix=suffix)
    photos = [photo(tmp_path / "a.jpg")]
    (result,) = caption_photos(photos, trigger="zqx", class_noun="man", style=style)
    assert result.text == expected


def test_the_separator_of_the_style_joins(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"red hat; zqx; smiling; zqx")
    style = CaptionStyle(prefix="a photo", suffix="grain", separator=";")
    photos = [photo(tmp_path / "a.jpg"), photo(tmp_path / "b.jpg")]
    results = caption_photos(photos, trigger="zqx", class_noun="man", style=style)
    assert [result.text for result in results] == [
        "a photo; red hat; zqx; smiling; grain",
        "a photo; zqx man; grain",
    ]


def test_each_line_may_be_a_caption_of_its_own(tmp_path: Path) -> None:
    lines = "# red hat\r\n\n  a photo of zqx, zqx  \n\x00\n# red hat"
    (tmp_path / "a.txt").write_bytes(lines.encode("utf-16"))
    (tmp_path / "b.txt").write_bytes(b"\n \n")
    photos = [photo(tmp_path / name) for name in ("a.jpg", "b.jpg")]
    several, none = caption_photos(photos, trigger="zqx", class_noun="man", several_lines=True)
    assert several.texts == ("zqx man, # red hat", "a photo of zqx", "zqx man, # red hat")
    assert (several.origin, none.origin, none.texts) == ("sidecar", "template", ("zqx man",))
    (joined, _) = caption_photos(photos, trigger="zqx", class_noun="man")
    assert joined.texts == ("# red hat a photo of zqx, # red hat",)
    assert read_sidecar(tmp_path / "a.txt") == "# red hat a photo of zqx, zqx # red hat"
    assert read_lines(tmp_path / "b.txt") == ()


def test_without_a_trigger_captions_stay_as_they_are(tmp_path: Path) -> None:
    assert caption(tmp_path, b"red hat", trigger="").text == "red hat"
    (tmp_path / "a.txt").unlink()
    (plain,) = caption_photos([photo(tmp_path / "a.jpg")], trigger="", class_noun="avatar")
    assert plain.text == "avatar"
    assert caption(tmp_path, b"zqx by {trigger}, zqx", trigger="").text == "zqx by, zqx"


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252", "utf-16-le"]
)
def test_sidecars_are_read_in_the_usual_encodings(tmp_path: Path, encoding: str) -> None:
    text = "zqx in a plain hat" if encoding == "utf-16-le" else "zqx, Zoë’s café"
    assert caption(tmp_path, text.encode(encoding)).text == text


def test_big_endian_utf_16_is_known_by_its_mark(tmp_path: Path) -> None:
    raw = b"\xfe\xff" + "zqx, Zoë \N{GRINNING FACE}".encode("utf-16-be")
    assert caption(tmp_path, raw).text == "zqx, Zoë \N{GRINNING FACE}"


def test_right_to_left_text_is_kept(tmp_path: Path) -> None:
    text = "zqx, \u05e9\u05dc\u05d5\u05dd"
    assert caption(tmp_path, text.encode()).text == text


def test_white_space_and_control_characters_are_cleaned(tmp_path: Path) -> None:
    raw = "\ufeff zqx\r\n\r\n red\0\x08 hat,\tsmiling \u2028 here\n".encode()
    assert caption(tmp_path, raw).text == "zqx red hat, smiling here"


@pytest.mark.parametrize("content", [b"", b" \r\n\t", b"\0\0", b"\xef\xbb\xbf", b"\xff\xfe"])
def test_an_empty_sidecar_counts_as_none(tmp_path: Path, content: bytes) -> None:
    result = caption(tmp_path, content)
    assert (result.text, result.origin) == ("zqx avatar", "template")


def test_a_very_long_caption_is_kept_whole(tmp_path: Path) -> None:
    text = "zqx " + " ".join(["word"] * 10_000)
    assert caption(tmp_path, text.encode()).text == text


def test_a_file_too_large_for_a_caption_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        caption(tmp_path, b"x" * 1_000_001)
    assert str(caught.value) == (
        "The caption a.txt is larger than 1000 kB.\n"
        f"  {tmp_path / 'a.txt'}\n"
        "A caption is a sentence or a list of tags. Shorten it, or remove it."
    )


def test_a_locked_sidecar_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"red hat")

    def refuse(self: Path, *args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError) as caught:
        caption_photos([photo(tmp_path / "a.jpg")], trigger="zqx", class_noun="avatar")
    assert str(caught.value) == (
        "The caption a.txt cannot be read (Permission denied).\n"
        f"  {tmp_path / 'a.txt'}\n"
        "Give yourself the permission to read it, or remove it."
    )


def test_photos_of_one_stem_share_a_sidecar_of_any_case(tmp_path: Path) -> None:
    (tmp_path / "a.TXT").write_bytes(b"red hat")
    photos = [photo(tmp_path / name) for name in ("a.jpg", "a.png", "b.png")]
    result = caption_photos(photos, trigger="zqx", class_noun="avatar")
    assert [item.photo for item in result] == photos
    assert [item.origin for item in result] == ["sidecar", "sidecar", "template"]
    assert result[0].text == result[1].text == "zqx avatar, red hat"


def test_accents_written_in_two_ways_are_one_name(tmp_path: Path) -> None:
    composed, split = (unicodedata.normalize(form, "Zoë") for form in ("NFC", "NFD"))
    (tmp_path / f"{composed}.txt").write_bytes(b"red hat")
    photos = [photo(tmp_path / f"{split}.jpg")]
    (result,) = caption_photos(photos, trigger="zqx", class_noun="avatar")
    assert result.text == "zqx avatar, red hat"


def test_a_folder_named_like_a_sidecar_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    (result,) = caption_photos([photo(tmp_path / "a.jpg")], trigger="zqx", class_noun="avatar")
    assert result.origin == "template"


def test_sidecars_can_be_ignored(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"red hat")
    photos = [photo(tmp_path / "a.jpg")]
    (result,) = caption_photos(photos, trigger="zqx", class_noun="avatar", use_sidecars=False)
    assert result.text == "zqx avatar"


@unhurried
@given(st.text())
def test_cleaned_text_is_one_line_and_stays_the_same(text: str) -> None:
    cleaned = one_line(text)
    assert not re.search(r"[\x00-\x1f\x7f]|\s\s|^\s|\s$", cleaned)
    assert one_line(cleaned) == cleaned
    assert cleaned.encode("utf-8") == unicodedata.normalize("NFC", cleaned).encode("utf-8")


PIECES = ["zqx", "ZQX", "zqxy", "red", " ", ",", ", ", ";", ".", "-", "'s", "(", ")", '"', "é"]


@unhurried
@given(
    st.lists(st.sampled_from(PIECES)).map("".join).map(one_line),
    st.sampled_from([",", ";", " ", " | "]),
)
def test_the_trigger_is_there_exactly_once_and_nothing_else_is_lost(
    text: str, separator: str
) -> None:
    def whole(text: str) -> list[str]:
        return re.findall(r"(?<!\w)zqx(?!\w)", text, re.IGNORECASE)

    once = with_word_once(text, "zqx", separator)
    assert whole(once) == ["zqx"]
    assert whole(without_word(text, "zqx", separator)) == []
    words = re.findall(r"\w{2,}", re.sub(r"(?<!\w)zqx(?!\w)", "", text, flags=re.IGNORECASE))
    assert [word for word in re.findall(r"\w{2,}", once) if word != "zqx"] == words
    assert with_word_once(once, "zqx", separator) == once
    if not re.search(r",\s*,|\s\s", text):
        assert not re.search(r",\s*,|\s\s", once)


def test_a_word_a_hundred_thousand_times_takes_no_minutes() -> None:
    text = "zqx, hat, " * 30_000
    assert with_word_once(text, "zqx") == "zqx, " + "hat, " * 30_000


def test_mentions_compares_as_captions_are_cleaned() -> None:
    composed, split = (unicodedata.normalize(form, "zoë") for form in ("NFC", "NFD"))
    assert mentions(f"a hat,{split}!", composed.upper())
    assert not mentions("zoey", "zoe")
    assert not mentions("a hat", "")


def test_photos_are_found_beside_their_sidecars_only(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_bytes(b"red hat")
    photos = [photo(tmp_path / "a.jpg"), photo(tmp_path / "sub" / "a.jpg")]
    assert find_sidecars(photos) == {tmp_path / "sub" / "a.jpg": tmp_path / "sub" / "a.txt"}


def test_captions_without_a_picture_are_listed(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    names = ["a.jpg", "a.txt", "broken.png", "broken.txt", "b.TXT", "license-cc0.txt", "c.md"]
    names += ["README.txt", "Read Me.txt", "notes.txt", "noteworthy.txt", "sub/d.txt", ".e.txt"]
    names += ["photo.heic", "photo.txt"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    photos = [photo(tmp_path / "a.jpg")]
    flat = [tmp_path / "b.TXT", tmp_path / "noteworthy.txt"]
    assert sorted(orphan_sidecars(tmp_path, photos)) == flat
    assert sorted(orphan_sidecars(tmp_path, photos, recursive=True)) == [
        *flat,
        tmp_path / "sub" / "d.txt",
    ]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / f"{'n' * 251}.txt"
    write_sidecar(path, "Zoë, red hat \N{GRINNING FACE}")
    assert content(tmp_path) == {path.name: "Zoë, red hat \N{GRINNING FACE}\n".encode()}
    assert read_sidecar(path) == "Zoë, red hat \N{GRINNING FACE}"


def test_a_file_that_is_there_stays_unless_it_is_to_be_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=re.escape("a.txt")):
        write_sidecar(path, "red hat")
    assert content(tmp_path) == {"a.txt": b"mine"}
    write_sidecar(path, "red hat", overwrite=True)
    assert content(tmp_path) == {"a.txt": b"red hat\n"}


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Between looking and writing a person saves a caption of their own."""
    path = tmp_path / "a.txt"
    sync, link = os.fsync, os.link

    def meanwhile(number: int) -> None:
        sync(number)
        path.write_bytes(b"mine")

    def refuse(*names: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(names[0]))

    monkeypatch.setattr(os, "fsync", meanwhile)
    monkeypatch.setattr(os, "link", link if links else refuse)
    with pytest.raises(FileExistsError):
        write_sidecar(path, "red hat")
    assert content(tmp_path) == {"a.txt": b"mine"}


def test_where_there_are_no_links_a_caption_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*names: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(names[0]))

    monkeypatch.setattr(os, "link", refuse)
    write_sidecar(tmp_path / "a.txt", "red hat")
    assert content(tmp_path) == {"a.txt": b"red hat\n"}

    def full(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_sidecar(tmp_path / "b.txt", "red hat")
    assert content(tmp_path) == {"a.txt": b"red hat\n"}


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_full_disk_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    path = tmp_path / "a.txt"
    if overwrite:
        path.write_bytes(b"mine")
    before = content(tmp_path)

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_sidecar(path, "red hat", overwrite=overwrite)
    assert content(tmp_path) == before


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    target, path = tmp_path / "texts" / "real.txt", tmp_path / "a.txt"
    target.write_bytes(b"mine")
    try:
        path.symlink_to(target)
    except OSError:
        pytest.skip("links cannot be made here")
    write_sidecar(path, "red hat", overwrite=True)
    assert path.is_symlink()
    assert content(tmp_path / "texts") == {"real.txt": b"red hat\n"}
    target.unlink()
    with pytest.raises(FileExistsError):
        write_sidecar(path, "red hat")
    write_sidecar(path, "blue hat", overwrite=True)
    assert target.read_bytes() == b"blue hat\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps no such permissions")
def test_permissions_are_as_the_system_gives_them(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    usual = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    path = tmp_path / "a.txt"
    write_sidecar(path, "red hat")
    assert stat.S_IMODE(path.stat().st_mode) == usual
    path.chmod(0o600)
    write_sidecar(path, "blue hat", overwrite=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_write_protected_caption_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"mine")
    opened = Path.open

    def refuse(self: Path, mode: str = "r", *args: object, **options: object) -> object:
        if mode == "r+b":  # what the system says of one, also to a test that runs as root
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, mode)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError):
        write_sidecar(path, "red hat", overwrite=True)
    monkeypatch.undo()
    assert content(tmp_path) == {"a.txt": b"mine"}
