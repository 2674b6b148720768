"""How much of a difference each factor carries, with intervals over the seeds."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.studies.loss_gap.training import Run

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""The two-sided 95 % point of Student's t for n values."""

Measure = Callable[[Run], float]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half of its 95 % interval, which is nan of a single seed."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The mean of independent values and Student's interval of it; of more than ten, as of ten.

        Raises:
            ValueError: no values.
        """
        if not values:
            raise ValueError("values is empty; want at least one")
        if len(values) == 1:
            return cls(values[0], math.nan)
        error = statistics.stdev(values) / math.sqrt(len(values))
        return cls(statistics.fmean(values), STUDENT[min(len(values), max(STUDENT))] * error)

    def __str__(self) -> str:
        digits = 3 if abs(self.mean) < 20 else 1
        interval = "" if math.isnan(self.half_width) else f" ± {self.half_width:.{digits}f}"
        return f"{self.mean:.{digits}f}{interval}"

    @property
    def differs_from_zero(self) -> bool:
        """Whether zero lies outside the interval; never with a single seed."""
        return abs(self.mean) > self.half_width


def difference(after: Sequence[Run], before: Sequence[Run], measure: Measure) -> Estimate:
    """By how much a measure rose from one setting to another, seed by seed.

    Raises:
        ValueError: runs of other seeds.
    """
    if [run.seed for run in after] != [run.seed for run in before]:
        raise ValueError(f"after has seeds {[run.seed for run in after]}; want {[run.seed for run in before]}")
    return Estimate.of([measure(late) - measure(early) for late, early in zip(after, before, strict=True)])


def contributions(rungs: Sequence[Sequence[Run]], measure: Measure) -> list[Estimate]:
    """What each step of a ladder adds; the means add up to the difference between its ends."""
    return [difference(after, before, measure) for before, after in itertools.pairwise(rungs)]


def first_below(curve: Sequence[float], level: float, window: int) -> int | None:
    """The first step (from 1) at which the mean of the last `window` values lies below a level; None: never."""
    for step in range(window, len(curve) + 1):
        if statistics.fmean(curve[step - window : step]) < level:
            return step
    return None


def parting(curves: Sequence[Sequence[float]], others: Sequence[Sequence[float]], blocks: int = 20) -> int | None:
    """The step from which two sets of curves, paired by seed, differ for good; None: they do not.

    The curves are cut into blocks of steps; they part where the interval of the mean difference excludes zero in that
    block and in all that follow.
    """
    length = len(curves[0])
    ends = [length * block // blocks for block in range(blocks + 1)]
    parted = None
    for start, end in itertools.pairwise(ends):
        if end == start:
            continue
        pairs = zip(curves, others, strict=True)
        rise = Estimate.of(
            [statistics.fmean(ours[start:end]) - statistics.fmean(theirs[start:end]) for ours, theirs in pairs]
        )
        if not rise.differs_from_zero:
            parted = None
        elif parted is None:
            parted = start
    return parted
