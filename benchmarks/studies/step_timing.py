"""What the throughput and the utilisation study share: where a step can run, and how contenders are timed.

A `Contender` draws batches from a real loader, or takes one batch again and again, and runs training steps in blocks;
`take_turns` lets contenders run block after block, so that what the machine does meanwhile happens to all alike.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import peak_extra_bytes
from benchmarks.training import Shapes, TrainingStep, endless
from eventkern.data import EventStore
from eventkern.data.loader import EventLoader
from eventkern.hardware import synchronize
from eventkern.models.event_transformer import EventBatchLike
from eventkern.ops import use_reference
from eventkern.train.device import float32_products, has_precision
from profiling.roofline import Ceilings

PHASES = ("data", "forward", "backward", "optimizer")
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "tf32", "bf16", "fp16")}
BLOCK_S = 0.05
"""Seconds that a timed block lasts at least: steps of microseconds would be lost in the clock."""
MOST_ROUNDS = 15
LEAST_ROUNDS = 3
UNTIMED_BELOW_S = 3.0
"""An untimed step goes before each timed block unless a step takes longer than this: it then dwarfs cold caches."""


@dataclass(frozen=True)
class Place:
    """A device and an arithmetic to train in."""

    device: str
    precision: str

    @property
    def missing(self) -> str | None:
        """Why nothing can run here; None where it can."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "torch sees no CUDA device"
        if not has_precision(self.precision, torch.device(self.device)):
            return f"{self.device} has no {self.precision}"
        return None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]


class PhaseClock:
    """Names the phases of a step and adds up what each takes: the wall on a CPU, the device's own events on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._pairs: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a phase. Drawing a batch is timed by the host's clock everywhere, as the trainer counts its waits."""
        if self.device.type == "cuda" and name != "data":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._pairs.append((name, start, end))
            return
        start_s = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - start_s

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call; waits for the device."""
        synchronize(self.device)
        for name, start, end in self._pairs:
            self._seconds[name] += start.elapsed_time(end) / 1e3
        taken, self._seconds, self._pairs = self._seconds, dict.fromkeys(PHASES, 0.0), []
        return taken


class EnergyMeter:
    """Joules that a CUDA device has used, by NVML's own counter; `note` says why there are none."""

    def __init__(self, device: torch.device) -> None:
        self.note = "no NVML"
        self._read: Callable[[], float] | None = None
        if device.type != "cuda":
            return
        try:
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except ImportError:
            return
        except Exception as error:  # NVML's own errors are known only once it is here
            self.note = f"NVML: {error}"
            return
        self.note = ""
        self._read = lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3

    def joules(self) -> float:
        """Since some fixed moment; nan where nothing counts them."""
        return self._read() if self._read else float("nan")


@dataclass(frozen=True)
class Sample:
    """A timed block of steps, per step."""

    seconds: float
    phases: dict[str, float]
    labels: float
    cpu_s: float
    joules: float


@dataclass
class Contender:
    """One way of training: a step and where its batches come from.

    Args:
        name: as tables show it.
        build: makes the step, given the names of phases; called once, so that compiling is in no timed block.
        batches: without end.
        place: where it runs.
        is_reference: whether the ops take their references meanwhile.
    """

    name: str
    build: Callable[[PhaseClock], TrainingStep]
    batches: Iterator[EventBatchLike]
    place: Place
    is_reference: bool = False
    samples: list[Sample] = field(default_factory=list)
    first_s: float = float("nan")
    first_losses: Tensor | None = None
    peak_bytes: float = float("nan")
    failure: str | None = None

    def __post_init__(self) -> None:
        self.device = torch.device(self.place.device)
        self.clock = PhaseClock(self.device)
        self.energy = EnergyMeter(self.device)
        self.step: TrainingStep | None = None
        self.least_s = float("inf")

    def settings(self) -> AbstractContextManager[object]:
        """What the whole process must be set to while this contender runs."""
        return use_reference() if self.is_reference else nullcontext()

    def run(self, num_steps: int) -> Sample:
        """Draw and train `num_steps` times; the device is waited for at the end alone."""
        assert self.step is not None
        labels = []
        with self.settings(), float32_products(self.place.precision):
            self.clock.take()
            joules, cpu_s, start_s = self.energy.joules(), time.process_time(), time.perf_counter()
            for _ in range(num_steps):
                with self.clock("data"):
                    batch = next(self.batches)
                self.losses = self.step(batch)
                labels.append(batch.num_targets)  # type: ignore[attr-defined]
            phases = self.clock.take()
            seconds = time.perf_counter() - start_s
            cpu_s = time.process_time() - cpu_s
            joules = self.energy.joules() - joules
        self.least_s = min(self.least_s, seconds / num_steps)
        count = sum(int(each) for each in labels)
        return Sample(
            seconds / num_steps,
            {name: spent / num_steps for name, spent in phases.items()},
            count / num_steps,
            cpu_s / num_steps,
            joules / num_steps,
        )

    def start(self) -> None:
        """Build, take the first step (which compiles) and one more, then see how much memory a step takes."""
        start_s = time.perf_counter()
        self.step = self.build(self.clock)
        self.run(1)
        self.first_s = time.perf_counter() - start_s
        self.first_losses = self.losses.float().clone()
        if self.least_s < UNTIMED_BELOW_S:
            self.run(1)
        self.peak_bytes = peak_extra_bytes(lambda: self.run(1), self.device)

    def time_block(self) -> None:
        if self.least_s < UNTIMED_BELOW_S:
            self.run(1)
        self.samples.append(self.run(max(1, round(BLOCK_S / self.least_s))))

    def record(self) -> dict[str, Any]:
        """The medians over the rounds, the spread, and how many there were; or why there is nothing."""
        if self.failure:
            return not_run(self.failure)
        seconds = [sample.seconds for sample in self.samples]
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3

        def middle(value: Callable[[Sample], float]) -> float:
            return statistics.median(map(value, self.samples))

        labels = statistics.fmean(sample.labels for sample in self.samples)
        return {
            "status": "measured",
            "rounds": len(seconds),
            "seconds": median,
            "spread_s": high - low,
            "phases": {name: middle(lambda sample, name=name: sample.phases[name]) for name in PHASES},  # type: ignore[misc]
            "labels": labels,
            "events_per_s": labels / median,
            "peak_bytes": self.peak_bytes,
            "first_s": self.first_s,
            "busy_threads": middle(lambda sample: sample.cpu_s / sample.seconds),
            "threads": torch.get_num_threads(),
            "joules": middle(lambda sample: sample.joules),
            "energy_note": self.energy.note,
        }


def not_run(reason: str) -> dict[str, Any]:
    """The record of what was not measured."""
    return {"status": "not run", "reason": reason}


def with_equal_labels(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the same work with the mean of their labels, so that which windows each drew makes none look faster."""
    counts = [row["labels"] for row in rows if row["status"] == "measured"]
    if not counts:
        return rows
    labels = statistics.fmean(counts)
    return [
        row | {"labels": labels, "events_per_s": labels / row["seconds"]} if row["status"] == "measured" else row
        for row in rows
    ]


def check_agreement(contenders: list[Contender]) -> None:
    """A figure is worth nothing unless all compute the same: those of one arithmetic must find the same first losses.

    Raises:
        RuntimeError: they do not.
    """
    for contender in contenders:
        first = next(each for each in contenders if each.place == contender.place)
        assert contender.first_losses is not None
        assert first.first_losses is not None
        tolerance = 1e-4 if contender.place.precision == "fp32" else 2e-2
        if not torch.allclose(contender.first_losses, first.first_losses, rtol=tolerance, atol=0.0):
            far = (contender.first_losses / first.first_losses - 1).abs().max().item()
            raise RuntimeError(
                f"{contender.name} and {first.name} differ by {far:.2g} of their first losses; want at most {tolerance}"
            )


def take_turns(contenders: list[Contender], budget_s: float, *, is_same_work: bool = True) -> None:
    """Start all, then time a block of each, turn by turn, while the budget lasts; three rounds in any case of short
    steps, one of steps that outlast the budget."""
    everyone = contenders
    for contender in everyone:
        try:
            contender.start()
        except torch.OutOfMemoryError:
            contender.failure = "out of memory"
            contender.step = None
    contenders = [contender for contender in everyone if contender.failure is None]
    if is_same_work:
        check_agreement(contenders)
    round_s = sum(2 * max(contender.least_s, BLOCK_S) for contender in contenders)
    least = LEAST_ROUNDS if round_s * LEAST_ROUNDS < 2 * budget_s else 1
    start_s = time.perf_counter()
    for number in range(MOST_ROUNDS if contenders else 0):
        if number >= least and time.perf_counter() - start_s + round_s > budget_s:
            break
        first = number % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            contender.time_block()


def loader_batches(store: EventStore, shapes: Shapes, device: str, *, seed: int = 0) -> Iterator[EventBatchLike]:
    """The training batches of a store without end, in full batches, for a model whose categories may be larger.

    Raises:
        ValueError: a category of the store with more classes than the model has.
    """
    model = shapes.model
    limit = model.category_sizes[0]
    largest = max(store.sizes(limit))
    if largest > limit:
        raise ValueError(f"a category of {store.path} has {largest} classes; want at most id_category_size = {limit}")
    loader = EventLoader(
        store,
        "train",
        src_seq_len=model.src_seq_len,
        tgt_seq_len=model.tgt_seq_len,
        id_category_size=limit,
        batch_size=shapes.batch_size,
        seed=seed,
        device=device,
        drop_last=True,
    )
    if not len(loader):
        raise ValueError(f"batch_size is {shapes.batch_size}; want at most {loader.num_samples}, the store's windows")
    return endless(loader)


def resized(shapes: Shapes, *, batch_size: int | None = None, num_classes: int | None = None, **model: int) -> Shapes:
    """The same shapes with another batch size, other numbers of classes, or other sizes of the model."""
    changes: dict[str, Any] = dict(model)
    if num_classes is not None:
        changes["category_sizes"] = (num_classes,) * len(shapes.model.category_names)
    return Shapes(replace(shapes.model, **changes), batch_size or shapes.batch_size)


def measured_rate(place: Place) -> float:
    """The measured roof: operations a second of large matrix products in a place's arithmetic."""
    with float32_products(place.precision):
        return Ceilings(torch.device(place.device)).rate(place.dtype)
