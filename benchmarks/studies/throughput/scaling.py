"""How the cost of a step grows with one size at a time, the exponent fitted, and what follows for sizes not run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import Any

import torch

from benchmarks.studies.step_timing import Contender, PhaseClock, Place, resized, take_turns
from benchmarks.training import RandomBatch, Shapes, TrainingStep, random_batch
from eventkern.models import EventTransformer

STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Two-sided 95 % quantiles of Student's distribution for 1 to 10 degrees of freedom."""
TAIL = 3
"""Points at the large end whose exponent an extrapolation goes on with."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Fit:
    """seconds = constant * size^exponent, by least squares of the logarithms.

    Attributes:
        low: of the exponent's 95 % interval; infinite ends with two points.
        high: of the same.
        residual: the largest distance of a point from the line, as a share of the line.
        least: smallest size among the points.
        most: largest one.
    """

    exponent: float
    low: float
    high: float
    constant: float
    residual: float
    least: float
    most: float

    def __call__(self, size: float) -> float:
        return float(self.constant * size**self.exponent)


def fit_exponent(points: Points) -> Fit:
    """Fit a power law.

    Raises:
        ValueError: fewer than two different sizes.
    """
    sizes = [size for size, _ in points]
    if len(set(sizes)) < 2:
        raise ValueError(f"points has {len(set(sizes))} different sizes; want at least 2")
    logs = [(math.log(size), math.log(seconds)) for size, seconds in points]
    count = len(logs)
    mean_x, mean_y = (sum(each[axis] for each in logs) / count for axis in (0, 1))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    exponent = sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread
    constant = math.exp(mean_y - exponent * mean_x)
    misses = [y - mean_y - exponent * (x - mean_x) for x, y in logs]
    margin = math.inf
    if count > 2:
        error = math.sqrt(sum(miss**2 for miss in misses) / (count - 2) / spread)
        margin = error * (STUDENT_T[count - 3] if count - 3 < len(STUDENT_T) else 2.0)
    residual = max(abs(math.expm1(miss)) for miss in misses)
    return Fit(exponent, exponent - margin, exponent + margin, constant, residual, min(sizes), max(sizes))


@dataclass(frozen=True)
class Prediction:
    """Seconds that were not measured: the middle, and what the flattest and the steepest slope of the tail give."""

    seconds: float
    low: float
    high: float


def growth(points: Points, start: float, end: float) -> Prediction:
    """The factor between two sizes of one curve: read off between its points, beyond them from its tail.

    Where the tail's exponent is below 1, a part of the cost does not grow: the tail then goes on as a straight line,
    between the flattest power and growth in proportion. Else it goes on as a power.

    Args:
        points: (size, seconds), at least two sizes.
        start: a size.
        end: another one.
    """
    line = sorted(points)
    tail = line[-TAIL:]
    slopes = [math.log(right[1] / left[1]) / math.log(right[0] / left[0]) for left, right in pairwise(tail)]
    middle = fit_exponent(tail).exponent
    last_size, last_s = line[-1]
    mean_size = sum(size for size, _ in tail) / len(tail)
    rise = sum((size - mean_size) * seconds for size, seconds in tail) / sum(
        (size - mean_size) ** 2 for size, _ in tail
    )
    per_size = max(0.0, rise)  # more work that took less time is noise, not a trend
    slopes = [max(0.0, slope) for slope in slopes]
    if middle < 1:
        slopes.append(1.0)

    def value(size: float, slope: float | None) -> float:
        if size > last_size and slope is None:
            return last_s + per_size * (size - last_size)
        if size > last_size and slope is not None:
            return last_s * float((size / last_size) ** slope)
        left, right = next(((one, two) for one, two in pairwise(line) if size <= two[0]), (line[-2], line[-1]))
        share = math.log(size / left[0]) / math.log(right[0] / left[0])
        return left[1] * (right[1] / left[1]) ** share

    ways = (None if middle < 1 else middle, min(slopes), max(slopes))
    factors = [value(end, slope) / value(start, slope) for slope in ways]
    return Prediction(factors[0], min(factors), max(factors))


def predict(base_s: float, growths: Sequence[Prediction]) -> Prediction:
    """The base's seconds times the growth in each size, as if none depended on another."""
    return Prediction(
        base_s * math.prod(each.seconds for each in growths),
        base_s * math.prod(each.low for each in growths),
        base_s * math.prod(each.high for each in growths),
    )


@dataclass(frozen=True)
class Curve:
    """One size varied and everything else as in the base.

    Args:
        name: of the size.
        sizes: the values of the axis.
        shapes: what is trained at each.
        base: the size that the base has.
    """

    name: str
    sizes: tuple[float, ...]
    shapes: tuple[Shapes, ...]
    base: float


def curves(base: Shapes, *, is_small: bool) -> list[Curve]:
    """Batch, sequence length, classes, layers and width around a configuration.

    Args:
        base: the configuration.
        is_small: fewer and smaller sizes.
    """
    model = base.model
    layers = model.encoder_layers + model.decoder_layers
    steps = (0.5, 1.0, 2.0) if is_small else (0.125, 0.25, 0.5, 1.0, 2.0)
    batches = [max(1, round(base.batch_size * factor)) for factor in (*steps, *(() if is_small else (4.0,)))]
    lengths = [
        (max(2, round(model.src_seq_len * factor)), max(2, round(model.tgt_seq_len * factor))) for factor in steps
    ]
    classes = [
        max(3, round(model.category_sizes[0] * factor)) for factor in (0.1, *steps[-3:], *(() if is_small else (8,)))
    ]
    depths = [
        (max(1, round(model.encoder_layers * factor)), max(1, round(model.decoder_layers * factor)))
        for factor in ((1.0, 2.0, 4.0) if is_small else (0.34, 1.0, 2.0, 4.0))
    ]
    widths = [model.d_model * factor for factor in ((1, 2) if is_small else (1, 2, 4))]
    if not is_small and model.d_model // 2 >= 2 * model.num_heads:
        widths.insert(0, model.d_model // 2)

    def curve(name: str, at: float, sized: dict[float, Shapes]) -> Curve:
        return Curve(name, tuple(sized), tuple(sized.values()), at)

    return [
        curve("batch", base.batch_size, {size: resized(base, batch_size=size) for size in batches}),
        curve(
            "sequence length",
            model.src_seq_len,
            {source: resized(base, src_seq_len=source, tgt_seq_len=target) for source, target in lengths},
        ),
        curve("classes", model.category_sizes[0], {size: resized(base, num_classes=size) for size in classes}),
        curve(
            "layers",
            layers,
            {sum(both): resized(base, encoder_layers=both[0], decoder_layers=both[1]) for both in depths},
        ),
        curve("width", model.d_model, {size: resized(base, d_model=size) for size in widths}),
    ]


def measure_curve(curve: Curve, place: Place, budget_s: float, seed: int) -> list[dict[str, Any]]:
    """Time a step at every size in turn, on random events that lie on the device already, with our ops and eager."""
    contenders = [
        Contender(
            f"{curve.name} {size:g}",
            lambda clock, shapes=shapes: random_step(shapes, place, clock, seed),  # type: ignore[misc]
            same_batch(shapes, place.device, seed),
            place,
        )
        for size, shapes in zip(curve.sizes, curve.shapes, strict=True)
    ]
    take_turns(contenders, budget_s, is_same_work=False)
    return [{"size": size, **contender.record()} for size, contender in zip(curve.sizes, contenders, strict=True)]


def same_batch(shapes: Shapes, device: str, seed: int) -> Iterator[RandomBatch]:
    """One random batch again and again."""
    return repeat(random_batch(shapes, device, seed=seed))


def random_step(shapes: Shapes, place: Place, clock: PhaseClock, seed: int) -> TrainingStep:
    """A step of our model with fresh weights."""
    torch.manual_seed(seed)
    model = EventTransformer(shapes.model).to(place.device)
    return TrainingStep(model, place.dtype, name_range=clock)


def points(records: Sequence[dict[str, Any]], value: str = "seconds") -> list[tuple[float, float]]:
    """(size, value) of the records that were measured."""
    return [(record["size"], record[value]) for record in records if record["status"] == "measured"]
