"""What this machine is, and what it can reach: copy bandwidth and matrix-product rate, measured with torch."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30, "mps": 512 << 20}
"""Bytes of the copied buffer by device type: several times the last-level cache."""
GEMM_SIZE = {"cpu": 1024, "cuda": 8192, "mps": 2048}
"""Rows and columns of the multiplied square matrices by device type."""


def copy_bandwidth(device: str | torch.device = "cpu", *, budget_s: float = 0.5) -> float:
    """Memory bandwidth of a large copy within `device`: (bytes read + bytes written) / seconds.

    Args:
        device: where both buffers lie.
        budget_s: seconds to spend on repeats, beyond the three that are always made.

    Returns:
        Bytes per second of the fastest repeat: a ceiling is what the machine reaches undisturbed.
    """
    device = torch.device(device)
    num_bytes = COPY_BYTES.get(device.type, COPY_BYTES["cpu"])
    if device.type == "cuda":
        num_bytes = min(num_bytes, torch.cuda.mem_get_info(device)[0] // 4)
    generator = torch.Generator(device=device).manual_seed(0)
    source = torch.randint(1 << 62, (num_bytes // 8,), dtype=torch.int64, device=device, generator=generator)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest_s(lambda: target.copy_(source), device, budget_s=budget_s)


def read_bandwidth(num_bytes: int, device: str | torch.device = "cpu", *, budget_s: float = 0.2) -> float:
    """Bandwidth of reading the same memory again and again, from whichever cache it fits: bytes / seconds.

    Args:
        num_bytes: size of what is read; on the CPU the threads share it out.
        device: where it lies.
        budget_s: seconds to spend on repeats, beyond the three that are always made.

    Returns:
        Bytes per second of the fastest repeat, all threads together.
    """
    device = torch.device(device)
    source = torch.ones(max(num_bytes // 4, 1), dtype=torch.float32, device=device)
    return source.nbytes / fastest_s(source.sum, device, budget_s=budget_s)


def gemm_rate(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, *, budget_s: float = 0.5
) -> float:
    """Rate of a large square matrix product on `device`: 2 n^3 / seconds.

    Args:
        device: where the matrices lie.
        dtype: their floating-point type; float32 runs as TF32 only where torch's settings allow it.
        budget_s: seconds to spend on repeats, beyond the three that are always made.

    Returns:
        Floating-point operations per second of the fastest repeat, on random operands.
    """
    device = torch.device(device)
    size = GEMM_SIZE.get(device.type, GEMM_SIZE["cpu"])
    generator = torch.Generator(device=device).manual_seed(0)
    left, right = torch.randn(2, size, size, dtype=torch.float32, device=device, generator=generator).to(dtype)
    product = torch.empty_like(left)
    return 2 * size**3 / fastest_s(lambda: torch.mm(left, right, out=product), device, budget_s=budget_s)


def fastest_s(work: Callable[[], object], device: torch.device, *, budget_s: float) -> float:
    """Seconds of the fastest call of `work`, after one warm-up, over at least three calls and about `budget_s`."""
    work()
    times_s: list[float] = []
    while len(times_s) < 3 or sum(times_s) < budget_s:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times_s.append(time.perf_counter() - start)
    return min(times_s)


def synchronize(device: str | torch.device) -> None:
    """Wait for all work queued on `device`; nothing to wait for on the CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def cpu_model() -> str:
    """The processor's name as the operating system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may run on, which containers and `taskset` make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def instruction_set() -> str:
    """The vector instructions torch chose for this CPU: "AVX512", "AVX2", "DEFAULT" and so on."""
    return str(torch.backends.cpu.get_cpu_capability())
