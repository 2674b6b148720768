"""Training and evaluating: the mode of every module of a model, kept for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Inside, every module of a model is in evaluation mode; afterwards each is in the mode it was found in.

    A layer that is frozen by `layer.eval()` inside of a model that trains stays so. Wrappers are modules too: those of
    torch.compile, DistributedDataParallel and fully_shard.
    """
    with _kept(model):
        model.train(False)
        yield


@contextmanager
def training(model: Any) -> Iterator[None]:
    """Inside, a model is in training mode: as it is, with what is frozen inside of it, or else with all its modules.

    Afterwards each module of a model that was found in evaluation mode is in the mode it was found in.
    """
    if model.training:
        yield
        return
    with _kept(model):
        model.train()
        yield


@contextmanager
def _kept(model: Any) -> Iterator[None]:
    modes: list[tuple[nn.Module, bool]] = [(module, module.training) for module in model.modules()]
    was_training = model.training
    try:
        yield
    finally:
        model.train(was_training)  # a model may do more there than to set modes
        for module, mode in modes:
            module.training = mode
