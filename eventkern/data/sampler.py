"""Batches of sample indices: shuffled globally or in windows, shared among ranks, resumed at any point."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypedDict

import torch
from torch import Tensor

from eventkern import _C
from eventkern.data.permutation import PERMUTATION_VERSION, fill_permutation, permutation
from eventkern.data.resumable_sampler import EpochOrder, ResumableSampler
from eventkern.plain import check_integer

# Indices of many batches are made by one call, few enough to stay in cache.
MAX_CHUNK = 1 << 16
MAX_CHUNK_BATCHES = 256
# A window holds at least WINDOW_BLOCKS blocks, of at most MAX_BLOCK samples unless that makes more than MAX_BLOCKS of
# them: what a window costs by itself stays bounded.
MAX_BLOCK = 1 << 10
WINDOW_BLOCKS = 16
MAX_BLOCKS = 1 << 16


class SamplerState(TypedDict):
    """Where a sampler stands: everything its order depends on, and the position reached in the global order."""

    version: int
    n: int
    seed: int
    epoch: int
    position: int
    shuffle: bool
    window: int | None


class IndexSampler(ResumableSampler):
    """Batches of sample indices, shuffled globally and then shared among ranks by position.

    Rank r takes positions [r * batch_size, (r + 1) * batch_size) of each global batch of world_size * batch_size. A
    short last batch is shared evenly; its remainder below world_size is dropped (num_dropped). Iterating starts the
    epoch anew, or goes on from a loaded state. A batch is a view of up to 64 Ki indices that are made at once.

    Serves as torch's `batch_sampler=`. With worker processes torch's DataLoader draws batches ahead, and the state
    counts what was drawn: to save the point that training has reached, call
    `sampler.advance(min(start + consumed_batches * world_size * batch_size, num_samples))` before `state_dict()`, with
    `start = sampler.start` read before the epoch's iteration; drawing goes on undisturbed. (torchdata's
    StatefulDataLoader keeps the state that belongs to each batch by itself.)

    Indices are tensors, which a dataset that looks up by key may not take: give `as_lists=True` then (it also spares
    worker processes a file descriptor for each batch). accelerate, which shares batches among its processes by itself,
    needs it too, and a sampler without rank and world_size.

    `window` is for stores larger than memory. Blocks of consecutive samples (a 16th of the window, at most 1,024 or a
    65,536th of the window, cut down to a power of two) come in shuffled order, and every run of at most `window`
    samples of that order is shuffled through: a window reads window / block places of the store. The borders of blocks
    move each epoch. A window below 32 or of at least n is the full shuffle. The price, on samples whose values follow
    their order (time, say): the means of batches vary about 1 + batch_size * block / window times as much (their
    variance) as under the full shuffle, and neighbours in the order share a batch n / window times as often. At n =
    900,000 and batch_size = 1,024, windows of 16 Ki, 64 Ki and 256 Ki measure 65, 16 and 5 times the variance, a
    correlation of successive samples of 0.06, 0.015 and 0.004, and, with rows of 34 bytes, touch 152, 593 and 2,034 of
    the store's 7,471 pages each. A window costs about 20 us of its own, and at most about 1 ms, since blocks grow with
    large ones: prefer it larger than a batch.

    Args:
        num_samples: n, 1 to 2^48.
        batch_size: samples of a batch, per rank.
        seed: of the order, in [0, 2^64).
        shuffle: a new order each epoch; else 0, 1, 2, ...
        rank: of this process, in [0, world_size).
        world_size: number of ranks.
        drop_last: leave out a short last batch.
        window: samples that are shuffled together, at least 1; None for all.
        as_lists: iterate over lists of ints, as torch's `BatchSampler` does, and not over tensors.

    Raises:
        TypeError: a number that is no integer, or a bool that is none of True, False, 1 and 0.
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
        as_lists: bool = False,
    ) -> None:
        super().__init__(
            seed=seed, shuffle=shuffle, rank=rank, world_size=world_size, drop_last=drop_last, as_lists=as_lists
        )
        num_samples = check_integer("num_samples", num_samples, 1, _C.max_permutation_size)
        batch_size = check_integer("batch_size", batch_size, 1, _C.max_permutation_size)
        if window is not None:
            window = check_integer("window", window, 1)
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.window = window

    @property
    def end(self) -> int:
        """One past the last position of an epoch: n."""
        return self.num_samples

    @property
    def num_dropped(self) -> int:
        """Samples of a whole epoch that no rank sees."""
        short = self.num_samples % (self.batch_size * self.world_size)
        return short if self.drop_last else short % self.world_size

    def __len__(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        full, short = divmod(self.num_samples, self.batch_size * self.world_size)
        return full + (not self.drop_last and short >= self.world_size)

    def walk(self, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, int]]:
        """Batches from `start` on, each with the position after its global batch, leaving the sampler's state alone.

        For consumers that draw ahead: they `advance` to a batch's position when it is used.

        Args:
            device: where the indices are made, "cpu" or "cuda".

        Returns:
            An iterator over (batch_size,) int64 indices (fewer in a short last batch) and positions.
        """
        device = torch.device(device)
        if device.type != "cpu":
            permutation(1, seed=0, device=device)  # names a device that cannot serve, once for the epoch
        order: Callable[[int, int], Tensor] = partial(self.order.places, self.num_samples, device=device)
        if self.shuffle and self.window is not None and 2 * WINDOW_BLOCKS <= self.window < self.num_samples:
            order = WindowedOrder(self.num_samples, self.window, seed=self.seed, epoch=self.epoch, device=device)
        return self._walk_alone(self.start, order) if self.world_size == 1 else self._walk_shares(self.start, order)

    def _walk_alone(self, position: int, order: Callable[[int, int], Tensor]) -> Iterator[tuple[Tensor, int]]:
        """Batches cut from chunks, which grow so that the first batch does not wait for many."""
        end = self.num_samples
        if self.drop_last:
            end -= (end - position) % self.batch_size
        num_batches, most = 1, min(max(MAX_CHUNK // self.batch_size, 1), MAX_CHUNK_BATCHES)
        while position < end:
            chunk = order(position, min(position + num_batches * self.batch_size, end))
            for batch in chunk.split(self.batch_size):
                position = min(position + self.batch_size, end)
                yield batch, self.num_samples if position == end else position
            num_batches = min(2 * num_batches, most)

    def _walk_shares(self, position: int, order: Callable[[int, int], Tensor]) -> Iterator[tuple[Tensor, int]]:
        """This rank's share of each global batch."""
        global_size = self.batch_size * self.world_size
        while (left := self.num_samples - position) > 0:
            share = min(self.batch_size, left // self.world_size)
            if share == 0 or (self.drop_last and share < self.batch_size):
                return
            start = position + self.rank * share
            position = min(position + global_size, self.num_samples)
            if self.drop_last and self.num_samples - position < global_size:
                position = self.num_samples  # the epoch is done, under any batch size
            yield order(start, start + share), position

    def state_dict(self) -> SamplerState:
        """The scalars that name this point of the epoch: batches already yielded are behind it."""
        return {
            "version": PERMUTATION_VERSION,
            "n": self.num_samples,
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self._position,
            "shuffle": self.shuffle,
            "window": self.window,
        }

    def load_state_dict(self, state: SamplerState) -> None:
        """Go on at a saved point, under any batch size and world size.

        Raises:
            TypeError: the state is no mapping, or one of its values has the wrong type.
            ValueError: the state belongs to another n, window or version of the permutation, or lacks a key.
        """
        own = {"version": PERMUTATION_VERSION, "n": self.num_samples, "window": self.window}
        self._restore(state, own)


class WindowedOrder:
    """An epoch's order shuffled by blocks, and inside windows of blocks.

    The samples, rotated by a shift of the epoch's own, are cut into blocks; the full blocks are permuted, the short
    one stays last. Windows share the blocks in that order evenly, and each permutes its samples. An epoch's order takes
    the permutation's part 1 (shift), 2 (blocks) and 3 + w (window w).

    Args:
        n: number of samples.
        window: samples of a window, in [2 * WINDOW_BLOCKS, n): windows hold at most that many.
        seed: of the order.
        epoch: of the order.
        device: where the samples are computed.
    """

    def __init__(self, n: int, window: int, *, seed: int, epoch: int, device: torch.device) -> None:
        self.n = n
        self.device = device
        # A power of two: a shift tells a position's block.
        self.block_bits = max(min(window // WINDOW_BLOCKS, MAX_BLOCK), window // MAX_BLOCKS).bit_length() - 1
        self.num_blocks = -(-n >> self.block_bits)
        self.num_windows = -(-self.num_blocks // (window >> self.block_bits))
        self._keys = {"seed": seed, "epoch": epoch}
        self._shift = int(EpochOrder(seed, epoch, shuffle=True).places(n, 0, 1, part=1))
        self._cached_window = -1

    def __call__(self, start: int, stop: int) -> Tensor:
        """The samples at positions [start, stop)."""
        samples = torch.empty(stop - start, dtype=torch.int64, device=self.device)
        position = start
        while position < stop:
            window = (((position >> self.block_bits) + 1) * self.num_windows - 1) // self.num_blocks
            first = self._first_block(window) << self.block_bits
            end = min(self._first_block(window + 1) << self.block_bits, self.n)
            part = samples[position - start : min(stop, end) - start]
            fill_permutation(part, end - first, **self._keys, start=position - first, part=3 + window)
            part += self._moves(window).index_select(0, part >> self.block_bits)
            position = min(stop, end)
        samples -= (samples >= self.n) * self.n
        return samples

    def _first_block(self, window: int) -> int:
        return self.num_blocks * window // self.num_windows

    def _moves(self, window: int) -> Tensor:
        """How far each block of a window lies from its place in the window, in samples, the shift included."""
        if window != self._cached_window:
            first, end = self._first_block(window), self._first_block(window + 1)
            num_full = self.n >> self.block_bits
            blocks = torch.arange(first, end, dtype=torch.int64, device=self.device)
            fill_permutation(blocks[: num_full - first], num_full, **self._keys, start=first, part=2)
            blocks -= torch.arange(end - first, dtype=torch.int64, device=self.device)
            self._cached_window, self._cached_moves = window, (blocks << self.block_bits) + self._shift
        return self._cached_moves
