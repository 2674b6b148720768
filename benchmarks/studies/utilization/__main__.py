"""Where did the utilisation go? What keeps the device waiting in a step, and what each part of the library buys.

    python -m benchmarks.studies.utilization            # about 5 minutes on a CPU, more where models compile first
    python -m benchmarks.studies.utilization --quick    # about 2 minutes

Starts from plain code (windows cut row by row from Parquet files, a plain model) and replaces one part after the other:
windows in memory, our order, our loader, our model on reference ops, our ops, torch.compile, CUDA graphs. Each step is
timed in turn with the others and profiled: operators or kernels, busy share from the profiler's own intervals, gaps by
cause. An interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import PlainEventTransformer
from benchmarks.studies import step_timing as timing
from benchmarks.studies.shuffle import data as shuffle_data
from benchmarks.studies.step_timing import Contender, PhaseClock, Place, not_run, resized
from benchmarks.studies.study_run import Part, devices, parser, run
from benchmarks.studies.throughput.scaling import same_batch
from benchmarks.studies.utilization import data
from benchmarks.studies.utilization.report import FEATURES, LOADERS, finish
from benchmarks.studies.utilization.trace import profiled
from benchmarks.training import Shapes, TrainingStep, random_batch
from eventkern.data import EventStore
from eventkern.data.shipped import open_store
from eventkern.models import EventTransformer
from eventkern.models.event_transformer import EventBatchLike
from eventkern.train.termination import ending_quietly

FILES, MEMORY, ORDER, LOADER, MODEL, OPS, COMPILED, GRAPHS = FEATURES
COMPILE_S = 60.0
LEAST_WINDOWS = 2
"""Windows that the loaders alone are timed over at least, whatever they take."""
HOST_SIZE = 2
"""Events and classes of the step that is nothing but dispatch."""


@dataclass(frozen=True)
class Budget:
    """Seconds of a part's timed rounds, and the steps that are profiled."""

    part_s: float
    profiled_steps: int


FULL = Budget(part_s=20.0, profiled_steps=5)
QUICK = Budget(part_s=6.0, profiled_steps=2)


class Study:
    """The parts, for the options of a command line."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.budget = QUICK if options.quick else FULL
        self.shapes = {Path(name).stem: Shapes.load(name) for name in options.config}
        self.found: dict[str, Any] = {}
        self._store: EventStore | None = None
        self._files: shuffle_data.Parts | None = None

    @property
    def store(self) -> EventStore:
        if self._store is None:
            self._store = open_store(self.options.store)
        return self._store

    def parts(self) -> list[Part]:
        """Loaders alone, dispatch alone, the ladder eager, and compiled, of each device and configuration."""
        made = []
        for device, config in itertools.product(self.options.device, self.shapes):
            place, shapes = Place(device, "fp32"), self.shapes[config]
            is_missing = place.missing is not None
            compiles = [feature for feature in (COMPILED, GRAPHS) if self.reason(place, config, feature) is None]
            for name, seconds, measure in (
                ("loaders", self.budget.part_s / 4, self.loaders),
                ("dispatch", self.budget.part_s / 4, self.dispatch),
                ("ladder", 2 * self.budget.part_s + COMPILE_S * len(compiles), self.ladder),
            ):
                expected_s = 0.0 if is_missing else seconds
                made.append(Part(f"{name} {device} {config}", expected_s, partial(measure, place, config, shapes)))
        return made

    def reason(self, place: Place, config: str, feature: str) -> str | None:
        """Why a step of the ladder is not run; None where it is."""
        if place.missing:
            return place.missing
        if feature == GRAPHS and place.device != "cuda":
            return "CUDA graphs need a GPU"
        if feature in (COMPILED, GRAPHS) and self.options.quick and config != next(iter(self.shapes)):
            return "--quick compiles one model"
        return None

    def windows(self, shapes: Shapes, feature: str) -> data.Windows:
        """Plain windows, from Parquet files or from memory."""
        if feature != FILES:
            return data.Windows(self.store, shapes, data.from_memory(self.store))
        if self._files is None:
            paths, rows_per_file = data.write_parts(self.store, self.folder / "files")
            parser = shuffle_data.FRAME if find_spec("pandas") else shuffle_data.ARRAY
            self._files = shuffle_data.parquet_files(paths, rows_per_file, self.store.num_events, parser)
        return data.Windows(self.store, shapes, data.from_files(self._files))

    def batches(self, place: Place, shapes: Shapes, feature: str) -> Iterator[EventBatchLike]:
        """The batches that a step of the ladder trains on."""
        if feature in (FILES, MEMORY, ORDER):
            windows, is_our_order = self.windows(shapes, feature), feature == ORDER
            return data.loader_batches(
                windows, shapes.batch_size, place.device, is_our_order=is_our_order, seed=self.options.seed
            )
        return timing.loader_batches(self.store, shapes, place.device, seed=self.options.seed)

    def loaders(self, place: Place, config: str, shapes: Shapes) -> list[dict[str, Any]]:
        """Every loader alone, with no model beside it."""
        if place.missing:
            return [{"loader": feature, **not_run(place.missing)} for feature in LOADERS]
        budget_s = self.budget.part_s / 4 / len(LOADERS)
        return [
            {"loader": feature, **loader_record(partial(self.batches, place, shapes, feature), shapes, budget_s)}
            for feature in LOADERS
        ]

    def dispatch(self, place: Place, config: str, shapes: Shapes) -> list[dict[str, Any]]:
        """The same layers and categories on next to nothing: what the host needs to start a step's operators."""
        features = (MEMORY, MODEL, OPS)
        if place.missing:
            return [{"feature": feature, **not_run(place.missing)} for feature in features]
        tiny = resized(
            shapes,
            batch_size=1,
            num_classes=HOST_SIZE + 1,
            src_seq_len=HOST_SIZE,
            tgt_seq_len=HOST_SIZE,
            d_model=4 * shapes.model.num_heads,
        )
        contenders = [
            Contender(
                feature,
                partial(self.step, tiny, place, feature),
                same_batch(tiny, place.device, self.options.seed),
                place,
                is_reference=feature == MODEL,
            )
            for feature in features
        ]
        timing.take_turns(contenders, self.budget.part_s / 4)
        return [{"feature": contender.name, **contender.record()} for contender in contenders]

    def ladder(self, place: Place, config: str, shapes: Shapes) -> list[dict[str, Any]]:
        """The steps from plain code to all of the library, timed in turn and then profiled one after the other."""
        ways: list[Contender | str] = []
        for feature in FEATURES:
            reason = self.reason(place, config, feature)
            if reason is not None:
                ways.append(reason)
                continue
            build, batches = partial(self.step, shapes, place, feature), self.batches(place, shapes, feature)
            ways.append(Contender(feature, build, batches, place, is_reference=feature == MODEL))
        contenders = [way for way in ways if isinstance(way, Contender)]
        if contenders:
            self.check(shapes, place)
        with torch._dynamo.config.patch(recompile_limit=64):
            timing.take_turns(contenders, self.budget.part_s, is_same_work=False)
            rows = [
                {"feature": feature, **(not_run(way) if isinstance(way, str) else self.profiled(way))}
                for feature, way in zip(FEATURES, ways, strict=True)
            ]
        torch._dynamo.reset()
        return timing.with_equal_labels(rows)

    def profiled(self, contender: Contender) -> dict[str, Any]:
        """The timed figures, and what the profiler saw afterwards."""
        record = contender.record()
        if contender.step is not None:
            with contender.settings():
                record["profile"] = profiled(contender.step, contender.batches, self.budget.profiled_steps)
        return record

    def model(self, shapes: Shapes, place: Place, feature: str) -> nn.Module:
        """With weights that are the same for all."""
        torch.manual_seed(self.options.seed)
        model = EventTransformer(shapes.model).to(place.device)
        return PlainEventTransformer(model) if feature in (FILES, MEMORY, ORDER, LOADER) else model

    def step(self, shapes: Shapes, place: Place, feature: str, clock: PhaseClock) -> TrainingStep:
        model = self.model(shapes, place, feature)
        if feature in (COMPILED, GRAPHS):
            options: dict[str, Any] = {"mode": "reduce-overhead"} if feature == GRAPHS else {}
            if place.device == "cpu":  # else the profiler sees nothing of compiled kernels
                options["options"] = {"cpp.enable_kernel_profile": True}
            model.compile(fullgraph=True, dynamic=False, **options)
        return TrainingStep(model, place.dtype, name_range=clock)

    def check(self, shapes: Shapes, place: Place) -> None:
        """A figure is worth nothing unless all models compute the same.

        Raises:
            RuntimeError: they do not.
        """
        batch = random_batch(resized(shapes, batch_size=1), place.device)
        losses: dict[str, Tensor] = {}
        for feature in (LOADER, MODEL, OPS):
            way = Contender(feature, lambda clock: None, iter(()), place, is_reference=feature == MODEL)  # type: ignore[arg-type, return-value]
            with way.settings(), torch.no_grad():
                losses[feature] = self.model(shapes, place, feature)(batch)
        for feature, found in losses.items():
            if not torch.allclose(found, losses[OPS], rtol=1e-4, atol=0.0):
                raise RuntimeError(f"the losses of '{feature}' and '{OPS}' differ: {found} and {losses[OPS]}")


def loader_record(batches: Callable[[], Iterator[EventBatchLike]], shapes: Shapes, budget_s: float) -> dict[str, Any]:
    """Seconds to a loader's first batch, and of each that follows while the time lasts."""
    start_s = time.perf_counter()
    running = batches()
    next(running)
    first_s = time.perf_counter() - start_s
    times_s: list[float] = []
    while len(times_s) < LEAST_WINDOWS or (sum(times_s) < budget_s and len(times_s) < 10_000):
        start_s = time.perf_counter()
        next(running)
        times_s.append(time.perf_counter() - start_s)
    # The mean, since batches gathered ahead come in no time and others pay for them.
    return {
        "status": "measured",
        "first_s": first_s,
        "batch_s": statistics.fmean(times_s),
        "window_s": statistics.fmean(times_s) / shapes.batch_size,
        "batches": len(times_s),
        "windows_per_batch": shapes.batch_size,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the study and write its results; returns the exit code."""
    assert __doc__ is not None
    commands = parser("utilization", __doc__.splitlines()[0])
    options = commands.parse_args(arguments)
    try:
        options.device = devices(options.device)
    except ValueError as error:
        commands.error(str(error))
    with tempfile.TemporaryDirectory(dir=options.work_dir, prefix="utilization-") as folder:
        study = Study(options, Path(folder))
        return run("utilization", options, arguments, study.parts(), study.found, finish)


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
