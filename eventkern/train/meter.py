"""What a run's steps cost: time, events, operations and memory between two logged steps."""

from __future__ import annotations

import functools
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eventkern import hardware
from eventkern.train.protocols import CountedModel

MEASURED = (
    "step_ms",
    "events_per_s",
    "tokens_per_s",
    "flops_per_s",
    "mfu",
    "data_wait_ms",
    "data_wait_share",
    "memory_bytes",
)
"""Names of what the meter reads: the numbers in which two otherwise equal runs differ."""
PEAK_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PEAK_BUDGET_S = 0.3


class Meter:
    """Counts steps, labels, operations and time between two logged steps.

    The peak that MFU is a share of is measured here when the first interval starts, before its clock: the fastest of a
    few large matrix products on the device, in the precision of the run and with the threads of the process.

    Args:
        model: the model itself, not a wrapper of it; one that is no CountedModel has no tokens/s and no MFU.
        device: where it computes.
        precision: "fp32", "tf32", "bf16" or "fp16".
        world_size: ranks; each is taken to do what this one does.
    """

    def __init__(
        self,
        model: Any = None,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        world_size: int = 1,
    ) -> None:
        self._model = model if isinstance(model, CountedModel) else None
        self._device = torch.device(device)
        self._precision = precision
        self._world_size = world_size
        self._peak: float | None = None
        self._begin()

    def start(self) -> None:
        """Begins a new interval, so that evaluations and checkpoints are in none."""
        if self._peak is None and self._model is not None:
            self._peak = peak_flops_per_s(self._device, self._precision, torch.get_num_threads())
        self._begin()

    def _begin(self) -> None:
        self._start_s = time.perf_counter()
        self._waited_s = 0.0
        self._steps = 0
        self._flops = 0
        self._tokens = 0
        self.num_targets = torch.zeros((), dtype=torch.int64, device="cpu")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in here is spent waiting for data."""
        before = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - before

    def leave_out(self, seconds: float) -> None:
        """Takes seconds that went into no step, such as those of a compilation, out of the interval."""
        self._start_s += seconds

    def count(self, num_targets: Tensor, batches: Sequence[Any] = ()) -> None:
        """Counts a step: its labels, which stay on the device, and the work that its micro-batches' shapes tell."""
        self._steps += 1
        self.num_targets = num_targets if self._steps == 1 else self.num_targets + num_targets
        if self._model is not None:
            for batch in batches:
                self._flops += self._model.flops(batch)
                self._tokens += self._model.tokens(batch)

    def read(self, num_targets: float) -> dict[str, float]:
        """The interval's numbers under the names of MEASURED, given its labels, of all ranks, as a number.

        Returns:
            step_ms; events_per_s: labelled target events; tokens_per_s: events that go through the network, those of
            the source streams and padding included; flops_per_s: operations of a rank, counted from shapes, and mfu,
            their share of its peak; data_wait_ms of a step, and data_wait_share of the time; memory_bytes: on CUDA the
            most that tensors took so far, elsewhere what the process holds. Without a CountedModel there are no
            tokens_per_s, flops_per_s and mfu.
        """
        elapsed_s = time.perf_counter() - self._start_s
        numbers = {"step_ms": 1e3 * elapsed_s / self._steps, "events_per_s": num_targets / elapsed_s}
        if self._peak is not None:
            numbers["tokens_per_s"] = self._world_size * self._tokens / elapsed_s
            numbers["flops_per_s"] = self._flops / elapsed_s
            numbers["mfu"] = self._flops / elapsed_s / self._peak
        return numbers | {
            "data_wait_ms": 1e3 * self._waited_s / self._steps,
            "data_wait_share": self._waited_s / elapsed_s,
            "memory_bytes": memory_bytes(self._device),
        }


@functools.cache
def peak_flops_per_s(device: torch.device, precision: str, num_threads: int) -> float:
    """The rate of large matrix products, measured in a third of a second, once for a process; leaves no memory taken.

    Args:
        device: where.
        precision: of the products; "tf32" is what torch's settings are then expected to say (`float32_products`).
        num_threads: the threads of the process, in which the rate of a CPU differs.
    """
    rate = hardware.gemm_rate(device, PEAK_DTYPES.get(precision, torch.float32), budget_s=PEAK_BUDGET_S)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return rate


def memory_bytes(device: torch.device) -> int:
    """On CUDA the most that tensors took so far, on MPS what the driver holds, on a CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the most so far: nothing tells the present there
    return most if sys.platform == "darwin" else most * 1024
