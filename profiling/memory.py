"""Where a training step's memory goes: every allocation in order, and the peak of each phase.

    python -m profiling.memory [--config NAME ...] [--precision fp32 bf16] [--device cpu|cuda] [--quick] [--out FOLDER]

prints, for each configuration and precision, what tensors hold at the peak and at the end of forward, backward and
optimizer, what the process or the CUDA allocator held at its peak, and what the backward is kept waiting for. With
`--out` it leaves the tables, the record and a timeline there, and on a CUDA device also the allocator's own snapshot,
for https://pytorch.org/memory_viz. Some 20 seconds, with `--quick` half.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.environment import environment
from benchmarks.studies import results
from benchmarks.studies.results import aligned
from benchmarks.training import Shapes, config_name
from eventkern.train.termination import ending_quietly
from profiling.memory_step import PHASES, PRECISIONS, StepMemory, measure, snapshot

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

NUM_STEPS, NUM_QUICK_STEPS = 5, 1
"""Steps whose peaks are taken, for the median, and whose history, for the fastest."""
NUM_KEPT = 6
"""Rows of the table of tensors kept for the backward."""
MIB = 2.0**20
COLOURS = {"forward": "#4c78a8", "backward": "#f58518", "optimizer": "#54a24b"}


def mebibytes(num_bytes: float) -> str:
    return f"{num_bytes / MIB:,.1f}" if math.isfinite(num_bytes) else "not told"


def phase_table(steps: list[StepMemory], device: torch.device) -> str:
    """The phases of every step."""
    system = "CUDA allocator, peak" if device.type == "cuda" else "resident set, peak"
    lines: list[tuple[str, ...]] = [("MiB", "tensors, peak", "tensors, at its end", system)]
    for step in steps:
        for phase in PHASES:
            end = step.history.held_at(step.history.phases[phase][1])
            peaks = step.history.peak_bytes(phase), end, step.peaks_bytes[phase]
            lines.append((f"{step.name}, {phase}", *map(mebibytes, peaks)))
    return aligned(lines)


def held_table(steps: list[StepMemory]) -> str:
    """What is held all along, and what the backward waits for."""
    names = list(steps[0].static_bytes)
    lines: list[tuple[str, ...]] = [("MiB", *names, "kept for the backward", "peak of all tensors")]
    for step in steps:
        peak = sum(step.static_bytes.values()) + max(map(step.history.peak_bytes, PHASES))
        lines.append((step.name, *map(mebibytes, (*step.static_bytes.values(), step.kept.num_bytes, peak))))
    return aligned(lines)


def kept_table(step: StepMemory) -> str:
    """The largest groups of what is kept for the backward."""
    lines: list[tuple[str, ...]] = [(f"kept for the backward of {step.name}", "tensors", "MiB", "%")]
    for name, count, num_bytes in step.kept.groups[:NUM_KEPT]:
        lines.append((name, f"{count}", mebibytes(num_bytes), f"{100 * num_bytes / step.kept.num_bytes:.0f}"))
    return aligned(lines)


def conclusion(steps: list[StepMemory], missing: list[str]) -> list[str]:
    """What the tables say, in words."""
    paragraphs = []
    for step in steps:
        phase = max(PHASES, key=step.history.peak_bytes)
        peak, kept = step.history.peak_bytes(phase), step.kept.num_bytes
        paragraphs.append(
            f"{step.name}: tensors peak in the {phase} phase, {mebibytes(peak)} MiB beyond weights, moments and batch "
            f"({mebibytes(sum(step.static_bytes.values()))} MiB); the forward leaves {mebibytes(kept)} MiB for the "
            "backward."
        )
    paragraphs.append(
        "MiB, beyond what was held when the step began. Tensors are what torch's own allocators gave out; memory that "
        "kernels take for themselves shows in the resident set alone, which in turn keeps what the heap has not "
        "returned yet."
    )
    return [*paragraphs, *missing]


def draw(steps: list[StepMemory], device: torch.device) -> Canvas:
    """What tensors held over each step, with its phases."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(11, 2.6 * len(steps) + 0.8), layout="constrained")
    for axis, step in zip(canvas.subplots(len(steps), 1, squeeze=False)[:, 0], steps, strict=True):
        history = step.history
        held = [each / MIB for each in history.held_bytes]
        axis.fill_between(history.times_ms, held, step="post", color="#bab0ac", alpha=0.6, linewidth=0)
        axis.plot(history.times_ms, held, drawstyle="steps-post", color="#333333", linewidth=0.8)
        top = max(map(history.peak_bytes, PHASES)) / MIB
        for phase, (start, end) in history.phases.items():
            axis.axvspan(start, end, color=COLOURS[phase], alpha=0.13, linewidth=0)
            words = f"{phase}\npeak {history.peak_bytes(phase) / MIB:,.1f}"
            # The last is too short for its words, which stand below those of the others.
            is_last = phase == PHASES[-1]
            place = (end, 1.0 * top, "right") if is_last else ((start + end) / 2, 1.28 * top, "center")
            axis.text(*place[:2], words, ha=place[2], va="top", fontsize=8)
        kept = step.kept.num_bytes / MIB
        axis.axhline(kept, color="#e45756", linestyle=":", linewidth=1, label=f"kept for the backward, {kept:,.1f} MiB")
        axis.set_ylim(0, 1.32 * top)
        axis.set_xlim(0, history.duration_ms())
        axis.set_title(step.name, loc="left", fontsize=9)
        axis.set_ylabel("MiB")
        axis.legend(loc="lower center", fontsize=7)
        axis.grid(alpha=0.3)
    axis.set_xlabel("ms of the step, under the profiler")
    canvas.suptitle(f"Memory of tensors over a training step on {device}, beyond what it began with", fontsize=11)
    return canvas


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m profiling.memory", description="a training step's memory")
    names = "TOML or JSON files, or names in eventkern/configs"
    parser.add_argument(
        "--config", nargs="+", type=config_name, default=["cpu_baseline", "gpu_optimized"], metavar="NAME", help=names
    )
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, help="default: both; with --quick the usual one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one precision, and the peak of one step")
    parser.add_argument("--out", type=Path, help="folder for the record, the tables and the timeline")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device is cuda, but torch {torch.__version__} sees no CUDA device: use cpu")
    usual = ["bf16"] if options.device == "cuda" else ["fp32"]
    options.precision = options.precision or (usual if options.quick else list(PRECISIONS))
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write where asked to; returns the exit code."""
    options = parse(arguments)
    device = torch.device(options.device)
    facts = environment(device)
    cases = [(Path(config).stem, Shapes.load(config), each) for config in options.config for each in options.precision]
    num_steps = NUM_QUICK_STEPS if options.quick else NUM_STEPS
    steps = [measure(name, shapes, precision, device, num_steps) for name, shapes, precision in cases]
    missing = []
    if device.type != "cuda":
        why = "--device is cpu" if torch.cuda.is_available() else f"torch {torch.__version__} sees no such device"
        missing.append(f"Not run: the snapshot of the caching allocator and its peaks, which are CUDA's; {why}.")
    if any(math.isnan(peak) for step in steps for peak in step.peaks_bytes.values()):
        missing.append("Not told by this system: the peak of the resident set, which wants Linux's /proc and glibc.")
    paragraphs = conclusion(steps, missing)
    tables = [phase_table(steps, device), held_table(steps), *map(kept_table, steps)]
    print("\n\n".join([*tables, *paragraphs]))
    if options.out is None:
        return 0
    command = shlex.join(["python", "-m", "profiling.memory", *(sys.argv[1:] if arguments is None else arguments)])
    titles = ("By phase", "What is held", "What the backward waits for")
    grouped = (tables[0], tables[1], "\n\n".join(tables[2:]))
    sections = [part for title, text in zip(titles, grouped, strict=True) for part in (f"## {title}", text)]
    text = results.markdown("Memory of a training step", command, [*paragraphs, *sections], facts)
    record = {
        "command": command,
        "environment": facts,
        "conclusion": paragraphs,
        "steps": [step.to_dict() for step in steps],
        "not_run": missing,
    }
    pictures = {"timeline": ("What tensors hold over a training step", draw(steps, device))}
    paths = results.write(options.out, "memory", record, text, pictures, device=options.device)
    if device.type == "cuda":
        for name, shapes, precision in cases:
            paths.append(paths[0].with_name(f"{paths[0].stem}-{name}-{precision}.pickle"))
            snapshot(shapes, precision, device, paths[-1])
    for path in paths:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
