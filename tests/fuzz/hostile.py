"""Values that nobody expects, and what an error must be like."""

from collections.abc import Callable
from random import Random
from typing import Any, TypeVar

T = TypeVar("T")

INTEGERS = (
    *(0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 4_097, 65_535, 65_536, 1 << 24),
    *(2**31 - 1, 2**31, 2**32, 2**48, 2**48 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30),
    *(-2, -(2**31), -(2**31) - 1, -(2**63), -(2**63) - 1),
)
FLOATS = (0.0, -0.0, 1.5, -1.0, 1e-45, 1e-30, 1e30, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "",
    " ",
    "x",
    "0",
    "-1",
    "1e5",
    "nan",
    "None",
    "\0",
    "\ud800",
    "é",
    "..",
    "/",
    "a" * 5_000,
    "%s{}",
    "all",
    "\n",
)
JUNK = (None, True, False, b"", (), [], {}, set(), object(), int, *FLOATS, *TEXTS)

NAMED = (ValueError, TypeError, IndexError)


def integer(random: Random) -> int:
    return random.choice(INTEGERS) if random.random() < 0.7 else random.randrange(-5, 40)


def value(random: Random) -> Any:
    """Anything that JSON or TOML can hold."""
    kinds = (
        lambda: integer(random),
        lambda: random.choice(FLOATS),
        lambda: random.choice(TEXTS),
        lambda: random.choice((None, True, False, [], {}, [[]], {"": 0}, [None], [1, "x"])),
    )
    return random.choice(kinds)()


def outcome(call: Callable[[], T], errors: tuple[type[Exception], ...] = NAMED) -> T | Exception:
    """What the call returns, or the error that it raised, one of those named; whatever else it raises is a fault.

    A message is one line that says something, and the class is no subclass that some other layer raised.
    """
    try:
        return call()
    except errors as error:
        if isinstance(error, UnicodeError) or type(error).__module__ == "json.decoder":
            raise
        told = error
    assert len(str(told)) > 8, f"{told!r} says nothing"
    return told


def told(result: object) -> str:
    return f"refused ({type(result).__name__})" if isinstance(result, Exception) else "right"


def flipped(random: Random, content: bytes) -> bytes:
    """The bytes with a few changes: bits, bytes, runs that are cut out, doubled, moved, or made of one byte."""
    held = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        if not held:
            break
        start = random.randrange(len(held))
        end = min(len(held), start + random.choice((1, 2, 4, 8, 100, 4_096)))
        kind = random.randrange(7)
        if kind == 0:
            held[start] ^= 1 << random.randrange(8)
        elif kind == 1:
            held[start] = random.randrange(256)
        elif kind == 2:
            del held[start:end]
        elif kind == 3:
            held[start:start] = held[start:end]
        elif kind == 4:
            held[start:end] = bytes([random.choice((0, 1, 127, 128, 255))]) * (end - start)
        elif kind == 5:
            other = random.randrange(len(held))
            piece = held[other : other + end - start]
            held[start : start + len(piece)] = piece
        else:
            del held[start:]
    return bytes(held)
