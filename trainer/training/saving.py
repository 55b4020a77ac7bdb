"""When a run is saved, where, and what happens when that fails: it waits, and saves elsewhere.

What has been learned is in the memory of one process. So a save that fails (a full disk, a drive
that was pulled out, a folder that may only be read) never ends it: the training pauses, says so and
tries again, later in other folders too, until the save is somewhere or the user gives it up.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from trainer.config.reader import to_toml
from trainer.data.cache_folder import cache_root
from trainer.errors import FileFormatError, OutputError, TrainerError
from trainer.training.export import export_lora
from trainer.training.lock import FolderLock
from trainer.training.run_folder import RunFolder, open_root, write_text
from trainer.training.session import Session
from trainer.training.state import checkpoint_bytes, save_checkpoint
from trainer.training.stop import StopSignal

Made = TypeVar("Made")

# A file of this name in the run's folder asks for a save.
SAVE_NOW = "save-now"
RETRY_SECONDS = 5.0
_LOOK_SECONDS = 1.0
_NAP_SECONDS = 0.1


class Saver:
    """Saves one run.

    Args:
        session: of the run.
        lock: on its folder, held.
        stop: the signals.
        started_at: when the run was started, seconds since 1970.
        say: shows a sentence to the user.

    Attributes:
        folder: where the newest save is; the run's own but for trouble.
        saved_step: the step of the newest save. started_at: as given.
    """

    def __init__(
        self,
        session: Session,
        lock: FolderLock,
        stop: StopSignal,
        started_at: float,
        say: Callable[[str], None],
    ) -> None:
        self.session = session
        self.folder = session.job.folder
        self.saved_step = session.start_step
        self._lock = lock
        self._stop = stop
        self.started_at = started_at
        self.say = say
        self._elsewhere: list[RunFolder] = []
        self._saved_at = self._looked_at = time.monotonic()
        self._asked = (self.folder.root / SAVE_NOW).exists()
        self._said: set[str] = set()

    # --- when

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after a step."""
        run = self.session.job.config.run
        minutes = (time.monotonic() - self._saved_at) / 60
        by_time = bool(run.save_every_minutes) and minutes >= run.save_every_minutes
        return by_time or self.wants_file(step)

    def wants_file(self, step: int) -> bool:
        """Whether that is to come with a LoRA file: it is not, where time alone asked for it."""
        by_steps = step % self.session.job.config.run.save_every_steps == 0
        last = step == self.session.plan.last_step
        return by_steps or last or bool(self._stop.number) or self._is_asked()

    def _is_asked(self) -> bool:
        """Whether the user asked for a save, by a signal or by a file; looked for now and then."""
        now = time.monotonic()
        if now - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = now
            self._asked = (self.session.job.folder.root / SAVE_NOW).exists()
        return self._asked or self._stop.save_asked

    # --- what

    def save(self, step: int) -> None:
        """Write a checkpoint and, where it is wanted, the step's LoRA file; wait if need be."""
        session, guard = self.session, self.session.guard
        wants_file = self.wants_file(step) and step < session.plan.total_steps
        # While steps go wrong, finite weights may be no good all the same: older ones stay.
        keep = session.job.config.run.keep_checkpoints + (step if guard.uneasy else 0)
        written: list[RunFolder] = []

        def write(folder: RunFolder) -> None:
            if folder not in written:
                save_checkpoint(
                    folder.checkpoints,
                    session.learner,
                    step,
                    session.facts,
                    keep=keep,
                    guard=guard.state(),
                    snapshot=guard.tensors(step),
                )
                written.append(folder)
            if wants_file:
                self._write_step_file(folder, step)

        self.persist(f"step {step}", write)
        self.saved_step, self._saved_at = step, time.monotonic()
        session.team.way_out = f"The last checkpoint is that of step {step}. {self.way_on}"
        self._served()

    def catch_up(self) -> None:
        """Write the LoRA file of the step that the run goes on from, where it was ended between
        the checkpoint and that file."""
        step, run = self.session.start_step, self.session.job.config.run
        due = step % run.save_every_steps == 0 and 0 < step < self.session.plan.total_steps
        if due and not self.folder.step_lora(step).exists():
            self.persist(
                f"the LoRA file of step {step}", lambda folder: self._write_step_file(folder, step)
            )

    def _write_step_file(self, folder: RunFolder, step: int) -> None:
        try:
            export_lora(
                in_folder(self.session, folder),
                folder.step_lora(step),
                step=step,
                started_at=self.started_at,
                thumbnail=None,
            )
        except FileFormatError as error:  # the weights themselves; they are in the checkpoint
            self.say(f"The LoRA file of step {step} was left out. {error}")

    def _served(self) -> None:
        """The wish for a save is granted."""
        asked, self._asked, self._stop.save_asked = self._asked, False, False
        if asked:
            with self.aside(f"the removal of {SAVE_NOW}"):
                (self.session.job.folder.root / SAVE_NOW).unlink(missing_ok=True)

    # --- where

    def persist(self, what: str, write: Callable[[RunFolder], Made]) -> Made:
        """Write something that must not be lost, and wait as long as it cannot be written.

        Args:
            what: is written, in words.
            write: writes it into a folder; it may be called again, for the same one or another.

        Raises:
            StopNow: the user gave it up by a second Ctrl-C.
            FileFormatError: what is to be written is not what it should be.
        """
        began, said = time.monotonic(), ""
        while True:
            for folder in self._places(time.monotonic() - began):
                try:
                    self._open(folder)
                    made = write(folder)
                except (OSError, OutputError) as error:
                    at_home = folder == self.session.job.folder and not self._gone
                    if at_home and str(error) != said:
                        said = str(error)
                        self.say(self._trouble(what, folder, error))
                    continue
                self._came_to(folder)
                return made
            self._wait()

    @property
    def _gone(self) -> bool:
        """Whether saves go elsewhere by now."""
        return self.folder != self.session.job.folder

    def _places(self, waited: float) -> list[RunFolder]:
        """Where to try: the run's own folder alone at first."""
        home = self.session.job.folder
        patience = self.session.job.config.run.save_retry_minutes * 60
        if waited < patience and not self._gone and not self._stop.number:
            return [home]
        if not self._elsewhere:
            self._elsewhere = [RunFolder(root, home.name) for root in self._fallback_roots()]
        return [home, *self._elsewhere]

    def _fallback_roots(self) -> list[Path]:
        given = self.session.job.config.run.fallback_folder
        usual = [cache_root() / "unsaved", Path(tempfile.gettempdir()) / "likeness-unsaved"]
        # A new folder below each, so that nothing of another run is ever replaced.
        name = f"{self.session.job.folder.name}-{time.strftime('%Y%m%d-%H%M%S')}-1"
        roots = [*([Path(given).expanduser()] if given else []), *usual]
        return [root.resolve() / name for root in roots]

    def _open(self, folder: RunFolder) -> None:
        """Make a folder a run's, if it is not or is so no longer."""
        if folder == self.session.job.folder:
            # Not its parents: where a drive is gone, nothing is written to the place it was at.
            folder.root.mkdir(exist_ok=True)
            self._lock.hold()
        elif not folder.settings.exists():
            root = open_root(folder.root, numbered=True)
            if root != folder.root:
                self._elsewhere[self._elsewhere.index(folder)] = RunFolder(root, folder.name)
                raise OutputError("The folder was taken in the meantime.", where=str(folder.root))
        if not folder.settings.exists():
            write_text(folder.settings, to_toml(self.session.job.config, self.session.job.origins))

    def _trouble(self, what: str, folder: RunFolder, error: OSError | OutputError) -> str:
        minutes = self.session.job.config.run.save_retry_minutes
        words = f"{error}" if isinstance(error, OutputError) else f"{error.strerror}: {folder.root}"
        return (
            f"\nThe training is paused: {what} cannot be saved.\n{words}\n"
            f"{_room(folder.root, checkpoint_bytes(self.session.learner))}Nothing is lost: it is "
            f"tried again every {RETRY_SECONDS:g} seconds, after {minutes:g} minutes or at once "
            "with Ctrl-C in another folder as well."
        )

    def _came_to(self, folder: RunFolder) -> None:
        """Say where the save is, if that is news."""
        before, self.folder = self.folder, folder
        if before == folder:
            return
        if self._gone:
            self.say(f"Saved in another folder:\n  {folder.root}\n{self.way_on}")
        else:
            self.say(f"Saved in {folder.root} again.")

    def _wait(self) -> None:
        """Until it is time to try again; a signal that has just come ends the waiting."""
        before, until = self._stop.number, time.monotonic() + RETRY_SECONDS
        while time.monotonic() < until and self._stop.number == before:
            time.sleep(_NAP_SECONDS)

    @property
    def way_on(self) -> str:
        """How to go on later, in a sentence with the command."""
        job = self.session.job
        words = f'{self.session.team.command} "{job.source}" --output "{job.folder.root}" --resume'
        return f"Go on with: {words}" + (f' "{self.folder.root}"' if self._gone else "")

    @contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """Something beside the training that may fail: it is said once, and the training goes on.

        Args:
            what: is written, in words.
        """
        try:
            yield
        except (OSError, TrainerError) as error:
            if what not in self._said:
                self._said.add(what)
                self.say(f"The training goes on without {what}. {error}")
        else:
            self._said.discard(what)


def in_folder(session: Session, folder: RunFolder) -> Session:
    """The session as if its run were in another folder."""
    return replace(session, job=replace(session.job, folder=folder))


def _room(folder: Path, needed: int) -> str:
    """How much room there is, where that is too little; else nothing."""
    try:
        free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    except (OSError, StopIteration):
        return ""
    if free > 2 * needed:
        return ""
    return f"It needs about {needed / 1e6:.1f} MB; {free / 1e6:.1f} MB are free there.\n"
