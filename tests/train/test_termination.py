"""SIGTERM unwinds."""

from __future__ import annotations

import signal
import threading

import pytest

from eventkern.train.termination import Terminated, terminable


def test_sigterm_runs_the_context_managers_on_its_way_out() -> None:
    before = signal.getsignal(signal.SIGTERM)
    cleaned_up = []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleaned_up.append(signal.getsignal(signal.SIGTERM))

    with pytest.raises(Terminated), terminable():
        work()
    assert cleaned_up == [signal.SIG_DFL]  # a second one would have ended the program
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_leaves_the_handlers_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with terminable():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
