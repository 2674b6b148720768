"""Where a device waits in a profiled step: its idle intervals, shared out among what the host did meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.training import TrainingStep
from eventkern.hardware import synchronize
from eventkern.models.event_transformer import EventBatchLike
from profiling.trace import LAUNCHES, busy, run_steps

Intervals = list[tuple[float, float]]

OPERATORS = ("aten::", "eventkern::", "graph_", "cpp_fused", "mkldnn", "mkl::")
"""How the names of operators begin that do work on a CPU, those of compiled kernels among them."""
SYNCS = (
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::equal",
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
)
ALLOCATIONS = ("aten::empty", "aten::empty_strided", "aten::empty_like", "cudaMalloc", "cudaFree", "cudaHostAlloc")
CAUSES = {
    "sync": "the host asks for a value (item, nonzero)",
    "allocator": "allocator",
    "data": "wait for data",
    "optimizer": "between operators: optimizer and clipping",
    "forward": "between operators: Python of the forward",
    "backward": "between operators: autograd of the backward",
    "other": "between the phases",
}
"""What an idle moment is put down to, by key; the first that fits."""
NUM_TOP = 8


def merged(intervals: Sequence[tuple[float, float]]) -> Intervals:
    """The same moments in disjoint intervals, in order."""
    joined: Intervals = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        elif end > start:
            joined.append((start, end))
    return joined


def minus(intervals: Intervals, removed: Intervals) -> Intervals:
    """What of disjoint intervals in order lies outside others."""
    left: Intervals = []
    first = 0
    for begin, end in intervals:
        start = begin
        while first < len(removed) and removed[first][1] <= start:
            first += 1
        number = first
        while number < len(removed) and removed[number][0] < end:
            if removed[number][0] > start:
                left.append((start, removed[number][0]))
            start = max(start, removed[number][1])
            number += 1
        if start < end:
            left.append((start, end))
    return left


def length(intervals: Intervals) -> float:
    return busy(intervals)[0]


def shared_out(span: tuple[float, float], work: Intervals, causes: dict[str, Intervals]) -> dict[str, float]:
    """The idle time of a span by cause: each idle moment goes to the first cause that covers it, else to "other".

    Args:
        span: start and end.
        work: when the device was busy.
        causes: when each was going on, in the order of precedence.
    """
    idle = minus([span], merged(work))
    times = {}
    for name, intervals in causes.items():
        rest = minus(idle, merged(intervals))
        times[name] = length(idle) - length(rest)
        idle = rest
    return times | {"other": length(idle)}


@dataclass(frozen=True)
class Moment:
    """An event of the profiler, as far as it matters here."""

    name: str
    start: float
    end: float
    is_on_device: bool
    is_nested: bool = False
    """Inside another operator's interval."""


def moments(profiler: profile) -> Iterator[Moment]:
    """The profiler's events."""
    for event in profiler.events() or []:
        is_on_device = event.device_type != DeviceType.CPU
        if is_on_device and getattr(event, "is_user_annotation", False):
            continue
        parent = event.cpu_parent
        while parent is not None and not parent.name.startswith(OPERATORS):
            parent = parent.cpu_parent
        yield Moment(event.name, event.time_range.start, event.time_range.end, is_on_device, parent is not None)


def account(seen: Sequence[Moment], num_steps: int, device_type: str) -> dict[str, Any]:
    """What a step did and where it waited.

    On CUDA the work is what ran on the device, and a gap is put down to what the host did meanwhile. On a CPU the work
    is the outermost operators, except those that only allocate or read a value.

    Args:
        seen: the events of whole steps, with a range for each phase.
        num_steps: how many steps.
        device_type: "cpu" or "cuda".
    """
    ranges = {
        name: [(each.start, each.end) for each in seen if each.name == name and not each.is_on_device]
        for name in ("data", "optimizer", "forward", "backward")
    }
    outermost = [each for each in seen if not each.is_on_device and not each.is_nested]
    causes = {
        "sync": [(each.start, each.end) for each in outermost if each.name in SYNCS],
        "allocator": [(each.start, each.end) for each in outermost if each.name in ALLOCATIONS],
        **ranges,
    }
    if device_type == "cuda":
        work = [each for each in seen if each.is_on_device]
    else:
        idle_names = (*SYNCS, *ALLOCATIONS)
        work = [each for each in outermost if each.name.startswith(OPERATORS) and each.name not in idle_names]
    starts, ends = ([pair[side] for pairs in ranges.values() for pair in pairs] for side in (0, 1))
    span = min(starts), max([*ends, *(each.end for each in work)])
    intervals = [(max(each.start, span[0]), each.end) for each in work]
    busy_us = length(merged(intervals))
    gaps = shared_out(span, intervals, causes)
    spent: Counter[str] = Counter()
    for each in work:
        spent[each.name] += each.end - each.start  # type: ignore[assignment]
    return {
        "span_ms": (span[1] - span[0]) / 1e3 / num_steps,
        "busy_ms": busy_us / 1e3 / num_steps,
        "busy_share": busy_us / (span[1] - span[0]),
        "kernels": len(work) / num_steps,
        "operators": sum(each.name.startswith(OPERATORS) for each in seen) / num_steps,
        "launches": sum(each.name in LAUNCHES for each in seen) / num_steps,
        "syncs": sum(each.name in SYNCS and not each.is_nested for each in seen) / num_steps,
        "gaps_ms": {name: spent_us / 1e3 / num_steps for name, spent_us in gaps.items()},
        "top_ms": {name: spent_us / 1e3 / num_steps for name, spent_us in spent.most_common(NUM_TOP)},
    }


def profiled(step: TrainingStep, batches: Iterator[EventBatchLike], num_steps: int) -> dict[str, Any]:
    """Profile a few steps and account for them."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if step.device.type == "cuda" else [])]
    clock, step.name_range = step.name_range, record_function
    try:
        run_steps(step, batches, 1)
        synchronize(step.device)
        with profile(acc_events=True, activities=kinds) as profiler:
            run_steps(step, batches, num_steps)
            synchronize(step.device)
    finally:
        step.name_range = clock
    return account(list(moments(profiler)), num_steps, step.device.type)
