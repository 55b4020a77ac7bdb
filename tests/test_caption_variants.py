"""Captions that differ from step to step: purity, wildcards, shuffling, dropping, the trigger."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import unhurried
from trainer.config.photo_settings import CaptionSettings
from trainer.data.caption_text import glue_of, one_line, split_tags
from trainer.data.caption_variants import CaptionStyle, dress, vary
from trainer.data.captions import caption_photos
from trainer.types import Photo, Size

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "captions.md"
SHUFFLED = CaptionStyle("zqx", "man", shuffle_tags=True)
DROPPED = CaptionStyle("zqx", "man", tag_dropout=0.3)
WILD = CaptionStyle("zqx", "man", wildcards=True)
LETTERS = tuple("abcdefgh")


def steps(texts: tuple[str, ...], style: CaptionStyle, count: int = 200) -> list[str]:
    return [vary(texts, style, seed=7, step=step, key="photo") for step in range(count)]


def tags() -> st.SearchStrategy[list[str]]:
    words = st.sampled_from([*LETTERS, "red hat", "zqx", "ZQX smiles", "zqxy", "é", "{x}"])
    return st.lists(words, min_size=0, max_size=8)


def styles() -> st.SearchStrategy[CaptionStyle]:
    ends = st.sampled_from(["", "best", "photo of {trigger}", "grain, zqx", "{p|q, r}", "zqx"])
    return st.builds(
        CaptionStyle,
        trigger=st.just("zqx"),
        class_noun=st.sampled_from(["man", "", "zqx man"]),
        prefix=ends,
        suffix=ends,
        separator=st.sampled_from([",", ";", " | "]),
        shuffle_tags=st.booleans(),
        keep_tags=st.integers(0, 3),
        tag_dropout=st.sampled_from([0.0, 0.5, 1.0]),
        wildcards=st.booleans(),
    )


def choices() -> st.SearchStrategy[str]:
    """Well-formed wildcards, one in another too."""
    leaf = st.sampled_from(["red", "zqx", "", " blue ", "a, b", "{x}", "\\{", "\\|"])
    return st.recursive(
        leaf,
        lambda inner: st.lists(inner, min_size=2, max_size=3).map(lambda c: f"{{{'|'.join(c)}}}"),
    )


@unhurried
@given(tags(), st.lists(choices(), max_size=2), styles(), st.integers(0, 5))
def test_the_trigger_is_there_exactly_once_whatever_is_done(
    words: list[str], wild: list[str], style: CaptionStyle, step: int
) -> None:
    text = dress(one_line(glue_of(style.separator).join([*words, *wild])), style)
    varied = vary((text,), style, seed=1, step=step, key="photo")
    whole = re.findall(r"(?<!\w)zqx(?!\w)", varied, re.IGNORECASE)
    assert whole == ["zqx"]
    assert varied == " ".join(varied.split())
    untidy = re.compile(r",\s*,|\s,|^[,;]|[,;]$")
    assert not untidy.search(varied) or untidy.search(text)


@unhurried
@given(tags(), st.integers(0, 4), st.integers(0, 20))
def test_shuffling_keeps_every_tag_and_the_first_ones_in_place(
    words: list[str], keep: int, step: int
) -> None:
    style = replace(SHUFFLED, keep_tags=keep)
    text = dress(", ".join(words), style)
    before = split_tags(text)
    after = split_tags(vary((text,), style, seed=3, step=step, key="photo"))
    assert Counter(after) == Counter(before)
    assert after[:keep] == before[:keep]
    (place,) = [number for number, tag in enumerate(before) if re.search(r"\bzqx\b", tag)]
    assert after[place] == before[place]


@unhurried
@given(tags(), st.integers(0, 4), st.floats(0, 1), st.integers(0, 20))
def test_dropping_keeps_the_first_tags_the_trigger_and_the_order(
    words: list[str], keep: int, dropout: float, step: int
) -> None:
    style = replace(DROPPED, keep_tags=keep, tag_dropout=dropout)
    before = split_tags(dress(", ".join(words), style))
    after = split_tags(vary((", ".join(before),), style, seed=3, step=step, key="photo"))
    assert after[:keep] == before[:keep]
    rest = iter(before)
    assert all(tag in rest for tag in after)
    assert sum("zqx" in tag.split() for tag in after) == 1


@unhurried
@given(st.lists(choices(), min_size=1, max_size=3), styles(), st.integers(0, 20))
def test_nothing_is_left_of_wildcards(wild: list[str], style: CaptionStyle, step: int) -> None:
    style = replace(style, wildcards=True, separator=",", suffix="")
    text = dress(f"a {' '.join(wild)} hat", style)
    varied = vary((text,), style, seed=1, step=step, key="photo")
    plain = varied.replace("{x}", "")
    if "\\" not in text:
        assert not set("{|}") & set(plain)
    assert "\\" not in varied


def test_each_choice_of_a_wildcard_comes_about_as_often_as_the_others() -> None:
    texts = ("zqx in a {red|dark {blue|green}|} hat",)
    counts = Counter(steps(texts, WILD, 1200))
    assert set(counts) == {
        "zqx in a red hat",
        "zqx in a dark blue hat",
        "zqx in a dark green hat",
        "zqx in a hat",
    }
    assert counts["zqx in a red hat"] == pytest.approx(400, abs=60)
    assert counts["zqx in a hat"] == pytest.approx(400, abs=60)
    assert counts["zqx in a dark blue hat"] == pytest.approx(200, abs=50)


@pytest.mark.parametrize(
    ("text", "possible"),
    [
        ("zqx, {red|}, hat", {"zqx, red, hat", "zqx, hat"}),
        ("zqx {red|} , hat", {"zqx red, hat", "zqx, hat"}),
        ("zqx, {|hat}", {"zqx", "zqx, hat"}),
        ("zqx {x} {a|a}", {"zqx {x} a"}),
        ("zqx \\{a\\|b\\} {c|d\\|e}", {"zqx {a|b} c", "zqx {a|b} d|e"}),
        ("zqx { {a|b}", {"zqx { a", "zqx { b"}),
        ("zqx a|b} {c|c}", {"zqx a|b} c"}),
        ("{zqx smiles|a man waves}", {"zqx smiles", "zqx man, a man waves"}),
        ("{zqx smiles|zqx waves}", {"zqx smiles", "zqx waves"}),
        ("zqx, {a|b, zqx}", {"zqx, a", "zqx, b"}),
    ],
)
def test_what_wildcards_become(text: str, possible: set[str]) -> None:
    assert set(steps((dress(text, WILD),), WILD, 60)) == possible


def test_wildcards_are_left_alone_unless_asked_for() -> None:
    assert set(steps(("zqx, {a|b}, \\{",), SHUFFLED, 40)) == {
        "zqx, {a|b}, \\{",
        "zqx, \\{, {a|b}",
    }


def test_a_prefix_and_a_suffix_stay_whole_and_in_place() -> None:
    style = CaptionStyle(
        "zqx",
        "man",
        prefix="best, photo of {trigger}",
        suffix="film, {sharp|soft}, by zqx",
        shuffle_tags=True,
        tag_dropout=0.5,
        wildcards=True,
    )
    text = dress("a, b, c", style)
    found = steps((text,), style)
    pattern = r"best, photo of zqx(, [abc])*, film, (sharp|soft), by"
    assert all(re.fullmatch(pattern, caption) for caption in found)
    assert len(set(found)) > 20


@pytest.mark.parametrize(
    ("prefix", "suffix", "expected"),
    [
        ("p, q", "r, s", r"p, q, zqx man, [ab], [ab], r, s"),
        ("ZQX, q", "r, zqx", r"zqx, q, [ab], [ab], r"),
        ("", "by {trigger}, s", r"[ab], [ab], by zqx, s"),
        ("zqx, zqx p", "", r"zqx, p, [ab], [ab]"),
    ],
)
def test_tags_are_shuffled_between_prefix_and_suffix(
    prefix: str, suffix: str, expected: str
) -> None:
    style = replace(SHUFFLED, prefix=prefix, suffix=suffix)
    found = set(steps((dress("a, b", style),), style))
    assert len(found) == 2
    assert all(re.fullmatch(expected, caption) for caption in found)


def test_every_order_comes_about_as_often() -> None:
    counts = Counter(steps(("zqx, a, b, c",), SHUFFLED, 1200))
    assert len(counts) == 6
    assert all(count == pytest.approx(200, abs=50) for count in counts.values())


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_the_share_of_dropped_tags_is_as_asked(dropout: float) -> None:
    style = replace(DROPPED, tag_dropout=dropout)
    text = ", ".join(("zqx", *LETTERS))
    counts = Counter(tag for caption in steps((text,), style, 600) for tag in split_tags(caption))
    assert counts.pop("zqx") == 600
    for letter in LETTERS:
        assert counts[letter] / 600 == pytest.approx(1 - dropout, abs=0.06)


def test_each_of_several_texts_comes_about_as_often() -> None:
    texts = ("zqx,a", "zqx smiles", "zqx, zqx")
    counts = Counter(steps(texts, CaptionStyle("zqx", "man"), 1200))
    assert set(counts) == set(texts)  # as they are: nothing about them is to be changed
    assert all(count == pytest.approx(400, abs=60) for count in counts.values())


def test_what_is_drawn_depends_on_seed_step_and_key_alone() -> None:
    texts = ("zqx, " + ", ".join(LETTERS), "zqx, {red|blue|green} hat, a, b")
    style = CaptionStyle("zqx", "man", shuffle_tags=True, tag_dropout=0.3, wildcards=True)
    runs = [steps(texts, style), steps(texts, style)]
    assert runs[0] == runs[1]
    assert vary(texts, style, 7, 150, "photo") == runs[0][150]
    others = [vary(texts, style, 7, step, "photo+flip") for step in range(200)]
    seeds = [vary(texts, style, 8, step, "photo") for step in range(200)]
    for other in (others, seeds, runs[0][1:]):
        assert sum(a == b for a, b in zip(runs[0], other, strict=False)) < 20


def test_captions_drawn_today_are_drawn_tomorrow() -> None:
    """A checkpoint goes on with the captions it would have had, in a later release too."""
    style = CaptionStyle("zqx", "man", shuffle_tags=True, tag_dropout=0.3, wildcards=True)
    texts = ("zqx, {red|blue} hat, a, b, c, d", "zqx waves, e, f, g")
    assert steps(texts, style, 4) == [
        "zqx, c, a, blue hat",
        "zqx waves, f, g",
        "zqx, d, b, a",
        "zqx waves, g, f",
    ]


def test_one_setting_does_not_move_the_draws_of_another() -> None:
    texts = ("zqx, {red|blue|green} hat, a, b, c, d", "zqx, {one|two} hats, e, f, g, h")
    wild = CaptionStyle("zqx", "man", wildcards=True)
    both = replace(wild, shuffle_tags=True)
    all_three = replace(both, tag_dropout=0.4)
    pairs = zip(steps(texts, wild), steps(texts, both), steps(texts, all_three), strict=True)
    for chosen, shuffled, dropped in pairs:
        assert sorted(split_tags(shuffled)) == sorted(split_tags(chosen))
        left = set(split_tags(dropped))
        assert split_tags(dropped) == tuple(tag for tag in split_tags(shuffled) if tag in left)
    ended = replace(all_three, prefix="{x|y|z}")
    bodies = [
        text.split(", ", 1)[1] for text in steps(tuple(dress(t, ended) for t in texts), ended)
    ]
    assert bodies == steps(texts, all_three)


@pytest.mark.parametrize(
    ("texts", "style"),
    [
        (("zqx,a , b",), CaptionStyle("zqx", "man")),
        (("zqx,a",), SHUFFLED),
        (("a,zqx,b",), replace(SHUFFLED, keep_tags=1)),
        (("zqx,a", "zqx,a"), CaptionStyle("zqx", "man")),
        (("zqx,a",), replace(DROPPED, keep_tags=2)),
        (("zqx",), replace(DROPPED, tag_dropout=1.0)),
        (("p,q, zqx",), replace(SHUFFLED, tag_dropout=0.5, prefix="p,q")),
        (("zqx {x} a|b",), WILD),
        (("zqx {a|b}",), CaptionStyle("zqx", "man")),
    ],
)
def test_where_nothing_varies_the_text_stays_as_it_is(
    texts: tuple[str, ...], style: CaptionStyle
) -> None:
    assert not style.varies(texts)
    assert set(steps(texts, style, 20)) == {texts[0]}


@pytest.mark.parametrize(
    ("texts", "style"),
    [
        (("zqx, a, b",), SHUFFLED),
        (("zqx, a",), DROPPED),
        (("zqx", "zqx smiles"), CaptionStyle("zqx", "man")),
        (("zqx {a|b}",), WILD),
        (("zqx man, zqx {a|b}",), replace(WILD, prefix="p")),
        (("a, b",), CaptionStyle("", "man", shuffle_tags=True)),
    ],
)
def test_where_something_varies_texts_differ(texts: tuple[str, ...], style: CaptionStyle) -> None:
    assert style.varies(texts)
    assert len(set(steps(texts, style))) > 1


def test_pictures_of_the_class_get_no_trigger() -> None:
    style = CaptionStyle("", "man", suffix="by {trigger}", shuffle_tags=True, wildcards=True)
    text = dress("a {red|blue} hat, b", style)
    assert text == "a {red|blue} hat, b, by"
    assert set(steps((text,), style)) == {
        "a red hat, b, by",
        "a blue hat, b, by",
        "b, a red hat, by",
        "b, a blue hat, by",
    }


def test_another_separator_leaves_commas_alone() -> None:
    style = replace(SHUFFLED, separator=" | ")
    found = set(steps((dress("a, b | c, d", style),), style))
    assert found == {"zqx man | a, b | c, d", "zqx man | c, d | a, b"}
    blank = replace(SHUFFLED, separator=" ")
    assert set(steps((dress("a b", blank),), blank)) == {
        f"zqx {rest}" for rest in ("man a b", "man b a", "a man b", "a b man", "b man a", "b a man")
    }


def examples() -> list[str]:
    return re.findall(r"```captions\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_guide_has_examples() -> None:
    assert len(examples()) >= 9


@pytest.mark.parametrize("example", examples())
def test_what_the_guide_says_is_what_is_trained(example: str, tmp_path: Path) -> None:
    lines = example.splitlines()
    given = "\n".join(line for line in lines if line.startswith("caption."))
    file = [line.removeprefix("file: ") for line in lines if line.startswith("file: ")]
    promised = {line.removeprefix("-> ") for line in lines if line.startswith("-> ")}
    settings = CaptionSettings(class_noun="woman", **tomllib.loads(given).get("caption", {}))
    names = ("prefix", "suffix", "separator", "shuffle_tags", "keep_tags", "tag_dropout")
    values = {name: getattr(settings, name) for name in (*names, "wildcards")}
    style = CaptionStyle(settings.trigger, settings.class_noun, **values)
    (tmp_path / "a.txt").write_text("\n".join(file), encoding="utf-8")
    (captioned,) = caption_photos(
        [Photo(tmp_path / "a.jpg", Size(64, 64), "0" * 64)],
        trigger=settings.trigger,
        class_noun=settings.class_noun,
        style=style,
        several_lines=settings.several_lines,
    )
    assert set(steps(captioned.texts, style, 600)) == promised
