"""What all samplers of an epoch share: its order, the position reached, saving and loading it, and who iterates."""

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from eventkern.data.permutation import MAX_KEY, fill_permutation
from eventkern.plain import check_flag, check_integer


class EpochOrder(NamedTuple):
    """What the orders of an epoch depend on, as a value that later calls of set_epoch leave alone."""

    seed: int
    epoch: int
    shuffle: bool

    def places(self, n: int, start: int, stop: int, *, part: int = 0, device: torch.device | str = "cpu") -> Tensor:
        """Positions [start, stop) of an order of [0, n): ascending, or the epoch's permutation `part`."""
        if not self.shuffle:
            # On the CPU by numpy: torch.arange opens a parallel region, which costs more than it saves on shared cores.
            is_cpu = torch.device(device).type == "cpu"
            return (
                torch.from_numpy(np.arange(start, stop))
                if is_cpu
                else torch.arange(start, stop, dtype=torch.int64, device=device)
            )
        places = torch.empty(stop - start, dtype=torch.int64, device=device)
        fill_permutation(places, n, seed=self.seed, epoch=self.epoch, start=start, part=part)
        return places


class ResumableSampler(ABC):
    """Iterates over an epoch whose batches are a pure function of (seed, epoch, position), and knows its position.

    Iterating starts the epoch anew, or once goes on from a loaded state. Of an epoch with nothing left a loaded state
    tells only that it is done: where `set_epoch` has chosen a later one that is not begun yet, that one comes.

    Attributes:
        sampler: the samples of the batches one by one, as torch's `BatchSampler` has them.
    """

    def __init__(
        self, *, seed: int, shuffle: bool, rank: int, world_size: int, drop_last: bool, as_lists: bool
    ) -> None:
        self.seed = check_integer("seed", seed, 0, MAX_KEY - 1)
        self.world_size = check_integer("world_size", world_size, 1)
        self.rank = check_integer("rank", rank, 0, self.world_size - 1)
        self.shuffle = check_flag("shuffle", shuffle)
        self.drop_last = check_flag("drop_last", drop_last)
        self.as_lists = check_flag("as_lists", as_lists)
        self.epoch = 0
        self._position = 0
        self._is_resuming = False
        self._is_chosen = False  # the epoch, by set_epoch, and not begun yet
        self._generation = 0

    @property
    @abstractmethod
    def end(self) -> int:
        """One past the last position of an epoch."""

    @property
    def start(self) -> int:
        """The position where iterating begins: a loaded one, else 0."""
        return self._position if self._is_resuming else 0

    @property
    def order(self) -> EpochOrder:
        """The epoch's order as it stands."""
        return EpochOrder(self.seed, self.epoch, self.shuffle)

    @abstractmethod
    def walk(self, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, int]]:
        """Batches from `start` on, each with the position after it (of all ranks), leaving the sampler's state alone.

        For consumers that draw ahead: they `advance` to a batch's position when it is used.

        Args:
            device: where the indices are made, "cpu" or "cuda".
        """

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)

    @property
    def sampler(self) -> "Samples":
        return Samples(self)

    def begin(self) -> Callable[[int], None]:
        """Begin an iteration: `start` is 0 again, and the function returned records the positions of this one alone.

        It does nothing once another epoch was chosen or a state loaded: positions of an older order mean nothing then.
        """
        self.advance(self.start)
        self._is_chosen = False
        generation = self._generation

        def consumed(position: int) -> None:
            if self._generation == generation:
                self._position = position

        return consumed

    def advance(self, position: int) -> None:
        """Record that the epoch is consumed up to a position.

        Raises:
            ValueError: a position outside the epoch.
        """
        check_integer("position", position, 0, self.end)
        self._position, self._is_resuming = position, False

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order; another epoch than the loaded one starts at its beginning."""
        epoch = check_integer("epoch", epoch, 0, MAX_KEY - 1)
        if epoch != self.epoch:
            self.epoch, self._position, self._is_resuming = epoch, 0, False
            self._generation += 1
        self._is_chosen = True

    def _restore(self, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Take the epoch, order and position of a state that agrees with what is this sampler's `own`."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state is of type {type(state).__name__}; want the mapping that state_dict() returned")
        for key in (*own, "seed", "epoch", "position", "shuffle"):
            if key not in state:
                raise ValueError(f"the sampler state has no {key}; want the mapping that state_dict() returned")
        for key, value in own.items():
            if state[key] != value:
                raise ValueError(f"the sampler state has {key} {state[key]}, but this sampler {value}")
        largest = {"seed": MAX_KEY - 1, "epoch": MAX_KEY - 1, "position": self.end}
        seed, epoch, position = (
            check_integer(f"the sampler state's {key}", state[key], 0, most) for key, most in largest.items()
        )
        shuffle = check_flag("the sampler state's shuffle", state["shuffle"])
        chosen = self.epoch if self._is_chosen else 0
        self.seed, self.shuffle, self.epoch = seed, shuffle, epoch
        self._position, self._is_resuming, self._is_chosen = position, True, False
        self._generation += 1
        if chosen > epoch and next(self.walk(), None) is None:
            self.set_epoch(chosen)


class BatchIterator(chain[Any]):
    """One iteration over a sampler, which begins with the first batch that is asked for. (A chain of one: it costs less
    than a method for each batch.)

    torchdata's StatefulDataLoader loads the state of a sampler and then that of its iteration: the loaded position is
    that iteration's alone from then on, and one that follows it, even if it was never begun, starts the epoch anew.
    """

    def __new__(cls, sampler: ResumableSampler) -> "BatchIterator":
        loaded: list[tuple[int, int]] = []  # a position, and the sampler's generation that it belongs to
        made = super().__new__(cls, _begun(sampler, loaded))
        made._sampler, made._loaded = sampler, loaded
        return made

    _sampler: ResumableSampler
    _loaded: list[tuple[int, int]]

    def state_dict(self) -> dict[str, Any]:
        """Nothing of its own: the sampler's state holds it all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the position that was loaded into the sampler."""
        sampler = self._sampler
        self._loaded[:] = [(sampler.start, sampler._generation)]
        sampler.advance(sampler.start)


def _begun(sampler: ResumableSampler, loaded: list[tuple[int, int]]) -> Iterator[Any]:
    _refuse_shards(sampler, sys._getframe().f_back)
    if loaded and loaded[0][1] == sampler._generation:
        sampler._position, sampler._is_resuming = loaded[0][0], True
    batches, consumed, as_lists = sampler.walk(), sampler.begin(), sampler.as_lists
    for batch, position in batches:
        consumed(position)
        yield batch.tolist() if as_lists else batch


def _refuse_shards(sampler: ResumableSampler, consumer: FrameType | None) -> None:
    """Raises a TypeError where accelerate is to share batches among its processes and cannot.

    It joins batches by `+`, which adds tensors up: other samples than those of the epoch, or an endless loop.
    """
    if consumer is None or not consumer.f_code.co_qualname.startswith("BatchSamplerShard."):
        return
    name = type(sampler).__name__
    if sampler.world_size > 1:
        raise ValueError(
            f"world_size is {sampler.world_size}, but accelerate shares the batches of this {name} among its processes "
            "by itself; leave out rank and world_size"
        )
    if not sampler.as_lists:
        raise TypeError(f"accelerate joins batches as lists, but this {name} makes tensors; give it as_lists=True")


class Samples:
    """The samples of a sampler's batches, one by one: the `sampler` of torch's `BatchSampler`.

    Those who look there for the epoch's order, as accelerate and Lightning do, find its `set_epoch`.
    """

    def __init__(self, batches: ResumableSampler) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[int]:
        for batch in self._batches:
            yield from batch if self._batches.as_lists else batch.tolist()

    def __len__(self) -> int:
        """Of a whole epoch, on this rank; it costs a walk through the epoch."""
        whole = copy.copy(self._batches)
        whole.advance(0)
        return sum(len(batch) for batch, _ in whole.walk())

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order."""
        self._batches.set_epoch(epoch)
