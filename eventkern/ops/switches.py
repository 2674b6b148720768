"""What every op reads: the dtypes that kernels serve, and the process-wide switches."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_reference_depth = 0
_check_depth = 0


@contextmanager
def use_reference() -> Iterator[None]:
    """Route every op to its plain-torch reference inside the block, on every device: for studies and debugging."""
    global _reference_depth
    _reference_depth += 1
    try:
        yield
    finally:
        _reference_depth -= 1


@contextmanager
def check_inputs() -> Iterator[None]:
    """Check ids and targets against their sizes on every device inside the block, and raise a named IndexError.

    The CPU always checks. On a GPU the check waits for the device, so it is off unless asked for: there an id or target
    out of range makes its row NaN instead.
    """
    global _check_depth
    _check_depth += 1
    try:
        yield
    finally:
        _check_depth -= 1


def is_reference_forced() -> bool:
    return _reference_depth > 0


def is_check_forced() -> bool:
    return _check_depth > 0
