"""The samples of a step become scores: which sample is measured by what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self, cast

import pytest
from PIL import Image

from trainer.scoring.copying import CopyFinder
from trainer.scoring.reader import PromptReader
from trainer.training.gallery import _spread
from trainer.training.measure import Measures, StepSamples
from trainer.training.preview import PreviewPrompt
from trainer.types import Size


def picture(seed: int) -> Image.Image:
    """Four by four blocks of colours that depend on the seed."""
    pixels = bytes((seed * 37 + 61 * n * (n + seed)) % 256 for n in range(48))
    small = Image.frombytes("RGB", (4, 4), pixels)
    return small.resize((64, 64), Image.Resampling.NEAREST)


@dataclass
class Constant:
    """Scores every picture by its place in the list."""

    photos_scores: tuple[float, ...] = (1.0,)
    others_scores: tuple[float, ...] = (0.0,)

    @classmethod
    def fit(cls, photos: Sequence[Image.Image], others: Sequence[Image.Image]) -> Self:
        return cls()

    def score(self, images: Sequence[Image.Image]) -> list[float]:
        return [float(number) for number in range(len(images))]


@dataclass
class Reader:
    """Answers with what it was given and remembers the prompts."""

    answers: list[float | None]
    asked: list[str]

    def follow(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        assert len(images) == len(prompts)
        self.asked += prompts
        return self.answers


PROMPT = PreviewPrompt("zqx avatar, smiling", "", Size(64, 64), 1, 4.0, 10, triggered=True)
PROMPTS = (
    PROMPT,
    replace(PROMPT, text="avatar, sad", triggered=False),
    replace(PROMPT, text="zqx avatar, laughing"),
    replace(PROMPT, text="zqx avatar, serious"),
)
PHOTOS = [picture(seed) for seed in range(4)]
OTHERS = [picture(seed) for seed in range(10, 16)]


def measures(reader: Reader | None) -> Measures:
    return Measures(
        scorer=Constant(),
        copies=CopyFinder.fit(PHOTOS, OTHERS),
        reader=cast(PromptReader | None, reader),
        prompts=PROMPTS,
        plain=tuple(prompt.without("zqx") for prompt in PROMPTS if prompt.triggered),
        before=tuple(OTHERS[:3]),
        reseeded=tuple(OTHERS[3:]),
    )


SAMPLES = StepSamples(
    shown=(picture(20), PHOTOS[0], PHOTOS[1], picture(21)), plain=tuple(OTHERS[:3])
)


def test_scores_of_the_samples_with_and_without_the_trigger() -> None:
    """The second prompt has no trigger: its sample is a photo and counts for nothing."""
    scores = measures(None).score(40, SAMPLES, saved=True)
    assert scores.trigger == scores.plain == pytest.approx(1.0)  # the mean of 0, 1 and 2
    assert (scores.step, scores.samples, scores.saved) == (40, 3, True)
    assert scores.copies == 1
    assert scores.copying == pytest.approx(1 / 3)
    assert scores.drift == 0
    assert scores.following is None
    assert measures(None).score(40, SAMPLES, saved=False).saved is False


def test_following_is_read_from_the_samples_with_the_trigger() -> None:
    reader = Reader([0.5, None, 1.0], [])
    assert measures(reader).score(1, SAMPLES, saved=True).following == pytest.approx(0.75)
    assert reader.asked == ["avatar, smiling", "avatar, laughing", "avatar, serious"]
    nothing = measures(Reader([None, None, None], [])).score(1, SAMPLES, saved=True)
    assert nothing.following is None


def test_blank_samples_are_counted_wherever_they_are() -> None:
    black = Image.new("RGB", (64, 64))
    shown = (black, *SAMPLES.shown[1:])
    assert measures(None).score(1, replace(SAMPLES, shown=shown), saved=True).blank == 1
    plain = (*SAMPLES.plain[:2], black)
    assert measures(None).score(1, StepSamples(shown, plain), saved=True).blank == 2


def test_a_sheet_of_many_steps_shows_the_best_one() -> None:
    steps = list(range(0, 1100, 100))
    assert _spread(steps, 6, None) == [0, 200, 400, 600, 800, 1000]
    assert _spread(steps, 6, 700) == [0, 200, 400, 700, 800, 1000]
    assert _spread(steps, 6, 100) == [0, 100, 400, 600, 800, 1000]
    assert _spread(steps, 6, 900) == [0, 200, 400, 600, 900, 1000]
    assert _spread(steps, 6, 1000) == _spread(steps, 6, 400) == _spread(steps, 6, None)
    assert _spread([0, 100], 6, 100) == [0, 100]
