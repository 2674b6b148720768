"""Where and in which precision to compute, and the seeds of all generators."""

from __future__ import annotations

import ctypes
import random
import sys

import numpy as np
import torch

from eventkern.train.config import ConfigError


def select_device(name: str) -> torch.device:
    """The device of a name; "auto" is cuda, else mps, else cpu.

    Raises:
        ConfigError: a device that torch does not see.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_there in available.items() if is_there)
    if name not in available:
        raise ConfigError(f"device is {name!r}, but must be auto | cpu | cuda | mps")
    if not available[name]:
        raise ConfigError(
            f"device is {name!r}, but torch {torch.__version__} sees no such device here: use auto or cpu"
        )
    return torch.device(name)


def keep_freed_memory() -> None:
    """Let the C allocator keep what a step frees, where it is glibc: half of a CPU step can go into page faults else.

    By default blocks of 32 MiB and more, and at first of 128 KiB and more, return to the kernel when they are freed and
    come back as fresh pages, one fault each. The process then holds its peak until it ends.

    Source: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    trim_threshold, mmap_threshold = -1, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


def select_precision(name: str, device: torch.device) -> str:
    """ "fp32" or "bf16"; "auto" is bf16 on a CUDA device that computes in it, else fp32."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bf16 autocast over float32 weights, or nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def seed_everything(seed: int) -> None:
    """Seeds the generators of python, numpy and torch (on every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  # for code that uses the global generator
    torch.manual_seed(seed)
