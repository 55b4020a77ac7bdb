"""The LoRA file that a training starts from (`--init`): its settings, and its weights."""

from __future__ import annotations

from pathlib import Path

from trainer.adapters.start import Start, read_start, start_settings
from trainer.config.reader import Layer, override_layer
from trainer.config.settings import TrainConfig
from trainer.errors import ModelError
from trainer.families import BaseFacts


def start_layer(path: Path) -> Layer:
    """The settings that make the adapters as they are in the file.

    Raises:
        FileFormatError: it cannot be read, or a training cannot start from it.
    """
    settings = start_settings(read_start(path))
    typed = [(f"adapter.{name}", value) for name, value in settings.items()]
    return override_layer(typed, f"the file {path.name}")


def chosen_start(config: TrainConfig, facts: BaseFacts, *, resume: bool) -> Start | None:
    """What the training starts from, if anything.

    Args:
        resume: the run goes on; its weights are in its checkpoint, so the file may be gone.

    Raises:
        FileFormatError: it cannot be read.
        ModelError: it is for another family than the base.
    """
    path = Path(config.adapter.init).expanduser()
    if not config.adapter.init or (resume and not path.exists()):
        return None
    start = read_start(path)
    if start.family not in ("unknown", facts.family) and facts.fits_real:
        raise ModelError(
            f"The LoRA to start from is for {start.family}, the base is of {facts.family}.",
            where=str(path),
            fix="Give a base of the same family after --base.",
        )
    return start
