"""What the trainer asks of models and loaders; it knows nothing else of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


class Batch(Protocol):
    """What a loader yields: anything its model understands, on the device of the model."""

    @property
    def num_targets(self) -> Tensor:
        """0-d integer: the labels of each loss in this batch, padding left out."""


class BatchLoader(Protocol):
    """An endless supply of epochs, whose order is a function of its own state alone."""

    def __iter__(self) -> Iterator[Any]:
        """The batches of the epoch, after a loaded position if there is one; each stays valid after the next."""

    def __len__(self) -> int:
        """Batches in a whole epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch, counted from 0; another than the present one starts at its beginning."""

    def state_dict(self) -> Any:
        """The position after the last batch that was yielded, as plain values."""

    def load_state_dict(self, state: Any) -> None:
        """Goes on at a saved position when iterated next."""


class TrainableModel(Protocol):
    """A torch module whose forward returns (H,) float32 losses, each a mean over the labels of the batch."""

    @property
    def head_names(self) -> Sequence[str]: ...

    def __call__(self, batch: Any) -> Tensor: ...

    def metrics(self, batch: Any) -> Mapping[str, Tensor]:
        """At least "loss" and "top1", (H,) each, means over the labels of the batch."""

    @property
    def training(self) -> bool: ...

    def train(self, mode: bool = True) -> Any: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def state_dict(self) -> Any: ...


@runtime_checkable
class CountedModel(Protocol):
    """What a model may offer beside: its work on a batch, from shapes alone, so that no device is waited for."""

    def flops(self, batch: Any) -> int:
        """Floating-point operations of a forward and a backward; what is recomputed does not count."""

    def tokens(self, batch: Any) -> int:
        """Sequence positions that go through the network, padding included."""


@runtime_checkable
class ScoredModel(Protocol):
    """What a model may offer beside: all that tells how good its probabilities are, for `evaluate` alone."""

    def scores(self, batch: Any, top_k: Sequence[int]) -> Mapping[str, Tensor]:
        """Sums over the labels of the batch, per head, so that those of batches add up; `eventkern.train.Scorecard`
        lists their names."""
