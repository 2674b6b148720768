"""What a checkpoint holds of a run, and the run that takes it up: where the two differ, the difference is named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from eventkern.train.checkpoint import (
    CheckpointError,
    load_weights,
    random_state,
    refuse_other_weights,
    set_random_state,
)
from eventkern.train.config import TrainerConfig, to_mapping
from eventkern.train.device import seed_everything
from eventkern.train.distributed import Ranks
from eventkern.train.environment import environment
from eventkern.train.failures import first_line, is_out_of_memory
from eventkern.train.optim import EarlyStopping, Schedule, load_moments
from eventkern.train.parallel import Parallel
from eventkern.train.protocols import BatchLoader
from eventkern.train.step import OptimizerStep

NEEDED = ("model", "optimizer", "schedule", "random", "loader", "step", "epochs_done", "best_loss")
SETTINGS = ("lr", "betas", "eps", "params")
"""What a group of parameters must bring along; the rest is the configuration's, or torch's own default."""
MOMENTS = frozenset({"step", "exp_avg", "exp_avg_sq"})
"""What Adam and AdamW hold of each parameter."""
NAMES_TOLD = 4


class Snapshot:
    """The state of a run's parts, to be saved and taken up.

    Args:
        parallel: the model, over the ranks.
        optimizer: of its parameters.
        optimizer_step, schedule, early_stopping, loader: the other parts; `loader` is that of the training data.
        config: the run's settings.
        ranks: those of `parallel`.
    """

    def __init__(
        self,
        parallel: Parallel,
        optimizer: torch.optim.Optimizer,
        optimizer_step: OptimizerStep,
        schedule: Schedule,
        early_stopping: EarlyStopping,
        loader: BatchLoader,
        config: TrainerConfig,
        ranks: Ranks,
    ) -> None:
        self._parallel = parallel
        self._optimizer = optimizer
        self._optimizer_step = optimizer_step
        self._schedule = schedule
        self._early_stopping = early_stopping
        self._loader = loader
        self._config = config
        self._ranks = ranks

    def state(self, progress: Mapping[str, Any]) -> dict[str, Any] | None:
        """What a checkpoint holds, `progress` beside the parts, on the main rank; None on others. All take part."""
        model, optimizer = (self._parallel.whole(part.state_dict()) for part in (self._parallel.model, self._optimizer))
        of_main, *of_others = self._ranks.gather(random_state())
        if not self._ranks.is_main:
            return None
        return {
            "model": model,
            "optimizer": optimizer,
            "trained": self._trained(),
            "schedule": self._schedule.state_dict(),
            "early_stopping": self._early_stopping.state_dict(),
            **self._optimizer_step.state_dict(),
            "random": of_main,
            "random_of_ranks": of_others,
            **progress,
            "config": to_mapping(self._config),
            "environment": environment(),
        }

    def moment_bytes(self) -> int:
        """What the optimizer will hold of its parameters, over all ranks, where it has taken no step yet."""
        if self._optimizer.state:
            return 0
        parameters = (parameter for group in self._optimizer.param_groups for parameter in group["params"])
        return sum(2 * parameter.numel() * parameter.element_size() for parameter in parameters)

    def take_up(self, path: Path, state: Mapping[str, Any]) -> None:
        """Goes on from a state; what differs from this run is found before anything changes, where that can be."""
        missing = [name for name in NEEDED if name not in state]
        if missing:
            raise CheckpointError(f"{path}: has no {_listed(missing)}: give a checkpoint that a trainer wrote")
        weights = self._parallel.own_weights(state["model"])
        refuse_other_weights(self._parallel.model.state_dict(), weights, path)
        self._refuse_other_parameters(path, state)
        load_weights(self._parallel.model, weights, path)
        mend = "give the store it was trained on, or start a fresh run"
        with fitting(path, "is of other training data", mend):
            self._loader.load_state_dict(state["loader"])
        with fitting(path, "its optimizer is not this run's"):
            load_moments(self._optimizer, self._parallel.own_moments(self._optimizer, state["optimizer"]))
        with fitting(path, "its loss scale is not this run's"):
            self._optimizer_step.load_state_dict(state)
        with fitting(path, "its schedule is not this run's"):
            self._schedule.load_state_dict(state["schedule"])
        with fitting(path, "its early stopping is not this run's"):
            self._early_stopping.load_state_dict(state.get("early_stopping", self._early_stopping.state_dict()))
        with fitting(path, "its generators are not those of this python, numpy and torch"):
            self._set_random_state(state)

    def _set_random_state(self, state: Mapping[str, Any]) -> None:
        """Takes up this rank's generators; where there were fewer ranks, seeds them by the step."""
        of_ranks = [state["random"], *state.get("random_of_ranks", [])]
        if self._ranks.rank < len(of_ranks):
            set_random_state(of_ranks[self._ranks.rank])
        else:
            seed_everything(self._config.seed, self._ranks.rank, state["step"])

    def _trained(self) -> list[str]:
        """Names of the optimizer's parameters, in its order."""
        names = {id(parameter): name for name, parameter in self._parallel.model.named_parameters()}
        return [names[id(parameter)] for group in self._optimizer.param_groups for parameter in group["params"]]

    def _refuse_other_parameters(self, path: Path, state: Mapping[str, Any]) -> None:
        """Raises a CheckpointError unless the checkpoint's optimizer trained what this run's does."""
        here, there = self._trained(), state.get("trained")
        if there is not None and there != here:
            more, fewer = ([name for name in a if name not in b] for a, b in ((here, there), (there, here)))
            told = [f"{_listed(more)} {_is(more)} trained in this run and not in the checkpoint"] if more else []
            told += [f"{_listed(fewer)} {_is(fewer)} trained in the checkpoint and not in this run"] if fewer else []
            raise CheckpointError(
                f"{path}: {', '.join(told) or 'parameters come in another order than in the checkpoint'}; "
                "freeze what was frozen there, or start a fresh run"
            )
        with fitting(path, "its optimizer is not this run's"):
            groups, moments = state["optimizer"]["param_groups"], state["optimizer"]["state"]
            own_groups = self._optimizer.param_groups
            sizes, own_sizes = ([len(group["params"]) for group in each] for each in (groups, own_groups))
            if sizes != own_sizes:  # of a checkpoint that names none
                raise ValueError(
                    f"it trains {sizes} parameters in its groups and this run {own_sizes}: freeze what was frozen there"
                )
            for number, group in enumerate(groups):
                if lacking := [key for key in SETTINGS if key not in group]:
                    raise ValueError(f"group {number} of its parameters has no {_listed(lacking)}")
            parameters = [parameter for group in own_groups for parameter in group["params"]]
            for number, of_parameter in moments.items():
                name, parameter = here[number], parameters[number]
                if of_parameter.keys() != MOMENTS:
                    raise ValueError(
                        f"it holds {_listed(sorted(of_parameter))} of {name!r}, and this run's "
                        f"{type(self._optimizer).__name__} {_listed(sorted(MOMENTS))}"
                    )
                shapes = {tuple(of_parameter[moment].shape) for moment in MOMENTS - {"step"}}
                if shapes != {tuple(parameter.shape)}:
                    raise ValueError(
                        f"it holds {_listed(map(str, shapes))} of {name!r}, which is {tuple(parameter.shape)}"
                    )


@contextmanager
def fitting(
    path: Path, what: str, mend: str = "give the configuration it was trained with, or start a fresh run"
) -> Iterator[None]:
    """Turns whatever a part of a checkpoint is refused with into a CheckpointError that says what does not fit."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError) or is_out_of_memory(error):
            raise
        reason = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise CheckpointError(f"{path}: {what}: {reason}; {mend}") from error


def _listed(names: Any) -> str:
    listed = [*names]
    more = f" and {len(listed) - NAMES_TOLD} more" if len(listed) > NAMES_TOLD else ""
    return ", ".join(listed[:NAMES_TOLD]) + more


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
