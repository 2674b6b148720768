"""How the shuffle study times a pass over samples: contenders and orders take turns, long passes are extrapolated."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

MOST_ROUNDS = 5
MOST_CHUNK = 64
"""Batches between two looks at the clock, at the most."""

Epochs = Callable[[], Iterator[Any]]


@dataclass(frozen=True)
class Pass:
    """One order of a contender's samples.

    Args:
        epochs: starts an epoch's iterator of batches.
        num_samples: samples of such an epoch.
        stands_for: samples that its seconds are told for; `num_samples` unless given.
        is_whole: never cut short, because its cost is not spread evenly over the samples.
        reads: files or row groups read so far and the seconds that took, where they are counted.
        expected_loads: reads that theory expects of so many samples.
        prepare: called before each epoch, untimed.
    """

    epochs: Epochs
    num_samples: int
    stands_for: int | None = None
    is_whole: bool = False
    reads: Callable[[], tuple[int, float]] | None = None
    expected_loads: Callable[[int], float] | None = None
    prepare: Callable[[], object] | None = None


@dataclass
class Contender:
    """One way through a layer.

    Args:
        name: as tables show it.
        passes: what is timed, by order.
        batch_size: samples of a batch.
        is_ours: whether it is eventkern's.
        skip: batches before the rate is taken: worker processes deliver the first ones in a burst.
    """

    name: str
    passes: Mapping[str, Pass]
    batch_size: int
    is_ours: bool = False
    skip: int = 1


@dataclass(frozen=True)
class Timing:
    """One pass.

    Attributes:
        seconds: of the samples that the pass stands for.
        first_s: until the first batch.
        num_timed: samples that really passed.
        num_loads: files or row groups read meanwhile; None where they are not counted.
        load_s: seconds that those reads took.
        expected_loads: reads that theory expects of num_timed samples.
    """

    seconds: float
    first_s: float
    num_timed: int
    num_loads: int | None = None
    load_s: float | None = None
    expected_loads: float | None = None


@dataclass
class Figure:
    """What was found for a contender in one order.

    Attributes:
        num_events: rows of the data.
        num_samples: samples that the seconds are told for.
        timings: every pass.
    """

    layer: str
    contender: str
    num_events: int
    order: str
    num_samples: int
    batch_size: int
    is_ours: bool = False
    timings: list[Timing] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(timing.seconds for timing in self.timings)

    @property
    def first_s(self) -> float:
        return statistics.median(timing.first_s for timing in self.timings)

    @property
    def load_s(self) -> float:
        """Seconds of an epoch that go into reads of files or row groups, where they were counted."""
        return self.num_samples * statistics.median(
            (timing.load_s or 0.0) / timing.num_timed for timing in self.timings
        )

    @property
    def num_timed(self) -> int:
        """Samples of the shortest pass."""
        return min(timing.num_timed for timing in self.timings)

    @property
    def is_extrapolated(self) -> bool:
        return self.num_timed < self.num_samples

    def to_dict(self) -> dict[str, object]:
        """All of it, with the medians, the spread and the number of repeats worked out."""
        times = [timing.seconds for timing in self.timings]
        return {
            **{key: value for key, value in vars(self).items() if key != "timings"},
            "seconds": self.seconds,
            "fastest_s": min(times),
            "slowest_s": max(times),
            "first_s": self.first_s,
            "repeats": len(times),
            "samples_timed": self.num_timed,
            "is_extrapolated": self.is_extrapolated,
            "timings": [vars(timing) for timing in self.timings],
        }


def time_pass(each: Pass, budget_s: float, skip: int = 1) -> Timing:
    """Time one epoch; where it outlasts the budget, only its first part, at whose rate the others are taken to pass.

    What comes before the first `skip` batches are there (the order of the whole epoch, the start of processes) then
    counts once, not in proportion, and the budget begins after it.

    Raises:
        RuntimeError: the epoch brings more or fewer samples than it should.
    """
    if each.prepare:
        each.prepare()
    reads_before = each.reads() if each.reads else None
    start_s = time.perf_counter()
    batches = each.epochs()
    num_timed, marks = 0, []
    for _ in range(skip):
        num_timed += sum(map(len, islice(batches, 1)))
        marks.append((time.perf_counter() - start_s, num_timed))
    first_s = marks[0][0]
    mark_s, num_marked = marks[-1]
    elapsed_s, chunk, is_dry = mark_s, 1, False
    num_batches, least_batches = 0, 2 * skip if skip > 1 else 1
    while num_timed < each.num_samples and not is_dry:
        if elapsed_s - mark_s > budget_s and num_batches >= least_batches and not each.is_whole:
            break
        before, before_s = num_timed, elapsed_s
        num_timed += sum(map(len, islice(batches, chunk)))
        elapsed_s = time.perf_counter() - start_s
        is_dry = num_timed == before
        num_batches += chunk
        if elapsed_s - before_s < budget_s / 20:
            chunk = min(2 * chunk, MOST_CHUNK)
    is_cut = num_timed < each.num_samples and not is_dry
    if not is_cut and (num_timed != each.num_samples or next(batches, None) is not None):
        raise RuntimeError(
            f"an epoch of {each.num_samples:,} samples brought {num_timed:,} and then went on or stopped"
        )
    del batches  # ends the worker processes
    n = each.stands_for or each.num_samples
    if num_timed < n and (is_cut or skip > 1) and num_timed > num_marked:
        seconds = mark_s + (elapsed_s - mark_s) / (num_timed - num_marked) * (n - num_marked)
    else:
        seconds = elapsed_s * n / num_timed
    expected = each.expected_loads(num_timed) if each.expected_loads else None
    timing = Timing(seconds, first_s, num_timed, expected_loads=expected)
    if each.reads is None or reads_before is None:
        return timing
    num_loads, load_s = each.reads()
    return replace(timing, num_loads=num_loads - reads_before[0], load_s=load_s - reads_before[1])


def measure(layer: str, num_events: int, contenders: list[Contender], pass_s: float, layer_s: float) -> list[Figure]:
    """Time all contenders in turn, in every order of theirs, again and again while the layer's time lasts.

    Args:
        layer: its name.
        num_events: rows of the data.
        contenders: who takes part.
        pass_s: most seconds of one pass, unless it must be whole.
        layer_s: seconds of all passes together; one round is made in any case.
    """
    figures: dict[tuple[str, str], Figure] = {}
    start_s = time.perf_counter()
    for _ in range(MOST_ROUNDS):
        round_start_s = time.perf_counter()
        for contender in contenders:
            for order, each in contender.passes.items():
                key = contender.name, order
                n = each.stands_for or each.num_samples
                if key not in figures:
                    figures[key] = Figure(layer, contender.name, num_events, order, n, contender.batch_size)
                    figures[key].is_ours = contender.is_ours
                figures[key].timings.append(time_pass(each, pass_s, contender.skip))
        now_s = time.perf_counter()
        if now_s - start_s + (now_s - round_start_s) > layer_s:
            break
    return list(figures.values())
