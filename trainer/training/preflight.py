"""What a run will take, measured before it begins: real steps of the largest bucket, a sample."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import partial

import psutil
import torch

from trainer.training.guards import Guard
from trainer.training.job import Job
from trainer.training.loop import one_step
from trainer.training.memory import explained, helps_training
from trainer.training.preview import chunk_size, draw
from trainer.training.session import Session


@dataclass(frozen=True, slots=True)
class Preflight:
    """What was measured, in seconds and bytes.

    bucket: the largest latents, as height x width, with the pictures of their batch. step_seconds:
    of an optimizer step on it. step_peak, sample_peak: memory that was in use at most, of the GPU
    where there is one, else of the process. sample_seconds: of one sample; 0 without samples.
    samples: how many the run draws. run_seconds: about what the whole run takes, without scoring.
    total: all memory of that kind.
    """

    bucket: str
    step_seconds: float
    step_peak: int
    sample_seconds: float
    sample_peak: int
    samples: int
    run_seconds: float
    total: int
    on_gpu: bool


def measure(session: Session) -> Preflight:
    """Make two steps of the largest bucket, of which the second counts, and draw the largest
    sample, as many of it as a run draws at once.

    The session's weights are no longer those of the run afterwards; nothing is written.

    Raises:
        DeviceError: the memory does not suffice; it says what would help.
    """
    index, areas = _largest(session)
    batch = session.learner.batches.batch(index)
    count = session.plan.accumulate_steps
    helps = partial(helps_training, session.job, session.device, session.backbone)
    _forget_peak(session)
    with explained("making a step of the largest bucket", helps):
        for _ in range(2):
            started = _now(session)
            one_step(session.learner, [index] * count, session.plan, Guard())
            step_seconds = _now(session) - started
    step_peak = _peak(session)
    sample_seconds, sample_peak = 0.0, 0
    if session.prompts:
        _forget_peak(session)
        with explained("drawing samples", helps):
            started = _now(session)
            largest = max(session.prompts, key=lambda prompt: prompt.size.area)
            at_once = min(chunk_size(largest.size), len(session.prompts) + _plain(session))
            draw(session.backbone, [largest] * at_once)
            sample_seconds = (_now(session) - started) / at_once
        sample_peak = _peak(session)
    samples = samples_of(session.job, len(session.prompts), _plain(session))
    steps = session.plan.last_step - session.start_step
    # Smaller buckets take less, about in proportion.
    mean = sum(areas) / len(areas) / max(areas)
    return Preflight(
        bucket=f"{batch.latents_BChw.shape[0]} of "
        f"{_pixels(session, batch.latents_BChw.shape[3])}x"
        f"{_pixels(session, batch.latents_BChw.shape[2])} px",
        step_seconds=step_seconds,
        step_peak=step_peak,
        sample_seconds=sample_seconds,
        sample_peak=sample_peak,
        samples=samples,
        run_seconds=steps * step_seconds * mean + samples * sample_seconds,
        total=_total(session),
        on_gpu=session.device.device.type == "cuda",
    )


def samples_of(job: Job, prompts: int, plain: int) -> int:
    """How many samples a run draws: at the start, as was set, and whenever it is saved."""
    run, every = job.config.run, job.config.preview.every_steps
    if not every:
        return 0
    due = {0, run.total_steps, *range(0, run.total_steps, every)}
    due |= set(range(0, run.total_steps, run.save_every_steps))
    return len({step for step in due if step <= job.last_step}) * (prompts + plain)


def _plain(session: Session) -> int:
    return sum(prompt.triggered for prompt in session.prompts)


def _largest(session: Session) -> tuple[int, list[int]]:
    """The number of the batch with the most latents, and how many each batch of an epoch has."""
    batches = session.learner.batches
    areas = []
    for index in range(batches.batches_per_epoch):
        shape = batches.batch(index).latents_BChw.shape
        areas.append(shape[0] * shape[2] * shape[3])
    return areas.index(max(areas)), areas


def _pixels(session: Session, latents: int) -> int:
    return latents * session.job.facts.pixels_per_latent


def _now(session: Session) -> float:
    if session.device.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _forget_peak(session: Session) -> None:
    if session.device.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(session: Session) -> int:
    """The GPU's since `_forget_peak`; the process's in its whole life."""
    if session.device.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return process_peak()


def process_peak() -> int:
    """The most main memory that this process has had, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _total(session: Session) -> int:
    if session.device.device.type == "cuda":
        return torch.cuda.get_device_properties(session.device.device).total_memory
    return int(psutil.virtual_memory().total)
