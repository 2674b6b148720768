"""Where did the throughput go? Every way to run a training step, timed by its phases, and how its cost grows.

    python -m benchmarks.studies.throughput            # about 10 minutes on a CPU, more where models compile first
    python -m benchmarks.studies.throughput --quick    # about 2 minutes

Trains the shapes of the notes' two configurations from a real loader on the synthetic stream: device x precision x
{reference, fused ops} x {eager, compiled} x batch, contenders in turn. Then one size at a time (batch, sequence length,
classes, layers, width) grows and the exponent of the cost is fitted; then the notes' wish list is run as far as time
and memory allow, and predicted from the curves beyond. An interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies.step_timing import (
    PRECISIONS,
    Contender,
    PhaseClock,
    Place,
    loader_batches,
    measured_rate,
    not_run,
    resized,
    take_turns,
    with_equal_labels,
)
from benchmarks.studies.study_run import Part, devices, parser, run
from benchmarks.studies.throughput import scaling
from benchmarks.studies.throughput.tables import finish
from benchmarks.training import Shapes, TrainingStep, random_batch
from eventkern.data import EventStore
from eventkern.data.shipped import open_store
from eventkern.models import EventTransformer
from eventkern.train.termination import ending_quietly

OPS, MODES = ("reference", "fused"), ("eager", "compiled")
COMPILE_S = {"cpu": 40.0, "cuda": 60.0}
MEMORY_SHARE = 0.5
"""Of the memory that is free, what a row of the wish list may be predicted to need and still be run."""


@dataclass(frozen=True)
class Budget:
    """Seconds of the timed rounds of a sweep and of a curve or wish, and of the longest step that is run at all."""

    part_s: float
    curve_s: float
    step_s: float


FULL = Budget(part_s=20.0, curve_s=8.0, step_s=30.0)
QUICK = Budget(part_s=3.0, curve_s=2.0, step_s=2.0)


@dataclass(frozen=True)
class Wish:
    """A row of the notes' wish list: the sizes in which it departs from a configuration."""

    name: str
    sizes: dict[str, int]


WISHES = (
    *(Wish(f"batch {size:,}", {"batch": size}) for size in (512, 1024, 2048)),
    *(Wish(f"d_model {size}", {"width": size}) for size in (128, 256)),
    Wish("6 + 10 layers", {"layers": 16}),
    Wish("batch 2,048, d_model 256, 6 + 10 layers", {"batch": 2048, "width": 256, "layers": 16}),
)


class Study:
    """The parts, for the options of a command line."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.is_quick = options.quick
        self.budget = QUICK if options.quick else FULL
        self.shapes = {Path(name).stem: Shapes.load(name) for name in options.config}
        self.found: dict[str, Any] = {}
        self._store: EventStore | None = None

    @property
    def store(self) -> EventStore:
        """Opened when it is first asked for, since it may have to be made."""
        if self._store is None:
            self._store = open_store(self.options.store)
        return self._store

    @property
    def curve_config(self) -> str:
        """The configuration that the curves vary: the first in a quick run, else the last, which is the largest."""
        return list(self.shapes)[0 if self.is_quick else -1]

    def place_of_curves(self, device: str) -> Place:
        return Place(device, "fp32" if device == "cpu" else "bf16")

    def parts(self) -> list[Part]:
        """The roofs, the sweep, the curves and the wish list of each device."""
        made = []
        for device in self.options.device:
            precisions = PRECISIONS[device]
            made += [
                Part(f"roof {one} {two}", 1.0, partial(self.roof, Place(one, two)))
                for one, two in itertools.product([device], precisions)
            ]
            for config in self.shapes:
                for batch in self.batches(device, config):
                    compiled = sum(
                        self.reason(Place(device, precision), config, batch, *how) is None and how[1] == "compiled"
                        for precision in precisions
                        for how in itertools.product(OPS, MODES)
                    )
                    made.append(
                        Part(
                            f"sweep {device} {config} {batch}",
                            3 * self.budget.part_s + compiled * COMPILE_S[device],
                            partial(self.sweep, device, config, batch),
                        )
                    )
            for config in self.shapes:
                made += [
                    Part(f"curve {device} {config} {name}", 2 * self.budget.curve_s, partial(self.curve, device, curve))
                    for name, curve in self.curves(config).items()
                ]
            for config, wish in itertools.product(self.shapes, WISHES):
                if config == self.curve_config or list(wish.sizes) == ["batch"]:
                    name, measure = f"wish {device} {config} {wish.name}", partial(self.wish, device, config, wish)
                    made.append(Part(name, self.budget.curve_s, measure))
        is_missing = {device: Place(device, "fp32").missing is not None for device in self.options.device}
        return [replace(part, expected_s=0.0) if is_missing[part.name.split()[1]] else part for part in made]

    def batches(self, device: str, config: str) -> tuple[int, ...]:
        """The sizes of the sweep."""
        own = self.shapes[config].batch_size
        if self.is_quick:
            return (own,)
        return (max(1, own // 4), own, 4 * own) if device == "cpu" else (own, 8 * own, 64 * own)

    def reason(self, place: Place, config: str, batch: int, ops: str, mode: str) -> str | None:
        """Why a row of the sweep is not run; None where it is."""
        if place.missing:
            return place.missing
        if mode == "eager":
            return None
        if place.device == "cpu" and ops == "reference" and config != next(iter(self.shapes)):
            return "on a CPU, reference ops are compiled for the first configuration alone: others take minutes"
        if self.is_quick and (config, ops, place.precision) != (next(iter(self.shapes)), "fused", "fp32"):
            return "--quick compiles one model"
        if place.device == "cpu" and batch != self.shapes[config].batch_size:
            return "on a CPU, compiled at the configuration's batch alone"
        return None

    def roof(self, place: Place) -> float | None:
        """Operations a second that large matrix products reach here."""
        return None if place.missing else measured_rate(place)

    def sweep(self, device: str, config: str, batch: int) -> list[dict[str, Any]]:
        """All ways to run a configuration at one batch size, in turn."""
        shapes = resized(self.shapes[config], batch_size=batch)
        rows: list[tuple[dict[str, Any], Contender | str]] = []
        for precision, ops, mode in itertools.product(PRECISIONS[device], OPS, MODES):
            place = Place(device, precision)
            row = {
                "device": device,
                "config": config,
                "precision": precision,
                "ops": ops,
                "mode": mode,
                "batch": batch,
                "is_own_batch": batch == self.shapes[config].batch_size,
            }
            reason = self.reason(place, config, batch, ops, mode)
            if reason is not None:
                rows.append((row, reason))
                continue
            contender = Contender(
                f"{precision}, {ops} ops, {mode}",
                partial(self.step, shapes, place, mode),
                loader_batches(self.store, shapes, device, seed=self.options.seed),
                place,
                is_reference=ops == "reference",
            )
            rows.append((row, contender))
        with torch._dynamo.config.patch(recompile_limit=64):
            take_turns([one for _, one in rows if isinstance(one, Contender)], self.budget.part_s)
        torch._dynamo.reset()
        return with_equal_labels(
            [row | (not_run(one) if isinstance(one, str) else one.record() | self.counted(shapes)) for row, one in rows]
        )

    def step(self, shapes: Shapes, place: Place, mode: str, clock: PhaseClock) -> TrainingStep:
        """A step with weights that are the same for all."""
        torch.manual_seed(self.options.seed)
        model = EventTransformer(shapes.model).to(place.device)
        if mode == "compiled":
            model.compile(fullgraph=True, dynamic=False)
        return TrainingStep(model, place.dtype, name_range=clock)

    def counted(self, shapes: Shapes) -> dict[str, float]:
        """Events that go through the network in a step, and its floating-point operations, from the shapes."""
        with torch.device("meta"):
            model = EventTransformer(shapes.model)
        batch = random_batch(Shapes(shapes.model, 1), "cpu")
        return {
            "tokens": shapes.batch_size * model.tokens(batch),
            "operations": float(shapes.batch_size * model.flops(batch)),
        }

    def curve(self, device: str, curve: scaling.Curve) -> list[dict[str, Any]]:
        """One size of the configuration varied."""
        place = self.place_of_curves(device)
        if place.missing:
            return [{"size": size, **not_run(place.missing)} for size in curve.sizes]
        return scaling.measure_curve(curve, place, self.budget.curve_s, self.options.seed)

    def wish(self, device: str, config: str, wish: Wish) -> dict[str, Any]:
        """A row of the wish list: run where the prediction allows it."""
        place = self.place_of_curves(device)
        base = self.shapes[config]
        row: dict[str, Any] = {"device": device, "config": config, "wish": wish.name, "precision": place.precision}
        if place.missing:
            return row | not_run(place.missing)
        shapes = resized(
            base,
            batch_size=wish.sizes.get("batch"),
            d_model=wish.sizes.get("width", base.model.d_model),
            encoder_layers=6 if "layers" in wish.sizes else base.model.encoder_layers,
            decoder_layers=10 if "layers" in wish.sizes else base.model.decoder_layers,
        )
        row |= self.counted(shapes) | self.forecast(device, config, wish)
        if shapes.batch_size > self.num_windows(shapes):
            return row | not_run(f"the store has fewer than {shapes.batch_size:,} windows")
        if row.get("predicted_s", 0.0) > self.budget.step_s:
            return row | not_run(f"a step is predicted to take more than {self.budget.step_s:g} s")
        if row.get("predicted_bytes", 0.0) > MEMORY_SHARE * free_bytes(device):
            return row | not_run(f"predicted to need more than {MEMORY_SHARE:.0%} of the free memory")
        batches = loader_batches(self.store, shapes, device, seed=self.options.seed)
        contender = Contender(wish.name, partial(self.step, shapes, place, "eager"), batches, place)
        take_turns([contender], self.budget.curve_s / 2)
        return row | contender.record()

    def num_windows(self, shapes: Shapes) -> int:
        return len(self.store.anchors("train", shapes.model.tgt_seq_len))

    def forecast(self, device: str, config: str, wish: Wish) -> dict[str, Any]:
        """Seconds and bytes that the curves say, before anything of the row is run."""
        base, curves = self.base_step(device, config), self.curves(config)
        records = {name: self.found.get(f"curve {device} {config} {name}", []) for name in wish.sizes}
        if base is None or any(len(scaling.points(line)) < 2 for line in records.values()):
            return {}
        growths, bytes_growth, is_on_curve = [], 1.0, len(wish.sizes) == 1
        for name, size in wish.sizes.items():
            line = scaling.points(records[name])
            growths.append(scaling.growth(line, curves[name].base, size))
            memory = [(at, max(value, 1.0)) for at, value in scaling.points(records[name], "peak_bytes")]
            bytes_growth *= scaling.growth(memory, curves[name].base, size).seconds
            is_on_curve = is_on_curve and size in dict(line)
        told = scaling.predict(base["seconds"], growths)
        return {
            "predicted_s": told.seconds,
            "predicted_low_s": told.low,
            "predicted_high_s": told.high,
            "predicted_bytes": base["peak_bytes"] * bytes_growth,
            "is_on_curve": is_on_curve,
        }

    def curves(self, config: str) -> dict[str, scaling.Curve]:
        """By name; of the other configurations the batch alone."""
        made = {curve.name: curve for curve in scaling.curves(self.shapes[config], is_small=self.is_quick)}
        return made if config == self.curve_config else {"batch": made["batch"]}

    def base_step(self, device: str, config: str) -> dict[str, Any] | None:
        """The eager step with our ops at the configuration's own sizes, in the precision of the curves."""
        shapes, precision = self.shapes[config], self.place_of_curves(device).precision
        for row in self.found.get(f"sweep {device} {config} {shapes.batch_size}", []):
            if (row["precision"], row["ops"], row["mode"], row["status"]) == (precision, "fused", "eager", "measured"):
                return row
        return None


def free_bytes(device: str) -> float:
    """Memory that a step could still take."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 4.0 * 2**30
    line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return 1024.0 * int(line.split()[1])


def main(arguments: list[str] | None = None) -> int:
    """Run the study and write its results; returns the exit code."""
    assert __doc__ is not None
    commands = parser("throughput", __doc__.splitlines()[0])
    options = commands.parse_args(arguments)
    try:
        options.device = devices(options.device)
    except ValueError as error:
        commands.error(str(error))
    study = Study(options)
    return run("throughput", options, arguments, study.parts(), study.found, finish)


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
