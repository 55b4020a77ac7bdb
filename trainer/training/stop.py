"""Signals: Ctrl-C and SIGTERM end a run without losing work, SIGUSR1 asks for a save.

During training the first one is only noted, so that the step is finished and saved; a second one
ends the run at once. Everywhere else (photos are encoded, samples drawn) one is enough.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

WATCHED = [signal.SIGINT, signal.SIGTERM]
if sys.platform == "win32":  # Ctrl-Break
    WATCHED.append(signal.SIGBREAK)
# Windows ends a process when the handler of a closing console returns, or after about so long.
_CLOSING_SECONDS = 20.0
_CLOSE_EVENTS = (2, 5, 6)  # CTRL_CLOSE_EVENT, CTRL_LOGOFF_EVENT, CTRL_SHUTDOWN_EVENT


class StopNow(KeyboardInterrupt):
    """A signal that ends what is being done at once."""


class StopSignal:
    """Inside `with StopSignal() as stop:` signals are watched.

    Attributes:
        number: the signal that came, or 0. save_asked: whether a save was asked for; whoever
            saves sets it back.

    Raises:
        StopNow: inside the block, when a signal comes that is not to be waited for.
    """

    def __init__(self) -> None:
        self.number = 0
        self.save_asked = False
        self._patient = False
        self._before: dict[int, Any] = {}
        self._ended = threading.Event()
        self._forget_console: Callable[[], None] = _nothing

    def __enter__(self) -> StopSignal:
        # Python lets the main thread alone have handlers; elsewhere signals are not ours.
        if threading.current_thread() is threading.main_thread():
            for number in WATCHED:
                self._before[number] = signal.signal(number, self._note)
            if sys.platform == "win32":
                self._forget_console = _watch_console(self.console_event)
            else:
                self._before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._forget_console()
        while self._before:
            number, handler = self._before.popitem()
            # None: the handler before was not Python's, so that it cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Inside this block the first signal is only noted."""
        with self._patience(True):
            yield

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside this block, within `noted`, the first signal ends what is being done.

        Raises:
            StopNow: at the place where it comes, or at the start if one has come.
        """
        with self._patience(False):
            if self.number:
                raise StopNow
            yield

    def console_event(self, event: int) -> bool:
        """What Windows calls on a thread of its own when the console is closed.

        Returns:
            Whether the event was dealt with; only when the run has ended.
        """
        if event not in _CLOSE_EVENTS:
            return False
        self.number = self.number or int(signal.SIGTERM)
        self._ended.wait(_CLOSING_SECONDS)
        return True

    @contextmanager
    def _patience(self, patient: bool) -> Iterator[None]:
        before, self._patient = self._patient, patient
        try:
            yield
        finally:
            self._patient = before

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.number = bool(self.number), self.number or number
        if again or not self._patient:
            raise StopNow

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.save_asked = True


def _nothing() -> None:
    """Where there is no console to watch."""


if sys.platform == "win32":

    def _watch_console(handler: Callable[[int], bool]) -> Callable[[], None]:
        """Have a function called when the console closes; returns what ends that."""
        import ctypes

        # Kept alive by what is returned: Windows calls it for as long as it is registered.
        call = ctypes.WINFUNCTYPE(ctypes.c_int, ctypes.c_uint)(lambda event: int(handler(event)))
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel.SetConsoleCtrlHandler(call, 1)
        return lambda: kernel.SetConsoleCtrlHandler(call, 0)
