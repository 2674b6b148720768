"""A trainer for models that return a vector of named losses; it meets models and loaders through protocols alone."""

from typing import TYPE_CHECKING, Any

from eventkern.train.config import ConfigError, TrainerConfig

if TYPE_CHECKING:
    from eventkern.train.checkpoint import CheckpointError
    from eventkern.train.evaluation import evaluate, score
    from eventkern.train.ledger import Ledger
    from eventkern.train.scorecard import Scorecard
    from eventkern.train.trainer import Loaders, Trainer, TrainResult

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Ledger",
    "Loaders",
    "Scorecard",
    "TrainResult",
    "Trainer",
    "TrainerConfig",
    "evaluate",
    "score",
]

_ROOMS = {
    "CheckpointError": "checkpoint",
    "Ledger": "ledger",
    "Scorecard": "scorecard",
    "evaluate": "evaluation",
    "score": "evaluation",
}


def __getattr__(name: str) -> Any:
    # The configuration is read before torch is needed: what needs it loads on first use.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_ROOMS.get(name, 'trainer')}"), name)
