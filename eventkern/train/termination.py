"""How a process ends: by SIGTERM, as an exception, so that half-written files are removed on the way out, or as a
request to stop; and quietly where nobody reads its output to the end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

STANDARD_OUTPUTS = (1, 2)
UNREAD = 141
"""The exit code of a command whose output is not read to its end, as a shell tells of one that SIGPIPE ended."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where it finds the program."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside, a first SIGTERM raises Terminated and a second one ends the program at once."""

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class StopRequest:
    """Whether a signal has asked for a stop."""

    is_made = False


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Inside, Ctrl-C and SIGTERM make the request; a second Ctrl-C is Python's own."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may set handlers
        return

    def make(number: int, frame: FrameType | None) -> None:
        request.is_made = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.signal(number, make) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ending_quietly(main: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit code; where nobody reads its output to the end (`| head`), `UNREAD`.

    A stream that is closed from the beginning (`>&-`) takes what is printed and drops it.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (as long as the process)
    try:
        try:
            code = main() or 0
            if not code:
                sys.stdout.flush()  # here, for at exit Python would tell of a broken pipe itself
            return code
        except SystemExit as leave:
            if isinstance(leave.__context__, BrokenPipeError):
                return UNREAD  # rich leaves so, with 1
            sys.stdout.flush()
            raise
    except BrokenPipeError:
        if not is_unread():
            raise  # another pipe than that of the output
        with open(os.devnull, "wb") as nowhere:
            for descriptor in STANDARD_OUTPUTS:
                os.dup2(nowhere.fileno(), descriptor)
        return UNREAD


def is_unread() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads any more."""
    outputs = select.poll()
    for descriptor in STANDARD_OUTPUTS:
        outputs.register(descriptor, select.POLLOUT)
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in outputs.poll(0))
