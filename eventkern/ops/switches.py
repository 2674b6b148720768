"""What every op reads: the library it is defined in, the dtypes that kernels serve, and the process-wide switches."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

LIBRARY = torch.library.Library("eventkern", "FRAGMENT")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""In the order of the extension's FloatType."""

_is_reference_forced = False
_is_check_forced = False


@contextmanager
def use_reference() -> Iterator[None]:
    """Route every op to its plain-torch reference inside the block, on every device: for studies and debugging.

    For the whole process, compiled code too (which compiles once more for it). A backward follows its forward.
    """
    global _is_reference_forced
    outer, _is_reference_forced = _is_reference_forced, True
    try:
        yield
    finally:
        _is_reference_forced = outer


@contextmanager
def check_inputs() -> Iterator[None]:
    """Check ids and targets against their sizes on every device inside the block, and raise a named IndexError.

    The CPU always checks. On a GPU the check waits for the device, so it is off unless asked for: there an id or target
    out of range makes its row NaN instead.
    """
    global _is_check_forced
    outer, _is_check_forced = _is_check_forced, True
    try:
        yield
    finally:
        _is_check_forced = outer


def is_reference_forced() -> bool:
    return _is_reference_forced


def is_check_forced() -> bool:
    return _is_check_forced


def has_kernel(device: torch.device) -> bool:
    """Whether ops have kernels for a device; "meta" stands for those of a traced or compiled model."""
    return device.type in ("cpu", "cuda", "meta")


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for a device; it knows no meta device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
