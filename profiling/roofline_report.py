"""Times what the roofline shows, and writes its table and its picture."""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.environment import environment
from benchmarks.measure import seconds
from benchmarks.studies import results
from benchmarks.studies.results import aligned, seconds_text
from eventkern.train.device import keep_freed_memory
from profiling.roofline import Ceilings
from profiling.roofline_cases import DTYPES, SIZES, Case, cases

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

NUM_TURNS = 3
MAX_ROUNDS = 50
"""Of a case in a turn."""
CASE_S, QUICK_CASE_S = 0.9, 0.1
"""Seconds of a case's rounds."""
COLOURS = {
    "multi_embedding": "#4c78a8",
    "multi_head_cross_entropy": "#f58518",
    "attention": "#54a24b",
    "permutation": "#b279a2",
    "gather": "#9d755d",
    "training step": "#e45756",
}


@dataclass(frozen=True)
class Point:
    """A case on the roofline: what was counted, what was measured, and what its ceilings allow.

    Args:
        subject: the op, or "training step".
        name: what distinguishes it.
        dtype: "float32", "bfloat16", "int64" or "int32".
        operations: of matrix products.
        bytes: each input read once, each output written once.
        cache_bytes: read and written again and again, beyond those.
        events: handled.
        median_s: of the rounds.
        fastest_s: the fastest of them.
        spread_s: their interquartile range.
        rounds: timed.
        floor_s: the least time under the ceilings.
        bound: the ceiling which that comes from: "copy", "cache" or "gemm".
    """

    subject: str
    name: str
    dtype: str
    operations: float
    bytes: float
    cache_bytes: float
    events: int
    median_s: float
    fastest_s: float
    spread_s: float
    rounds: int
    floor_s: float
    bound: str

    @property
    def share(self) -> float:
        """Of the roof: 1 where nothing could be faster."""
        return self.floor_s / self.median_s

    @property
    def intensity(self) -> float:
        """Operations a byte, counted from the shapes."""
        return self.operations / self.bytes

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "share_of_roof": self.share, "operations_a_byte": self.intensity}


def measure(
    chosen: list[Case], device: torch.device, budget_s: float, told: Callable[[str], None]
) -> tuple[list[Point], Ceilings]:
    """All cases and ceilings in turn, several times over: what the machine does meanwhile happens to all of them.

    Args:
        chosen: what to time.
        device: where it runs.
        budget_s: seconds of a case, all its rounds together.
        told: is given a line as each turn begins.

    Returns:
        A point for each case, medians over all rounds; and the highest ceilings of all turns.
    """
    times_s: list[list[float]] = [[] for _ in chosen]
    measured = []
    for turn in range(NUM_TURNS):
        told(f"turn {turn + 1} of {NUM_TURNS}")
        measured.append(ceilings := Ceilings(device))
        for case, all_s in zip(chosen, times_s, strict=True):
            ceilings.floor_s(case.repeated_work, case.dtype)
            case.run()
            turn_s: list[float] = []
            while not turn_s or (sum(turn_s) < budget_s / NUM_TURNS and len(turn_s) < MAX_ROUNDS):
                turn_s.append(seconds(case.run, device))
            all_s += turn_s
    highest = Ceilings.highest(measured)
    return [point(case, all_s, highest) for case, all_s in zip(chosen, times_s, strict=True)], highest


def point(case: Case, times_s: list[float], ceilings: Ceilings) -> Point:
    """A case that took these times, at least two."""
    low_s, median_s, high_s = statistics.quantiles(times_s, n=4, method="inclusive")
    return Point(
        subject=case.subject,
        name=case.name,
        dtype=dtype_name(case.dtype),
        operations=case.work.operations,
        bytes=case.work.bytes,
        cache_bytes=case.work.cache_bytes,
        events=case.work.events,
        median_s=median_s,
        fastest_s=min(times_s),
        spread_s=high_s - low_s,
        rounds=len(times_s),
        floor_s=ceilings.floor_s(case.repeated_work, case.dtype),
        bound=ceilings.bound(case.repeated_work, case.dtype),
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ceilings_text(ceilings: Ceilings) -> str:
    """The ceilings in words, and the intensity from which arithmetic is the bound."""
    lines = [f"{ceilings.device}: copy {ceilings.bandwidth() / 1e9:.1f} GB/s, read and written"]
    for dtype in DTYPES.values():
        rate = ceilings.rate(dtype)
        ridge = rate / ceilings.bandwidth()
        lines.append(f"{dtype}: gemm {rate / 1e9:,.0f} GFLOP/s; arithmetic bounds above {ridge:.0f} operations a byte")
    return "\n".join(lines)


def table(points: list[Point]) -> str:
    """A line for each case."""
    head = ("work", "dtype", "GFLOP", "MB", "FLOP/B", "median", "fastest", "floor", "reached", "bound", "% of roof")
    return aligned([head, *map(_line, points)])


def _line(point: Point) -> tuple[str, ...]:
    is_arithmetic = point.bound == "gemm"
    num_bytes = point.bytes + point.cache_bytes
    reached = point.operations if is_arithmetic else num_bytes
    return (
        f"{point.subject} {point.name}",
        point.dtype,
        f"{point.operations / 1e9:.3g}" if point.operations else "",
        f"{num_bytes / 1e6:.3g}",
        f"{point.intensity:.3g}" if point.operations else "",
        seconds_text(point.median_s),
        seconds_text(point.fastest_s),
        seconds_text(point.floor_s),
        f"{reached / point.median_s / 1e9:,.1f} {'GFLOP/s' if is_arithmetic else 'GB/s'}",
        point.bound,
        f"{100 * point.share:.0f}",
    )


def conclusion(points: list[Point], not_run: list[str]) -> list[str]:
    """What the table says, in words."""
    highest, lowest = max(points, key=lambda point: point.share), min(points, key=lambda point: point.share)
    steps = [point for point in points if point.subject == "training step"]
    paragraphs = [
        f"Nearest its roof is {highest.subject} {highest.name} in {highest.dtype}, at {100 * highest.share:.0f} % "
        f"({highest.bound} bounds it); farthest is {lowest.subject} {lowest.name} in {lowest.dtype}, at "
        f"{100 * lowest.share:.0f} % ({lowest.bound})."
    ]
    if steps:
        shares = "; ".join(f"{step.name} {step.dtype} {100 * step.share:.0f} % ({step.bound})" for step in steps)
        paragraphs.append(f"Share of the roof that a training step reaches: {shares}.")
    paragraphs.append(
        "Operations are those of matrix products, and bytes those that any version must move: exponentials, norms, "
        "copies and dispatch count as time alone, so that a share below 100 % is not all waste. Runs repeat, so that "
        "what fits a cache is held against reading a cache. The ceilings are the fastest of some repeats in the same "
        "run, which takes turns with the work; its times are medians."
    )
    return [*paragraphs, *(f"Not run: {reason}" for reason in not_run)]


def draw(points: list[Point], ceilings: Ceilings) -> Canvas:
    """The log-log roofline of what has operations, and the share of the roof of everything."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(14, max(6.0, 0.23 * len(points) + 1.2)), layout="constrained")
    roofline, shares = canvas.subplots(1, 2, width_ratios=(1.35, 1))
    placed = [point for point in points if point.operations]
    across = [point.intensity for point in placed] or [1.0]
    dtypes = {dtype_name(dtype): dtype for dtype in DTYPES.values()}
    rates = {name: ceilings.rate(dtype) for name, dtype in dtypes.items()}
    copy, ends = ceilings.bandwidth(), (min(across) / 2, 2 * max(across))
    for (name, rate), style in zip(rates.items(), ("-", "--"), strict=True):
        label = f"{name} products {rate / 1e9:,.0f} GFLOP/s, copy {copy / 1e9:,.1f} GB/s"
        roofline.plot(*_roof(rate, copy, *ends), style, color="black", linewidth=1.2, label=label)
    if ceilings.measured_reads:
        read = max(ceilings.measured_reads.values())
        label = f"reading a cache, {read / 1e9:,.0f} GB/s at best"
        roofline.plot(*_roof(max(rates.values()), read, *ends), ":", color="gray", label=label)
    for subject, colour in COLOURS.items():
        for name, marker in (("float32", "o"), ("bfloat16", "^")):
            chosen = [point for point in placed if (point.subject, point.dtype) == (subject, name)]
            if chosen:
                places = zip(
                    *((point.intensity, point.operations / point.median_s / 1e9) for point in chosen), strict=True
                )
                label = f"{subject}, {name}"
                roofline.scatter(*places, s=34, marker=marker, color=colour, alpha=0.85, label=label, zorder=3)
    roofline.set_xscale("log")
    roofline.set_yscale("log")
    roofline.set_xlabel("operations a byte, counted from shapes")
    roofline.set_ylabel("GFLOP/s reached")
    roofline.set_title("Work with matrix products under the measured roofs", loc="left", fontsize=10)
    roofline.grid(which="major", alpha=0.3)
    roofline.legend(fontsize=8, loc="lower right")
    for place, point in enumerate(points):
        shares.barh(place, 100 * point.share, 0.75, color=COLOURS[point.subject])
        words = f"{100 * point.share:.0f} % of {point.bound}"
        shares.annotate(
            words, (100 * point.share, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7
        )
    shares.set_yticks(
        range(len(points)), [f"{point.subject} {point.name} {point.dtype}" for point in points], fontsize=6.5
    )
    shares.set_ylim(len(points) - 0.4, -0.6)
    shares.set_xlim(0, max(110.0, *(115 * point.share for point in points)))
    shares.set_xlabel("% of the roof: least time under the ceilings / measured time")
    shares.set_title("Everything, and the ceiling that bounds it", loc="left", fontsize=10)
    shares.grid(axis="x", alpha=0.3)
    canvas.suptitle(f"Roofline on {ceilings.device}, {len(points)} cases", fontsize=11)
    return canvas


def _roof(rate: float, bandwidth: float, lowest: float, highest: float) -> tuple[list[float], list[float]]:
    """Corners of the least of bandwidth times intensity and rate, in operations a byte and GFLOP/s."""
    corners = [lowest, min(max(rate / bandwidth, lowest), highest), highest]
    return corners, [min(rate, bandwidth * intensity) / 1e9 for intensity in corners]


def print_now(line: str) -> None:
    print(line, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m profiling.roofline", description="every op and the training steps on the machine's roofs"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer rounds, some 15 seconds")
    parser.add_argument("--out", type=Path, help="folder for the record, the table and the picture")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device is cuda, but torch {torch.__version__} sees no CUDA device: use cpu")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write where asked to; returns the exit code."""
    options = parse(arguments)
    device = torch.device(options.device)
    keep_freed_memory()
    facts = environment(device)
    start_s = time.perf_counter()
    print(f"every op and the training steps: {'some 15 seconds' if options.quick else 'half a minute'}", flush=True)
    with cases(device, SIZES[device.type, options.quick]) as chosen:
        points, ceilings = measure(chosen, device, QUICK_CASE_S if options.quick else CASE_S, print_now)
    print(ceilings_text(ceilings))
    not_run = []
    if not torch.cuda.is_available():
        not_run.append(f"CUDA, since torch {torch.__version__} sees no CUDA device here.")
    paragraphs = conclusion(points, not_run)
    print(f"\n{table(points)}\n")
    print("\n\n".join(paragraphs))
    print(f"{time.perf_counter() - start_s:.0f} s in all")
    if options.out is None:
        return 0
    command = shlex.join(["python", "-m", "profiling.roofline", *(sys.argv[1:] if arguments is None else arguments)])
    parts = [*paragraphs, "## Ceilings", f"```\n{ceilings_text(ceilings)}\n```", "## Work under them", table(points)]
    text = results.markdown("Every op and the training steps on the roofs", command, parts, facts)
    record = {
        "command": command,
        "environment": facts,
        "conclusion": paragraphs,
        "ceilings": ceilings.to_dict(),
        "points": [point.to_dict() for point in points],
        "not_run": not_run,
    }
    words = "Operations a second against operations a byte under the measured roofs, and the share that each reaches"
    pictures = {"picture": (words, draw(points, ceilings))}
    for path in results.write(options.out, "roofline", record, text, pictures, device=options.device):
        print(f"wrote {path}")
    return 0
