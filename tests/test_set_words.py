"""The trigger and class that folder names give: what a run goes by, and still when it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.commands.sets import SO_FAR, photo_sets, with_words_of
from trainer.config.reader import Resolved, build_config, override_layer
from trainer.errors import ConfigError


def folders(tmp_path: Path, *names: str) -> Path:
    for name in names:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "a.jpg").touch()
    return tmp_path


def settings(*overrides: str, origin: str = "command line") -> Resolved:
    typed = [(name, value) for name, _, value in (text.partition("=") for text in overrides)]
    return build_config([override_layer(typed, origin)])


def words(resolved: Resolved) -> tuple[str, str]:
    return resolved.config.caption.trigger, resolved.config.caption.class_noun


def triggers(source: Path, resolved: Resolved) -> list[tuple[str, str]]:
    return [(kept.trigger, kept.class_noun) for kept in photo_sets(source, resolved)]


def going_on(resolved: Resolved) -> Resolved:
    """The settings as a run that goes on reads them: complete, without their origins."""
    trigger, class_noun = words(resolved)
    return settings(f"caption.trigger={trigger}", f"caption.class_noun={class_noun}", origin=SO_FAR)


def test_a_folder_named_for_its_words_names_them_for_the_whole_run(tmp_path: Path) -> None:
    source = folders(tmp_path, "10_zwx old man")
    resolved = with_words_of(source, settings())
    assert words(resolved) == ("zwx", "old man")
    assert "folder" in resolved.origins["caption.trigger"]
    assert triggers(source, resolved) == [("zwx", "old man")]


def test_what_a_person_chose_stands_above_the_folder(tmp_path: Path) -> None:
    source = folders(tmp_path, "10_zwx man")
    resolved = with_words_of(source, settings("caption.trigger=abc"))
    assert words(resolved) == ("abc", "man")
    assert resolved.origins["caption.trigger"] == "command line"


def test_a_plain_folder_changes_no_words(tmp_path: Path) -> None:
    resolved = settings()
    assert with_words_of(folders(tmp_path, "."), resolved) == resolved


@pytest.mark.parametrize("typed", [(), ("caption.trigger=abc",), ("caption.class_noun=dog",)])
def test_a_run_that_goes_on_keeps_its_words(tmp_path: Path, typed: tuple[str, ...]) -> None:
    source = folders(tmp_path, "3_zwx man", "5_qrs woman")
    first = with_words_of(source, settings(*typed))
    again = with_words_of(source, going_on(first))
    assert words(again) == words(first)
    assert triggers(source, again) == triggers(source, first)


def test_a_run_goes_on_though_its_folder_makes_no_trigger(tmp_path: Path) -> None:
    source = folders(tmp_path, "3_a,b man")
    first = with_words_of(source, settings("caption.trigger=abc"))
    assert triggers(source, with_words_of(source, going_on(first))) == [("abc", "man")]


def test_a_word_that_is_no_trigger_is_explained(tmp_path: Path) -> None:
    source = folders(tmp_path, f"3_{'x' * 65} man")
    with pytest.raises(ConfigError, match="the folder's name"):
        with_words_of(source, settings())
