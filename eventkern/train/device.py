"""Where and in which precision to compute, and the seeds of all generators."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from eventkern.train.config import ConfigError

FUSED_DEVICES = ("cpu", "cuda")
"""Where torch's fused optimizers run, which skip a step when a tensor on the device says so."""


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
    """ "fp32", "tf32", "bf16" or "fp16"; "auto" is bf16 on a CUDA device that computes in it, else fp32.

    Raises:
        ConfigError: tf32 or fp16 on a device that has none.
    """
    if name == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "fp32"
    if not has_precision(name, device):
        raise ConfigError(f"precision is {name!r}, but device {device} has none: use fp32 or auto")
    return name


def has_precision(name: str, device: torch.device) -> bool:
    """Whether a device trains in it: tf32 needs CUDA since Ampere, fp16 a device that skips a step without a sync."""
    if name == "tf32":
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return name != "fp16" or device.type in FUSED_DEVICES


def compiles(compile_key: str, device: torch.device) -> bool:
    """Whether a run with this key `compile` compiles its model on a device."""
    return compile_key in ("on", "reduce-overhead") or (compile_key == "auto" and device.type == "cuda")


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Autocast to bf16 or fp16 over float32 weights, or nothing for fp32 and tf32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision in ("bf16", "fp16"))


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """For tf32: inside, CUDA's matrix products and convolutions of float32 tensors are computed in TF32."""
    if precision != "tf32":
        yield
        return
    backends: Any = torch.backends
    settings = (backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    before = [setting.fp32_precision for setting in settings]
    of_all = "highest"
    with suppress(RuntimeError):  # torch refuses to tell where the user has set CUDA's products alone
        of_all = torch.get_float32_matmul_precision()
    try:
        # not the setting of CUDA's products alone, beside which torch refuses to tell what inductor's autotuning asks
        torch.set_float32_matmul_precision("high")
        for setting in (backends.cudnn.conv, backends.cudnn.rnn):
            setting.fp32_precision = "tf32"
        yield
    finally:
        torch.set_float32_matmul_precision(of_all)
        for setting, value in zip(settings, before, strict=True):
            if setting.fp32_precision != value:
                setting.fp32_precision = value


def seed_everything(seed: int, rank: int = 0, step: int = 0) -> None:
    """Seeds the generators of python, numpy and torch (on every device); other ranks and steps draw other numbers."""
    if rank or step:  # hashed together, since a sum is another run's seed
        (seed,) = np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64).tolist()
        seed >>= 1
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  # for code that uses the global generator
    torch.manual_seed(seed)
