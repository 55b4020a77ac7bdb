"""The samples of a run: drawn at a step, kept as PNG files, scored, and laid out as a sheet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.data.opening import PictureError, opened
from trainer.report.contact_sheet import SheetRow, contact_sheet
from trainer.scoring import Scorer
from trainer.training.best import Choice, StepScores, choose
from trainer.training.export import written_step
from trainer.training.learner import disabled, scaled
from trainer.training.measure import Measures, StepSamples, fit_measures
from trainer.training.preview import draw, parameters, save_preview
from trainer.training.run_folder import write_text
from trainer.training.scorer import scorer_name
from trainer.training.session import Session
from trainer.untrusted import read_json

# Samples are 2048 px at most on either side.
_SAMPLE_MEGAPIXELS = 5.0


class Gallery:
    """All samples of a run by step, and their scores.

    Args:
        session: of the run; samples that lie in its folder from before are read back when the run
            goes on, those of later steps are forgotten.

    Attributes:
        prompts: what is drawn. plain: those with the trigger, once more without it.
        steps: the pictures of each step. scores: the scores of each step.
        measures: None where no prompt has the trigger.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.folder = session.job.folder
        self.prompts = session.prompts
        trigger = session.job.config.caption.trigger
        self.plain = tuple(
            prompt.without(trigger) for prompt in session.prompts if prompt.triggered
        )
        self.steps: dict[int, StepSamples] = {}
        self.scores: list[StepScores] = []
        self.measures: Measures | None = None
        self._model = session.job.facts.name
        config = session.job.config
        self._scorer = f"{scorer_name(config, session.job.facts)} {config.preview.scorer_folder}"
        sampler = str(session.backbone.scheduler_config["_class_name"])
        self._sampler = sampler.removesuffix("Scheduler")
        if session.start_step:
            self._read_back(session.start_step)
        with disabled(session.learner.adapters):
            self._draw_before()

    def _draw_before(self) -> None:
        """What the base itself draws, and the scales that it sets."""
        if 0 not in self.steps:
            self.draw_step(0)
        if not self.plain:
            return
        self.measures = fit_measures(self.session, self.plain, self.steps[0].plain)
        # After a crash between drawing and scoring, or with another version's scores.
        for step in sorted(self.steps.keys() - {row.step for row in self.scores}):
            self.score(step)

    @property
    def scorer(self) -> Scorer | None:
        """The score of likeness or style; None where no prompt has the trigger."""
        return self.measures.scorer if self.measures else None

    @property
    def choice(self) -> Choice | None:
        """The best step so far; None before the first save and where nothing is scored."""
        return choose(self.scores, self.session.job.config.run.kind)

    @property
    def words(self) -> list[str]:
        """What is wrong with the samples, for the report; nothing in a normal run."""
        blank = [str(step) for step, samples in sorted(self.steps.items()) if samples.blank]
        return [f"Samples of one colour were drawn at step {', '.join(blank)}."] if blank else []

    def due(self, step: int) -> bool:
        """Whether samples are to be drawn at a step: when it is saved, and as was set."""
        return self._saved(step) or step % self.session.job.config.preview.every_steps == 0

    def _saved(self, step: int) -> bool:
        """Whether a run that nobody stops writes a file at a step."""
        run = self.session.job.config.run
        return step > 0 and (step % run.save_every_steps == 0 or step == run.total_steps)

    def draw_step(self, step: int) -> None:
        """Draw all samples as a file of the weights as they are now would, into `previews/`."""
        session = self.session
        with scaled(session.learner.adapters, session.job.config.adapter.strength):
            images = draw(session.backbone, [*self.prompts, *self.plain])
        # First: what cannot be written is scored and shown all the same.
        self.steps[step] = self._samples(images)
        # Not its parents: a drive that is gone leaves an empty place.
        self.folder.previews.mkdir(exist_ok=True)
        drawn = zip([*self.prompts, *self.plain], self._paths(step), images, strict=True)
        for prompt, path, image in drawn:
            save_preview(path, image, prompt, model=self._model, sampler=self._sampler)

    def score(self, step: int) -> StepScores | None:
        """Score the samples of a step and remember it in `scores.json`; None without measures."""
        if self.measures is None:
            return None
        saved = self._saved(step) and self._has_file(step)
        scores = self.measures.score(step, self.steps[step], saved=saved)
        others = [old for old in self.scores if old.step != step]
        self.scores = sorted([*others, scores], key=lambda row: row.step)
        rows = [asdict(row) for row in self.scores]
        kept = {"scorer": self._scorer, "scores": rows}
        write_text(self.folder.scores, json.dumps(kept, indent=1) + "\n")
        return scores

    def sheet(
        self, *, title: str, subtitle: str, photos: Sequence[Image.Image], more: int
    ) -> Image.Image:
        """The contact sheet: prompts by steps, at most six of them, and the photos above."""
        choice = self.choice
        best = choice.best.step if choice else None
        steps = _spread(sorted(self.steps), 6, best)
        rows = [
            SheetRow(prompt.text, [self.steps[step].shown[number] for step in steps])
            for number, prompt in enumerate(self.prompts)
        ]
        columns = ["before training" if step == 0 else f"step {step}" for step in steps]
        marked = steps.index(best) if best in steps else None
        if marked is not None:
            columns[marked] += " \u00b7 best"
        return contact_sheet(
            rows,
            columns,
            title=title,
            subtitle=subtitle,
            reference=photos,
            more=more,
            marked=marked,
        )

    def _samples(self, images: Sequence[Image.Image]) -> StepSamples:
        count = len(self.prompts)
        return StepSamples(tuple(images[:count]), tuple(images[count:]))

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
        texts = [
            parameters(prompt, model=self._model, sampler=self._sampler)
            for prompt in (*self.prompts, *self.plain)
        ]
        for step in sorted(step for step in found if step <= start_step):
            if images := _read_pictures(self._paths(step), texts):
                self.steps[step] = self._samples(images)
        self.scores = [
            replace(row, saved=row.saved and self._has_file(row.step))
            for row in _read_scores(self.folder.scores, self._scorer)
            if row.step in self.steps
        ]

    def _has_file(self, step: int) -> bool:
        """Whether a step's weights are in a file or about to be; an earlier one's may be lost."""
        return (
            step >= self.session.start_step
            or written_step(self.folder.step_lora(step)) == step
            or written_step(self.folder.best_lora) == step
        )


def open_gallery(session: Session) -> Gallery | None:
    """The gallery of a run with the base's own samples in it; None without previews."""
    return Gallery(session) if session.prompts else None


def _read_pictures(paths: Sequence[Path], texts: Sequence[str]) -> list[Image.Image]:
    """The pictures; none at all if one is missing, damaged or drawn from something else."""
    images = []
    for path, text in zip(paths, texts, strict=True):
        try:
            with opened(path, maximum_megapixels=_SAMPLE_MEGAPIXELS) as image:
                images.append(image.convert("RGB"))
                if image.info.get("parameters") != text:
                    return []
        except PictureError:
            return []
    return images


def _read_scores(path: Path, scorer: str) -> list[StepScores]:
    """The scores that lie in a run's folder; none if they are missing, damaged or by another."""
    try:
        kept: dict[str, Any] = read_json(path)
        if kept["scorer"] != scorer:
            return []
        return [StepScores(**row) for row in kept["scores"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _spread(steps: Sequence[int], count: int, kept: int | None) -> list[int]:
    """At most `count` of the steps, evenly spread, with the first, the last and the one `kept`."""
    if len(steps) <= count:
        return list(steps)
    chosen = [steps[round(n * (len(steps) - 1) / (count - 1))] for n in range(count)]
    if kept is not None and kept not in chosen:
        nearest = min(chosen[1:-1], key=lambda step: abs(step - kept))
        chosen[chosen.index(nearest)] = kept
    return chosen
