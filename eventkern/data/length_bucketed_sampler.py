"""Batches of ragged samples: of similar length, under a token budget, in few padded shapes."""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from eventkern.data.permutation import PERMUTATION_VERSION
from eventkern.data.resumable_sampler import EpochOrder, ResumableSampler
from eventkern.plain import check_integer

MAX_CANDIDATES = 4096  # lengths that may become a boundary; the search costs their square
CHUNK_STEPS = 1024  # steps whose batch numbers are made at once

IntArray = np.ndarray[Any, np.dtype[np.int64]]


class LengthBucketedState(TypedDict):
    """Where a sampler stands: everything its batches and their order depend on, and the batches behind it."""

    version: int
    n: int
    seed: int
    epoch: int
    position: int
    shuffle: bool
    lengths: str
    max_tokens: int
    boundaries: list[int]
    drop_last: bool


@dataclass(frozen=True)
class Bucket:
    """The samples that are padded to one length, and how they are cut into batches.

    Attributes:
        samples: (num_samples,) int64, ascending.
        padded_length: tokens of each, padding included.
        batch_size: samples of a full batch.
        num_batches: with the short one, where it is kept.
        first_batch: number of the bucket's first batch among those of all buckets.
    """

    samples: Tensor
    padded_length: int
    batch_size: int
    num_batches: int
    first_batch: int

    def range_of(self, batch: int) -> tuple[int, int]:
        """[start, stop) of one of the bucket's batches in the order of its samples."""
        start = batch * self.batch_size
        return start, min(start + self.batch_size, len(self.samples))


class LengthBucketedSampler(ResumableSampler):
    """Batches of samples of similar length under a token budget: batch size x padded length <= max_tokens.

    Lengths are padded up to one of at most num_shapes boundaries, chosen so that an epoch has the fewest padded tokens
    (exactly, by dynamic programming). Each boundary's bucket of samples is shuffled and cut into batches of
    max_tokens // boundary samples, the last one short; the batches of all buckets are shuffled together. So an epoch
    has at most two shapes a bucket, the same ones each epoch (`shapes`), and a compiled model meets no other.

    A step takes world_size consecutive batches of that order, and rank r the r-th of them; fewer batches than that at
    the end are dropped (num_dropped counts their samples). Iterating starts the epoch anew, or goes on from a loaded
    state; positions count batches. Serves as torch's `batch_sampler=`, with the same care for batches that worker
    processes draw ahead as `IndexSampler`; a collate function pads to `padded_length(longest sample of the batch)`.

    Memory: 8 bytes a sample. A batch costs its own size, wherever it stands in the epoch.

    Args:
        lengths: (n,) integers, tokens of each sample, at least 1.
        max_tokens: largest product of batch size and padded length.
        num_shapes: largest number of padded lengths; choosing them takes time in proportion (0.02 s each at most).
        multiple: padded lengths are multiples of it (of a larger one below the longest, where the lengths span more
            than 4,096 multiples).
        seed: of the order, in [0, 2^64).
        shuffle: new batches in a new order each epoch; else bucket after bucket, samples by number.
        rank: of this process, in [0, world_size).
        world_size: number of ranks.
        drop_last: leave out each bucket's short batch, unless it is the bucket's only one.
        as_lists: iterate over lists of ints, as torch's `BatchSampler` does, and not over tensors.

    Attributes:
        boundaries: the padded lengths, ascending.
        shapes: (batch size, padded length) of every batch that an epoch can have.
        padding_share: padding among all tokens of the batches, those that drop_last leaves out included.
        num_batches: batches of an epoch, over all ranks.

    Raises:
        TypeError: lengths or another number that is no integer, or a bool that is none of True, False, 1 and 0.
        ValueError: an argument out of its range, or a sample that max_tokens has no room for.

    Numerics:
        Integers throughout: the same batches on every machine.
    """

    def __init__(
        self,
        lengths: Tensor | np.ndarray[Any, Any] | Sequence[int],
        max_tokens: int,
        *,
        num_shapes: int = 8,
        multiple: int = 8,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        as_lists: bool = False,
    ) -> None:
        super().__init__(
            seed=seed, shuffle=shuffle, rank=rank, world_size=world_size, drop_last=drop_last, as_lists=as_lists
        )
        max_tokens = check_integer("max_tokens", max_tokens, 1)
        num_shapes = check_integer("num_shapes", num_shapes, 1)
        multiple = check_integer("multiple", multiple, 1)
        values = checked_lengths(lengths, max_tokens, multiple)
        self.num_samples = len(values)
        self.max_tokens = max_tokens
        self.boundaries = choose_boundaries(values, num_shapes, multiple)
        bucket_of_sample = np.searchsorted(self.boundaries, values)
        self._buckets = self._cut(bucket_of_sample)
        self._first_batches = [bucket.first_batch for bucket in self._buckets]
        self.num_batches = sum(bucket.num_batches for bucket in self._buckets)
        self.shapes = self._list_shapes()
        padded_tokens = sum(len(bucket.samples) * bucket.padded_length for bucket in self._buckets)
        self.padding_share = 1 - int(values.sum()) / padded_tokens
        self._lengths_digest = hashlib.blake2b(values.astype("<i8").tobytes(), digest_size=8).hexdigest()

    def _cut(self, bucket_of_sample: IntArray) -> list[Bucket]:
        # numpy sorts 16-bit integers by radix.
        order = np.argsort(bucket_of_sample.astype(np.uint16), kind="stable")
        parts = torch.from_numpy(order).split(np.bincount(bucket_of_sample).tolist())
        buckets: list[Bucket] = []
        first_batch = 0
        for samples, padded_length in zip(parts, self.boundaries, strict=True):
            batch_size = self.max_tokens // padded_length
            full, short = divmod(len(samples), batch_size)
            # Of a bucket without a full batch, drop_last would leave out the same samples in every epoch.
            num_batches = full + (short > 0 and (not self.drop_last or full == 0))
            buckets.append(Bucket(samples, padded_length, batch_size, num_batches, first_batch))
            first_batch += num_batches
        return buckets

    def _list_shapes(self) -> list[tuple[int, int]]:
        shapes = []
        for bucket in self._buckets:
            for batch in {0, bucket.num_batches - 1}:
                start, stop = bucket.range_of(batch)
                shapes.append((stop - start, bucket.padded_length))
        return sorted(set(shapes), key=lambda shape: (shape[1], -shape[0]))

    def padded_length(self, length: int) -> int:
        """The length that samples of this length are padded to.

        Raises:
            ValueError: a length that no sample can have.
        """
        length = check_integer("length", length, 1, self.boundaries[-1])
        return self.boundaries[bisect_left(self.boundaries, length)]

    @property
    def end(self) -> int:
        """One past the last position of an epoch, in batches of all ranks."""
        return self.num_batches

    @property
    def num_dropped(self) -> int:
        """Samples of this epoch that no rank sees."""
        in_batches = sum(bucket.range_of(bucket.num_batches - 1)[1] for bucket in self._buckets)
        left_over = self.order.places(self.num_batches, len(self) * self.world_size, self.num_batches).tolist()
        return self.num_samples - in_batches + sum(len(self._samples(number, self.order)) for number in left_over)

    def __len__(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        return self.num_batches // self.world_size

    def walk(self, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, int]]:
        """Batches from `start` on, each with the position after its step, leaving the sampler's state alone.

        Args:
            device: where the indices arrive.

        Returns:
            An iterator over (batch size,) int64 indices and positions.
        """
        return self._walk(self.start, self.order, torch.device(device))

    def _walk(self, position: int, order: EpochOrder, device: torch.device) -> Iterator[tuple[Tensor, int]]:
        chunk = CHUNK_STEPS * self.world_size
        for first in range(position, self.num_batches, chunk):
            numbers = order.places(self.num_batches, first, min(first + chunk, self.num_batches)).tolist()
            for step in range(0, len(numbers) - self.world_size + 1, self.world_size):
                samples = self._samples(numbers[step + self.rank], order)
                yield samples.to(device), first + step + self.world_size

    def _samples(self, number: int, order: EpochOrder) -> Tensor:
        """The samples of a batch, numbered among those of all buckets."""
        bucket_number = bisect_right(self._first_batches, number) - 1
        bucket = self._buckets[bucket_number]
        start, stop = bucket.range_of(number - bucket.first_batch)
        places = order.places(len(bucket.samples), start, stop, part=1 + bucket_number)  # part 0 orders the batches
        return bucket.samples.index_select(0, places)

    def state_dict(self) -> LengthBucketedState:
        """The scalars that name this point of the epoch, and the boundaries: batches already yielded are behind it."""
        return {
            "version": PERMUTATION_VERSION,
            "n": self.num_samples,
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self._position,
            "shuffle": self.shuffle,
            "lengths": self._lengths_digest,
            "max_tokens": self.max_tokens,
            "boundaries": list(self.boundaries),
            "drop_last": self.drop_last,
        }

    def load_state_dict(self, state: LengthBucketedState) -> None:
        """Go on at a saved point, under any world size.

        Raises:
            TypeError: the state is no mapping, or one of its values has the wrong type.
            ValueError: the state belongs to other lengths, another budget, other boundaries or another version of the
                permutation, or lacks a key.
        """
        own: Mapping[str, object] = self.state_dict()
        keys = ("version", "n", "lengths", "max_tokens", "boundaries", "drop_last")
        self._restore(state, {key: own[key] for key in keys})


def checked_lengths(lengths: Tensor | np.ndarray[Any, Any] | Sequence[int], max_tokens: int, multiple: int) -> IntArray:
    """The lengths as an array, each known to have room."""
    values = lengths.numpy(force=True) if isinstance(lengths, Tensor) else np.asarray(lengths)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"lengths has shape {values.shape}; want (n,) with n at least 1")
    if values.dtype.kind not in "iu":
        raise TypeError(f"lengths is {values.dtype}; want integers")
    values = values.astype(np.int64)
    shortest, longest = int(values.argmin()), int(values.argmax())
    if values[shortest] < 1:
        raise ValueError(f"lengths[{shortest}] is {values[shortest]}; want at least 1")
    padded = -(-int(values[longest]) // multiple) * multiple
    if padded > max_tokens:
        raise ValueError(
            f"lengths[{longest}] is {values[longest]}, padded {padded}; want at most max_tokens = {max_tokens}"
        )
    return values


def choose_boundaries(lengths: IntArray, num_shapes: int, multiple: int) -> list[int]:
    """At most num_shapes multiples, the last one holding the longest, that pad these lengths the least."""
    last = -(-int(lengths.max()) // multiple) * multiple
    step = -(-last // (multiple * MAX_CANDIDATES)) * multiple
    candidates, counts = np.unique(np.minimum(-(-lengths // step) * step, last), return_counts=True)
    # least[k, j]: padded tokens of the samples of the first j candidates under at most k boundaries, the last one being
    # candidate j - 1; the one before it is candidate before[k, j] - 1.
    num_candidates = len(candidates)
    if num_shapes >= num_candidates:
        return [int(candidate) for candidate in candidates]
    num_boundaries = num_shapes
    samples = np.concatenate([[0], counts.cumsum()])
    least = np.full((num_boundaries + 1, num_candidates + 1), np.iinfo(np.int64).max // 2)
    least[:, 0] = 0
    before = np.zeros_like(least)
    layers = np.arange(num_boundaries)
    for j in range(1, num_candidates + 1):
        tokens = least[:-1, :j] + candidates[j - 1] * (samples[j] - samples[:j])
        choice = tokens.argmin(axis=1)
        before[1:, j] = choice
        least[1:, j] = tokens[layers, choice]
    boundaries = []
    j = num_candidates
    for k in range(num_boundaries, 0, -1):
        if j == 0:
            break
        boundaries.append(int(candidates[j - 1]))
        j = before[k, j]
    return boundaries[::-1]
