"""A reader of one style: what cannot be read in true drawings is not asked for, the rest counts."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import style_reader
from benchmarks.quality_table import table
from benchmarks.sets import blueprint
from benchmarks.style_reader import (
    StyleRecipe,
    follow,
    judge,
    plain_contexts,
    readable_looks,
)
from pretraining.avatars import draw_avatar
from pretraining.captions import describe_context
from pretraining.looks import sample_identity
from trainer.scoring.reader import PromptReader

COLOURS = {"hat_colour", "clothes_colour", "background_colour"}


@pytest.fixture(scope="module")
def common() -> PromptReader:
    return PromptReader.load()


def drawn(count: int) -> tuple[list[Image.Image], list[str]]:
    """True drawings in the base's own style, and their prompts."""
    contexts = plain_contexts(random.Random("some drawings"), count)
    pictures = [draw_avatar(sample_identity(n), context, 64) for n, context in enumerate(contexts)]
    return pictures, [describe_context(context) for context in contexts]


def test_looks_that_are_misread_in_more_than_a_tenth_do_not_count() -> None:
    assert readable_looks({"hat": 0.9, "mouth": 0.899, "clothes": 1.0}) == {"hat", "clothes"}


def test_only_the_given_looks_are_asked_for(common: PromptReader) -> None:
    pictures, prompts = drawn(24)
    assert follow(common, pictures, prompts, {"clothes", "background"}) > 0.95
    # Another picture's prompt: its clothes are seldom these, and every prompt names some.
    others = prompts[1:] + prompts[:1]
    assert follow(common, pictures, others, {"clothes"}) < 0.5
    wrong = [prompt.replace("wearing", "wearing a crown and") for prompt in prompts]
    hats = follow(common, pictures, wrong, {"hat"})
    assert follow(common, pictures, wrong, {"background"}) > 0.9 > hats + 0.5


def test_colours_count_in_the_styles_of_the_base_and_not_on_blueprints(
    common: PromptReader,
) -> None:
    flat, blue = judge(common, draw_avatar, 40), judge(common, blueprint, 40)
    assert flat.looks >= COLOURS | {"hat", "clothes", "background"}
    assert flat.share > 0.95
    assert not blue.looks & COLOURS
    assert set(blue.by_look) == set(flat.by_look)


def test_it_is_trained_on_the_style_and_kept_for_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = StyleRecipe(pictures=6, others=2, steps=2, batch=4, fresh=8)
    first = style_reader.style_reader("blueprint", blueprint, recipe, tmp_path)
    pictures, labels = style_reader._material(blueprint, recipe)
    assert pictures.shape == (16, 64, 64, 3)
    # No name of a style is taught for a new one; the last two of each half are the base's own.
    assert [row[-1] == -1 for row in labels] == 2 * (6 * [True] + 2 * [False])
    blue = np.asarray(pictures[0], np.float64).mean(axis=(0, 1))
    assert blue[2] > blue[0] + 20

    def never(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(style_reader, "_train", never)
    again = style_reader.style_reader("blueprint", blueprint, recipe, tmp_path)
    assert again.by_look == first.by_look
    with pytest.raises(AssertionError, match="trained again"):
        style_reader.style_reader("blueprint", draw_avatar, recipe, tmp_path)


def test_the_table_shows_what_a_style_reached_beside_what_was_to_be_reached() -> None:
    common_cells = {"set": "ink", "likeness": "0.8", "leak": "0", "drift": "0.2", "looks": "nan"}
    common_cells |= {"following": "0.4"}
    shares = {"style_following": "0.75", "style_base": "0.81", "style_true": "0.97"}
    unknown = dict.fromkeys(shares, "nan")
    rows = [
        common_cells | shares | {"configuration": "new", "copying": "0"},
        common_cells | unknown | {"configuration": "old", "copying": "0"},
    ]
    lines = table(rows, "ink").splitlines()
    assert "| new | 1 | 0.80 | 0.00 | 0.20 | 0.75 | 0.81 | 0.97 | 0.40 | 0.00 |" in lines
    assert "| old | 1 | 0.80 | 0.00 | 0.20 |  |  |  | 0.40 | 0.00 |" in lines
