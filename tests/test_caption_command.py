"""`likeness caption`: whose words are kept, what is written, and going on after a stop."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pretraining.avatars import draw_avatar
from pretraining.data import looks
from tests.captioners import save_tiny_captioner
from tests.runs import Outcome, files_in, save_photos, state_of
from trainer.captioners import CaptionerOptions
from trainer.captioners.wordless import (
    FileName,
    Template,
    load_filename,
    load_template,
    words_of,
)
from trainer.config.presets import shipped_folder
from trainer.data.captions import caption_photos, write_sidecar
from trainer.errors import DataError, ModelError
from trainer.types import Photo, Size

Cli = Callable[..., Outcome]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with somebody's BLIP; never written to."""
    return save_tiny_captioner(tmp_path_factory.mktemp("captioners") / "tiny")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photos without captions, whose names say what they show."""
    photos = save_photos(tmp_path / "anna")
    (photos / "0.txt").unlink()
    for number, name in enumerate(("smiling", "in the snow", "on a beach")):
        (photos / f"{number}.png").rename(photos / f"{name}.png")
    return photos


def photo(path: Path, digest: str = "0" * 64) -> Photo:
    return Photo(path, Size(64, 64), digest)


def no_picture() -> Image.Image:
    pytest.fail("this captioner needs no pixels")


def captions_in(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.txt")}


# -- whose words are kept


def test_captions_are_written_and_never_overwritten_unasked(
    cli: Cli, tiny: Path, tmp_path: Path
) -> None:
    folder = save_photos(tmp_path / "anna")
    (folder / "2.TXT").write_text("my own", encoding="utf-8")
    Image.open(folder / "1.png").save(folder / "1.jpg")
    (folder / "broken.jpg").write_bytes(b"no picture")
    before = state_of(folder)
    chosen = ("--captioner", "transformers", "--model", tiny)

    result = cli("caption", folder, *chosen).done()
    after = state_of(folder)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"1.txt"}
    written = (folder / "1.txt").read_text(encoding="utf-8")
    assert f"1 of 1  1.jpg: {written}" in result.out or f"1 of 1  1.png: {written}" in result.out
    assert "shares the caption of 1." in result.out
    assert "broken.jpg" in result.out
    assert "Captions written: 1" in result.out

    assert "Photos with a .txt file, which stays: 4" in cli("caption", folder).done().out
    assert state_of(folder) == after

    cli("caption", folder, *chosen, "--overwrite").done()
    assert "my own" not in (folder / "2.TXT").read_text(encoding="utf-8")
    assert set(state_of(folder)) == set(after)


def test_a_file_of_nothing_is_filled(cli: Cli, folder: Path) -> None:
    (folder / "smiling.txt").write_text(" \n\ufeff\n", encoding="utf-8")
    (folder / "on a beach.TXT").touch()
    cli("caption", folder, "--captioner", "filename").done()
    assert captions_in(folder) == {"smiling": "smiling\n", "in the snow": "in the snow\n"}
    assert (folder / "on a beach.TXT").read_text(encoding="utf-8") == "on a beach\n"


def test_what_somebody_writes_meanwhile_stays(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(self: FileName, photo: Photo, image: object, kind: str) -> str:
        if photo.path.stem == "smiling":
            photo.path.with_suffix(".txt").write_text("mine", encoding="utf-8")
        return words_of(photo.path.stem)

    monkeypatch.setattr(FileName, "caption", slowly)
    out = cli("caption", folder, "--captioner", "filename").done().out
    assert "smiling.png: it has a .txt file by now, which stays" in out
    assert captions_in(folder)["smiling"] == "mine"
    assert len(captions_in(folder)) == 3


def test_a_run_that_was_stopped_goes_on(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described: list[str] = []

    def stops(self: FileName, photo: Photo, image: object, kind: str) -> str:
        if len(described) == 1:
            raise KeyboardInterrupt
        described.append(photo.path.stem)
        return words_of(photo.path.stem)

    before = files_in(folder)
    with monkeypatch.context() as patch:
        patch.setattr(FileName, "caption", stops)
        result = cli("caption", folder, "--captioner", "filename")
    assert result.code == 130
    assert "Captions written: 1; photos left: 2" in result.err
    assert files_in(folder) - before == {f"{described[0]}.txt"}
    first = state_of(folder)

    out = cli("caption", folder, "--captioner", "filename").done().out
    assert "2 of 2" in out
    assert "which stays: 1" in out
    assert len(captions_in(folder)) == 3
    assert first.items() <= state_of(folder).items()


def test_a_full_disk_leaves_whole_captions_only(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def fills_up(path: Path, text: str, *, overwrite: bool = False) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_sidecar(path, text, overwrite=overwrite)

    monkeypatch.setattr("trainer.commands.caption.write_sidecar", fills_up)
    result = cli("caption", folder, "--captioner", "filename")
    assert result.code == 1
    assert "Captions cannot be written: No space left on device" in result.err
    assert len(calls) == 2
    assert captions_in(folder) == {calls[0].stem: f"{calls[0].stem}\n"}
    assert not [path for path in folder.iterdir() if path.suffix not in (".png", ".txt")]


# -- photos that fail, and photos without words


def failing(monkeypatch: pytest.MonkeyPatch, *stems: str) -> None:
    def caption(self: FileName, photo: Photo, image: object, kind: str) -> str:
        if photo.path.stem in stems:
            raise ModelError("too thin.", fix="Write it by hand.")
        return words_of(photo.path.stem)

    monkeypatch.setattr(FileName, "caption", caption)


def test_a_photo_that_fails_is_a_line_and_not_the_end(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "in the snow")
    out = cli("caption", folder, "--captioner", "filename").done().out
    assert "in the snow.png: too thin. Write it by hand." in out
    assert "Photos that could not be described: 1" in out
    assert set(captions_in(folder)) == {"smiling", "on a beach"}


def test_if_every_photo_fails_the_command_has_failed(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "smiling", "in the snow", "on a beach")
    result = cli("caption", folder, "--captioner", "filename")
    assert (result.code, captions_in(folder)) == (1, {})
    assert "too thin" in result.err


def test_photos_without_words_get_no_file(cli: Cli, folder: Path) -> None:
    (folder / "smiling.png").rename(folder / "IMG_2041.png")
    out = cli("caption", folder, "--captioner", "filename").done().out
    assert "IMG_2041.png: the captioner has no words for it" in out
    assert "Photos without words, which got no file: 1" in out
    assert set(captions_in(folder)) == {"in the snow", "on a beach"}


# -- flags


def test_a_captioner_that_cannot_be_loaded_leaves_the_folder_alone(
    cli: Cli, folder: Path, tmp_path: Path
) -> None:
    before = state_of(folder)
    chosen = ("--captioner", "transformers", "--model", tmp_path / "missing")
    result = cli("caption", folder, *chosen, "--overwrite")
    assert result.code == 1
    assert "no captioner in this folder" in result.err
    assert state_of(folder) == before


def test_a_folder_in_place_of_a_captioner_is_answered_with_what_to_type(
    cli: Cli, folder: Path, tiny: Path, tmp_path: Path
) -> None:
    result = cli("caption", folder, "--captioner", tiny)
    assert result.code == 2
    assert f'--captioner transformers --model "{tiny}"' in result.err
    (tmp_path / "selected_tags.csv").touch()
    result = cli("caption", folder, "--captioner", tmp_path)
    assert f'--captioner tagger --model "{tmp_path}"' in result.err
    result = cli("caption", folder, "--captioner", "somebody/blip")
    assert '--captioner transformers --model "somebody/blip"' in result.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--captioner", "taggr"], "Did you mean 'tagger'"),
        (["--captioner", "tagger"], "--model is missing"),
        (["--captioner", "transformers"], "--model is missing"),
        (["--model", "x"], "takes no model"),
        (["--captioner", "filename", "--model", "x"], "takes no model"),
        (["--prompt", "a man"], "--prompt is for the captioner 'transformers'"),
        (["--threshold", "0.5"], "--threshold is for the captioner 'tagger'"),
        (["--exclude", "1girl"], "--exclude is for the captioner 'tagger'"),
        (["--rating"], "--rating is for the captioner 'tagger'"),
        (["--captioner", "tagger", "--model", "x", "--threshold", "nan"], "--threshold nan is not"),
        (["--captioner", "tagger", "--model", "x", "--threshold", "0"], "--threshold 0 is not"),
        (
            ["--captioner", "tagger", "--model", "x", "--character-threshold", "1.1"],
            "--character-threshold 1.1 is not",
        ),
        (
            ["--captioner", "transformers", "--model", "x", "--prompt", "a" * 2001],
            "longer than 2000 characters",
        ),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    cli: Cli, folder: Path, flags: list[str], said: str
) -> None:
    before = state_of(folder)
    result = cli("caption", folder, *flags)
    assert result.code == 2
    assert said in result.err
    assert state_of(folder) == before


def test_nothing_is_loaded_when_every_photo_has_its_caption(cli: Cli, folder: Path) -> None:
    cli("caption", folder, "--captioner", "filename").done()
    chosen = ("--captioner", "transformers", "--model", folder / "missing")
    assert "Describing" not in cli("caption", folder, *chosen).done().out


# -- template


def test_a_template_is_a_pure_function_of_the_photos_content(cli: Cli, folder: Path) -> None:
    out = cli("caption", folder, "--captioner", "template").done().out
    assert "{trigger} {class}" in out
    first = captions_in(folder)
    (folder / "smiling.png").rename(folder / "zoë.png")
    (folder / "smiling.txt").unlink()
    cli("caption", folder, "--captioner", "template", "--overwrite").done()
    second = captions_in(folder)
    assert second.pop("zoë") == first.pop("smiling")
    assert second == first


@pytest.mark.parametrize("kind", ["face", "style"])
def test_shipped_templates_name_trigger_and_class_once(kind: str) -> None:
    path = shipped_folder("prompts") / "captions" / f"{kind}.txt"
    lines = load_template(CaptionerOptions(str(path))).lines
    assert len(set(lines)) == len(lines) >= 4
    assert all(line.count("{trigger} {class}") == 1 for line in lines)
    assert all(line.count("{") == 2 for line in lines)


def test_every_line_of_a_template_is_taken() -> None:
    template = Template(("a", "b", "c", "d"))
    taken = [
        template.caption(photo(Path("x.png"), f"{number:064x}"), no_picture, "face")
        for number in range(400)
    ]
    assert set(taken) == set(template.lines)
    assert all(60 < taken.count(line) < 140 for line in template.lines)


def test_a_template_of_ones_own(cli: Cli, folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("\ufeff# mine\n\n  {trigger},   outdoors \n", encoding="utf-8")
    cli("caption", folder, "--captioner", "template", "--model", own).done()
    assert set(captions_in(folder).values()) == {"{trigger}, outdoors\n"}
    (captioned, *_) = caption_photos(
        [photo(folder / "smiling.png")], trigger="zqx", class_noun="dog"
    )
    assert captioned.text.startswith("zqx")


@pytest.mark.parametrize("content", [b"", b"# only this\n", b"\xff\xfe\x00", b"x" * 1_000_001])
def test_a_file_without_templates_is_explained(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match="caption templates cannot be used"):
        load_template(CaptionerOptions(str(path)))


# -- file names


@pytest.mark.parametrize(
    ("stem", "words"),
    [
        ("anna_smiling-in_the snow 02", "anna smiling in the snow"),
        ("smiling2", "smiling"),
        ("01_smiling on a beach", "smiling on a beach"),
        ("3 women on a bench (2)", "3 women on a bench"),
        ("smiling - Copy (2)", "smiling"),
        ("2023-01-31 anna on the beach", "anna on the beach"),
        ("été à la plage", "été à la plage"),
        ("e\u0301te\u0301", "été"),
        ("日本_の_山", "日本 の 山"),
        ("smile 😀", "smile 😀"),
        *((name, "") for name in ("IMG_1234", "IMG_1234 (1)", "DSC01234", "P1010001", "7", "_")),
        *((name, "") for name in ("PXL_20230131_123456789", "IMG-20230131-WA0001", "photo")),
        ("😀", ""),
        ("WhatsApp Image 2023-01-31 at 12.00.01", ""),
        ("Screenshot 2024-05-05 at 10.10.10", ""),
        ("3f2a9c1b-4f3c-4a5b-8c6d-1234567890ab", ""),
    ],
)
def test_the_words_of_a_files_name(stem: str, words: str) -> None:
    captioner = load_filename(CaptionerOptions())
    assert captioner.caption(photo(Path(f"{stem}.jpg")), no_picture, "face") == words


@given(st.text(st.characters(), max_size=60))
def test_any_name_gives_one_line_that_can_be_written(stem: str) -> None:
    words = words_of(stem)
    assert words.encode("utf-8").decode("utf-8") == words == " ".join(words.split())
    assert "_" not in words
    assert words_of(words) in (words, words_of(words_of(words)))


def test_a_name_of_the_file_system_that_is_no_text(tmp_path: Path) -> None:
    name = b"smiling\xff_anna".decode("utf-8", "surrogateescape")
    assert words_of(name) == "smiling anna"


# -- our own


def test_written_captions_are_read_back_by_a_run(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    draw_avatar(*looks(71_000_001), 64).save(folder / "a.png")
    out = cli("caption", folder, "--kind", "style").done().out
    assert "Describing photos with our own captioner" in out
    written = (folder / "a.txt").read_text(encoding="utf-8").strip()
    (captioned,) = caption_photos([photo(folder / "a.png")], trigger="zqx", class_noun="style")
    assert (captioned.text, captioned.origin) == (f"zqx style, {written}", "sidecar")
