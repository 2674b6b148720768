"""Everything a GPU must show, in one command, on a machine that may have no network.

    python -m profiling.gpu_suite [--out FOLDER] [--minutes 9.5] [--wheels FOLDER] [--commit HASH] [--dry-run]

builds the extension for the card at hand, runs the tests marked `gpu` or `triton`, the GPU benchmarks, traces, the
roofline, a step's memory and the quick form of the studies, the most telling first, each as a process of its own under
its own time limit; what a part leaves of its time is for those after it. What fails or runs out of time is recorded,
and the rest goes on.
Writes gpu_suite_<card>_<yyyymmdd>.{json,md}. Exit status: 0 all passed, 1 something did not, 3 no GPU.
"""

import argparse
import dataclasses
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks.environment import ROOT, environment, hardware_slug
from eventkern.train.termination import ending_quietly

Outcome = Literal["passed", "failed", "timed out", "not run"]
NO_GPU = 3
TAIL_CHARACTERS = 6000


@dataclass(frozen=True)
class Part:
    """A command of the suite and the seconds it may take, beyond what those before it left."""

    name: str
    command: tuple[str, ...]
    limit_s: float


@dataclass(frozen=True)
class Result:
    """How a part ended, and the end of what it printed."""

    part: Part
    outcome: Outcome
    seconds: float
    output: str


def parts(out: Path, *, architecture: str, wheels: Path | None = None, site: Path | None = None) -> list[Part]:
    """The parts in order, for a card of the given CUDA architecture ("90")."""
    python, pip = (sys.executable, "-m"), (sys.executable, "-m", "pip", "install", "--no-index", "--no-deps")
    pytest = (*python, "pytest", "-p", "no:cacheprovider")
    listed: list[Part] = []
    if wheels is not None:
        files = sorted(str(path) for path in wheels.glob("*.whl"))
        listed.append(Part("wheels", (*pip, "--target", str(site), *files), 20))
    build = ("--no-build-isolation", "-C", f"cmake.define.CMAKE_CUDA_ARCHITECTURES={architecture}-real", "-e", ".")
    bench = (*pytest, "benchmarks", "--benchmark-only", "-m", "gpu", "--results-dir", str(out))
    trace = ("profiling.trace", "--config", "gpu_optimized.json", "--precision", "bf16", "--out")
    quick = ("--quick", "--device", "cuda", "--out", str(out))
    return [
        *listed,
        Part("build", (*pip, *build), 85),
        Part("tests", (*pytest, "-q", "-m", "gpu or triton"), 125),
        Part("benchmarks", bench, 155),
        Part("trace", (*python, *trace, str(out / "trace")), 20),
        Part("graphs", (*python, *trace, str(out / "graphs"), "--compile", "reduce-overhead"), 35),
        Part("roofline", (*python, "profiling.roofline", *quick), 30),
        Part("memory", (*python, "profiling.memory", *quick), 15),
        Part("throughput", (*python, "benchmarks.studies.throughput", *quick), 35),
        Part("utilization", (*python, "benchmarks.studies.utilization", *quick), 30),
        Part("loss_gap", (*python, "benchmarks.studies.loss_gap", *quick), 40),
    ]


def run_part(part: Part, limit_s: float, variables: dict[str, str]) -> Result:
    """Run a part with everything it starts; after limit_s seconds all of that is killed."""
    start_s = time.monotonic()
    process = subprocess.Popen(
        part.command,
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        outcome: Outcome = "passed" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        outcome = "timed out"
    return Result(part, outcome, time.monotonic() - start_s, output[-TAIL_CHARACTERS:])


def run_all(listed: list[Part], budget_s: float, variables: dict[str, str]) -> list[Result]:
    """Run the parts in order within budget_s seconds in all; parts that no time is left for are recorded as not run.

    A part ends when its limit and those of the parts before it are used up: what they left is at its disposal.
    """
    start_s = time.monotonic()
    allowed_s = 0.0
    results = []
    for part in listed:
        allowed_s += part.limit_s
        left_s = min(allowed_s, budget_s) - (time.monotonic() - start_s)
        result = run_part(part, left_s, variables) if left_s > 0 else Result(part, "not run", 0.0, "")
        print(f"{part.name:<12} {result.outcome:<10} {result.seconds:6.1f} s", flush=True)
        if result.outcome != "passed":
            print(result.output, flush=True)
        results.append(result)
    return results


def write(out: Path, slug: str, facts: dict[str, object], results: list[Result]) -> Path:
    """Write the dated results file and its Markdown form; return the first."""
    out.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d")
    path = out / f"gpu_suite_{slug}_{date}.json"
    record = {"environment": facts, "parts": [dataclasses.asdict(result) for result in results]}
    path.write_text(json.dumps(record, indent=1) + "\n")
    lines = ["# GPU suite", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += ["| part | outcome | seconds |", "| ---- | ------- | ------: |"]
    lines += [f"| {result.part.name} | {result.outcome} | {result.seconds:.1f} |" for result in results]
    for result in results:
        lines += ["", f"## {result.part.name}", "", "```", result.output.strip(), "```"]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="build, test, measure and profile on a machine with a GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.5, help="time for all parts together")
    parser.add_argument("--wheels", type=Path, help="folder of wheels the machine lacks, used for this run alone")
    parser.add_argument("--commit", help="what is measured, where the checkout has no .git folder")
    parser.add_argument("--dry-run", action="store_true", help="print the parts and their limits, and run nothing")
    options = parser.parse_args(arguments)
    out = options.out.resolve()

    if options.wheels is not None and not any(options.wheels.glob("*.whl")):
        parser.error(f"--wheels {options.wheels}: no such folder, or no .whl file in it")
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not options.dry_run:
        print(f"no GPU: torch {torch.__version__} sees no CUDA device, and every part needs one", file=sys.stderr)
        return NO_GPU
    architecture = "".join(map(str, torch.cuda.get_device_capability())) if has_gpu else "90"
    with tempfile.TemporaryDirectory() as site:
        wheels = options.wheels.resolve() if options.wheels else None
        listed = parts(out, architecture=architecture, wheels=wheels, site=Path(site))
        if options.dry_run:
            for part in listed:
                print(f"{part.name:<12} at most {part.limit_s:4.0f} s  {shlex.join(part.command)}")
            return 0
        paths = [site, os.environ.get("PYTHONPATH", "")] if wheels else [os.environ.get("PYTHONPATH", "")]
        variables = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        results = run_all(listed, 60 * options.minutes, variables)
    path = write(out, hardware_slug("cuda"), environment("cuda", commit=options.commit), results)
    print(f"wrote {path} and {path.with_suffix('.md').name}")
    return 0 if all(result.outcome == "passed" for result in results) else 1


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
