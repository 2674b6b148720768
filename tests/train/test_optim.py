"""Optimizers decay matrices alone; schedules and early stopping follow their rules and go on from a saved state."""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LinearLR,
    LRScheduler,
    SequentialLR,
)

from eventkern.train import Trainer, TrainerConfig
from eventkern.train.checkpoint import load_checkpoint
from eventkern.train.optim import EarlyStopping, Schedule, build_optimizer, load_moments


def rates(
    config: TrainerConfig,
    total_steps: int,
    losses: dict[int, float] | None = None,
    stop: int = 0,
    before: tuple[TrainerConfig, int] | None = None,
) -> list[float]:
    """The learning rate of every step; at `stop` the schedule (of `before`, if that is given) is saved and taken up by
    a new one."""
    old_config, old_total = before or (config, total_steps)
    optimizer = build_optimizer([nn.Parameter(torch.ones(2, 2))], old_config)
    schedule = Schedule(optimizer, old_config, old_total)
    taken = []
    for step in range(total_steps):
        if step == stop and stop:
            state, optimizer_state = copy.deepcopy((schedule.state_dict(), optimizer.state_dict()))
            optimizer = build_optimizer([nn.Parameter(torch.ones(2, 2))], config)
            schedule = Schedule(optimizer, config, total_steps)
            load_moments(optimizer, optimizer_state)
            schedule.load_state_dict(state)
        taken.append(schedule.lr)
        optimizer.step()
        schedule.step()
        if losses and step + 1 in losses:
            schedule.evaluated(losses[step + 1])
    return taken


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_weight_decay_is_of_matrices_alone(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model[1].weight.requires_grad_(False)
    config = TrainerConfig(optimizer=name, lr=0.1, weight_decay=0.5)  # type: ignore[arg-type]
    optimizer = build_optimizer(model.parameters(), config)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {id(model[0].weight): 0.5, id(model[0].bias): 0.0, id(model[1].bias): 0.0}
    before = [parameter.clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = list(model.parameters())
    decoupled = before[0] * (1 - 0.1 * 0.5)
    if name == "adamw":
        torch.testing.assert_close(after[0], decoupled)
    else:  # the decay passes through Adam, which turns any gradient's first step into lr
        torch.testing.assert_close(after[0], before[0] - 0.1 * before[0].sign(), rtol=0, atol=1e-5)
    assert torch.equal(torch.cat(before[1:]), torch.cat([parameter.detach() for parameter in after[1:]]))


@pytest.mark.parametrize(("name", "peer_class"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_it_is_torchs_on_matrices_with_decay_and_on_vectors_without(
    name: str, peer_class: type[torch.optim.AdamW | torch.optim.Adam]
) -> None:
    torch.manual_seed(0)
    config = TrainerConfig(optimizer=name, lr=0.01, weight_decay=0.1)  # type: ignore[arg-type]
    for shape, decay in (((5, 3), 0.1), ((2, 3, 4), 0.1), ((7,), 0.0)):
        start, gradients = torch.randn(*shape), torch.randn(4, *shape)
        ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        peer = peer_class([theirs], lr=0.01, weight_decay=decay, foreach=False, fused=False)
        optimizer = build_optimizer([ours], config)
        for gradient in gradients:
            ours.grad, theirs.grad = gradient.clone(), gradient.clone()
            optimizer.step()
            peer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_it_is_fused_where_the_device_has_that(name: str) -> None:
    config = TrainerConfig(optimizer=name)  # type: ignore[arg-type]
    here, elsewhere = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2, device="meta"))
    for parameters, is_fused in (([here], True), ([elsewhere], False), ([here, elsewhere], False)):
        groups = build_optimizer(parameters, config).param_groups
        assert [group["fused"] for group in groups] == [is_fused]


def test_constant_linear_and_cosine_with_warmup() -> None:
    climb = [0.25, 0.5, 0.75]
    formulas = {
        "constant": [1.0] * 6,
        "linear": [1 - k / 6 for k in range(6)],
        "cosine": [(1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)],
    }
    for name, decay in formulas.items():
        config = TrainerConfig(lr=2.0, schedule=name, warmup_steps=3)  # type: ignore[arg-type]
        assert rates(config, 9) == pytest.approx([2 * share for share in climb + decay]), name
    assert rates(TrainerConfig(lr=2.0, schedule="linear"), 4) == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_the_plateau_halves_after_more_than_three_and_keeps_the_warmup() -> None:
    config = TrainerConfig(lr=1.0, schedule="plateau", warmup_steps=3)
    losses = dict.fromkeys(range(1, 13), 1.0)
    # 1.0 is best at step 1; the 4 evaluations after it are no better, and the next 4
    assert rates(config, 12, losses) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25])
    falling = {step: 1.0 / step for step in range(1, 13)}
    assert rates(TrainerConfig(lr=1.0, schedule="plateau"), 12, falling) == [1.0] * 12


SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "linear": {},
    "cosine": {},
    "cosine_restarts": {"restart_steps": 5},
    "longer restarts": {"restart_steps": 3, "restart_multiplier": 2},
    "plateau": {},
}


def config_of(name: str, **keys: Any) -> TrainerConfig:
    schedule: Any = "cosine_restarts" if name == "longer restarts" else name
    return TrainerConfig(schedule=schedule, **SCHEDULES[name], **keys)


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "plateau"])
def test_the_rates_are_those_of_torchs_own_schedulers(name: str, warmup: int) -> None:
    total = 40
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], lr=0.3)
    after: dict[str, Callable[[], LRScheduler]] = {
        "constant": lambda: ConstantLR(optimizer, 1.0),
        "linear": lambda: LinearLR(optimizer, 1.0, 0.0, total - warmup),
        "cosine": lambda: CosineAnnealingLR(optimizer, total - warmup),
        "cosine_restarts": lambda: CosineAnnealingWarmRestarts(optimizer, 5),
        "longer restarts": lambda: CosineAnnealingWarmRestarts(optimizer, 3, 2),
    }
    scheduler = after[name]()
    if warmup:
        climb = LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
        scheduler = SequentialLR(optimizer, [climb, scheduler], [warmup])
    wanted = []
    for _ in range(total):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(config_of(name, lr=0.3, warmup_steps=warmup), total) == pytest.approx(wanted, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_saved_schedule_goes_on_bitwise(name: str, warmup: int) -> None:
    config = config_of(name, lr=0.3, warmup_steps=warmup)
    losses = dict.fromkeys(range(1, 21), 1.0)
    undisturbed = rates(config, 20, losses)
    for stop in range(1, 20):  # on the climb, at its end, at a restart, after the plateau's first halving
        assert rates(config, 20, losses, stop=stop) == undisturbed, stop


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "plateau"])
@pytest.mark.parametrize(("before", "old_total"), [("cosine", 12), ("linear", 12), ("plateau", 12), ("constant", 20)])
def test_a_run_that_goes_on_otherwise_takes_the_rates_that_its_keys_mean(
    name: str, before: str, old_total: int
) -> None:
    """More steps, another warm-up, another schedule, another rate."""
    config, old = config_of(name, lr=0.3, warmup_steps=14), config_of(before, lr=0.7, warmup_steps=2)
    assert rates(config, 30, stop=12, before=(old, old_total))[12:] == rates(config, 30)[12:]


def test_a_plateau_that_goes_on_with_another_rate_keeps_its_halvings() -> None:
    losses = dict.fromkeys(range(1, 31), 1.0)
    old = rates(TrainerConfig(lr=0.8, schedule="plateau"), 22, losses)
    new = rates(
        TrainerConfig(lr=0.2, schedule="plateau"),
        22,
        losses,
        stop=12,
        before=(TrainerConfig(lr=0.8, schedule="plateau"), 22),
    )
    assert old[12] < 0.8
    assert new == pytest.approx([*old[:12], *(rate / 4 for rate in old[12:])])


def test_weight_decay_is_that_of_the_run_that_goes_on() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    saved = build_optimizer([parameter], TrainerConfig(optimizer="adamw", weight_decay=0.1)).state_dict()
    optimizer = build_optimizer([parameter], TrainerConfig(optimizer="adam", weight_decay=0.5))
    load_moments(optimizer, saved)
    (group,) = optimizer.param_groups
    assert (group["weight_decay"], group["decoupled_weight_decay"]) == (0.5, False)


def test_a_plateau_after_another_schedule_halves_the_rate_it_finds() -> None:
    losses = dict.fromkeys(range(13, 31), 1.0)
    old = TrainerConfig(lr=0.3, schedule="constant", warmup_steps=2)
    found = rates(TrainerConfig(lr=0.3, schedule="plateau"), 22, losses, stop=12, before=(old, 12))
    assert found[12:] == pytest.approx([0.3] * 5 + [0.15] * 4 + [0.075])


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_shorter_than_its_warmup_ends_on_the_climb(name: str) -> None:
    assert rates(config_of(name, lr=1.0, warmup_steps=9), 5) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def stoppable(tiny: Any, run_dir: Path, losses: Iterable[float], stop_at: int = 0, **keys: Any) -> Trainer:
    """A trainer of 20 steps with these validation losses in turn; SIGTERM comes in forward pass `stop_at`."""

    def interrupt(call: int) -> None:
        if call == stop_at:
            signal.raise_signal(signal.SIGTERM)

    return tiny.trainer(run_dir, tiny.Scripted(losses, interrupt), **{"epochs": 5, "evaluate_every": 2, **keys})


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
    trainer = stoppable(tiny, tmp_path, [4.0, 3.0, 3.5, 3.0, 2.0], early_stopping=2)
    result = trainer.fit()
    assert (result.step, result.interrupted, result.best_loss) == (8, False, 3.0)
    assert load_checkpoint(tmp_path / "checkpoints/last")["step"] == 8
    assert load_checkpoint(tmp_path / "checkpoints/best")["step"] == 4
    told = "ended early at step 8: no validation loss below 3.0000 in 2 evaluations in a row"
    assert told in capsys.readouterr().out
    again = stoppable(tiny, tmp_path, [], early_stopping=2)
    again.resume(tmp_path / "checkpoints/last")
    assert again.fit().step == 8
    assert "nothing left to do at step 8: raise early_stopping" in capsys.readouterr().out


def test_a_raised_patience_takes_the_run_on(tiny: Any, tmp_path: Path) -> None:
    stoppable(tiny, tmp_path, [4.0, 4.0, 4.0], early_stopping=2).fit()
    patient = stoppable(tiny, tmp_path, [4.0, 4.0], early_stopping=4)
    patient.resume(tmp_path / "checkpoints/last")
    assert patient.fit().step == 10


@pytest.mark.parametrize("stop_at", [3, 5, 6])
def test_an_interrupted_run_ends_where_the_undisturbed_one_does(tiny: Any, tmp_path: Path, stop_at: int) -> None:
    losses = [4.0, 4.0, 3.0, 3.0, 3.5, 3.0]
    whole = stoppable(tiny, tmp_path / "whole", losses, early_stopping=3)
    assert whole.fit().step == 12
    left = iter(losses)
    part = stoppable(tiny, tmp_path / "parts", left, stop_at=stop_at, early_stopping=3)
    result = part.fit()
    assert (result.interrupted, result.step) == (True, stop_at)
    resumed = stoppable(tiny, tmp_path / "parts", left, early_stopping=3)
    resumed.resume(tmp_path / "parts/checkpoints/last")
    assert resumed.fit().step == 12
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_evaluation_that_only_ends_a_run_is_not_counted(tiny: Any, tmp_path: Path) -> None:
    stoppable(tiny, tmp_path, [4.0, 4.0], max_steps=3, early_stopping=2).fit()  # after steps 2 and 3; 3 is not due
    resumed = stoppable(tiny, tmp_path, [4.0, 4.0], early_stopping=2)
    resumed.resume(tmp_path / "checkpoints/last")
    assert resumed.fit().step == 6
