"""The machine's own ceilings, and the least time that counted work can take under them.

    python -m profiling.roofline [--device cpu|cuda] [--quick] [--out benchmarks/results]

measures the ceilings, then every op and the training steps under them (profiling/roofline_cases.py), and prints a
table; with `--out` it leaves the table, the record and a picture there (profiling/roofline_report.py). Half a minute on
2 quiet cores, with `--quick` half of that.

Source:
    Williams, Waterman and Patterson, 2009 (Roofline: an insightful visual performance model).
"""

import sys
from dataclasses import dataclass, field

import torch

from eventkern import hardware
from eventkern.train.termination import ending_quietly


@dataclass(frozen=True)
class Work:
    """What work needs whatever the code, counted from shapes: each input read once, each output written once.

    Args:
        operations: floating-point operations of matrix products.
        bytes: to and from memory.
        events: handled by the work, for a rate.
        cache_bytes: read and written again and again, in a working set of cache_size bytes that fits a cache.
        cache_size: of that working set.
    """

    operations: float
    bytes: float
    events: int = 0
    cache_bytes: float = 0.0
    cache_size: int = 0


@dataclass
class Ceilings:
    """Bandwidths and matrix-product rates of one device, each measured when first asked for and then kept."""

    device: torch.device
    measured_bandwidth: float | None = None
    measured_rates: dict[torch.dtype, float] = field(default_factory=dict)
    measured_reads: dict[int, float] = field(default_factory=dict)

    @classmethod
    def highest(cls, measured: "list[Ceilings]") -> "Ceilings":
        """Of several measurements of one device: a ceiling is what it reaches undisturbed."""
        rates: dict[torch.dtype, float] = {}
        reads: dict[int, float] = {}
        for each in measured:
            rates |= {dtype: max(rate, rates.get(dtype, 0.0)) for dtype, rate in each.measured_rates.items()}
            reads |= {size: max(rate, reads.get(size, 0.0)) for size, rate in each.measured_reads.items()}
        copies = [each.measured_bandwidth for each in measured if each.measured_bandwidth is not None]
        return cls(measured[0].device, max(copies, default=None), rates, reads)

    def bandwidth(self) -> float:
        """Bytes per second of a large copy, read and written."""
        if self.measured_bandwidth is None:
            self.measured_bandwidth = hardware.copy_bandwidth(self.device)
        return self.measured_bandwidth

    def rate(self, dtype: torch.dtype) -> float:
        """Floating-point operations per second of a large matrix product."""
        if dtype not in self.measured_rates:
            self.measured_rates[dtype] = hardware.gemm_rate(self.device, dtype)
        return self.measured_rates[dtype]

    def read_bandwidth(self, size: int) -> float:
        """Bytes per second of reading `size` bytes again and again."""
        if size not in self.measured_reads:
            self.measured_reads[size] = hardware.read_bandwidth(size, self.device)
        return self.measured_reads[size]

    def times_s(self, work: Work, dtype: torch.dtype) -> dict[str, float]:
        """Seconds that the work takes at each ceiling that bounds it: "copy", "gemm", "cache"."""
        times = {"copy": work.bytes / self.bandwidth()}
        if work.operations:
            times["gemm"] = work.operations / self.rate(dtype)
        if work.cache_bytes:
            times["cache"] = work.cache_bytes / self.read_bandwidth(work.cache_size)
        return times

    def floor_s(self, work: Work, dtype: torch.dtype) -> float:
        """Seconds below which no version can go: the largest of the times at the ceilings."""
        return max(self.times_s(work, dtype).values())

    def bound(self, work: Work, dtype: torch.dtype) -> str:
        """Which ceiling the floor comes from."""
        times = self.times_s(work, dtype)
        return max(times, key=times.__getitem__)

    def to_dict(self) -> dict[str, object]:
        """What has been measured so far, for a results file."""
        return {
            "device": str(self.device),
            "copy_bytes_per_s": self.measured_bandwidth,
            "read_bytes_per_s": {str(size): rate for size, rate in self.measured_reads.items()},
            "gemm_flops_per_s": {
                str(dtype).removeprefix("torch."): rate for dtype, rate in self.measured_rates.items()
            },
        }


if __name__ == "__main__":
    from profiling.roofline_report import main

    sys.exit(ending_quietly(main))
