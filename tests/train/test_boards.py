"""Weights & Biases as a stub sees it; TensorBoard is tested with the log that writes to it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from eventkern.train import ConfigError, boards
from eventkern.train.logging import RunLog

ROW = {
    "step": 10, "epoch": 1, "loss_sum": 0.3, "loss_mean": 0.15, "lr": 0.001, "grad_norm": 0.75, "step_ms": 20.0,
    "events_per_s": 1234.5, "data_wait_ms": 1.0, "data_wait_share": 0.05,
}  # fmt: skip


class Stub(ModuleType):
    """What the board uses of wandb."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.inits: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str]] = []
        self.logged: list[dict[str, Any]] = []
        self.exit_codes: list[int] = []
        self.refusal: Exception | None = None
        self.Settings = dict
        self.Histogram = list

    def init(self, **options: Any) -> Any:
        if self.refusal is not None:
            raise self.refusal
        self.inits.append(options)
        return SimpleNamespace(
            define_metric=lambda name, step_metric: self.metrics.append((name, step_metric)),
            log=self.logged.append,
            finish=lambda exit_code: self.exit_codes.append(exit_code),
        )


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Stub:
    stub = Stub()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


def test_it_gets_the_rows_of_the_run_under_the_same_names(tmp_path: Path, wandb: Stub) -> None:
    settings = {"lr": 0.001, "model": {"d_model": 8}}
    with RunLog(tmp_path / "run", ("kind", "place"), total_steps=40, logger="wandb", settings=settings) as log:
        log.write(ROW, [0.1, 0.2], {"loss": [0.4, 0.6], "top1": [0.5, 0.25]})
    (options,) = wandb.inits
    assert (options["project"], options["name"], options["dir"]) == ("eventkern", "run", str(tmp_path / "run"))
    assert options["config"] == settings
    assert wandb.metrics == [("*", "step")]
    (logged,) = wandb.logged
    assert logged["step"] == 10
    assert (logged["loss/place"], logged["validation_loss/kind"], logged["validation_top1/place"]) == (0.2, 0.4, 0.25)
    assert ROW.items() <= logged.items()
    assert wandb.exit_codes == [0]


def test_a_resumed_run_keeps_its_id_and_another_has_its_own(tmp_path: Path, wandb: Stub) -> None:
    for folder, first_step in (("one", 0), ("one", 10), ("two", 0)):
        with RunLog(tmp_path / folder, ("kind",), total_steps=40, first_step=first_step, logger="wandb"):
            pass
    first, resumed, other = (options["id"] for options in wandb.inits)
    assert first == resumed != other
    assert {options["resume"] for options in wandb.inits} == {"allow"}


def test_a_failed_run_is_shown_as_failed(tmp_path: Path, wandb: Stub) -> None:
    with pytest.raises(FloatingPointError), RunLog(tmp_path, ("kind",), total_steps=40, logger="wandb"):
        raise FloatingPointError("step 3")
    assert wandb.exit_codes == [1]


def test_histograms(tmp_path: Path, wandb: Stub) -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    with RunLog(tmp_path, ("kind",), total_steps=40, logger="wandb") as log:
        log.write_histograms(10, model)
    (logged,) = wandb.logged
    assert logged.pop("step") == 10
    assert [list(values) for values in logged.values()] == [model.weight.flatten().tolist()]
    assert logged.keys() == {"weights/weight"}


def test_it_is_not_touched_unless_asked_for(tmp_path: Path, wandb: Stub) -> None:
    with RunLog(tmp_path, ("kind",), total_steps=40) as log:
        log.write(ROW, [0.1])
    assert (wandb.inits, wandb.logged) == ([], [])
    assert not (tmp_path / "wandb_id").exists()


def test_a_refusal_is_one_line(tmp_path: Path, wandb: Stub) -> None:
    wandb.refusal = wandb.Error("No API key configured.\n Use `wandb login`")
    wanted = r"^logger is 'wandb', which does not start: No API key configured. Use `wandb login` \(WANDB_MODE=offline "
    with pytest.raises(ConfigError, match=wanted):
        RunLog(tmp_path, ("kind",), total_steps=40, logger="wandb")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "has", lambda package: package != "wandb")
    boards.require_board("none")
    with pytest.raises(ConfigError, match="logger is 'wandb', but the package is not installed: pip install wandb"):
        boards.require_board("wandb")
