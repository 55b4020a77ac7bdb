"""`likeness train`: from a folder of photos to a LoRA file, a contact sheet and a report."""

from __future__ import annotations

import time
from contextlib import suppress

import torch
from rich.console import Console

from trainer.commands.decide import Request, decide
from trainer.config.reader import to_toml
from trainer.errors import DeviceError, Stopped, TrainerError
from trainer.training.export import export_lora, keep_best
from trainer.training.finish import (
    best_words,
    learned,
    write_cards,
    write_report,
    write_sheet,
)
from trainer.training.gallery import Gallery, open_gallery
from trainer.training.loop import train
from trainer.training.reports import (
    MetricsFile,
    Reporter,
    TensorBoardReporter,
    TerminalReporter,
)
from trainer.training.run_folder import clear_run, holds_run, write_text
from trainer.training.session import Session, open_session
from trainer.training.state import save_checkpoint
from trainer.training.stop import StopSignal


def run(request: Request) -> None:
    """Train.

    Raises:
        TrainerError: anything the user can do something about; what is wrong with the request
            itself is said before anything is loaded.
        Stopped: after saving, when the user asked for it.
    """
    try:
        _run(request, Console(markup=False))
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            "The GPU's memory is full.",
            where=str(error).splitlines()[0],
            fix="What helps most: --set model.checkpointing=true, --set data.batch_size=1, "
            "--set adapter.text_encoder=false. Close other programs that use the GPU.",
        ) from error


def _run(request: Request, console: Console) -> None:
    job = decide(request, console)
    started_at = time.time()
    try:
        session = open_session(job, console, resume=request.resume)
    except TrainerError:
        with suppress(OSError):  # an empty folder is not left behind; one that holds something is
            job.folder.root.rmdir()
        raise
    # Everything is known to be right: only now an older run goes, and the folder holds this one.
    if request.overwrite and holds_run(job.folder.root):
        clear_run(job.folder)
    write_text(job.folder.settings, to_toml(job.config, job.origins))
    gallery = open_gallery(session)
    start = session.start_step
    if gallery is not None:
        if start not in gallery.steps and gallery.due(start):
            _preview(gallery, start, console)  # the run was stopped between saving and drawing
        _keep_best(gallery, start, started_at)
    if session.start_step < session.plan.last_step:
        _train(session, gallery, console, started_at)
    if session.plan.last_step < session.plan.total_steps:
        console.print(
            f"Stopped at step {session.plan.last_step} of {session.plan.total_steps}, as asked by "
            f"run.stop_at_step. Go on with: {_resume_words(session)}",
            highlight=False,
            soft_wrap=True,
        )
        return
    _finish(session, gallery, console, started_at)


def _train(session: Session, gallery: Gallery | None, console: Console, started_at: float) -> None:
    """The loop with everything that happens beside a step, in the order in which it happens."""
    job, plan = session.job, session.plan
    reporters: list[Reporter] = [
        TerminalReporter(console, plan.last_step, session.start_step),
        MetricsFile(job.folder.metrics, session.start_step),
    ]
    if job.config.run.tensorboard:
        reporters.append(TensorBoardReporter(job.folder.root / "tensorboard"))
    step = session.start_step
    try:
        with StopSignal() as stop:
            for report in train(session.learner, plan, session.start_step):
                step = report.step
                for reporter in reporters:
                    reporter.step(report)
                last = step == plan.last_step
                if last or stop.number or step % job.config.run.save_every_steps == 0:
                    _save(session, step)
                    if step < plan.total_steps:
                        path = job.folder.step_lora(step)
                        export_lora(session, path, step=step, started_at=started_at, thumbnail=None)
                if stop.number:
                    raise Stopped(
                        stop.number,
                        f"\nStopped after step {step} of {plan.total_steps}; everything is saved "
                        f"in {job.folder.root}.\nGo on with: {_resume_words(session)}",
                    )
                if gallery is not None and gallery.due(step):
                    _preview(gallery, step, console)
                    if _keep_best(gallery, step, started_at):
                        best = job.folder.best_lora.name
                        console.print(f"  the best step so far: {best}", highlight=False)
    finally:
        for reporter in reporters:
            reporter.close()


def _save(session: Session, step: int) -> None:
    save_checkpoint(
        session.job.folder.checkpoints,
        session.learner,
        step,
        session.facts,
        keep=session.job.config.run.keep_checkpoints,
    )


def _preview(gallery: Gallery, step: int, console: Console) -> None:
    """Draw, score and lay out the samples of a step."""
    gallery.draw_step(step)
    words = f"  step {step}: samples drawn"
    if scores := gallery.score(step):
        kind = "likeness" if gallery.session.job.config.run.kind == "face" else "style"
        words += (
            f"; {kind} with the trigger {scores.trigger:.2f}, without {scores.plain:.2f}, "
            f"drift {scores.drift:.2f}"
        )
        if scores.following is not None:
            words += f", prompts followed {scores.following:.0%}"
        if scores.copies:
            words += f", {scores.copies} of {scores.samples} copy a photo"
    console.print(words, highlight=False, soft_wrap=True)
    if blank := gallery.steps[step].blank:
        console.print(
            f"  {blank} of the samples are of one colour: something is wrong with the training "
            "or the precision.",
            style="yellow",
        )
    write_sheet(gallery)


def _keep_best(gallery: Gallery, step: int, started_at: float) -> bool:
    """Have the best step so far in a file of its own; `step`: of the weights as they are now."""
    choice = gallery.choice
    best = choice.best.step if choice else None
    return keep_best(
        gallery.session,
        best,
        now=step,
        started_at=started_at,
        thumbnail=None if best is None else gallery.steps[best].shown[0],
    )


def _finish(session: Session, gallery: Gallery | None, console: Console, started_at: float) -> None:
    """Sheet, file, report: the LoRA file comes last, so that its being there means done."""
    job = session.job
    sheet = thumbnail = None
    if gallery is not None:
        sheet = write_sheet(gallery)
        thumbnail = gallery.steps[max(gallery.steps)].shown[0]
    verified = export_lora(
        session,
        job.folder.unfinished_lora,
        step=session.plan.total_steps,
        started_at=started_at,
        thumbnail=thumbnail,
    )
    write_report(session, gallery, verified, sheet)
    job.folder.unfinished_lora.replace(job.folder.lora)
    write_cards(session, gallery, thumbnail)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    say("")
    megabytes = job.folder.lora.stat().st_size / 2**20
    say(
        f"LoRA file  {job.folder.lora} ({megabytes:.1f} MB; read back: all {verified.matched} "
        "tensors match the base's key table)"
    )
    for line in best_words(job, gallery):
        say(line)
    say(f"Report     {job.folder.report}")
    say(f"Learned    {learned(job, gallery)}")


def _resume_words(session: Session) -> str:
    """The command that goes on with this run; its settings are remembered in its folder."""
    job = session.job
    return f'likeness train "{job.source}" --output "{job.folder.root}" --resume'
