"""Batches of sample indices: shuffled globally, shared among ranks, resumed at any point."""

from collections.abc import Iterator
from typing import TypedDict

import torch
from torch import Tensor

from eventkern.data.permutation import MAX_KEY, PERMUTATION_VERSION, permutation


class SamplerState(TypedDict):
    """Where a sampler stands: everything its order depends on, and the position reached in the global order."""

    version: int
    n: int
    seed: int
    epoch: int
    position: int
    shuffle: bool
    window: int | None


class IndexSampler:
    """Batches of sample indices, shuffled globally and then shared among ranks by position.

    Rank r takes positions [r * batch_size, (r + 1) * batch_size) of each global batch of world_size * batch_size. A
    short last batch is shared evenly; its remainder below world_size is dropped (num_dropped). Iterating starts the
    epoch anew, or goes on from a loaded state. Serves as torch's `batch_sampler=`.

    Args:
        num_samples: n.
        batch_size: samples of a batch, per rank.
        seed: of the order.
        shuffle: a new order each epoch; else 0, 1, 2, ...
        rank: of this process, in [0, world_size).
        world_size: number of ranks.
        drop_last: leave out a short last batch.
        window: not supported yet; must be None.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        window: int | None = None,
    ) -> None:
        for name, value in (("num_samples", num_samples), ("batch_size", batch_size), ("world_size", world_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; want at least 1")
        if not 0 <= seed < MAX_KEY:
            raise ValueError(f"seed is {seed}; want 0 to 2^64 - 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; want 0 to world_size - 1 = {world_size - 1}")
        if window is not None:
            raise ValueError(f"window is {window}; windowed shuffling is not supported yet, want None")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.epoch = 0
        self._position = 0
        self._resume_position = 0

    @property
    def num_dropped(self) -> int:
        """Samples of a whole epoch that no rank sees."""
        short = self.num_samples % (self.batch_size * self.world_size)
        return short if self.drop_last else short % self.world_size

    def __len__(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        full, short = divmod(self.num_samples, self.batch_size * self.world_size)
        return full + (not self.drop_last and short >= self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order; another epoch than the loaded one starts at its beginning."""
        if epoch != self.epoch:
            self.epoch, self._position, self._resume_position = epoch, 0, 0

    def __iter__(self) -> Iterator[Tensor]:
        position, self._resume_position = self._resume_position, 0
        while (batch := self._slice(position)) is not None:
            start, stop, position = batch
            self._position = position
            yield self._indices(start, stop)

    def _slice(self, position: int) -> tuple[int, int, int] | None:
        """This rank's [start, stop) of the global batch at `position`, and the position after it; None at the end."""
        global_size = self.batch_size * self.world_size
        left = self.num_samples - position
        if left >= global_size:
            start = position + self.rank * self.batch_size
            return start, start + self.batch_size, position + global_size
        share = left // self.world_size
        if self.drop_last or share == 0:
            return None
        start = position + self.rank * share
        return start, start + share, self.num_samples

    def _indices(self, start: int, stop: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(start, stop)
        return permutation(self.num_samples, seed=self.seed, epoch=self.epoch, start=start, stop=stop)

    def state_dict(self) -> SamplerState:
        """The scalars that name this point of the epoch: batches already yielded are behind it."""
        return {
            "version": PERMUTATION_VERSION,
            "n": self.num_samples,
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self._position,
            "shuffle": self.shuffle,
            "window": None,
        }

    def load_state_dict(self, state: SamplerState) -> None:
        """Go on at a saved point, under any batch size and world size.

        Raises:
            ValueError: the state belongs to another n, window or version of the permutation.
        """
        own = self.state_dict()
        for key, value in (("version", own["version"]), ("n", own["n"]), ("window", own["window"])):
            if state.get(key) != value:
                raise ValueError(f"the sampler state has {key} {state.get(key)}, but this sampler {value}")
        if not 0 <= state["position"] <= self.num_samples:
            raise ValueError(f"the sampler state has position {state['position']}; want 0 to n = {self.num_samples}")
        self.seed, self.shuffle, self.epoch = state["seed"], state["shuffle"], state["epoch"]
        self._position = self._resume_position = state["position"]
