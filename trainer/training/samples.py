"""The samples of a run: drawn at a step, kept as PNG files, scored, and laid out as a sheet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.families import Backbone
from trainer.report.contact_sheet import SheetRow, contact_sheet
from trainer.scoring import SCORERS, Scorer
from trainer.scoring.drift import drift, looks_blank
from trainer.training.preview import PreviewPrompt, draw, save_preview
from trainer.training.run_folder import RunFolder, write_text


@dataclass(frozen=True, slots=True)
class StepScores:
    """Scores of the samples of one step; 0 = other pictures of the class, 1 = the photos.

    trigger: mean of the samples with the trigger word. plain: mean of the same prompts and seeds
    without it. drift: how far the latter have moved from the base's (0 not at all, 1 as far as
    another seed moves them).
    """

    step: int
    trigger: float
    plain: float
    drift: float


@dataclass(frozen=True, slots=True)
class StepSamples:
    """Pictures of one step, in the order of the prompts; `plain` those without the trigger."""

    shown: tuple[Image.Image, ...]
    plain: tuple[Image.Image, ...]


class SampleBook:
    """All samples of a run, by step.

    Args:
        folder: of the run; what lies there from before is read back when a run goes on.
        prompts: the prompts file.
        trigger: the trigger word.
        model: name of the base, for the pictures' text.
        start_step: samples of later steps are forgotten.
    """

    def __init__(
        self,
        folder: RunFolder,
        prompts: Sequence[PreviewPrompt],
        trigger: str,
        model: str,
        start_step: int,
    ) -> None:
        self.folder = folder
        self.prompts = tuple(prompts)
        self.plain = tuple(prompt.without(trigger) for prompt in prompts if prompt.triggered)
        self.model = model
        self.steps: dict[int, StepSamples] = {}
        self.scores: list[StepScores] = []
        self.reseeded: list[Image.Image] = []
        if start_step:
            self._read_back(start_step)

    def draw_step(self, backbone: Backbone, step: int) -> StepSamples:
        """Draw all samples as the model is now and write them to `previews/`."""
        images = draw(backbone, [*self.prompts, *self.plain])
        count = len(self.prompts)
        samples = StepSamples(tuple(images[:count]), tuple(images[count:]))
        sampler = type(backbone.pipeline().scheduler).__name__.removesuffix("Scheduler")
        pairs = zip([*self.prompts, *self.plain], self._paths(step), images, strict=True)
        for prompt, path, image in pairs:
            save_preview(path, image, prompt, model=self.model, sampler=sampler)
        self.steps[step] = samples
        return samples

    def blank(self, step: int) -> int:
        """How many samples of a step are of one colour."""
        samples = self.steps[step]
        return sum(looks_blank(image) for image in (*samples.shown, *samples.plain))

    def score(self, scorer: Scorer, step: int, reseeded: Sequence[Image.Image]) -> StepScores:
        """Score the samples of a step and remember it in `scores.json`.

        Args:
            reseeded: the plain samples of the base with other seeds, the measure of drift.
        """
        samples, first = self.steps[step], self.steps[0]
        triggered = [
            image
            for prompt, image in zip(self.prompts, samples.shown, strict=True)
            if prompt.triggered
        ]
        scores = StepScores(
            step=step,
            trigger=_mean(scorer.score(triggered)),
            plain=_mean(scorer.score(samples.plain)),
            drift=drift(first.plain, samples.plain, reseeded),
        )
        self.scores = [*(old for old in self.scores if old.step < step), scores]
        rows = [asdict(row) for row in self.scores]
        write_text(self.folder.scores, json.dumps(rows, indent=1) + "\n")
        return scores

    def sheet(self, title: str, subtitle: str, photos: Sequence[Image.Image]) -> Image.Image:
        """The contact sheet: prompts by steps, at most six of them, and the photos above."""
        steps = _spread(sorted(self.steps), 6)
        rows = [
            SheetRow(prompt.text, [self.steps[step].shown[number] for step in steps])
            for number, prompt in enumerate(self.prompts)
        ]
        columns = ["before training" if step == 0 else f"step {step}" for step in steps]
        return contact_sheet(rows, columns, title=title, subtitle=subtitle, reference=photos)

    def _paths(self, step: int) -> list[Path]:
        names = [f"{n:02d}" for n in range(1, len(self.prompts) + 1)]
        names += [f"{n:02d}-without-trigger" for n in range(1, len(self.plain) + 1)]
        return [self.folder.previews / f"step-{step:06d}_{name}.png" for name in names]

    def _read_back(self, start_step: int) -> None:
        found = {
            int(path.name[5:11])
            for path in self.folder.previews.glob("step-??????_01.png")
            if path.name[5:11].isdigit()
        }
        for step in sorted(step for step in found if step <= start_step):
            paths = self._paths(step)
            if all(path.is_file() for path in paths):
                images = []
                for path in paths:
                    with Image.open(path) as image:
                        images.append(image.convert("RGB"))
                count = len(self.prompts)
                self.steps[step] = StepSamples(tuple(images[:count]), tuple(images[count:]))
        if self.folder.scores.is_file():
            rows: list[dict[str, Any]] = json.loads(self.folder.scores.read_text(encoding="utf-8"))
            scores = [StepScores(**row) for row in rows]
            self.scores = [score for score in scores if score.step <= start_step]


def fit_scorer(kind: str, photos: Sequence[Image.Image], others: Sequence[Image.Image]) -> Scorer:
    """The score that suits a kind of training (`face`, `style`)."""
    scorer: Scorer = SCORERS.load("style" if kind == "style" else "likeness").fit(photos, others)
    return scorer


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _spread(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly spread, with the first and the last."""
    if len(steps) <= count:
        return list(steps)
    return [steps[round(n * (len(steps) - 1) / (count - 1))] for n in range(count)]
