"""Ctrl-C and SIGTERM end the training after the current step; a second one ends it at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

WATCHED = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGBREAK"):  # Windows: Ctrl-Break and a closing console
    WATCHED.append(signal.SIGBREAK)


class StopSignal:
    """Inside `with StopSignal() as stop:`, `stop.number` is the signal that came, or 0."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for number in WATCHED:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]
