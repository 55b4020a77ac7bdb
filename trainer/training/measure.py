"""What the samples of a step are measured by: everything that is fitted once at a run's start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from trainer.scoring import Scorer
from trainer.scoring.copying import CopyFinder
from trainer.scoring.drift import drift, looks_blank
from trainer.scoring.reader import PromptReader
from trainer.training.best import StepScores
from trainer.training.preview import PreviewPrompt, decode, draw
from trainer.training.prior import prior_images
from trainer.training.scorer import fit_scorer
from trainer.training.session import Session

# Added to a sample's seed to see what another seed draws.
OTHER_SEED = 500_000


@dataclass(frozen=True, slots=True)
class StepSamples:
    """Pictures of one step, in the order of the prompts; `plain` those without the trigger."""

    shown: tuple[Image.Image, ...]
    plain: tuple[Image.Image, ...]

    @property
    def blank(self) -> int:
        """How many of them are of one colour."""
        return sum(looks_blank(image) for image in (*self.shown, *self.plain))


@dataclass(frozen=True, slots=True)
class Measures:
    """Fitted to a run's photos and base.

    scorer: of likeness or style. copies: knows the photos. reader: None where nothing can read
    samples. prompts: all prompts of the samples. plain: those with the trigger, without it.
    before: the base's plain samples. reseeded: the same with other seeds, the measure of drift.
    """

    scorer: Scorer
    copies: CopyFinder
    reader: PromptReader | None
    prompts: tuple[PreviewPrompt, ...]
    plain: tuple[PreviewPrompt, ...]
    before: tuple[Image.Image, ...]
    reseeded: tuple[Image.Image, ...]

    def score(self, step: int, samples: StepSamples, *, saved: bool) -> StepScores:
        """Score the samples of a step; `saved`: whether its weights have a file."""
        triggered = [
            image
            for prompt, image in zip(self.prompts, samples.shown, strict=True)
            if prompt.triggered
        ]
        copies = self.copies.copies(triggered)
        return StepScores(
            step=step,
            trigger=_mean(self.scorer.score(triggered)),
            plain=_mean(self.scorer.score(samples.plain)),
            drift=drift(self.before, samples.plain, self.reseeded),
            following=self._following(triggered),
            copying=sum(copies) / len(copies),
            samples=len(triggered),
            blank=samples.blank,
            saved=saved,
        )

    def _following(self, triggered: Sequence[Image.Image]) -> float | None:
        if self.reader is None:
            return None
        # Without the trigger the texts say the same: it is no look that could be read.
        shares = self.reader.follow(triggered, [prompt.text for prompt in self.plain])
        known = [share for share in shares if share is not None]
        return _mean(known) if known else None


def fit_measures(
    session: Session, plain: Sequence[PreviewPrompt], before: Sequence[Image.Image]
) -> Measures:
    """Fit everything; the adapters have to be off, as the base draws here.

    Args:
        plain: the prompts with the trigger, without it; at least one.
        before: what the base draws from them.

    Raises:
        TrainerError: what the score needs is missing or damaged (`fit_scorer`).
    """
    backbone = session.backbone
    # Photos go through the VAE too, so that its softness is not taken for a difference.
    photos = [decode(backbone, sample.latents_Chw[None])[0] for sample in session.encoded.plain]
    # The empty prompt draws anything; the scale is set by other pictures of the class.
    others = prior_images(backbone, [sample for sample in session.encoded.others if sample.text])
    other_seeds = [replace(prompt, seed=prompt.seed + OTHER_SEED) for prompt in plain]
    return Measures(
        scorer=fit_scorer(session.job.config, session.job.facts, photos, others),
        copies=CopyFinder.fit(photos, others),
        reader=PromptReader.load() if session.job.facts.embedded else None,
        prompts=session.prompts,
        plain=tuple(plain),
        before=tuple(before),
        reseeded=tuple(draw(backbone, other_seeds)),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
