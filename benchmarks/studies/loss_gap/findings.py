"""The study's runs put together: every setting with its runs, what is known of its stream, and the attributions."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies.loss_gap.attribution import Estimate, contributions, difference
from benchmarks.studies.loss_gap.runs import Runs
from benchmarks.studies.loss_gap.settings import NOTED_GPU, NOTED_IDS, Plan, Setting
from benchmarks.studies.loss_gap.streams import open_stream
from benchmarks.studies.loss_gap.training import Run, missing
from eventkern.data.baselines import baselines

BASE = "as it is"


@dataclass(frozen=True)
class Reference:
    """What is known of a stream under an id_category_size, in nats a category, on the validation labels.

    Attributes:
        guessing: ln(classes).
        marginal, first_order: of counting.
        floor: no model can be better; nan where it is not known.
    """

    guessing: float
    marginal: float
    first_order: float
    floor: float


@dataclass(frozen=True)
class Rung:
    """A setting and its runs; none where this machine cannot run it, and then `reason` says why."""

    name: str
    setting: Setting
    runs: list[Run]
    reference: Reference

    @property
    def reason(self) -> str | None:
        return missing(self.setting)

    @property
    def reading(self) -> Estimate:
        """The loss as the notes would print it, over the last tenth of the steps."""
        return Estimate.of([run.reading for run in self.runs])

    @property
    def nats(self) -> Estimate:
        """Training nats a category over the last tenth of the steps."""
        return Estimate.of([last_nats(run) for run in self.runs])

    @property
    def first(self) -> float:
        """Training nats a category at the first step."""
        return statistics.fmean(run.nats[0] for run in self.runs)

    @property
    def validation(self) -> Estimate:
        return Estimate.of([statistics.fmean(run.validation) for run in self.runs])

    @property
    def curve(self) -> list[float]:
        """Training nats a category before each step, over the seeds."""
        return [statistics.fmean(values) for values in zip(*(run.nats for run in self.runs), strict=True)]

    @property
    def tenths(self) -> list[list[float]]:
        """Training nats by category over each tenth of the steps, over the seeds."""
        return np.mean([run.tenths for run in self.runs], axis=0).tolist()

    @property
    def validated(self) -> list[float]:
        """Validation nats by category after the last step, over the seeds."""
        return np.mean([run.validation for run in self.runs], axis=0).tolist()

    def to_dict(self) -> dict[str, Any]:
        """For the record."""
        told: dict[str, Any] = {"name": self.name, "setting": self.setting.to_dict(), "reference": vars(self.reference)}
        if self.reason:
            return {**told, "not_run": self.reason}
        seeds = [{"seed": run.seed, "reading": run.reading, "skipped": run.skipped} for run in self.runs]
        return {
            **told,
            "seeds": seeds,
            "reading": vars(self.reading),
            "nats": vars(self.nats),
            "validation": vars(self.validation),
            "curve": [round(value, 4) for value in self.curve[:: max(1, len(self.curve) // 200)]],
            "validation_by_category": [round(value, 3) for value in self.validated],
            "nats_by_category_and_tenth": [[round(value, 3) for value in tenth] for tenth in self.tenths],
        }


def last_nats(run: Run) -> float:
    """A run's training nats a category over the last tenth of its steps."""
    return statistics.fmean(run.last)


class Findings:
    """All that the tables, the pictures and the text are made of.

    Args:
        plan: of the study.
        runs: finished, all that the machine can run.
        folder: of the streams.
        step_s: median seconds of a step under each of the plan's bugs, from steps taken in turn.
    """

    def __init__(self, plan: Plan, runs: Runs, folder: Path, step_s: dict[str, float]) -> None:
        self.plan = plan
        self.step_s = step_s
        workforce = open_stream("workforce", folder)
        self.category_names = workforce.schema.category_names
        self.num_windows = len(workforce.anchors("train", plan.forward[0].tgt_seq_len))
        self.commits = sorted({runs.commits[runs.key(run.setting, run.seed)] for run in self._all(plan, runs)})
        self._references: dict[tuple[str, int], Reference] = {}

        def rung(name: str, setting: Setting) -> Rung:
            return Rung(name, setting, runs.of(setting, plan.seeds), self._reference(setting, folder))

        names = [factor.name for factor in plan.factors]
        start = "cpu_baseline as it is"
        self.forward = [rung(*pair) for pair in zip([start, *names], plan.forward, strict=True)]
        self.backward = [rung(*pair) for pair in zip([start, *names[::-1]], plan.backward, strict=True)]
        large = plan.forward[-1]
        on_gpu = [] if large.device == "cuda" else [replace(large, device="cuda")]
        self.beyond = [rung("device cpu to cuda", setting) for setting in on_gpu if missing(setting)]
        self.suspects = {
            base: [rung(name, setting) for name, setting in settings.items()]
            for base, settings in plan.suspects.items()
        }
        self.bugs = [rung(name, setting) for name, setting in plan.bugs.items()]
        self.precisions = [rung(name, setting) for name, setting in plan.precisions.items()]
        self.remedies = [rung(name, setting) for name, setting in plan.remedies.items()]

    @staticmethod
    def _all(plan: Plan, runs: Runs) -> list[Run]:
        return [run for setting in plan.settings() for run in runs.of(setting, plan.seeds)]

    def _reference(self, setting: Setting, folder: Path) -> Reference:
        key = setting.stream, setting.id_category_size
        if key not in self._references:
            found = baselines(open_stream(setting.stream, folder), setting.id_category_size)
            means = (float(np.mean(values)) for values in (found.marginal, found.first_order, found.floor))
            self._references[key] = Reference(float(np.mean(np.log(found.classes))), *means)
        return self._references[key]

    @property
    def large(self) -> list[Rung]:
        """The suspects beside the GPU's configuration."""
        return list(self.suspects.values())[-1]

    @property
    def gap(self) -> Estimate:
        """From the CPU's reading to the GPU's, in the notes' units."""
        return difference(self.forward[-1].runs, self.forward[0].runs, lambda run: run.reading)

    def shares(self) -> dict[str, tuple[Estimate, Estimate]]:
        """What each factor adds to the reading, in the order of the ladder and in the other order."""
        forward = contributions([rung.runs for rung in self.forward], lambda run: run.reading)
        backward = contributions([rung.runs for rung in self.backward], lambda run: run.reading)
        names = [factor.name for factor in self.plan.factors]
        return dict(zip(names, zip(forward, backward[::-1], strict=True), strict=True))

    def against_base(self, rung: Rung, rungs: list[Rung]) -> Estimate:
        """How many nats a category a suspect ends above its base, whose name is `BASE`."""
        base = next(each for each in rungs if each.name == BASE)
        return difference(rung.runs, base.runs, last_nats)

    def at_noted_sum(self, rung: Rung) -> tuple[int, list[float]]:
        """The tenth (from 1) whose sum over the categories lies nearest to what the notes read, and its nats."""
        tenths = rung.tenths
        nearest = min(range(len(tenths)), key=lambda tenth: abs(math.fsum(tenths[tenth]) - NOTED_GPU))
        return nearest + 1, tenths[nearest]

    def noted_ids(self, nats: list[float]) -> dict[str, float]:
        """Those of the two categories that the notes tell of."""
        return {name: nats[self.category_names.index(name)] for name in NOTED_IDS}

    def noted_estimates(self, rung: Rung, tenth: int | None) -> dict[str, Estimate]:
        """The two categories' training nats in a tenth (from 1), or with None their validation nats, over the seeds."""
        by_seed = [self.noted_ids(run.validation if tenth is None else run.tenths[tenth - 1]) for run in rung.runs]
        return {name: Estimate.of([ids[name] for ids in by_seed]) for name in NOTED_IDS}

    def record(self) -> dict[str, Any]:
        """For the JSON file."""

        def listed(rungs: list[Rung]) -> list[dict[str, Any]]:
            return [rung.to_dict() for rung in rungs]

        return {
            "category_names": self.category_names,
            "run_commits": self.commits,
            "training_windows": self.num_windows,
            "seeds": list(self.plan.seeds),
            "gap": vars(self.gap),
            "shares": {name: [vars(each) for each in pair] for name, pair in self.shares().items()},
            "forward": listed([*self.forward, *self.beyond]),
            "backward": listed(self.backward),
            "suspects": {base: listed(rungs) for base, rungs in self.suspects.items()},
            "bugs": listed(self.bugs),
            "bug_step_s": self.step_s,
            "precisions": listed(self.precisions),
            "remedies": listed(self.remedies),
        }
