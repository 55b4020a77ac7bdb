"""Which step of a run is the one to take, why in one sentence, and what to do next time.

The last step is the best only by chance: while a subject still comes nearer to the photos, the
samples may begin to repeat the photos, and prompts without the trigger may begin to show it. So
every saved step is scored on the same prompts and seeds, and the scores are put together to a total

    likeness - leak - lost prompt following - drift / 2 - copying

with weights for what is learned (`FACE`, `STYLE`). Everything here is a function of the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# A likeness this far above the one before training is called learned.
CLEARLY = 0.1
# A rise without the trigger up to this is called staying as it was.
LEAK = 0.2
# A drift beyond this is called a change of everything else.
MOVED = 0.5
# A loss of prompt following beyond this is spoken of.
LOST = 0.1
# A likeness that grew this much up to the last step is called still rising.
RISING = 0.05


@dataclass(frozen=True, slots=True)
class StepScores:
    """Scores of the samples of one step; 0 = other pictures of the class, 1 = the photos.

    trigger: mean of the samples with the trigger word. plain: mean of the same prompts and seeds
    without it. drift: how far the latter have moved from the base's (0 not at all, 1 as far as
    another seed moves them). following: share of what the prompts with the trigger name that is to
    be seen; None where nothing reads it. copying: share of the samples with the trigger that
    repeat a photo. samples: how many there are of these. blank: samples of one colour, of all.
    saved: whether this step's weights have a file, so that it can be chosen.
    """

    step: int
    trigger: float
    plain: float
    drift: float
    following: float | None
    copying: float
    samples: int
    blank: int
    saved: bool

    @property
    def likeness(self) -> float:
        """With the trigger word; nearer than the photos themselves is no better."""
        return min(1.0, self.trigger)

    @property
    def copies(self) -> int:
        """How many samples repeat a photo."""
        return round(self.copying * self.samples)


# Totals this near are equal: a handful of samples tells no smaller difference. Of equal steps the
# last is taken, whose rate has fallen furthest; in the runs where it mattered it showed more of the
# subject's looks, as a reader sees them that has no part in the total (benchmarks/LOG.md).
CHANCE = 0.03


@dataclass(frozen=True, slots=True)
class Weights:
    """What each part takes from the total, and the same in words."""

    leak: float
    following: float
    drift: float
    copying: float
    words: str


FACE = Weights(
    leak=1.0,
    following=1.0,
    drift=0.5,
    copying=1.0,
    words="likeness with the trigger (at most 1), minus its rise without the trigger, minus the "
    "share of prompt following lost, minus half of the drift, minus the share of copies",
)
# A style's file is used when that style is wanted, so what it does to other prompts hardly counts.
STYLE = Weights(
    leak=0.25,
    following=1.0,
    drift=0.0,
    copying=1.0,
    words="style with the trigger (at most 1), minus a quarter of its rise without the trigger, "
    "minus the share of prompt following lost, minus the share of copies",
)


@dataclass(frozen=True, slots=True)
class Choice:
    """The best step, why, and what may help next time (empty where there is nothing to say).

    totals: of every step that could have been chosen.
    """

    best: StepScores
    totals: dict[int, float]
    reason: str
    advice: str


def weights_of(kind: str) -> Weights:
    """The weights for what is learned: "face" or "style"."""
    return STYLE if kind == "style" else FACE


def choose(scores: Sequence[StepScores], kind: str) -> Choice | None:
    """The saved step with the highest total; of those within `CHANCE` of it the last.

    A step with a blank sample is never chosen.

    Args:
        scores: by rising step, the first of them before training.
        kind: "face" or "style".

    Returns:
        None where no step can be chosen.
    """
    if not scores:
        return None
    base, weights = scores[0], weights_of(kind)
    saved = [row for row in scores[1:] if row.saved]
    sound = [row for row in saved if not row.blank]
    if not sound:
        return None
    totals = {row.step: total(row, base, weights) for row in sound}
    # Rounded: 0.80 - 0.03 is not 0.77 in binary.
    enough = round(max(totals.values()) - CHANCE, 2)
    best = [row for row in sound if totals[row.step] >= enough][-1]
    teller = _Teller(base, weights, "style" if kind == "style" else "likeness")
    blank = [str(row.step) for row in saved if row.blank]
    left_out = f" Left out for blank samples: step {', '.join(blank)}." if blank else ""
    return Choice(
        best, totals, teller.reason(best, sound, totals) + left_out, teller.advice(best, scores)
    )


def total(row: StepScores, base: StepScores, weights: Weights) -> float:
    """What the steps are ordered by, to two decimals: what is less is chance."""
    return round(
        row.likeness
        - weights.leak * _leak(row, base)
        - weights.following * _lost(row, base)
        - weights.drift * row.drift
        - weights.copying * row.copying,
        2,
    )


def _leak(row: StepScores, base: StepScores) -> float:
    """How far the likeness without the trigger has risen."""
    return max(0.0, row.plain - base.plain)


def _lost(row: StepScores, base: StepScores) -> float:
    """The share of what prompts name that the base shows and this step does not."""
    if row.following is None or base.following is None:
        return 0.0
    return max(0.0, base.following - row.following)


@dataclass(frozen=True, slots=True)
class _Teller:
    """Puts scores into words; `word` is "likeness" or "style"."""

    base: StepScores
    weights: Weights
    word: str

    def reason(
        self, best: StepScores, sound: Sequence[StepScores], totals: dict[int, float]
    ) -> str:
        """Why this step, with its numbers and those of the step one might take instead."""
        if len(sound) == 1:
            return f"Step {best.step} is the only one to choose from: {self._facts(best)}."
        if best is sound[-1]:
            rival = max(sound[:-1], key=lambda row: (totals[row.step], row.step))
        else:
            rival = sound[-1]
        return (
            f"Step {best.step} is the best of {len(sound)}: {self._facts(best)}; "
            f"step {rival.step} {self._against(rival, best)}."
        )

    def _facts(self, row: StepScores) -> str:
        facts = [f"{self.word} {row.trigger:.2f}"]
        leak, lost = _leak(row, self.base), _lost(row, self.base)
        if leak > LEAK:
            facts.append(f"prompts without the trigger take on {leak:.2f} of it")
        elif row.drift > MOVED:
            facts.append("prompts without the trigger changed, but not towards your photos")
        else:
            facts.append("prompts without the trigger stay as they were")
        if lost > LOST:
            facts.append(f"prompts are followed {_points(lost)} less than before")
        if row.copies:
            facts.append(f"{row.copies} of {row.samples} samples copy a photo")
        return _listed(facts)

    def _against(self, rival: StepScores, best: StepScores) -> str:
        """What another step has over the best one, and what it lacks: the weightiest of each."""
        parts = [part for part in self._parts(rival, best) if abs(part[0]) >= 0.005]
        gains = sorted((part for part in parts if part[0] > 0), reverse=True)[:1]
        losses = sorted(part for part in parts if part[0] < 0)[:2]
        told, against = _listed([part[1] for part in gains]), _listed([part[1] for part in losses])
        if gains and losses:
            return f"{told}, but {against}"
        if gains:
            return f"{told}, too little to count"
        return against or "is no better"

    def _parts(self, rival: StepScores, best: StepScores) -> list[tuple[float, str]]:
        """Each part's share in the difference of totals, and the same in words."""
        likeness = rival.likeness - best.likeness
        leak = _leak(rival, self.base) - _leak(best, self.base)
        lost = _lost(rival, self.base) - _lost(best, self.base)
        drift = rival.drift - best.drift
        more = f"{'gains' if likeness > 0 else 'has'} {abs(likeness):.2f}"
        often = f"a photo in {rival.copies} of {rival.samples} samples" if rival.copies else "none"
        return [
            (likeness, f"{more} {self.word}" if likeness > 0 else f"{more} less {self.word}"),
            (
                -self.weights.leak * leak,
                f"leaks {abs(leak):.2f} {_more(leak)} into prompts without the trigger",
            ),
            (
                -self.weights.following * lost,
                f"follows prompts {_points(lost)} {_more(-lost)}",
            ),
            (
                -self.weights.drift * drift,
                f"moves other pictures {abs(drift):.2f} {_more(drift)}",
            ),
            (-self.weights.copying * (rival.copying - best.copying), f"copies {often}"),
        ]

    def advice(self, best: StepScores, scores: Sequence[StepScores]) -> str:
        """What may help next time, if anything; `scores` of all steps, saved or not."""
        later = [row for row in scores if row.step > best.step and not row.blank]
        if best.trigger <= self.base.trigger + CLEARLY:
            return "Hardly anything was learned: more steps, a higher rate or more photos may help."
        if any(row.copies > best.copies for row in later):
            gain = max(row.likeness for row in later) - best.likeness
            if gain <= CLEARLY:
                return (
                    f"After step {best.step} more training only copies your photos: "
                    "fewer steps are enough, and more photos allow for more."
                )
            return (
                f"After step {best.step} the samples begin to repeat your photos: with more "
                "photos, in more places, longer training would pay."
            )
        if best.copies:
            return (
                "Even the best step repeats photos: more of them, in more places and clothes, "
                "help most; fewer steps help too."
            )
        if self.weights is FACE and _leak(best, self.base) > LEAK:
            return (
                f"Even at the best step prompts without the trigger take on the {self.word}: "
                "class pictures (objective.prior_weight), fewer steps or more photos help."
            )
        if self.weights is FACE and any(row.plain - best.plain > LEAK / 2 for row in later):
            return (
                f"After step {best.step} prompts without the trigger take on the {self.word} "
                "too: fewer steps are enough, and more photos allow for more."
            )
        return "" if later else self._rising(best, scores)

    def _rising(self, best: StepScores, scores: Sequence[StepScores]) -> str:
        before = [row for row in scores[1:] if row.step < best.step and not row.blank]
        if not before or best.likeness - before[-1].likeness < RISING:
            return ""
        return (
            f"The {self.word} was still rising at the end: more steps may give more "
            f"(--set run.total_steps={_half_more(best.step)})."
        )


def _more(amount: float) -> str:
    return "more" if amount > 0 else "less"


def _points(share: float) -> str:
    """A difference of shares in percentage points, at least one."""
    points = max(1, round(100 * abs(share)))
    return f"{points} point{'' if points == 1 else 's'}"


def _listed(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _half_more(steps: int) -> int:
    """One and a half times as many steps, to two digits."""
    more = steps * 3 // 2
    unit = int(10 ** max(0, len(str(more)) - 2))
    return max(steps + 1, more // unit * unit)
