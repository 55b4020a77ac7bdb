"""The choice of the best step: by its total, with a reason and advice that say what is so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.training.best import CHANCE, FACE, STYLE, Choice, StepScores, choose, total, weights_of

BASE = StepScores(
    step=0,
    trigger=0.05,
    plain=0.0,
    drift=0.0,
    following=0.9,
    copying=0.0,
    samples=7,
    blank=0,
    saved=False,
)


def row(step: int, trigger: float, **changes: Any) -> StepScores:
    """A saved step without faults but those that are given."""
    return replace(BASE, step=step, trigger=trigger, saved=True, **changes)


def chosen(rows: Sequence[StepScores], kind: str = "face") -> Choice:
    choice = choose([BASE, *rows], kind)
    assert choice is not None
    return choice


def test_the_total_is_the_sum_of_its_parts() -> None:
    """By hand: 0.9 - 0.2 - (0.9 - 0.8) - 0.3 / 2 - 1 / 7, rounded."""
    faulty = row(100, 0.9, plain=0.2, following=0.8, drift=0.3, copying=1 / 7)
    assert total(faulty, BASE, FACE) == pytest.approx(0.31)
    # A style: 0.9 - 0.2 / 4 - 0.1 - 1 / 7; drift does not count.
    assert total(faulty, BASE, STYLE) == pytest.approx(0.61)
    assert (weights_of("face"), weights_of("style")) == (FACE, STYLE)


def test_what_gets_better_adds_nothing() -> None:
    """Likeness beyond the photos, less leak and more following than before are no merits."""
    plain = total(row(100, 1.0), BASE, FACE)
    assert total(row(100, 1.4, plain=-0.3, following=1.0), BASE, FACE) == plain == 1.0
    assert total(row(100, 1.0, following=None), BASE, FACE) == plain


def test_the_best_is_the_highest_total_and_the_last_of_those_that_chance_may_order() -> None:
    rows = [row(100, 0.6), row(200, 0.9), row(300, 0.87), row(400, 0.95, plain=0.3)]
    choice = chosen(rows)
    assert choice.best.step == 300
    assert choice.totals == {100: 0.6, 200: 0.9, 300: 0.87, 400: 0.65}
    assert chosen([*rows[:2], row(300, 0.86)]).best.step == 200


def test_blank_and_unsaved_steps_are_never_chosen() -> None:
    rows = [row(100, 0.5), row(200, 1.0, blank=1), replace(row(250, 1.0), saved=False)]
    choice = chosen(rows)
    assert choice.best.step == 100
    assert choice.totals == {100: 0.5}
    assert "Left out for blank samples: step 200." in choice.reason
    assert choose([BASE, *rows[1:]], "face") is None
    assert choose([BASE], "face") is None
    assert choose([], "face") is None


def test_the_reason_names_what_the_last_step_has_and_lacks() -> None:
    choice = chosen([row(100, 0.5), row(300, 0.92), row(400, 0.93, copying=3 / 7)])
    assert choice.reason == (
        "Step 300 is the best of 3: likeness 0.92 and prompts without the trigger stay as they "
        "were; step 400 gains 0.01 likeness, but copies a photo in 3 of 7 samples."
    )


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ({"plain": 0.4}, "step 400 leaks 0.40 more into prompts without the trigger"),
        ({"following": 0.75}, "step 400 follows prompts 15 points less"),
        ({"following": 0.862}, "step 400 follows prompts 4 points less"),
        ({"drift": 0.25}, "step 400 moves other pictures 0.25 more"),
        ({"trigger": 0.7}, "step 400 has 0.22 less likeness"),
        (
            {"trigger": 0.99, "plain": 0.1, "following": 0.7, "copying": 1 / 7},
            "step 400 gains 0.07 likeness, but follows prompts 20 points less and copies a photo "
            "in 1 of 7 samples",
        ),
    ],
)
def test_the_reason_tells_each_difference(last: dict[str, Any], words: str) -> None:
    changes = {"trigger": 0.92, **last}
    choice = chosen([row(300, 0.92), row(400, **changes)])
    assert choice.best.step == 300
    assert choice.reason.endswith(f"; {words}.")


def test_the_last_step_is_compared_with_the_next_best() -> None:
    choice = chosen([row(100, 0.3), row(200, 0.8, copying=1 / 7), row(300, 0.7)])
    assert choice.reason.endswith(
        "; step 200 gains 0.10 likeness, but copies a photo in 1 of 7 samples."
    )
    fewer = chosen([row(100, 0.3), row(200, 0.95, copying=1 / 7)])
    assert fewer.reason.endswith("; step 100 copies none, but has 0.65 less likeness.")


def test_a_single_step_is_not_called_the_best_of_one() -> None:
    reason = chosen([row(100, 0.6)]).reason
    assert reason.startswith("Step 100 is the only one to choose from: likeness 0.60")


def test_the_reason_says_what_is_wrong_with_the_best() -> None:
    leaking = chosen([row(100, 0.9, plain=0.5, following=0.7, copying=1 / 7)]).reason
    assert "prompts without the trigger take on 0.50 of it" in leaking
    assert "prompts are followed 20 points less than before" in leaking
    assert "1 of 7 samples copy a photo" in leaking
    moved = chosen([row(100, 0.9, drift=0.6)]).reason
    assert "prompts without the trigger changed, but not towards your photos" in moved
    assert "style 0.90" in chosen([row(100, 0.9)], "style").reason


def test_a_styles_leak_counts_little() -> None:
    rows = [row(100, 0.4, plain=0.3), row(200, 1.0, plain=0.8, drift=0.9)]
    assert chosen(rows, "style").best.step == 200
    assert chosen(rows, "face").best.step == 100


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row(100, 0.1), row(200, 0.1)], "Hardly anything was learned"),
        ([row(100, 0.9), row(200, 0.95, copying=2 / 7)], "more training only copies your photos"),
        (
            [row(100, 0.5), row(200, 0.95, copying=4 / 7)],
            "After step 100 the samples begin to repeat your photos",
        ),
        ([row(100, 0.9, copying=1 / 7)], "Even the best step repeats photos"),
        ([row(100, 0.9), row(200, 0.95, plain=0.3)], "take on the likeness too"),
        ([row(100, 0.9, plain=0.3), row(200, 0.9, plain=0.5)], "Even at the best step prompts"),
        ([row(100, 0.5), row(200, 0.8)], "more steps may give more (--set run.total_steps=300)"),
        ([row(100, 0.5), row(200, 0.52), row(300, 0.53)], ""),
        ([row(100, 0.9), row(200, 0.8)], ""),
        ([row(100, 0.9)], ""),
        ([row(100, 1.2), row(200, 1.4)], ""),
    ],
)
def test_advice_comes_where_it_applies(rows: list[StepScores], words: str) -> None:
    advice = chosen(rows).advice
    assert words in advice
    assert bool(words) == bool(advice)


def test_steps_between_saves_count_for_advice() -> None:
    between = replace(row(150, 0.55), saved=False)
    assert "still rising" in chosen([row(100, 0.3), between, row(200, 0.8)]).advice
    level = replace(row(150, 0.79), saved=False)
    assert chosen([row(100, 0.3), level, row(200, 0.8)]).advice == ""


def test_a_style_is_not_blamed_for_showing_without_its_trigger() -> None:
    assert chosen([row(100, 0.9), row(200, 0.91, plain=0.9)], "style").advice == ""


SCORES = st.builds(
    StepScores,
    step=st.integers(1, 10**6),
    trigger=st.floats(-2, 2),
    plain=st.floats(-2, 2),
    drift=st.floats(0, 2),
    following=st.none() | st.floats(0, 1),
    copying=st.integers(0, 7).map(lambda copies: copies / 7),
    samples=st.just(7),
    blank=st.integers(0, 1),
    saved=st.booleans(),
)


@given(
    rows=st.lists(SCORES, min_size=1, max_size=6, unique_by=lambda row: row.step),
    kind=st.sampled_from(["face", "style"]),
)
def test_every_choice_is_sound_and_can_be_told(rows: list[StepScores], kind: str) -> None:
    rows = sorted(rows, key=lambda row: row.step)
    choice = choose([BASE, *rows], kind)
    sound = [row for row in rows if row.saved and not row.blank]
    assert (choice is None) == (not sound)
    if choice is None:
        return
    best = choice.totals[choice.best.step]
    assert choice.totals.keys() == {row.step for row in sound}
    enough = max(choice.totals.values()) - CHANCE - 1e-9
    assert best >= enough
    assert all(value < enough for step, value in choice.totals.items() if step > choice.best.step)
    assert choice.reason.startswith(f"Step {choice.best.step} is the ")
    # A run that goes on from any step comes to the same choice: steps are added one by one.
    so_far = [choose([BASE, *rows[:count]], kind) for count in range(1, len(rows) + 1)]
    steps = [one.best.step for one in so_far if one]
    assert steps == sorted(steps)
    assert steps[-1] == choice.best.step
