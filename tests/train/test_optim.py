"""Optimizers decay matrices alone; schedules follow their formulas and go on from a saved state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from eventkern.train import TrainerConfig
from eventkern.train.optim import Schedule, build_optimizer


def rates(
    config: TrainerConfig, total_steps: int, losses: dict[int, float] | None = None, stop: int = 0
) -> list[float]:
    """The learning rate of every step; at `stop` the schedule is saved and taken up by a new one."""
    optimizer = build_optimizer([nn.Parameter(torch.ones(2, 2))], config)
    schedule = Schedule(optimizer, config, total_steps)
    taken = []
    for step in range(total_steps):
        if step == stop and stop:
            state, optimizer_state = schedule.state_dict(), optimizer.state_dict()
            optimizer = build_optimizer([nn.Parameter(torch.ones(2, 2))], config)
            schedule = Schedule(optimizer, config, total_steps)
            optimizer.load_state_dict(optimizer_state)
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


def test_adamw_is_torchs() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 3), torch.randn(4, 5, 3)
    config = TrainerConfig(optimizer="adamw", lr=0.01, weight_decay=0.1)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    peer = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    optimizer = build_optimizer([ours], config)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        peer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


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


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "plateau"])
@pytest.mark.parametrize("stop", [2, 7])
def test_a_saved_schedule_goes_on(name: str, stop: int) -> None:
    config = TrainerConfig(lr=0.3, schedule=name, warmup_steps=4)  # type: ignore[arg-type]
    losses = dict.fromkeys(range(1, 21), 1.0)
    assert rates(config, 20, losses, stop=stop) == rates(config, 20, losses)
