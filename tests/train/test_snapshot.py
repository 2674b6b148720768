"""A checkpoint that does not fit a run is refused in the project's words, which name what differs; nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eventkern.train import CheckpointError
from eventkern.train.checkpoint import load_checkpoint, save_checkpoint


def frozen(model: Any, *names: str) -> Any:
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


@pytest.fixture
def written(tiny: Any, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint of a run of two steps, changed before it is written again."""

    def write(model: Any = None, change: Callable[[dict[str, Any]], object] = lambda state: None, **keys: Any) -> Path:
        tiny.trainer(tmp_path / "run", model, max_steps=2, **keys).fit()
        state = load_checkpoint(tmp_path / "run/checkpoints/last")
        change(state)
        save_checkpoint(state, tmp_path / "changed.pt")
        return tmp_path / "changed.pt"

    return write


def without_names(state: dict[str, Any]) -> None:
    """As checkpoints were before they named the parameters that are trained."""
    del state["trained"]


@pytest.mark.parametrize(
    ("there", "here", "told"),
    [
        (("hidden",), (), r"hidden\.weight, hidden\.bias are trained in this run and not in the checkpoint; freeze"),
        ((), ("hidden",), r"hidden\.weight, hidden\.bias are trained in the checkpoint and not in this run; freeze"),
        (
            ("heads.0",),
            ("heads.1",),
            r"heads\.0\.weight, heads\.0\.bias are trained in this run and not in the checkpoint, "
            r"heads\.1\.weight, heads\.1\.bias are trained in the checkpoint and not in this run; freeze",
        ),
    ],
)
def test_parameters_that_are_trained_on_one_side_alone_are_named(
    tiny: Any, tmp_path: Path, written: Any, there: tuple[str, ...], here: tuple[str, ...], told: str
) -> None:
    path = written(frozen(tiny.Model(), *there))
    model = frozen(tiny.Model(), *here)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"changed\.pt: {told}"):
        tiny.trainer(tmp_path / "next", model).resume(path)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("there", "here", "told"),
    [
        (("hidden",), (), r"it trains \[2, 2\] parameters in its groups and this run \[3, 3\]: freeze what was"),
        (("hidden", "heads"), ("heads",), r"it trains \[\] parameters in its groups and this run \[1, 1\]"),
        (("heads.0",), ("heads.1",), r"it holds \(7, 6\) of 'heads\.0\.weight', which is \(5, 6\)"),
    ],
)
def test_a_checkpoint_that_names_no_parameters_is_told_by_numbers_and_shapes(
    tiny: Any, tmp_path: Path, written: Any, there: tuple[str, ...], here: tuple[str, ...], told: str
) -> None:
    if there == ("hidden", "heads"):  # nothing trains there: such a run ends before it begins

        def change(state: dict[str, Any]) -> None:
            without_names(state)
            state["optimizer"] = {"state": {}, "param_groups": []}

        path = written(None, change)
    else:
        path = written(frozen(tiny.Model(), *there), without_names)
    with pytest.raises(CheckpointError, match=rf"changed\.pt: its optimizer is not this run's: {told}"):
        tiny.trainer(tmp_path / "next", frozen(tiny.Model(), *here)).resume(path)


def test_a_checkpoint_that_names_no_parameters_goes_on(
    tiny: Any, tmp_path: Path, written: Any, assert_same: Any
) -> None:
    ends = []
    for change in (lambda state: None, without_names):
        trainer = tiny.trainer(tmp_path / f"next {len(ends)}")
        trainer.resume(written(None, change))
        trainer.fit()
        ends.append(trainer.model.state_dict())
    assert_same(*ends)


def moments_of(state: dict[str, Any]) -> dict[str, Any]:
    return dict(state["optimizer"]["state"][0])


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another optimizer": (
        lambda state: state["optimizer"]["state"].update({0: {"momentum_buffer": torch.ones(6, 6)}}),
        r"its optimizer is not this run's: it holds momentum_buffer of 'hidden\.weight', and this run's AdamW exp",
    ),
    "another optimizer's groups": (
        lambda state: state["optimizer"]["param_groups"][1].pop("betas"),
        "its optimizer is not this run's: group 1 of its parameters has no betas",
    ),
    "moments of other shapes": (
        lambda state: state["optimizer"]["state"].update({0: {**moments_of(state), "exp_avg": torch.ones(6, 5)}}),
        r"its optimizer is not this run's: it holds .*\(6, 5\).* of 'hidden\.weight', which is \(6, 6\)",
    ),
    "moments of no parameter": (
        lambda state: state["optimizer"]["state"].update({17: moments_of(state)}),
        "its optimizer is not this run's: .*out of range",
    ),
    "no groups": (
        lambda state: state["optimizer"].pop("param_groups"),
        "its optimizer is not this run's: it has no 'param_groups'",
    ),
    "parameters in another order": (
        lambda state: state["trained"].reverse(),
        "parameters come in another order than in the checkpoint",
    ),
    "another shape": (
        lambda state: state["model"].update({"heads.1.bias": torch.ones(9)}),
        r"parameter 'heads\.1\.bias' is \(9,\) in the checkpoint and \(7,\) in the model; give the configuration",
    ),
    "a missing parameter": (
        lambda state: state["model"].pop("heads.1.bias"),
        r"parameter 'heads\.1\.bias' is absent in the checkpoint and \(7,\) in the model",
    ),
    "a buffer that the model lacks": (
        lambda state: state["model"].update({"statistics": torch.ones(9)}),
        r"parameter 'statistics' is \(9,\) in the checkpoint and absent in the model",
    ),
    "extra state that the model lacks": (
        lambda state: state["model"].update({"_extra_state": {"a": 1}}),
        "extra state '_extra_state' is there in the checkpoint and absent in the model",
    ),
    "no schedule": (lambda state: state.pop("schedule"), "has no schedule: give a checkpoint that a trainer wrote"),
    "several parts": (
        lambda state: [state.pop(name) for name in ("loader", "random", "step")],
        "has no random, loader, step: give a checkpoint that a trainer wrote",
    ),
    "another schedule": (
        lambda state: state["schedule"]["step"].pop("last_epoch"),
        "its schedule is not this run's: it has no 'last_epoch'",
    ),
    "a schedule of other groups": (
        lambda state: state["schedule"]["step"].update(base_lrs=[0.1]),
        "its schedule is not this run's: zip",
    ),
    "another loss scale": (
        lambda state: state.update(scaler={"factor": 2.0}),
        "its loss scale is not this run's: it has no 'scale'",
    ),
    "another early stopping": (
        lambda state: state.update(early_stopping={}),
        "its early stopping is not this run's: it has no 'lowest'",
    ),
    "another loader": (
        lambda state: state.update(loader={"epoch": 0}),
        "is of other training data: it has no 'position'; give the store",
    ),
    "other generators": (
        lambda state: state["random"].update(python=(2, (), None)),
        "its generators are not those of this python, numpy and torch",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_part_that_does_not_fit_is_named(tiny: Any, tmp_path: Path, written: Any, name: str) -> None:
    change, told = CHANGES[name]
    path = written(None, change)
    trainer = tiny.trainer(tmp_path / "next", precision="fp16" if "scale" in name else "fp32")
    with pytest.raises(CheckpointError, match=rf"^\S*changed\.pt: {told}") as error:
        trainer.resume(path)
    assert "\n" not in str(error.value)
    assert "; " in str(error.value) or ": give" in str(error.value)


def test_what_a_model_refuses_itself_is_told(tiny: Any, tmp_path: Path, written: Any) -> None:
    class Picky(tiny.Model):  # type: ignore[misc]
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 2}

        def set_extra_state(self, state: dict[str, int]) -> None:
            raise ValueError(f"version {state['version']} is too new")

    path = written(Picky())
    with pytest.raises(
        CheckpointError, match=r"changed\.pt: the model does not take its weights: version 2 is too new"
    ):
        tiny.trainer(tmp_path / "next", Picky()).resume(path)


def test_memory_that_is_used_up_is_no_mismatch(
    tiny: Any, tmp_path: Path, written: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written()

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer = tiny.trainer(tmp_path / "next")
    monkeypatch.setattr(trainer.optimizer, "load_state_dict", full)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.resume(path)
