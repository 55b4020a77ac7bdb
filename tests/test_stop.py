"""Signals: which end what is being done, which are only noted."""

from __future__ import annotations

import signal
import sys
import threading
import time
from contextlib import suppress

import pytest

from trainer.training.stop import WATCHED, StopNow, StopSignal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_ends_it(number: signal.Signals) -> None:
    stop = StopSignal()
    noted: list[int] = []

    def twice() -> None:
        with stop, stop.noted():
            signal.raise_signal(number)
            noted.append(stop.number)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(StopNow):
        twice()
    assert noted == [number]
    assert stop.number == number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_outside_of_the_steps_one_is_enough(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        signal.raise_signal(number)
    assert stop.number == number


def test_what_may_end_at_once_ends_and_the_rest_goes_on() -> None:
    done = []
    with StopSignal() as stop, stop.noted():
        with suppress(StopNow), stop.at_once():
            signal.raise_signal(signal.SIGINT)
            done.append("drawn to the end")
        done.append("saved")
        with suppress(StopNow), stop.at_once():
            done.append("drawn again")
    assert done == ["saved"]


def test_the_handlers_of_before_are_put_back() -> None:
    before = [signal.getsignal(number) for number in WATCHED]
    with StopSignal() as stop:
        assert signal.getsignal(signal.SIGINT) == stop._note
    assert [signal.getsignal(number) for number in WATCHED] == before


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGUSR1")
def test_a_save_can_be_asked_for_at_any_time() -> None:
    with StopSignal() as stop:
        assert not stop.save_asked
        signal.raise_signal(signal.SIGUSR1)
        assert stop.save_asked
        assert not stop.number
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_in_another_thread_signals_are_left_alone() -> None:
    seen = []

    def work() -> None:
        with StopSignal() as stop, stop.noted():
            seen.append(stop.number)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0]


def test_a_closing_console_waits_until_the_run_has_ended() -> None:
    answers: list[bool] = []
    with StopSignal() as stop:
        assert not stop.console_event(0)  # Ctrl-C, which comes as a signal
        thread = threading.Thread(target=lambda: answers.append(stop.console_event(2)))
        thread.start()
        end = time.monotonic() + 5
        while not stop.number and time.monotonic() < end:
            time.sleep(0.001)
        assert stop.number == signal.SIGTERM
        assert answers == []
    thread.join(5)
    assert answers == [True]
