"""What ends a run and is nobody's mistake, in one line with its way out. Imports no torch before it is needed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from eventkern.train.config import TrainerConfig


class RunFailure(RuntimeError):
    """A failure of the machine or of another rank: one line that says the way out."""


class OtherRankError(Exception):
    """Another rank has failed, and tells the reason; this one ends in silence."""


def smaller_step(config: TrainerConfig) -> str:
    """How a training step takes less memory, for `explained`."""
    return (
        f"at batch_size {config.batch_size} and grad_accum {config.grad_accum}: lower batch_size, and raise grad_accum "
        "to keep the step as large"
    )


@contextmanager
def explained(smaller: str, *, is_alone: bool = True, compiles: bool = True) -> Iterator[None]:
    """Turns memory that is used up, a failed compilation and a lost rank into a RunFailure; the rest passes through.

    Args:
        smaller: at which keys and values memory was used up, and which of them to change.
        is_alone: there are no other ranks to lose.
        compiles: there is a --compile to be switched off.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RunFailure):
            raise
        if is_out_of_memory(error):
            told = f"out of memory {smaller} ({first_line(error)})"
        elif compiles and _is_of_compiler(error):
            told = f"torch.compile failed; --compile off trains without it ({first_line(error)})"
        elif not is_alone and _is_of_connection(error):
            told = f"lost another rank, whose own message says why; --resume auto goes on ({first_line(error)})"
        else:
            raise
        raise RunFailure(told) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the allocator of the CPU, had no memory left."""
    import torch

    is_of_device = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return is_of_device or "can't allocate memory" in str(error) or "MPS backend out of memory" in str(error)


def _is_of_compiler(error: BaseException) -> bool:
    exceptions = sys.modules.get("torch._dynamo.exc")  # not there, then nothing was compiled
    return exceptions is not None and isinstance(error, exceptions.TorchDynamoException)


def _is_of_connection(error: BaseException) -> bool:
    import torch

    # gloo's own errors are plain ones, which name its source file
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    error = getattr(error, "inner_exception", error)  # what a compiler's backend has raised
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip()[:200] if lines else type(error).__name__
