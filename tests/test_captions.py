"""Captions: sidecars in every encoding, the trigger rule, and tag counts."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import captioned, unhurried
from trainer.data.captions import _one_line, caption_photos, tag_frequency
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
    assert plain == Captioned(photos[0], "zqx avatar", "template")
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
        ("ZQX, smiling", "ZQX, smiling"),
        ("zqxy at home", "zqx avatar, zqxy at home"),
        ("a {class} named {trigger}", "a avatar named zqx"),
        ("the {class} smiles", "zqx avatar, the avatar smiles"),
    ],
)
def test_the_trigger_is_put_in_front_unless_it_is_there(
    tmp_path: Path, sidecar: str, expected: str
) -> None:
    result = caption(tmp_path, sidecar.encode())
    assert (result.text, result.origin) == (expected, "sidecar")


def test_a_trigger_with_signs_of_its_own_is_matched_as_written(tmp_path: Path) -> None:
    assert caption(tmp_path, b"a.b smiles", trigger="a.b").text == "a.b smiles"
    assert caption(tmp_path, b"axb smiles", trigger="a.b").text == "a.b avatar, axb smiles"
    assert caption(tmp_path, b"(me)", trigger="(me)").text == "(me)"


def test_without_a_trigger_captions_stay_as_they_are(tmp_path: Path) -> None:
    assert caption(tmp_path, b"red hat", trigger="").text == "red hat"
    (tmp_path / "a.txt").unlink()
    (plain,) = caption_photos([photo(tmp_path / "a.jpg")], trigger="", class_noun="avatar")
    assert plain.text == "avatar"


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


def test_tags_are_counted_the_most_frequent_first() -> None:
    texts = ["zqx avatar, Red Hat,, smiling ", "smiling, zqx avatar", "beach, zqx  avatar"]
    captions = [captioned(Path("a.jpg"), Size(64, 64), text=text) for text in texts]
    counts = tag_frequency(captions)
    assert list(counts.items()) == [
        ("smiling", 2),
        ("zqx avatar", 2),
        ("beach", 1),
        ("red hat", 1),
        ("zqx  avatar", 1),
    ]


@unhurried
@given(st.text())
def test_cleaned_text_is_one_line_and_stays_the_same(text: str) -> None:
    cleaned = _one_line(text)
    assert not re.search(r"[\x00-\x1f\x7f]|\s\s|^\s|\s$", cleaned)
    assert _one_line(cleaned) == cleaned
