"""The samples of a run: drawn at a step, kept as PNG files, scored, and laid out as a sheet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.report.contact_sheet import SheetRow, contact_sheet
from trainer.scoring import SCORERS, Scorer
from trainer.scoring.drift import drift, looks_blank
from trainer.training.learner import disabled
from trainer.training.preview import decode, draw, save_preview
from trainer.training.prior import prior_images
from trainer.training.run_folder import write_text
from trainer.training.session import Session

# Added to a sample's seed to see what another seed draws.
OTHER_SEED = 500_000


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


class Gallery:
    """All samples of a run by step, and their scores.

    Args:
        session: of the run; samples that lie in its folder from before are read back when the run
            goes on, those of later steps are forgotten.

    Attributes:
        prompts: what is drawn. plain: those with the trigger, once more without it.
        steps: the pictures of each step. scores: the scores of each step.
        scorer: None where no prompt has the trigger.
        reseeded: the base's plain samples with other seeds, the measure of drift.
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
        self.scorer: Scorer | None = None
        self.reseeded: tuple[Image.Image, ...] = ()
        if session.start_step:
            self._read_back(session.start_step)
        with disabled(session.learner.adapters):
            self._draw_before()

    def _draw_before(self) -> None:
        """What the base itself draws, and the scale that it sets."""
        if 0 not in self.steps:
            self.draw_step(0)
        if not self.plain:
            return
        session = self.session
        # Photos go through the VAE too, so that its softness is not taken for a difference.
        photos = [
            decode(session.backbone, sample.latents_Chw[None])[0]
            for sample in session.encoded.photos
            if not sample.key.endswith("+flip")
        ]
        others = prior_images(session.backbone, session.encoded.prior)
        kind = "style" if session.job.config.run.kind == "style" else "likeness"
        self.scorer = SCORERS.load(kind).fit(photos, others)
        others_seeds = [replace(prompt, seed=prompt.seed + OTHER_SEED) for prompt in self.plain]
        self.reseeded = tuple(draw(session.backbone, others_seeds))
        if not any(row.step == 0 for row in self.scores):
            self.score(0)

    def draw_step(self, step: int) -> None:
        """Draw all samples as the model is now and write them to `previews/`."""
        backbone, model = self.session.backbone, self.session.job.facts.name
        images = draw(backbone, [*self.prompts, *self.plain])
        count = len(self.prompts)
        samples = StepSamples(tuple(images[:count]), tuple(images[count:]))
        sampler = type(backbone.pipeline().scheduler).__name__.removesuffix("Scheduler")
        pairs = zip([*self.prompts, *self.plain], self._paths(step), images, strict=True)
        for prompt, path, image in pairs:
            save_preview(path, image, prompt, model=model, sampler=sampler)
        self.steps[step] = samples

    def blank(self, step: int) -> int:
        """How many samples of a step are of one colour."""
        samples = self.steps[step]
        return sum(looks_blank(image) for image in (*samples.shown, *samples.plain))

    def score(self, step: int) -> StepScores | None:
        """Score the samples of a step and remember it in `scores.json`; None without a scorer."""
        if self.scorer is None:
            return None
        scorer = self.scorer
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
            drift=drift(first.plain, samples.plain, self.reseeded),
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
            if images := _read_pictures(paths):
                count = len(self.prompts)
                self.steps[step] = StepSamples(tuple(images[:count]), tuple(images[count:]))
        self.scores = [
            scores for scores in _read_scores(self.folder.scores) if scores.step in self.steps
        ]


def open_gallery(session: Session) -> Gallery | None:
    """The gallery of a run with the base's own samples in it; None without previews."""
    return Gallery(session) if session.prompts else None


def _read_pictures(paths: Sequence[Path]) -> list[Image.Image]:
    """The pictures; none at all if one of them is missing or damaged."""
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError):  # what Pillow raises on a damaged PNG
            return []
    return images


def _read_scores(path: Path) -> list[StepScores]:
    """The scores that lie in a run's folder; none if they are missing or damaged."""
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return [StepScores(**row) for row in rows]
    except (OSError, ValueError, TypeError):
        return []


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _spread(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly spread, with the first and the last."""
    if len(steps) <= count:
        return list(steps)
    return [steps[round(n * (len(steps) - 1) / (count - 1))] for n in range(count)]
