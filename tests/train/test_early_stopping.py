"""A run ends after so many evaluations without a lower loss, counted over interruptions, and says so."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from eventkern.train import Loaders, Trainer, TrainerConfig
from eventkern.train.checkpoint import load_checkpoint
from eventkern.train.optim import EarlyStopping

CONFIG = TrainerConfig(
    epochs=5, batch_size=6, lr=0.01, schedule="constant", precision="fp32", device="cpu", log_every=1, evaluate_every=2
)


def make(tiny: Any, run_dir: Path, losses: list[float], stop_at: int = 0, **keys: Any) -> Trainer:
    """A trainer of 20 steps with these validation losses in turn; SIGTERM comes in forward pass `stop_at`."""

    class Scripted(tiny.Model):  # type: ignore[misc]
        def metrics(self, batch: Any) -> dict[str, torch.Tensor]:
            return {"loss": torch.tensor([losses.pop(0) - 1, 1.0]), "top1": torch.zeros(2)}

    def interrupt(call: int) -> None:
        if call == stop_at:
            signal.raise_signal(signal.SIGTERM)

    loaders = Loaders(tiny.Loader(6), tiny.Loader(4, num_samples=4, seed=1))
    return Trainer(
        Scripted(before_forward=interrupt), TrainerConfig(**{**vars(CONFIG), **keys}), loaders, run_dir=run_dir
    )


def test_the_count_is_of_evaluations_in_a_row_without_a_lower_loss() -> None:
    losses = [3.0, 3.0, 2.5, math.nan, 2.6, 2.5, 2.4, 2.4, math.inf, 2.4]
    due = []
    early_stopping = EarlyStopping(3)
    for loss in losses:
        early_stopping.evaluated(loss)
        due.append(early_stopping.is_due)
    assert due == [False] * 5 + [True] + [False] * 3 + [True]
    assert early_stopping.story() == "no validation loss below 2.4000 in 3 evaluations in a row"
    never = EarlyStopping(None)
    for _ in range(100):
        never.evaluated(1.0)
    assert not never.is_due


@pytest.mark.parametrize("cut", range(1, 10))
def test_the_count_goes_on_from_a_saved_state(cut: int) -> None:
    losses = [3.0, 3.0, 2.5, math.nan, 2.6, 2.5, 2.4, 2.4, math.inf, 2.4]
    whole, part = EarlyStopping(3), EarlyStopping(3)
    for number, loss in enumerate(losses):
        if number == cut:
            state = part.state_dict()
            part = EarlyStopping(3)
            part.load_state_dict(state)
        whole.evaluated(loss)
        part.evaluated(loss)
        assert (part.is_due, part.story()) == (whole.is_due, whole.story())


def test_a_run_ends_early_saves_and_says_why(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make(tiny, tmp_path, [4.0, 3.0, 3.5, 3.0, 2.0], early_stopping=2)
    result = trainer.fit()
    assert (result.step, result.interrupted, result.best_loss) == (8, False, 3.0)
    assert load_checkpoint(tmp_path / "checkpoints/last")["step"] == 8
    assert load_checkpoint(tmp_path / "checkpoints/best")["step"] == 4
    told = "ended early at step 8: no validation loss below 3.0000 in 2 evaluations in a row"
    assert told in capsys.readouterr().out
    again = make(tiny, tmp_path, [], early_stopping=2)
    again.resume(tmp_path / "checkpoints/last")
    assert again.fit().step == 8
    assert "nothing left to do at step 8: raise early_stopping" in capsys.readouterr().out


def test_a_raised_patience_takes_the_run_on(tiny: Any, tmp_path: Path) -> None:
    make(tiny, tmp_path, [4.0, 4.0, 4.0], early_stopping=2).fit()
    patient = make(tiny, tmp_path, [4.0, 4.0], early_stopping=4)
    patient.resume(tmp_path / "checkpoints/last")
    assert patient.fit().step == 10


@pytest.mark.parametrize("stop_at", [3, 5, 6])
def test_an_interrupted_run_ends_where_the_undisturbed_one_does(tiny: Any, tmp_path: Path, stop_at: int) -> None:
    losses = [4.0, 4.0, 3.0, 3.0, 3.5, 3.0]
    whole = make(tiny, tmp_path / "whole", list(losses), early_stopping=3)
    assert whole.fit().step == 12
    left = list(losses)
    part = make(tiny, tmp_path / "parts", left, stop_at=stop_at, early_stopping=3)
    result = part.fit()
    assert (result.interrupted, result.step) == (True, stop_at)
    resumed = make(tiny, tmp_path / "parts", left, early_stopping=3)
    resumed.resume(tmp_path / "parts/checkpoints/last")
    assert resumed.fit().step == 12
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_evaluation_that_only_ends_a_run_is_not_counted(tiny: Any, tmp_path: Path) -> None:
    make(tiny, tmp_path, [4.0, 4.0], max_steps=3, early_stopping=2).fit()  # after steps 2 and 3; 3 is not due
    resumed = make(tiny, tmp_path, [4.0, 4.0], early_stopping=2)
    resumed.resume(tmp_path / "checkpoints/last")
    assert resumed.fit().step == 6
