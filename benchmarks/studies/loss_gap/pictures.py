"""The loss study's pictures: where the gap comes from, the curves, and the precisions."""

from __future__ import annotations

import itertools
import statistics
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.studies.loss_gap.findings import Findings, Rung
from benchmarks.studies.loss_gap.report import NUM_CATEGORIES
from benchmarks.studies.loss_gap.settings import NOTED_CPU, NOTED_GPU

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UP, DOWN, TOTAL = "#f58518", "#54a24b", "#4c78a8"


def draw(findings: Findings) -> dict[str, tuple[str, Figure]]:
    """The pictures by name, with what they show in words."""
    return {
        "waterfall": ("From the CPU's reading to the GPU's, a factor at a time, in both orders", waterfall(findings)),
        "curves": ("Training loss by step, of the ladder and of the suspects", curves(findings)),
        "precision": ("Training loss over a long run in each precision, and against fp32", precision(findings)),
    }


def waterfall(findings: Findings) -> Figure:
    """Bars from one reading to the next, the two orders one above the other."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(10, 7), layout="constrained")
    axes = canvas.subplots(2, 1, sharex=True)
    orders = (("the ladder's order", findings.forward), ("the other order", findings.backward))
    for axis, (title, rungs) in zip(axes, orders, strict=True):
        readings = [rung.reading for rung in rungs]
        for place, reading in enumerate(readings):
            before = readings[place - 1].mean if place else 0.0
            rise = reading.mean - before
            colour = TOTAL if place == 0 else UP if rise > 0 else DOWN
            axis.barh(place, rise, left=before, color=colour)
            label = f"{reading.mean:.2f}" if place == 0 else f"{rise:+.1f}"
            axis.annotate(label, (max(before, reading.mean), place), (14, 0), textcoords="offset points", va="center")
            if np.isfinite(reading.half_width):
                axis.errorbar(reading.mean, place, xerr=reading.half_width, color="black", capsize=3)
        place = len(rungs)
        axis.barh(place, readings[-1].mean, color=TOTAL)
        axis.annotate(
            f"{readings[-1].mean:.1f}", (readings[-1].mean, place), (14, 0), textcoords="offset points", va="center"
        )
        axis.axvline(NOTED_GPU, color="grey", linestyle=":")
        axis.set_yticks(range(place + 1), [*(rung.name for rung in rungs), "gpu_optimized"], fontsize=8)
        axis.invert_yaxis()
        axis.set_title(title, loc="left", fontsize=10)
        axis.margins(x=0.1)
    axes[-1].set_xlabel(f"loss as printed (dotted: the notes' {NOTED_GPU})")
    return canvas


def curves(findings: Findings) -> Figure:
    """Nats a category by step."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(11, 5), layout="constrained")
    left, right = canvas.subplots(1, 2, sharey=True)
    for axis in (left, right):
        axis.set_prop_cycle(color=[colormaps["tab20"](place) for place in range(20)])
    for rung in findings.forward:
        line(left, rung)
    for rung in findings.large:
        if not rung.reason:
            line(right, rung)
    for axis, title in ((left, "the ladder, one factor more each"), (right, "suspects beside gpu_optimized")):
        axis.axhline(NOTED_CPU, color="grey", linestyle=":")
        axis.axhline(NOTED_GPU / NUM_CATEGORIES, color="grey", linestyle="--")
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel(f"step (dotted: {NOTED_CPU:g}; dashed: {NOTED_GPU} / {NUM_CATEGORIES})")
        axis.set_ylim(0, 13.5)  # room for the legend
        axis.legend(fontsize=6, loc="upper right" if axis is right else "lower left", ncols=2 if axis is right else 1)
    left.set_ylabel("nats a category")
    return canvas


def line(axis: Axes, rung: Rung) -> None:
    """A rung's curve over the seeds, with the band between the lowest and the highest seed."""
    seeds = np.array([run.nats for run in rung.runs])
    steps = np.arange(1, seeds.shape[1] + 1)
    (drawn,) = axis.plot(steps, seeds.mean(0), label=rung.name, linewidth=1.2)
    axis.fill_between(steps, seeds.min(0), seeds.max(0), color=drawn.get_color(), alpha=0.15, linewidth=0)


def precision(findings: Findings) -> Figure:
    """Smoothed curves of each precision, and their paired differences from fp32."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(11, 4), layout="constrained")
    left, right = canvas.subplots(1, 2)
    plain = findings.precisions[0]
    for rung in findings.precisions:
        if rung.reason:
            continue
        ours, theirs = (np.array([smoothed(run.nats) for run in each.runs]) for each in (rung, plain))
        steps = np.linspace(0, rung.setting.num_steps, ours.shape[1] + 1)[1:]
        for axis, values in ((left, ours), (right, ours - theirs)):
            (drawn,) = axis.plot(steps, values.mean(0), label=rung.name, linewidth=1.2)
            axis.fill_between(steps, values.min(0), values.max(0), color=drawn.get_color(), alpha=0.2, linewidth=0)
    left.set_ylabel("nats a category")
    right.set_ylabel("nats above fp32, paired by seed")
    for axis in (left, right):
        axis.set_xlabel("step (bands: lowest to highest seed)")
        axis.legend(fontsize=8)
    return canvas


def smoothed(values: list[float], blocks: int = 60) -> list[float]:
    """Means over blocks of steps."""
    blocks = min(blocks, len(values))
    ends = [len(values) * block // blocks for block in range(blocks + 1)]
    return [statistics.fmean(values[start:end]) for start, end in itertools.pairwise(ends)]
