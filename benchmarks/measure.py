"""Times contenders in turn, so that what the machine does meanwhile happens to all of them alike."""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from eventkern.hardware import synchronize
from profiling.roofline import Ceilings, Work

Run = Callable[[], object]


@dataclass
class Contender:
    """One way of doing the work: a name, what to call, and the seconds and memory of its calls."""

    name: str
    run: Run
    is_ours: bool = False
    times_s: list[float] = field(default_factory=list)
    peak_bytes: float = float("nan")
    is_part: bool = False
    """A part of the work, timed alone: shown, and never the strongest peer."""

    def time_once(self, device: torch.device) -> None:
        """Run once untimed, so that the caches are as a call of its own leaves them; then once more, timed."""
        self.run()
        self.times_s.append(seconds(self.run, device))


@dataclass(frozen=True)
class Row:
    """One line of a results table. Times are medians over the rounds, spreads interquartile ranges."""

    contender: str
    is_ours: bool
    rounds: int
    median_s: float
    spread_s: float
    ratio: float | None
    """How many times faster than the strongest peer: its time over this one's, round by round, the median of that."""
    peak_bytes: float
    floor_s: float
    bound: str
    is_part: bool = False

    @property
    def ceiling_share(self) -> float:
        return self.floor_s / self.median_s


class Compare(Protocol):
    """What a benchmark calls with its contenders."""

    def __call__(
        self, case: str, contenders: list[Contender], work: Work, *, device: torch.device, dtype: torch.dtype
    ) -> None: ...


def seconds(run: Run, device: torch.device) -> float:
    """Seconds of one call: the device's own clock on CUDA, the wall elsewhere."""
    synchronize(device)
    if device.type != "cuda":
        start_s = time.perf_counter()
        run()
        synchronize(device)
        return time.perf_counter() - start_s
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_extra_bytes(run: Run, device: torch.device) -> float:
    """The most memory one call held beyond what was held before it; nan where the system does not tell."""
    if device.type == "cuda":
        before = float(torch.cuda.memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if not reset_peak_resident():
        return float("nan")
    before = status_bytes("VmRSS")
    run()
    return max(0.0, status_bytes("VmHWM") - before)


def reset_peak_resident() -> bool:
    """Let the peak of the resident set begin anew; False where the system does not tell it."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        # Blocks that the heap kept from earlier calls would hide what the next call needs.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return False
    return True


def status_bytes(name: str) -> float:
    """A field of /proc/self/status, which counts in KiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024.0 * int(line.split()[1])


def rotations(contenders: list[Any]) -> Iterator[list[Any]]:
    """The contenders again and again, each time another one first: none always runs in another's wake."""
    first = 0
    while True:
        yield contenders[first:] + contenders[:first]
        first = (first + 1) % max(1, len(contenders))


def rows(contenders: list[Contender], work: Work, ceilings: Ceilings, dtype: torch.dtype) -> list[Row]:
    """The table of one case, the fastest first."""
    peers = [contender for contender in contenders if not contender.is_ours and not contender.is_part]
    strongest = min(peers, key=lambda peer: statistics.median(peer.times_s), default=None)
    table = []
    for contender in contenders:
        ratio = None
        if strongest:
            pairs = zip(strongest.times_s, contender.times_s, strict=True)
            ratio = statistics.median(theirs_s / ours_s for theirs_s, ours_s in pairs)
        low_s, median_s, high_s = statistics.quantiles(contender.times_s, n=4, method="inclusive")
        table.append(
            Row(
                contender=contender.name,
                is_ours=contender.is_ours,
                rounds=len(contender.times_s),
                median_s=median_s,
                spread_s=high_s - low_s,
                ratio=ratio,
                peak_bytes=contender.peak_bytes,
                floor_s=ceilings.floor_s(work, dtype),
                bound=ceilings.bound(work, dtype),
                is_part=contender.is_part,
            )
        )
    return sorted(table, key=lambda row: (-(row.ratio or 0.0), row.median_s))
