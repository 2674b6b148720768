"""Where and in which precision to compute, and the seeds of all generators."""

from __future__ import annotations

import random

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
