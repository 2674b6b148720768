"""The guard decides on the device, skips bitwise, counts, and names what went bad first."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eventkern.train import Loaders, Trainer, TrainerConfig
from eventkern.train import optim as optim_room
from eventkern.train.checkpoint import load_checkpoint
from eventkern.train.guard import Guard, Notice

CPU = torch.device("cpu")
BASE: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 6,
    "lr": 0.01,
    "schedule": "constant",
    "device": "cpu",
    "log_every": 1,
}


def make_trainer(tiny: Any, run_dir: Path, model: Any, **keys: Any) -> Trainer:
    config = TrainerConfig(**{**BASE, "precision": "fp32", **keys})
    loaders = Loaders(tiny.Loader(config.batch_size), tiny.Loader(4, num_samples=9, seed=1))
    return Trainer(model, config, loaders, run_dir=run_dir)


def snapshot(trainer: Trainer) -> list[torch.Tensor]:
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in (*trainer.model.parameters(), *moments)]


def spoil_loss(tiny: Any, is_spoiled: Callable[[int], bool]) -> Any:
    class Spoiled(tiny.Model):  # type: ignore[misc]
        def forward(self, batch: Any) -> torch.Tensor:
            losses = super().forward(batch)
            return losses * torch.tensor([1.0, math.nan]) if is_spoiled(self.num_calls) else losses

    return Spoiled()


def spoil_gradient(tiny: Any, is_spoiled: Callable[[int], bool]) -> Any:
    model = tiny.Model()

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf if is_spoiled(model.num_calls) else gradient

    model.heads[0].weight.register_hook(spoil)
    return model


def spoil_input(tiny: Any, is_spoiled: Callable[[int], bool]) -> Any:
    class Spoiled(tiny.Model):  # type: ignore[misc]
        def forward(self, batch: Any) -> torch.Tensor:
            is_bad = is_spoiled(self.num_calls + 1)
            inputs = batch.inputs.index_fill(0, torch.tensor([0]), math.nan) if is_bad else batch.inputs
            return super().forward(type(batch)(inputs, batch.labels, batch.num_targets))

    return Spoiled()


SPOILS = {"loss": spoil_loss, "gradient": spoil_gradient, "input": spoil_input}


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("what", SPOILS)
def test_a_bad_step_leaves_weights_moments_and_counts_bitwise(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, optimizer: str, is_fused: bool
) -> None:
    if not is_fused:
        monkeypatch.setattr(optim_room, "FUSED_DEVICES", ())
    # two micro-batches a step: the second of step 3 is bad
    model = SPOILS[what](tiny, lambda call: call == 6)
    trainer = make_trainer(tiny, tmp_path, model, optimizer=optimizer, weight_decay=0.1, grad_accum=2, batch_size=3)
    assert trainer.optimizer.defaults["fused"] is is_fused
    batches = list(trainer.loaders.train)
    before = [snapshot(trainer)]
    for step in range(4):
        trainer._train_step(batches[2 * step : 2 * step + 2])
        before.append(snapshot(trainer))
    for one, other in zip(before[2], before[3], strict=True):
        assert torch.equal(one, other)
    changed = [not torch.equal(one, other) for one, other in zip(before[3], before[4], strict=True)]
    assert all(changed)  # the step after is taken, with moments that are finite
    assert all(tensor.isfinite().all() for tensor in before[4])
    assert (int(trainer._optimizer_step.guard.skipped), int(trainer._optimizer_step.guard.in_a_row)) == (1, 0)


def test_a_skipped_step_is_the_absence_of_its_update_alone(tiny: Any, tmp_path: Path) -> None:
    """The run goes on as one that never saw the batch, for a schedule that does not count steps."""
    spoiled = make_trainer(tiny, tmp_path / "spoiled", spoil_loss(tiny, lambda call: call == 2))
    clean = make_trainer(tiny, tmp_path / "clean", tiny.Model())
    batches = list(spoiled.loaders.train)
    for number in range(4):
        spoiled._train_step([batches[number]])
        if number != 1:
            clean._train_step([batches[number]])
    for one, other in zip(snapshot(spoiled), snapshot(clean), strict=True):
        assert torch.equal(one, other)


def test_so_many_in_a_row_end_the_run_with_the_names_of_the_first(tiny: Any, tmp_path: Path) -> None:
    model = spoil_gradient(tiny, lambda call: call >= 4)
    trainer = make_trainer(tiny, tmp_path, model, max_skipped_steps=3, log_every=100, save_every=2, keep_checkpoints=9)
    with pytest.raises(FloatingPointError) as error:
        trainer.fit()
    healthy = tmp_path / "checkpoints/step-00000002.pt"
    assert str(error.value) == (
        "step 6: 3 steps in a row were skipped; at step 4 were not finite: gradient heads.0.weight; "
        f"the last checkpoint is {healthy}; lower lr, or find what is wrong with the data"
    )
    assert [path.name for path in healthy.parent.glob("*.pt")] == [
        healthy.name
    ]  # none at step 4, though an epoch's end
    assert load_checkpoint(healthy)["step"] == 2


def test_the_end_is_found_where_nothing_is_logged(tiny: Any, tmp_path: Path) -> None:
    model = spoil_loss(tiny, lambda call: call >= 2)
    loader = tiny.Loader(1, num_samples=40)
    config = TrainerConfig(**{**BASE, "batch_size": 1, "log_every": 100, "max_skipped_steps": 5})
    trainer = Trainer(model, config, (loader, tiny.Loader(4)), run_dir=tmp_path)
    with pytest.raises(
        FloatingPointError, match=r"step 7: 5 steps in a row .* at step 2 were not finite: the loss of pl"
    ):
        trainer.fit()


def test_a_save_among_skipped_steps_is_put_off(tiny: Any, tmp_path: Path) -> None:
    model = spoil_loss(tiny, lambda call: call in (4, 5))
    keys = {"save_every": 4, "evaluate_every": 100, "log_every": 100, "max_steps": 9}
    trainer = make_trainer(tiny, tmp_path, model, **keys)
    saved: list[int] = []
    save = trainer._save
    trainer._save = lambda is_best: (saved.append(trainer.step), save(is_best))[1]  # type: ignore[method-assign]
    trainer.fit()
    assert saved == [7, 8, 9]  # that of step 4 comes once a step was healthy, as the next one is told
    assert load_checkpoint(tmp_path / "checkpoints/last")["skipped_steps"] == 2
    again = make_trainer(tiny, tmp_path, tiny.Model(), **{**keys, "max_steps": 10})
    again.resume(tmp_path / "checkpoints/last")
    again.fit()
    assert load_checkpoint(tmp_path / "checkpoints/last")["skipped_steps"] == 2


def test_an_evaluation_among_skipped_steps_is_never_the_best(tiny: Any, tmp_path: Path) -> None:
    model = spoil_loss(tiny, lambda call: call == 4)
    totals = iter([2.0, 3.0])  # after steps 4 and 5
    model.metrics = lambda _: {"loss": torch.tensor([next(totals), 0.0]), "top1": torch.zeros(2)}
    trainer = make_trainer(tiny, tmp_path, model, evaluate_every=4, max_steps=5)
    trainer.loaders = Loaders(trainer.loaders.train, tiny.Loader(9, num_samples=9, seed=1))  # one batch
    assert trainer.fit().best_loss == 3.0
    best = load_checkpoint(tmp_path / "checkpoints/best")
    assert (best["step"], best["best_loss"]) == (5, 3.0)  # not 4, which has no checkpoint


def test_a_run_that_ends_on_a_skipped_step_is_saved_with_the_weights_before_it(tiny: Any, tmp_path: Path) -> None:
    model = spoil_loss(tiny, lambda call: call == 5)
    assert make_trainer(tiny, tmp_path / "spoiled", model, max_steps=5).fit().step == 5
    make_trainer(tiny, tmp_path / "clean", tiny.Model(), max_steps=5, save_every=4, keep_checkpoints=9).fit()
    spoiled = load_checkpoint(tmp_path / "spoiled/checkpoints/last")
    clean = load_checkpoint(tmp_path / "clean/checkpoints/step-00000004.pt")
    assert (spoiled["step"], spoiled["skipped_steps"]) == (5, 1)
    for name, weight in clean["model"].items():
        assert torch.equal(spoiled["model"][name], weight)


def test_a_stop_on_a_skipped_step_waits_for_one_that_counts(tiny: Any, tmp_path: Path) -> None:
    stopped = []

    def is_bad(call: int) -> bool:
        if call == 3:
            stopped.append(signal.raise_signal(signal.SIGTERM))
        return call in (3, 4)

    result = make_trainer(tiny, tmp_path, spoil_loss(tiny, is_bad), max_steps=9).fit()
    assert (result.step, result.interrupted, len(stopped)) == (5, True, 1)
    assert load_checkpoint(tmp_path / "checkpoints/last")["step"] == 5


def judge(guard: Guard, step: int, *, loss: float = 1.0, norm: float = 1.0, scale: float | None = None) -> list[int]:
    scales = None if scale is None else torch.tensor(scale)
    guard.judge(step, torch.tensor([1.0, loss]), torch.tensor([norm, 2.0]), torch.tensor(norm + 2), scales)
    return [int(guard.skipped), int(guard.in_a_row)]


def test_a_loss_scale_may_come_down_before_steps_count_in_a_row() -> None:
    guard = Guard(("kind", "place"), ("a", "b"), 3, CPU)
    inf, nan = math.inf, math.nan
    assert judge(guard, 1, norm=inf, scale=4.0) == [1, 0]
    assert judge(guard, 2, norm=inf, scale=2.0) == [2, 0]
    assert judge(guard, 3, norm=inf, scale=1.0) == [3, 1]  # nowhere left to go
    assert judge(guard, 4, norm=inf, scale=0.5) == [4, 2]
    assert judge(guard, 5, scale=0.25) == [4, 0]
    assert judge(guard, 6, loss=nan, scale=4.0) == [5, 1]  # a loss is none of the scale's doing
    assert judge(guard, 7, norm=nan, scale=2.0) == [6, 1]  # in between, neither counted nor forgotten
    assert guard.story() == "at step 6 were not finite: the loss of place"


def test_the_story_is_that_of_the_first_step_of_the_last_row() -> None:
    guard = Guard(("kind", "place"), tuple("abcdefg"), 3, CPU)
    norms = torch.ones(7)
    bad = torch.full((7,), math.nan)
    for step, now in enumerate([bad, norms, norms.index_fill(0, torch.tensor([1]), math.inf), bad], start=1):
        guard.judge(step, torch.ones(2), now, now.sum())
    assert guard.story() == "at step 3 were not finite: gradient b"
    guard.judge(5, torch.ones(2), norms, norms.sum())
    guard.judge(6, torch.ones(2), bad, bad.sum())
    assert guard.story() == "at step 6 were not finite: gradient a, gradient b, gradient c, gradient d and 3 more"
    guard.judge(7, torch.ones(2), norms, norms.sum())
    guard.judge(8, torch.ones(2), norms, torch.tensor(math.inf))  # the squares overflow, the norms do not
    assert guard.story() == "at step 8 were not finite: the norm of all gradients together"


@pytest.mark.gpu
def test_a_notice_does_not_wait_for_later_work() -> None:
    device = torch.device("cuda")
    notice = Notice(device)
    for number in range(3):
        notice.post(torch.full((2,), number, dtype=torch.int64, device=device))
        torch.cuda._sleep(1_000_000_000)  # cycles, about half a second
        assert notice.read() == [number, number]
        assert not torch.cuda.current_stream().query()  # still at it
    torch.cuda.synchronize()


def test_the_loss_scale_comes_down_where_the_guard_skips(tiny: Any, tmp_path: Path) -> None:
    """Also where every gradient is finite, but not the norm."""
    model = tiny.Model()
    model.heads[0].weight.register_hook(lambda gradient: torch.full_like(gradient, 1e30))
    trainer = make_trainer(tiny, tmp_path, model, precision="fp16")
    trainer._train_step([next(iter(trainer.loaders.train))])
    assert int(trainer._optimizer_step.guard.skipped) == 1
    assert trainer._optimizer_step.scaler.get_scale() == 2.0**15
