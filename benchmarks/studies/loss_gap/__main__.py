"""Why did the loss read 85 on the GPU and 4 on the CPU? From one configuration to the other, a factor at a time.

    python -m benchmarks.studies.loss_gap            # an hour on 2 cores; says its time first, can be resumed
    python -m benchmarks.studies.loss_gap --quick    # under 5 minutes

Every run is seeded (data, initialisation, order) and kept in the work folder as it ends: an interrupted study goes on
with the same command. What this machine cannot run (no CUDA device) is left as a row that says so.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.environment import environment
from benchmarks.studies import results
from benchmarks.studies.loss_gap import pictures, report
from benchmarks.studies.loss_gap.findings import Findings
from benchmarks.studies.loss_gap.runs import Runs, forecast_s, play, step_times
from benchmarks.studies.loss_gap.settings import Plan, Sizes
from eventkern.hardware import usable_cores
from eventkern.train.termination import ending_quietly

FULL = Sizes(num_steps=100, long_steps=3000, seeds=3)
QUICK = Sizes(num_steps=6, long_steps=100, seeds=2)
TIMED_ROUNDS = 20


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.loss_gap", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps and seeds, under 5 minutes on 2 cores")
    parser.add_argument("--steps", type=int, help="optimizer steps of a rung")
    parser.add_argument("--long-steps", type=int, help="optimizer steps of the runs that compare precisions")
    parser.add_argument("--seeds", type=int, help="runs of each setting")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="that the ladder leads to")
    parser.add_argument("--jobs", type=int, default=usable_cores(), help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run; part of what its numbers depend on")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/loss_gap"), help="folder of data and finished runs")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else FULL
    options.steps = sizes.num_steps if options.steps is None else options.steps
    options.long_steps = sizes.long_steps if options.long_steps is None else options.long_steps
    options.seeds = sizes.seeds if options.seeds is None else options.seeds
    for name, least in (("steps", 2), ("long_steps", 2), ("seeds", 1), ("jobs", 1), ("threads", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; want at least {least}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch sees no CUDA device; want cpu or auto")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the study and write its results; returns the exit code."""
    options = parse(arguments)
    console = Console()
    facts = {**environment(options.device), "threads": options.threads}
    plan = Plan(Sizes(options.steps, options.long_steps, options.seeds), options.device)
    runs = Runs(options.work_dir / "runs.jsonl", options.threads, str(facts["commit"]))
    wanted = runs.wanted(plan.settings(), plan.seeds)
    minutes = forecast_s(wanted, options.jobs) / 60
    console.print(f"{len(wanted)} runs to play, about {minutes:.0f} minutes with {options.jobs} at a time")
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    try:
        with Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True
        ) as progress:
            play(runs, wanted, options.work_dir, options.jobs, progress)
        times_s = step_times(plan.bugs, options.work_dir, TIMED_ROUNDS, options.threads)
    except KeyboardInterrupt:
        console.print(f"interrupted: finished runs are kept in {runs.path}; the same command goes on")
        return 130
    findings = Findings(plan, runs, options.work_dir, times_s)
    command = shlex.join(["python", "-m", "benchmarks.studies.loss_gap", *(arguments or sys.argv[1:])])
    paragraphs = report.conclusion(findings)
    text = results.markdown(
        "Why did the loss read 85 on the GPU and 4 on the CPU?",
        command,
        [*paragraphs, *report.tables(findings)],
        facts,
    )
    record = {"command": command, "environment": facts, "conclusion": paragraphs, **findings.record()}
    console.print(text, markup=False, soft_wrap=True)
    for path in results.write(options.out, "loss_gap", record, text, pictures.draw(findings), device=options.device):
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
