"""A run that was stopped and taken up again is the undisturbed one, in its weights, its order and its records."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eventkern.train import CheckpointError, Ledger
from eventkern.train.checkpoint import load_checkpoint
from eventkern.train.meter import MEASURED

RESUMES = {
    "mid-epoch": ([2], {}),
    "mid-accumulation-epoch": ([1], {"batch_size": 3, "grad_accum": 3}),
    "mid-accumulation, then an epoch's short last step": ([2, 3], {"batch_size": 2, "grad_accum": 4}),
    "epoch end": ([4], {}),
    "twice": ([3, 7], {}),
    "plateau": ([5], {"schedule": "plateau", "warmup_steps": 3, "evaluate_every": 2}),
    "cosine": ([5], {"schedule": "cosine", "warmup_steps": 2, "save_every": 2}),
    "restarts": ([5], {"schedule": "cosine_restarts", "restart_steps": 3, "warmup_steps": 2, "max_steps": 10}),
    "linear": ([5], {"schedule": "linear", "max_steps": 10}),
    "adam": ([6], {"optimizer": "adam", "weight_decay": 0.1, "keep_checkpoints": 3}),
}


@pytest.mark.parametrize("name", RESUMES)
def test_a_resumed_run_is_bitwise_the_undisturbed_one(tiny: Any, tmp_path: Path, assert_same: Any, name: str) -> None:
    stops, keys = RESUMES[name]
    calls_per_step = keys.get("grad_accum", 1)
    undisturbed = tiny.trainer(tmp_path / "whole", tiny.Model(dropout=0.3), **keys)
    wanted = undisturbed.fit()
    assert not wanted.interrupted
    assert wanted.step > stops[-1]

    for number, stop in enumerate(stops):

        def interrupt(calls: int, at: int = stop - (stops[number - 1] if number else 0)) -> None:
            if calls == (at - 1) * calls_per_step + 1:
                signal.raise_signal(signal.SIGTERM)

        part = tiny.trainer(tmp_path / "parts", tiny.Model(dropout=0.3, before_forward=interrupt), **keys)
        if number:
            part.resume(tmp_path / "parts/checkpoints/last")
        result = part.fit()
        assert (result.interrupted, result.step) == (True, stop)
        torch.rand(3)  # another process has other generator states
        np.random.rand(3)  # noqa: NPY002

    resumed = tiny.trainer(tmp_path / "parts", tiny.Model(dropout=0.3), **keys)
    resumed.resume(tmp_path / "parts/checkpoints/last")
    assert resumed.fit() == wanted
    states = [load_checkpoint(tmp_path / run / "checkpoints/last") for run in ("whole", "parts")]
    for state in states:  # of the attempt: a commit in between changes nothing
        assert state["environment"].pop("time")
        assert state["environment"].pop("commit")
    assert_same(states[0], states[1])
    histories = [
        [{key: value for key, value in row.items() if key not in MEASURED} for row in tiny.rows_of(tmp_path / run)]
        for run in ("whole", "parts")
    ]
    assert histories[0] == histories[1]


def test_other_training_data_are_refused(tiny: Any, tmp_path: Path) -> None:
    class Strict(tiny.Loader):  # type: ignore[misc]
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise ValueError("the state has n 22, but this loader 23")

    tiny.trainer(tmp_path, max_steps=1).fit()
    resumed = tiny.trainer(tmp_path, loader=Strict(6))
    with pytest.raises(
        CheckpointError, match=r"last: is of other training data: .* n 22, .* 23; give the store it was"
    ):
        resumed.resume(tmp_path / "checkpoints/last")


def test_another_batch_size_continues_the_same_order(tiny: Any, tmp_path: Path) -> None:
    tiny.trainer(tmp_path, max_steps=2).fit()
    seen: list[int] = []
    loader = tiny.Loader(5)
    batch = loader.batch
    loader.batch = lambda samples: seen.extend(samples.tolist()) or batch(samples)
    resumed = tiny.trainer(tmp_path, loader=loader, epochs=1, batch_size=5)
    resumed.resume(tmp_path / "checkpoints/last")
    resumed.fit()
    order = torch.randperm(22, generator=torch.Generator().manual_seed(0)).tolist()
    assert seen == order[12:]


def test_a_position_at_the_end_of_a_larger_batch_size_moves_to_the_next_epoch(tiny: Any, tmp_path: Path) -> None:
    class DropLast(tiny.Loader):  # type: ignore[misc]
        def __iter__(self) -> Iterator[Any]:
            return (batch for batch in super().__iter__() if len(batch.inputs) == self.batch_size)

    tiny.trainer(tmp_path, max_steps=3).fit()
    resumed = tiny.trainer(tmp_path, loader=DropLast(10), epochs=2, batch_size=10)
    resumed.resume(tmp_path / "checkpoints/last")
    result = resumed.fit()
    assert (result.step, result.epochs_done) == (3 + 2, 2)


def test_an_evaluation_that_only_ends_a_run_leaves_the_schedule_alone(tiny: Any, tmp_path: Path) -> None:
    keys = {"schedule": "plateau", "evaluate_every": 2}
    tiny.trainer(tmp_path / "whole", tiny.Scripted([3.0] * 6), **keys).fit()
    tiny.trainer(tmp_path / "parts", tiny.Scripted([3.0] * 3), max_steps=5, **keys).fit()
    resumed = tiny.trainer(tmp_path / "parts", tiny.Scripted([3.0] * 4), **keys)
    resumed.resume(tmp_path / "parts/checkpoints/last")
    resumed.fit()
    rates = [{row["step"]: row["lr"] for row in tiny.rows_of(tmp_path / run)} for run in ("whole", "parts")]
    assert rates[0] == rates[1]
    assert rates[0][12] == 0.005


def test_a_resumed_run_remembers_its_best(tiny: Any, tmp_path: Path) -> None:
    tiny.trainer(tmp_path, tiny.Scripted([3.0]), max_steps=3, evaluate_every=3).fit()
    resumed = tiny.trainer(tmp_path, tiny.Scripted([4.0, 3.5]), max_steps=9, evaluate_every=3)
    resumed.resume(tmp_path / "checkpoints/last")
    assert resumed.fit().best_loss == 3.0
    assert os.readlink(tmp_path / "checkpoints/best") == "step-00000003.pt"
    branch = tiny.trainer(tmp_path / "branch", tiny.Scripted([4.0]), max_steps=6, evaluate_every=3)
    branch.ledger = Ledger(("kind", "place"), (5, 7), [1.5, 1.8], [1.4, 1.7])
    branch.resume(tmp_path / "checkpoints/step-00000003.pt")
    assert branch.fit().best_loss == 3.0
    assert json.loads((tmp_path / "branch/ledger.json").read_text())["step"] == 6  # the best it has


@pytest.mark.gpu
def test_a_run_on_a_gpu_resumes_bitwise(tiny: Any, tmp_path: Path, assert_same: Any) -> None:
    keys = {"device": "cuda", "schedule": "cosine"}
    tiny.trainer(tmp_path / "whole", tiny.Model(dropout=0.3), **keys).fit()
    stop = tiny.Model(dropout=0.3, before_forward=lambda calls: calls == 6 and signal.raise_signal(signal.SIGTERM))
    assert tiny.trainer(tmp_path / "parts", stop, **keys).fit().step == 6
    resumed = tiny.trainer(tmp_path / "parts", tiny.Model(dropout=0.3), **keys)
    resumed.resume(tmp_path / "parts/checkpoints/last")
    assert resumed.fit().step == 12
    states = [load_checkpoint(tmp_path / run / "checkpoints/last") for run in ("whole", "parts")]
    for key in ("model", "optimizer", "schedule", "random"):
        assert_same(states[0][key], states[1][key], key)
