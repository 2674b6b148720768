"""Where did shuffling cost? Every layer between an order of samples and a batch, shuffled against in order.

    python -m benchmarks.studies.shuffle            # some 15 minutes
    python -m benchmarks.studies.shuffle --quick    # under a minute, 10,000 and 100,000 events

The notes found shuffle=True 140 times slower with 900,000 events. The study times the order of samples, the fetch and
collate, the storage and the worker processes by themselves; finds a Parquet layout with that ratio; replaces its layers
by eventkern's one at a time and one after the other; and says which layer took the ratio with it.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.environment import environment
from benchmarks.studies import results
from benchmarks.studies.shuffle import data, report
from benchmarks.studies.shuffle.ladder import Layout, Verdict, crossings, judge, ladder, measure_layouts, nearest
from benchmarks.studies.shuffle.layers import cold_layer, fetch_layer, order_layer, storage_layer, worker_layer
from benchmarks.studies.shuffle.timing import Contender, Figure, measure
from eventkern.data import EventStore
from eventkern.train.device import keep_freed_memory
from eventkern.train.termination import ending_quietly

NOTED_EVENTS = 900_000
LADDER_SHARE = 2
"""The ladder's time, in that of other layers: the verdict rests on it, so it wants several rounds."""

LAYERS = ("order", "fetch", "storage", "workers", "ladder", "cold")


@dataclass(frozen=True)
class Budget:
    """Seconds of a pass before it is cut and extrapolated, and of a layer at one size before it is no more repeated."""

    pass_s: float
    layer_s: float


FULL = Budget(pass_s=1.0, layer_s=36.0)
QUICK = Budget(pass_s=0.2, layer_s=2.0)


class Study:
    """The figures as they come in, one size after the other."""

    def __init__(self, budget: Budget, counts: list[int], seed: int, progress: Progress) -> None:
        self.budget = budget
        self.counts = counts
        self.seed = seed
        self.progress = progress
        self.task = progress.add_task("starting", total=None)
        self.figures: list[Figure] = []
        self.layouts: list[Layout] = []
        self.verdicts: dict[int, Verdict] = {}
        self.cold: dict[int, str] = {}

    def run(self, sizes: list[int], folder: Path) -> None:
        """All layers at all sizes, the size of the notes first: it decides the layout that the others are given."""
        noted = max((size for size in sizes if size <= NOTED_EVENTS), default=min(sizes))
        self.progress.update(self.task, total=len(sizes) * (len(LAYERS) + 1) + 1)
        for num_events in [noted, *(size for size in sizes if size != noted)]:
            self._begin(f"{num_events:,} events: preparing the store")
            with tempfile.TemporaryDirectory(dir=folder, prefix="events-") as name:
                store = data.make_store(Path(name), num_events, self.seed)
                if num_events == noted:
                    self._begin(f"{num_events:,} events: layouts")
                    self._measure_layouts(store, Path(name))
                self._measure_layers(store, Path(name))

    def _begin(self, words: str) -> None:
        self.progress.update(self.task, description=words)
        self.progress.advance(self.task)

    def _measure_layouts(self, store: EventStore, folder: Path) -> None:
        parsers = [parser for parser in data.PARSERS.values() if parser is data.ARRAY or find_spec("pandas")]
        figures, self.layouts = measure_layouts(store, folder, self.counts, parsers, self.seed, self.budget.pass_s)
        self.figures += figures

    def _measure_layers(self, store: EventStore, folder: Path) -> None:
        n, seed, pass_s = store.num_events, self.seed, self.budget.pass_s
        base = nearest(self.layouts)
        parser = data.PARSERS[base.parser]
        paths = data.write_files(store.codes, folder / "files", base.rows_per_file)
        files = data.parquet_files(paths, base.rows_per_file, n, parser)
        self._measure("order", n, order_layer(n, seed))
        self._measure("fetch", n, fetch_layer(store, seed))
        self._measure("storage", n, storage_layer(store, folder, files, parser, seed, pass_s))
        self._measure("workers", n, worker_layer(store, files, seed, pass_s))
        self._measure("ladder", n, ladder(store, files, seed, pass_s))
        self.verdicts[n] = judge(self.figures, n)
        contenders, seen = cold_layer(store, seed)
        self._measure("cold", n, contenders)
        self.cold[n] = report.cold_text(self.figures, n, seen)

    def _measure(self, layer: str, num_events: int, contenders: list[Contender]) -> None:
        self._begin(f"{num_events:,} events: {layer}")
        if contenders:
            layer_s = self.budget.layer_s * (LADDER_SHARE if layer == "ladder" else 1)
            self.figures += measure(layer, num_events, contenders, self.budget.pass_s, layer_s)

    def record(self) -> dict[str, Any]:
        """Every figure, for the JSON file."""
        return {
            "layouts": [layout.to_dict() for layout in self.layouts],
            "notes_pipeline": nearest(self.layouts).to_dict(),
            "files_for_ratio_140": crossings(self.layouts),
            "verdicts": {str(size): vars(verdict) for size, verdict in self.verdicts.items()},
            "page_cache": {str(size): words for size, words in self.cold.items()},
            "figures": [figure.to_dict() for figure in self.figures],
        }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.shuffle", description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, nargs="+", metavar="N", help="rows of the data (default: 10^4 to 10^7)")
    parser.add_argument("--files", type=int, nargs="+", metavar="F", help="Parquet files to try for the ratio of 140")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--work-dir", type=Path, help="where data are kept meanwhile (default: the temporary folder)")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of every order")
    parser.add_argument("--quick", action="store_true", help="small sizes and short passes, under a minute")
    parser.add_argument("--pass-seconds", type=float, help="most seconds of one pass before it is extrapolated")
    options = parser.parse_args(arguments)
    options.events = options.events or ([10_000, 100_000] if options.quick else [10_000, 100_000, 900_000, 10_000_000])
    options.files = options.files or ([3, 10, 100] if options.quick else [9, 30, 90, 365, 3650])
    for name, least in (("events", 100), ("files", 1)):
        for value in getattr(options, name):
            if value < least:
                parser.error(f"--{name} is {value}; want at least {least}")
    return options


@contextmanager
def workplace(parent: Path | None, num_events: int) -> Iterator[Path]:
    """A folder that is gone afterwards, also after an interruption, once there is known to be room for it."""
    folder = Path(tempfile.mkdtemp(dir=parent, prefix="shuffle-study-"))
    try:
        data.check_space(folder, num_events)
        yield folder
    finally:
        shutil.rmtree(folder)


def main(arguments: list[str] | None = None) -> int:
    """Run the study and write its results; returns the exit code."""
    options = parse(arguments)
    budget = QUICK if options.quick else FULL
    if options.pass_seconds:
        seconds = options.pass_seconds
        budget = Budget(pass_s=seconds, layer_s=36 * seconds)
    keep_freed_memory()
    facts = environment()
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with (
            workplace(options.work_dir, max(options.events)) as folder,
            Progress(*columns, console=console, transient=True) as progress,
        ):
            study = Study(budget, options.files, options.seed, progress)
            study.run(sorted(set(options.events)), folder)
    except KeyboardInterrupt:
        console.print("interrupted: nothing was written")
        return 130
    base = nearest(study.layouts)
    paragraphs = report.conclusion(study.figures, study.layouts, base, study.verdicts, study.cold)
    command = shlex.join(["python", "-m", "benchmarks.studies.shuffle", *(arguments or sys.argv[1:])])
    text = report.markdown(paragraphs, study.figures, study.layouts, facts, command)
    record = {"command": command, "environment": facts, "conclusion": paragraphs, **study.record()}
    pictures = {"layers": ("Every layer, shuffled against in order", report.draw(study.figures, base.num_events))}
    console.print(text, markup=False, soft_wrap=True)
    for path in results.write(options.out, "shuffle", record, text, pictures):
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
