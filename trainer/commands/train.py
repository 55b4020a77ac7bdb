"""`likeness train`: from a folder of photos to a LoRA file, a contact sheet and a report."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress

from rich.console import Console

from trainer.adapters.file import Verified
from trainer.commands.decide import Request, decide, require_own
from trainer.commands.follow import follow
from trainer.commands.preflight import preflight
from trainer.commands.terminal import Terminal
from trainer.config.reader import to_toml
from trainer.errors import Stopped, UsageError
from trainer.training.export import export_lora, keep_best
from trainer.training.finish import (
    best_words,
    learned,
    write_cards,
    write_report,
    write_sheet,
)
from trainer.training.gallery import Gallery, open_gallery
from trainer.training.job import Job
from trainer.training.lock import FolderLock
from trainer.training.loop import StepDone, train
from trainer.training.memory import (
    helps_training,
    is_memory_full,
    left_out,
    let_go,
    memory_error,
)
from trainer.training.reports import (
    MetricsFile,
    Reporter,
    TensorBoardReporter,
    TerminalReporter,
)
from trainer.training.run_folder import RunFolder, clear_run, holds_run, sweep, write_text
from trainer.training.saving import Saver, in_folder
from trainer.training.session import Session, open_session
from trainer.training.stop import StopNow, StopSignal
from trainer.training.team import Team, open_team


def run(request: Request) -> None:
    """Train.

    Raises:
        TrainerError: anything the user can do something about; what is wrong with the request
            itself is said before anything is loaded.
        Stopped: when the user asked for it; what was learned until then is saved.
    """
    with open_team(_say_at_once) as team:
        if request.preflight and team.size > 1:
            raise UsageError(
                "--preflight measures one process.",
                fix="Start it without torchrun; each of several processes takes as much.",
            )
        _run_explained(request, team)


def _say_at_once(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _run_explained(request: Request, team: Team) -> None:
    stop = StopSignal()
    try:
        with stop:
            if team.leader:
                _run(request, Terminal(), stop, team)
            else:
                follow(request, stop, team)
    except KeyboardInterrupt:
        raise Stopped(
            stop.number or signal.SIGINT,
            "\nStopped. What was saved before stays: go on with the same command and --resume.",
        ) from None
    except (MemoryError, RuntimeError) as error:
        if not is_memory_full(error):
            raise
        let_go(error)
        raise memory_error("working on the run", (), error) from error


def _run(request: Request, console: Console, stop: StopSignal, team: Team) -> None:
    job = decide(request, console, team.size)
    if request.preflight:
        preflight(job, console, resume=request.resume)
        return
    root = job.folder.root
    team.told(str(root))
    try:
        with FolderLock(root) as lock:
            for notice in lock.notices:
                console.print(notice, style="yellow", soft_wrap=True)
            require_own(request, job.folder)  # once more: another run may have ended just now
            _run_in_folder(request, job, lock, stop, console, team)
    finally:
        with suppress(OSError):  # an empty folder is not left behind; one that holds something is
            root.rmdir()


def _run_in_folder(
    request: Request, job: Job, lock: FolderLock, stop: StopSignal, console: Console, team: Team
) -> None:
    """Everything that happens while the folder is locked."""
    started_at = time.time()
    sweep(job.folder)
    session = open_session(job, console, resume=request.resume, team=team)
    # Everything is known to be right: only now an older run goes, and the folder holds this one.
    if request.overwrite and holds_run(job.folder.root):
        clear_run(job.folder)
    write_text(job.folder.settings, to_toml(job.config, job.origins))

    def say(words: str) -> None:
        console.print(words, style="yellow", highlight=False, soft_wrap=True)

    saver = Saver(session, lock, stop, started_at, say)
    saver.catch_up()
    gallery = None
    with left_out("samples, so there will be no scores either", say):
        gallery = open_gallery(session)
    start = session.start_step
    if gallery is not None:
        if start not in gallery.steps and gallery.due(start):
            _preview(gallery, start, saver, console)  # stopped between saving and drawing
        _keep_best(gallery, start, saver, console)
    if session.start_step < session.plan.last_step:
        _train(session, gallery, saver, stop, console)
    if session.plan.last_step < session.plan.total_steps:
        console.print(
            f"Stopped at step {session.plan.last_step} of {session.plan.total_steps}, as asked by "
            f"run.stop_at_step. {saver.way_on}",
            highlight=False,
            soft_wrap=True,
        )
        return
    _finish(session, gallery, saver, console)


def _train(
    session: Session,
    gallery: Gallery | None,
    saver: Saver,
    stop: StopSignal,
    console: Console,
) -> None:
    """The loop with everything that happens beside a step, in the order in which it happens."""
    job, plan, team = session.job, session.plan, session.team
    reporters: list[Reporter] = [
        TerminalReporter(console, plan.last_step, session.start_step),
        MetricsFile(job.folder.metrics, session.start_step),
    ]
    if job.config.run.tensorboard:
        reporters.append(TensorBoardReporter(job.folder.root / "tensorboard"))
    try:
        with stop.noted():
            for report in _steps(session, saver):
                step = report.step
                # As a name of its own: a signal may come at any moment, and all go by the same one.
                number = team.stop(stop.number)
                _tell(report, reporters, saver, console)
                if saver.due(step) or number:
                    saver.save(step)
                if gallery is not None and gallery.due(step) and not number:
                    # Alone, nobody waits for this process to come to its next step.
                    with suppress(StopNow), stop.at_once() if team.size == 1 else nullcontext():
                        _preview(gallery, step, saver, console)
                        _keep_best(gallery, step, saver, console)
                    number = stop.number if team.size == 1 else 0
                if number:
                    if saver.saved_step != step:  # it was stopped while it drew
                        saver.save(step)
                    raise Stopped(
                        number,
                        f"\nStopped after step {step} of {plan.total_steps}; everything is saved "
                        f"in {saver.folder.root}.\n{saver.way_on}",
                    )
    finally:
        for reporter in reporters:
            with saver.aside("closing what reports the steps"):
                reporter.close()


def _tell(report: StepDone, reporters: Sequence[Reporter], saver: Saver, console: Console) -> None:
    """What a step has to say: its numbers, and what went wrong."""
    for numbers in report.read:
        for reporter in reporters:
            with saver.aside(f"the {reporter.what}"):
                reporter.step(numbers)
    for sentence in report.said:
        console.print(f"  {sentence}", style="yellow", highlight=False, soft_wrap=True)


def _steps(session: Session, saver: Saver) -> Iterator[StepDone]:
    """The steps of the training. When the memory is full, the last whole one is saved."""
    learner, guard = session.learner, session.guard
    try:
        yield from train(learner, session.plan, session.start_step, guard, session.team)
    except (MemoryError, RuntimeError) as error:
        if not is_memory_full(error):
            raise
        let_go(error)
        if guard.whole and guard.step > saver.saved_step:
            saver.save(guard.step)
        saved = f"Step {saver.saved_step} is saved. {saver.way_on}" if saver.saved_step else ""
        helps = helps_training(session.job, session.device, session.backbone)
        raise memory_error("training", helps, error, saved) from error


def _preview(gallery: Gallery, step: int, saver: Saver, console: Console) -> None:
    """Draw, score and lay out the samples of a step, if the memory suffices."""
    with left_out("samples", saver.say):
        _draw(gallery, step, saver, console)


def _draw(gallery: Gallery, step: int, saver: Saver, console: Console) -> None:
    with saver.aside("the files of the samples"):
        gallery.draw_step(step)
    if step not in gallery.steps:  # parts of the base could not be read again
        return
    with saver.aside("the file of their scores"):
        gallery.score(step)
    words = f"  step {step}: samples drawn"
    if scores := next((row for row in gallery.scores if row.step == step), None):
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
    with saver.aside("the contact sheet"):
        write_sheet(gallery)


def _keep_best(gallery: Gallery, step: int, saver: Saver, console: Console) -> None:
    """Have the best step so far in a file of its own; `step`: of the weights as they are now."""
    choice = gallery.choice
    best = choice.best.step if choice else None
    thumbnail = None if best is None else gallery.steps[best].shown[0]
    with saver.aside("the file of the best step"):
        if keep_best(
            gallery.session, best, now=step, started_at=saver.started_at, thumbnail=thumbnail
        ):
            name = gallery.session.job.folder.best_lora.name
            console.print(f"  the best step so far: {name}", highlight=False)


def _finish(session: Session, gallery: Gallery | None, saver: Saver, console: Console) -> None:
    """Sheet, file, report: the LoRA file comes last, so that its being there means done."""
    sheet = thumbnail = None
    if gallery is not None:
        with saver.aside("the contact sheet"):
            sheet = write_sheet(gallery)
        thumbnail = gallery.steps[max(gallery.steps)].shown[0]
    last = session.plan.total_steps

    def write(folder: RunFolder) -> Verified:
        place, path = in_folder(session, folder), folder.unfinished_lora
        at = saver.started_at
        return export_lora(place, path, step=last, started_at=at, thumbnail=thumbnail)

    def give_name(folder: RunFolder) -> None:
        if not folder.unfinished_lora.exists():
            write(folder)
        folder.unfinished_lora.replace(folder.lora)

    verified = saver.persist("the LoRA file", write)
    with saver.aside("the report"):
        write_report(in_folder(session, saver.folder), gallery, verified, sheet)
    saver.persist("the LoRA file", give_name)
    job = in_folder(session, saver.folder).job
    with saver.aside("the files that A1111 shows"):
        write_cards(in_folder(session, saver.folder), gallery, thumbnail)

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
    for line in session.guard.words():
        say(f"Note       {line}")
    if job.folder.report.exists():
        say(f"Report     {job.folder.report}")
    say(f"Learned    {learned(job, gallery)}")
