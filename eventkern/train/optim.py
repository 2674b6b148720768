"""Optimizers and learning-rate schedules by name, and the end of a run that no longer gets better."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau

from eventkern.train.config import TrainerConfig
from eventkern.train.device import FUSED_DEVICES

PLATEAU_FACTOR = 0.5
PLATEAU_PATIENCE = 3
POSITION = ("last_epoch", "_step_count", "_last_lr")
"""What each of torch's schedulers holds of its place; the rest of its state is its settings."""


def build_optimizer(parameters: Iterable[nn.Parameter], config: TrainerConfig) -> torch.optim.Optimizer:
    """Adam or AdamW over all parameters that take gradients; weight decay acts on matrices only.

    Args:
        parameters: parameters on the device where they will be trained; fused kernels run on the CPU and on CUDA.
        config: its keys optimizer, lr and weight_decay.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if group
    ]
    fused = all(parameter.device.type in FUSED_DEVICES for parameter in trained)
    optimizer_class = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return optimizer_class(groups, lr=config.lr, fused=fused)


def load_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Takes up an optimizer's saved state; kind and strength of the weight decay stay the configuration's."""
    kept: list[dict[str, Any]] = [
        {key: group[key] for key in ("weight_decay", "decoupled_weight_decay") if key in group}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, kept, strict=True):
        group.update(own)


class Schedule:
    """The learning rate of each step: a warm-up, then a function of the step, or halving at a plateau.

    The function of the step is torch's LambdaLR over `factor`, and so a run that is resumed with more steps, another
    warm-up or another schedule takes the rates that those mean; torch's CosineAnnealingLR, LinearLR and SequentialLR
    bring their lengths back from the checkpoint (past its old end cosine climbs again, and linear stays at 0).

    Args:
        optimizer: the optimizer whose learning rate it sets.
        config: its keys schedule, warmup_steps, restart_steps and restart_multiplier.
        total_steps: the step at which linear and cosine decay reach 0.

    Numerics:
        A schedule that goes on from a saved state gives bitwise the rates of one that was never interrupted.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainerConfig, total_steps: int) -> None:
        self._optimizer = optimizer
        self._of_step: LambdaLR | LinearLR
        self._factor: Callable[[int], float] | None = None
        self._of_loss: ReduceLROnPlateau | None = None
        if config.schedule == "plateau":
            # LinearLR multiplies the present rate where LambdaLR would overwrite what the plateau has halved.
            warmup = config.warmup_steps
            self._of_step = LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
            self._of_loss = ReduceLROnPlateau(optimizer, factor=PLATEAU_FACTOR, patience=PLATEAU_PATIENCE)
        else:
            self._factor = partial(factor, config, total_steps)
            self._of_step = LambdaLR(optimizer, self._factor)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def step(self) -> None:
        """To be called after every optimizer step."""
        self._of_step.step()

    def evaluated(self, loss: float) -> None:
        """To be called after every evaluation that the configuration asks for, with the validation loss."""
        if self._of_loss is not None:
            self._of_loss.step(loss)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"step": {name: getattr(self._of_step, name) for name in (*POSITION, "base_lrs")}}
        return state if self._of_loss is None else {**state, "loss": self._of_loss.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a saved state, after the optimizer has; rates, lengths and kind stay the configuration's."""
        for name in POSITION:
            setattr(self._of_step, name, state["step"][name])
        groups, base_lrs = self._optimizer.param_groups, self._of_step.base_lrs
        for group, base_lr, saved in zip(groups, base_lrs, state["step"]["base_lrs"], strict=True):
            # What a plateau has halved stays halved.
            share = group["lr"] / saved if self._factor is None else self._factor(self._of_step.last_epoch)
            if self._factor is not None or base_lr != saved:  # a product with a quotient might not be bitwise the same
                group["lr"] = base_lr * share
        if self._of_loss is not None and "loss" in state:
            self._of_loss.load_state_dict(state["loss"])


class EarlyStopping:
    """Ends a run after `patience` evaluations in a row without a validation loss below the lowest before them.

    One that is not finite is not lower. The count is saved, so that a run that is interrupted ends where an undisturbed
    one does; another patience may be given on resuming.

    Args:
        patience: evaluations; None: the run is never ended.

    Source: L. Prechelt, "Early stopping - but when?" (1998), with successive evaluations for its strips.
    """

    def __init__(self, patience: int | None) -> None:
        self._patience = patience
        self._lowest = math.inf
        self._count = 0

    @property
    def is_due(self) -> bool:
        """Whether the run is to end."""
        return self._patience is not None and self._count >= self._patience

    def evaluated(self, loss: float) -> None:
        """To be called after every evaluation that the configuration asks for, with the validation loss."""
        self._count = 0 if loss < self._lowest else self._count + 1
        self._lowest = loss if loss < self._lowest else self._lowest

    def story(self) -> str:
        """Why the run ends, in words."""
        return f"no validation loss below {self._lowest:.4f} in {self._count} evaluations in a row"

    def state_dict(self) -> dict[str, Any]:
        return {"lowest": self._lowest, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._lowest, self._count = state["lowest"], state["count"]


def factor(config: TrainerConfig, total_steps: int, step: int) -> float:
    """The share of config.lr that step (counted from 0) takes, for the schedules that are functions of the step.

    Source: the cosine and its warm restarts are those of I. Loshchilov and F. Hutter, "SGDR" (2017), equation 5.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    done, length = step - warmup, max(1, total_steps - warmup)
    if config.schedule == "cosine_restarts":
        length = config.restart_steps or length
        while done >= length and config.restart_multiplier > 1:
            done, length = done - length, length * config.restart_multiplier
        done %= length
    share = min(1.0, done / length)
    return 1.0 - share if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
