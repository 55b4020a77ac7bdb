"""The report's part on the steps of a run: which one to take, why, and how the scores went."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from trainer.report.curves import Series, series_chart


@dataclass(frozen=True, slots=True)
class StepRow:
    """The scores of one step; `total` is None where the step could not be chosen.

    copying and following are shares; following is None where nothing reads the samples. `copies`
    says the same as copying in words ("3 of 7").
    """

    step: int
    likeness: float
    plain: float
    drift: float
    following: float | None
    copying: float
    copies: str
    total: float | None


@dataclass(frozen=True, slots=True)
class BestStep:
    """Which step to take.

    Args:
        step: the best one; None where none could be chosen.
        file: the path of its LoRA file, "" where there is none.
        reason: why, in one sentence; or why there is none.
        advice: what to do next time; may be empty.
        word: what was scored ("Likeness" or "Style").
        formula: what the total is made of, in words.
        rows: all scored steps, the first of them before training.
    """

    step: int | None
    file: str
    reason: str
    advice: str = ""
    word: str = "Likeness"
    formula: str = ""
    rows: tuple[StepRow, ...] = ()

    @property
    def is_last(self) -> bool:
        """Whether the training ended with it."""
        return bool(self.rows) and self.rows[-1].step == self.step

    @property
    def reads(self) -> bool:
        """Whether prompt following was measured."""
        return any(row.following is not None for row in self.rows)

    @property
    def likeness_chart(self) -> Markup:
        """Likeness with and without the trigger over the steps."""
        steps = [row.step for row in self.rows]
        return series_chart(
            [
                Series("with the trigger", steps, [row.likeness for row in self.rows]),
                Series("without it", steps, [row.plain for row in self.rows]),
            ],
            label=self.word.lower(),
            best=self.step,
        )

    @property
    def change_chart(self) -> Markup:
        """Prompt following, drift and copying over the steps."""
        steps = [row.step for row in self.rows]
        series = [
            Series("drift", steps, [row.drift for row in self.rows]),
            Series("copies", steps, [row.copying for row in self.rows]),
        ]
        read = [(row.step, row.following) for row in self.rows if row.following is not None]
        if read:
            series.insert(
                0, Series("prompts followed", [s for s, _ in read], [value for _, value in read])
            )
        return series_chart(series, label="share", best=self.step)
