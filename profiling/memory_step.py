"""A training step's memory: every allocation in order, the peak of each phase, and what the backward waits for."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.measure import reset_peak_resident, status_bytes
from benchmarks.training import Shapes, TrainingStep, random_batch
from eventkern.models import EventTransformer
from eventkern.models.event_transformer import EventBatchLike

PHASES = ("forward", "backward", "optimizer")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_WARM_UP_STEPS = 2
NUM_SLICES = 200
"""Of a step, in the record."""


@dataclass(frozen=True)
class History:
    """What tensors held, in order, beyond what they held when the step began.

    Args:
        times_ms: of each allocation and release, since the step began.
        held_bytes: just after each.
        phases: start and end of each phase, in the same milliseconds.
    """

    times_ms: list[float]
    held_bytes: list[float]
    phases: dict[str, tuple[float, float]]

    def peak_bytes(self, phase: str) -> float:
        """The most that was held in a phase, what was held when it began included."""
        return self.most_held(*self.phases[phase])

    def most_held(self, start_ms: float, end_ms: float) -> float:
        """The most that was held in an interval."""
        inside = self.held_bytes[bisect_left(self.times_ms, start_ms) : bisect_right(self.times_ms, end_ms)]
        return max([self.held_at(start_ms), *inside])

    def held_at(self, time_ms: float) -> float:
        """What was held at a time."""
        num_before = bisect_right(self.times_ms, time_ms)
        return self.held_bytes[num_before - 1] if num_before else 0.0

    def duration_ms(self) -> float:
        """Of the step."""
        return self.phases[PHASES[-1]][1]

    def by_slice(self, num_slices: int) -> list[float]:
        """The most that was held in each of so many equal parts of the step."""
        end = self.duration_ms()
        edges = [end * edge / num_slices for edge in range(num_slices + 1)]
        return [self.most_held(*each) for each in pairwise(edges)]


@dataclass(frozen=True)
class Kept:
    """The tensors that autograd keeps from the forward for the backward, without parameters and the batch.

    Args:
        num_bytes: of their memory, counted once where tensors share it.
        groups: shape and dtype, how many, and their bytes; the largest first.
    """

    num_bytes: float
    groups: list[tuple[str, int, float]]


@dataclass(frozen=True)
class StepMemory:
    """A training step's memory.

    Args:
        name: configuration and precision.
        static_bytes: held all along, by name: weights, moments of the optimizer, the batch.
        history: of the allocations of one step.
        peaks_bytes: by phase, of the resident set (CPU) or the caching allocator (CUDA), beyond what the step began
            with; nan where the system does not tell.
        kept: for the backward.
    """

    name: str
    static_bytes: dict[str, float]
    history: History
    peaks_bytes: dict[str, float]
    kept: Kept

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "static_bytes": self.static_bytes,
            "kept_for_backward_bytes": self.kept.num_bytes,
            "kept_for_backward": self.kept.groups,
            "phases": {
                phase: {
                    "tensors_peak_bytes": self.history.peak_bytes(phase),
                    "tensors_end_bytes": self.history.held_at(self.history.phases[phase][1]),
                    "system_peak_bytes": self.peaks_bytes[phase],
                }
                for phase in PHASES
            },
            "phases_ms": self.history.phases,
            "held_bytes_by_slice": self.history.by_slice(NUM_SLICES),
        }


def record_history(step: TrainingStep, batch: EventBatchLike) -> History:
    """Every allocation of one step by torch's allocators on the step's device, as its profiler sees them."""
    step.name_range = record_function
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if step.device.type == "cuda" else [])]
    with profile(acc_events=True, activities=kinds, profile_memory=True) as profiler:
        step(batch)
    recorded: Any = profiler.profiler
    events = recorded.kineto_results.events()
    spans = {
        event.name(): (event.start_ns(), event.end_ns())
        for event in events
        if event.name() in PHASES and event.device_type() == DeviceType.CPU
    }
    start_ns = spans[PHASES[0]][0]
    times_ms, held_bytes, held = [], [], 0.0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        if event.device_type().name.lower() == step.device.type:
            held += event.nbytes()
            times_ms.append((event.start_ns() - start_ns) / 1e6)
            held_bytes.append(held)
    phases = {name: ((start - start_ns) / 1e6, (end - start_ns) / 1e6) for name, (start, end) in spans.items()}
    return History(times_ms, held_bytes, phases)


@dataclass
class Peaks:
    """Ranges that take the peak of each phase beyond `before`."""

    device: torch.device
    before: float
    taken: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The peak from here to its end."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            self.taken[name] = torch.cuda.max_memory_allocated(self.device) - self.before
            return
        is_told = reset_peak_resident()
        yield
        self.taken[name] = status_bytes("VmHWM") - self.before if is_told else math.nan


def system_peaks(step: TrainingStep, batch: EventBatchLike, num_steps: int) -> dict[str, float]:
    """By phase, the median over some steps of what the process, or the allocator of CUDA, held at most."""
    taken: list[dict[str, float]] = []
    for _ in range(num_steps):
        if step.device.type == "cuda":
            before = float(torch.cuda.memory_allocated(step.device))
        else:
            before = status_bytes("VmRSS") if reset_peak_resident() else math.nan
        peaks = Peaks(step.device, before)
        step.name_range = peaks.phase
        step(batch)
        taken.append(peaks.taken)
    return {phase: statistics.median(peaks[phase] for peaks in taken) for phase in PHASES}


def record_kept(step: TrainingStep, batch: EventBatchLike) -> Kept:
    """What the forward of one step leaves for its backward."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*step.parameters, batch.sources, batch.targets)}
    storages: dict[int, float] = {}
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()

    def kept(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in storages and storage.nbytes():
            storages[storage.data_ptr()] = float(storage.nbytes())
            name = f"{'x'.join(map(str, tensor.shape))} {str(tensor.dtype).removeprefix('torch.')}"
            counts[name] += 1
            sizes[name] += storage.nbytes()
        return tensor

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        if name == "forward":
            with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
                yield
        else:
            yield

    step.name_range = phase
    step(batch)
    return Kept(sum(storages.values()), [(name, counts[name], float(size)) for name, size in sizes.most_common()])


def static_bytes(step: TrainingStep, batch: EventBatchLike) -> dict[str, float]:
    """What is held before a step and after it."""
    moments = [value for state in step.optimizer.state.values() for value in state.values() if value.numel() > 1]
    return {
        "weights": float(sum(parameter.nbytes for parameter in step.parameters)),
        "moments of Adam": float(sum(moment.nbytes for moment in moments)),
        "batch": float(batch.sources.nbytes + batch.targets.nbytes),
    }


def measure(name: str, shapes: Shapes, precision: str, device: torch.device, num_steps: int) -> StepMemory:
    """All of a step's memory, after steps that warm it up; of num_steps histories the least disturbed, the fastest."""
    torch.manual_seed(0)
    step = TrainingStep(EventTransformer(shapes.model).to(device), PRECISIONS[precision])
    batch = random_batch(shapes, device)
    for _ in range(NUM_WARM_UP_STEPS):
        step(batch)
    return StepMemory(
        name=f"{name} {precision}",
        static_bytes=static_bytes(step, batch),
        history=min((record_history(step, batch) for _ in range(num_steps)), key=History.duration_ms),
        peaks_bytes=system_peaks(step, batch, num_steps),
        kept=record_kept(step, batch),
    )


def snapshot(shapes: Shapes, precision: str, device: torch.device, path: Path) -> None:
    """The history of CUDA's caching allocator over one step, with stacks, for https://pytorch.org/memory_viz."""
    step = TrainingStep(EventTransformer(shapes.model).to(device), PRECISIONS[precision])
    batch = random_batch(shapes, device)
    for _ in range(NUM_WARM_UP_STEPS):
        step(batch)
    torch.cuda.memory._record_memory_history(max_entries=100_000)
    try:
        step(batch)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
