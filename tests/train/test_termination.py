"""SIGTERM unwinds, and output that nobody reads ends quietly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from eventkern.train.termination import UNREAD, Terminated, terminable


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


PROGRAM = """
import os, sys
from eventkern.train.termination import ending_quietly

def main():
    {body}

sys.exit(ending_quietly(main))
"""


def exit_of(body: str, *, stdout: int, stderr: int = subprocess.PIPE) -> tuple[int, str]:
    """The exit code and the complaints of a command of this body."""
    program = [sys.executable, "-c", PROGRAM.format(body=body)]
    run = subprocess.run(program, stdout=stdout, stderr=stderr, text=True, check=False)
    return run.returncode, run.stderr or ""


@pytest.fixture
def unread() -> Iterator[int]:
    """A pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize(
    "body",
    [
        "print('short')",  # written at exit, were it not written before
        "print('short', flush=True)",
        "print('long' * 100_000)",
        "print('help'); sys.exit(0)",
        "import rich; rich.print('drawn')",
    ],
)
def test_output_that_nobody_reads_ends_quietly(unread: int, body: str) -> None:
    assert exit_of(body, stdout=unread) == (UNREAD, "")
    assert exit_of(body, stdout=unread, stderr=unread)[0] == UNREAD
    assert exit_of(body, stdout=subprocess.DEVNULL) == (0, "")


def test_complaints_that_nobody_reads_end_quietly_too(unread: int) -> None:
    assert exit_of("print('no', file=sys.stderr); return 2", stdout=subprocess.DEVNULL, stderr=unread)[0] == UNREAD


def test_another_broken_pipe_is_no_reader_s_doing() -> None:
    other = "reading, writing = os.pipe(); os.close(reading); os.write(writing, b'lost')"
    code, told = exit_of(other, stdout=subprocess.DEVNULL)
    assert code == 1
    assert told.endswith("BrokenPipeError: [Errno 32] Broken pipe\n")


def test_a_stream_closed_from_the_beginning_takes_and_drops() -> None:
    body = "print('nowhere', sys.stdout.isatty()); print('nowhere', file=sys.stderr); return 3"
    program = [sys.executable, "-c", PROGRAM.format(body=body)]
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *program]
        assert subprocess.run(shell, capture_output=True, check=False).returncode == 3
