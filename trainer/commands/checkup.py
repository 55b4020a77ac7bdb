"""What the doctor says of a folder, for the settings that a training would have."""

from __future__ import annotations

from rich.console import Console

from trainer.commands import decide, prepare
from trainer.commands.material import gather
from trainer.doctor.findings import Diagnosis


def check(request: prepare.Request, console: Console) -> Diagnosis:
    """Examine the photos as `likeness train` would with the same words; nothing is written.

    Raises:
        TrainerError: there is no such folder, or a setting is wrong.
    """
    asked = decide.Request(
        photos=request.photos,
        kind=request.kind,
        trigger=request.trigger,
        class_noun=request.class_noun,
        base=request.base,
        config=request.config,
        overrides=request.overrides,
    )
    resolved, facts = decide.settings_of(asked)
    return gather(request.photos, resolved, facts, console, strict=False).diagnosis
