"""How the throughput and the utilisation study run: part by part, each kept on disk as soon as it is measured."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.environment import environment, hardware_slug
from benchmarks.studies import results
from benchmarks.studies.step_timing import PRECISIONS
from benchmarks.training import config_name
from eventkern.train.device import keep_freed_memory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNFINISHED = 130
"""Exit status of a run that was interrupted or ran out of its minutes."""


@dataclass(frozen=True)
class Part:
    """Something to measure in one go: its name, about how long it takes, and how it is done."""

    name: str
    expected_s: float
    measure: Callable[[], Any]


@dataclass(frozen=True)
class Report:
    """What a study found: its title, the paragraphs, the text's parts with tables, a record, and pictures."""

    title: str
    conclusion: list[str]
    parts: list[str]
    record: Mapping[str, Any]
    pictures: Mapping[str, tuple[str, Figure]]


def devices(words: list[str]) -> list[str]:
    """The devices that a command line names; "auto" is every one that is known, missing ones as rows not run."""
    named = list(dict.fromkeys(name for word in words for name in word.split(",")))
    for name in named:
        if name not in ("auto", *PRECISIONS):
            raise ValueError(f"--device is {name!r}; want auto, cpu, cuda or a list of them")
    return list(PRECISIONS) if "auto" in named else named


class Notebook:
    """Finished parts of a run, kept in a file until the results are written.

    Args:
        path: of the file; its folder is made.
        setting: what the parts were measured under; parts of another setting are not used.
        deadline_s: by time.monotonic(); None for none. No part starts after it.
    """

    def __init__(self, path: Path, setting: dict[str, Any], deadline_s: float | None = None) -> None:
        self.path = path
        self.setting = json.loads(json.dumps(setting))
        self.deadline_s = deadline_s
        self.parts: dict[str, Any] = {}
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["setting"] == self.setting:
                self.parts = kept["parts"]
        self.num_kept = len(self.parts)

    def part(self, name: str, measure: Callable[[], Any]) -> Any:
        """The part of that name: as kept, else measured now and kept.

        Raises:
            KeyboardInterrupt: the time for parts is over.
        """
        if name not in self.parts:
            if self.deadline_s is not None and time.monotonic() > self.deadline_s:
                raise KeyboardInterrupt("the minutes are over")
            found = measure()
            self.parts[name] = found
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self.path.with_suffix(".new")
            fresh.write_text(json.dumps({"setting": self.setting, "parts": self.parts}))
            fresh.replace(self.path)
        return self.parts[name]

    def forget(self) -> None:
        """Remove the file: the results hold all of it now."""
        self.path.unlink(missing_ok=True)


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """The command line of a study."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.studies.{name}", description=description)
    made.add_argument("--quick", action="store_true", help="few sizes and short rounds, within 5 minutes on 2 cores")
    made.add_argument(
        "--device", nargs="+", default=["auto"], help="auto (all, missing ones as rows not run), cpu, cuda"
    )
    names = "TOML or JSON files, or names in eventkern/configs"
    made.add_argument("--config", nargs="+", type=config_name, default=["cpu_baseline", "gpu_optimized"], help=names)
    made.add_argument("--store", default="synthetic", help="a prepared store, or synthetic, which is made first")
    made.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    made.add_argument("--work-dir", type=Path, help="where finished parts are kept meanwhile (default: --out)")
    made.add_argument("--minutes", type=float, help="start no part after so long; run again to go on")
    made.add_argument("--restart", action="store_true", help="measure again what an interrupted run has kept")
    made.add_argument("--seed", type=int, default=0, help="of weights, events and every order")
    return made


def run(
    subject: str,
    options: argparse.Namespace,
    arguments: list[str] | None,
    parts: list[Part],
    found: dict[str, Any],
    finish: Callable[[dict[str, Any]], Report],
) -> int:
    """Measure all parts, or go on with them, and write the results.

    Args:
        subject: the study.
        options: from `parser`.
        arguments: the command line, None for the process's own.
        parts: in order.
        found: filled with what the parts give, by their names, so that later ones can look up earlier ones.
        finish: makes the report from it.

    Returns:
        The exit status: 0, or UNFINISHED with what was measured kept.
    """
    keep_freed_memory()
    console = Console()
    facts = environment()
    setting = {
        **{name: facts.get(name) for name in ("commit", "torch", "cpu", "threads")},
        **{name: str(getattr(options, name)) for name in ("quick", "device", "config", "store", "seed")},
    }
    deadline_s = time.monotonic() + 60 * options.minutes if options.minutes else None
    path = (options.work_dir or options.out) / f"{subject}_{hardware_slug('cpu')}.resume.json"
    if options.restart:
        path.unlink(missing_ok=True)
    notebook = Notebook(path, setting, deadline_s)
    left_s = sum(part.expected_s for part in parts if part.name not in notebook.parts)
    console.print(
        f"{len(parts)} parts, {notebook.num_kept} kept from before; about {max(1.0, left_s / 60):.0f} minutes, longer "
        "where models compile for the first time"
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        facts = notebook.part("environment", lambda: facts)
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("starting", total=len(parts))
            for part in parts:
                progress.update(task, description=part.name)
                found[part.name] = notebook.part(part.name, part.measure)
                progress.advance(task)
    except KeyboardInterrupt:
        console.print(f"not finished; {len(notebook.parts)} parts are kept in {path}: run the same command to go on")
        return UNFINISHED
    report = finish(found)
    command = shlex.join(["python", "-m", f"benchmarks.studies.{subject}", *(arguments or sys.argv[1:])])
    text = results.markdown(report.title, command, [*report.conclusion, *report.parts], facts)
    record = {"command": command, "environment": facts, "conclusion": report.conclusion, **report.record}
    console.print(text, markup=False, soft_wrap=True)
    device = "cuda" if "cuda" in options.device and torch.cuda.is_available() else "cpu"
    for written in results.write(options.out, subject, record, text, report.pictures, device=device):
        console.print(f"wrote {written}", markup=False, soft_wrap=True)
    notebook.forget()
    return 0
