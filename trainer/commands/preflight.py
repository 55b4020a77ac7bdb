"""`likeness train --preflight`: what a run would take, measured in a minute; it leaves no trace."""

from __future__ import annotations

from rich.console import Console

from trainer.training.job import Job
from trainer.training.memory_class import CLASSES, GIB, room_of
from trainer.training.preflight import Preflight, measure
from trainer.training.session import open_session


def preflight(job: Job, console: Console, *, resume: bool) -> None:
    """Load, encode, make a step of the largest bucket, draw a sample, and say what it took.

    Nothing is written but latents and embeddings into the cache, which the run then finds there.

    Raises:
        TrainerError: as the run itself would; of full memory, what would help.
    """
    session = open_session(job, console, resume=resume)
    for line in in_words(measure(session), session.job.config.model.memory):
        console.print(line, highlight=False, soft_wrap=True)


def in_words(found: Preflight, memory: str = "off") -> list[str]:
    """The lines for the user. memory: the memory class that the run is to fit into."""
    kind = "the GPU's memory" if found.on_gpu else "memory of the process"
    lines = [
        f"Preflight  a step of the largest bucket ({found.bucket}): {found.step_seconds:.2f} s; "
        f"{_gigabytes(found.step_peak)} of {kind} at most"
    ]
    if found.samples:
        lines.append(
            f"           a sample: {found.sample_seconds:.1f} s; {_gigabytes(found.sample_peak)} "
            "at most"
        )
    lines += [
        f"           there are {_gigabytes(found.total)} in all",
        *(
            [f"           {_class_words(found, memory)}"]
            if found.on_gpu and memory != "off"
            else []
        ),
        f"           the whole run: about {_duration(found.run_seconds)}"
        + (f", with {found.samples} samples; their scores come on top" if found.samples else ""),
        "Nothing was trained or written; start it without --preflight.",
    ]
    return lines


def _class_words(found: Preflight, memory: str) -> str:
    """Whether the run stays within its memory class."""
    room = room_of(CLASSES.get(memory, found.total / GIB))
    peak = max(found.step_peak, found.sample_peak)
    words = f"{_gigabytes(peak)} of the {_gigabytes(int(room))} that it has for a run"
    if peak <= room:
        return f"memory class {memory}: holds, {words}"
    if found.step_peak <= room:
        return f"memory class {memory}: holds in training, but samples take {words}"
    return f"memory class {memory}: does not hold, {words}; name a smaller one"


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.1f} GB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
