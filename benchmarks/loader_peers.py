"""What the sampler and the loader are measured against: every way behind one signature, eventkern's own among them.

INDEX_BATCHES: build(n, batch_size, *, shuffle, seed) gives a factory of epochs. Each call of it starts the next epoch,
an iterator of batches of indices in the form that the way makes them: lists, arrays or tensors.

ROW_BATCHES: build(rows, batch_size, *, shuffle, seed) with rows (N, C) in memory gives a factory of epochs, iterators
of (B, C) batches of the rows. `store_batches` has this signature too, for an EventStore.

Shuffled epochs differ, and those of one seed come again in the same order; the in-order ones are all alike.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler, TensorDataset

from benchmarks.peers import Peer
from eventkern.data import IndexSampler

Indices = Sequence[int] | np.ndarray[Any, np.dtype[np.int64]] | Tensor
IndexEpochs = Callable[[], Iterator[Indices]]
RowEpochs = Callable[[], Iterator[Tensor]]

GRAIN_ROUNDS = 4
"""Rounds of the cipher that Grain's own shuffle asks of its index_shuffle."""


class Rows(Protocol):
    """What store_batches needs of an EventStore."""

    num_events: int

    def rows(self, indices: Tensor, out: Tensor | None = None) -> Tensor: ...


def sampler_indices(n: int, batch_size: int, *, shuffle: bool, seed: int, window: int | None = None) -> IndexEpochs:
    """eventkern's IndexSampler."""
    sampler = IndexSampler(n, batch_size, seed=seed, shuffle=shuffle, window=window)
    next_epoch = 0

    def epoch() -> Iterator[Tensor]:
        nonlocal next_epoch
        sampler.set_epoch(next_epoch)
        next_epoch += 1
        return iter(sampler)

    return epoch


def torch_sampler(n: int, *, shuffle: bool, seed: int) -> Sampler[int]:
    """torch's sampler of single indices, as DataLoader(shuffle=...) makes it."""
    if not shuffle:
        return SequentialSampler(range(n))
    return RandomSampler(range(n), generator=torch.Generator().manual_seed(seed))


def single_indices(n: int, batch_size: int, *, shuffle: bool, seed: int) -> IndexEpochs:
    """torch's sampler without a BatchSampler: its indices cut into lists."""
    sampler = torch_sampler(n, shuffle=shuffle, seed=seed)

    def epoch() -> Iterator[list[int]]:
        indices = iter(sampler)
        while batch := list(islice(indices, batch_size)):
            yield batch

    return epoch


def batch_sampler_indices(n: int, batch_size: int, *, shuffle: bool, seed: int) -> IndexEpochs:
    """torch's BatchSampler around its RandomSampler or SequentialSampler."""
    return BatchSampler(torch_sampler(n, shuffle=shuffle, seed=seed), batch_size, drop_last=False).__iter__


def randperm_indices(n: int, batch_size: int, *, shuffle: bool, seed: int) -> IndexEpochs:
    """The whole epoch as one tensor, cut into views."""
    generator = torch.Generator().manual_seed(seed)

    def epoch() -> Iterator[Tensor]:
        order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
        return iter(order.split(batch_size))

    return epoch


def numpy_indices(n: int, batch_size: int, *, shuffle: bool, seed: int) -> IndexEpochs:
    """The whole epoch as one array, cut into views."""
    generator = np.random.default_rng(seed)

    def epoch() -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
        order = generator.permutation(n) if shuffle else np.arange(n)
        return (order[start : start + batch_size] for start in range(0, n, batch_size))

    return epoch


def grain_indices(n: int, batch_size: int, *, shuffle: bool, seed: int) -> IndexEpochs:
    """Grain's index_shuffle, one call an index, as its samplers make them."""
    from grain.experimental import index_shuffle

    next_seed = seed

    def epoch() -> Iterator[list[int]]:
        nonlocal next_seed
        own_seed, next_seed = next_seed % 2**32, next_seed + 1
        for start in range(0, n, batch_size):
            positions = range(start, min(start + batch_size, n))
            yield [index_shuffle(at, n - 1, own_seed, GRAIN_ROUNDS) for at in positions] if shuffle else list(positions)

    return epoch


class BatchDataset(Dataset[Tensor]):
    """Rows that torch's DataLoader asks for a batch at a time."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]

    def __getitems__(self, indices: list[int]) -> Tensor:
        return self.rows.index_select(0, torch.tensor(indices))


def as_they_come(batch: Tensor) -> Tensor:
    """The collate function of batches that are whole already."""
    return batch


def first_of(batch: Sequence[Tensor] | Tensor) -> Tensor:
    """The rows of a batch: TensorDataset's comes as a list of one tensor."""
    return batch if isinstance(batch, Tensor) else batch[0]


def dataset_batches(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    shuffle: bool,
    seed: int,
    num_workers: int = 0,
    is_stateful: bool = False,
    **options: Any,
) -> RowEpochs:
    """torch's DataLoader, or torchdata's StatefulDataLoader, over any dataset.

    Args:
        dataset: gives items, or batches where it has `__getitems__`.
        batch_size: B.
        shuffle: as DataLoader takes it.
        seed: of the order.
        num_workers: worker processes.
        is_stateful: whether torchdata's loader takes the place of torch's.
        options: of the loader.
    """
    kind: Any = DataLoader
    if is_stateful:
        from torchdata.stateful_dataloader import StatefulDataLoader

        kind = StatefulDataLoader
    if isinstance(dataset, BatchDataset):
        options.setdefault("collate_fn", as_they_come)
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():  # StatefulDataLoader calls what torch deprecates
        warnings.filterwarnings("ignore", "'set_vital' is deprecated", UserWarning)
        loader = kind(dataset, batch_size, shuffle=shuffle, generator=generator, num_workers=num_workers, **options)
    return lambda: map(first_of, loader)


def item_batches(rows: Tensor, batch_size: int, *, shuffle: bool, seed: int, **options: Any) -> RowEpochs:
    """A loader over TensorDataset: item by item, then stacked."""
    return dataset_batches(TensorDataset(rows), batch_size, shuffle=shuffle, seed=seed, **options)


def getitems_batches(rows: Tensor, batch_size: int, *, shuffle: bool, seed: int, **options: Any) -> RowEpochs:
    """A loader over a dataset with `__getitems__`: a batch in one indexing."""
    return dataset_batches(BatchDataset(rows), batch_size, shuffle=shuffle, seed=seed, **options)


def index_select_batches(rows: Tensor, batch_size: int, *, shuffle: bool, seed: int) -> RowEpochs:
    """No loader: torch.randperm and index_select, or copies of slices where the order is the rows' own."""
    orders = randperm_indices(len(rows), batch_size, shuffle=True, seed=seed)

    def epoch() -> Iterator[Tensor]:
        if not shuffle:
            return (batch.clone() for batch in rows.split(batch_size))
        return (rows.index_select(0, torch.as_tensor(indices)) for indices in orders())

    return epoch


def store_batches(
    store: Rows, batch_size: int, *, shuffle: bool, seed: int, window: int | None = None, num_categories: int = 17
) -> RowEpochs:
    """eventkern's IndexSampler and EventStore.rows; every batch is written over the one before."""
    orders = sampler_indices(store.num_events, batch_size, shuffle=shuffle, seed=seed, window=window)
    out = torch.empty(batch_size, num_categories, dtype=torch.int32)

    def epoch() -> Iterator[Tensor]:
        return (store.rows(torch.as_tensor(indices), out=out[: len(indices)]) for indices in orders())

    return epoch


INDEX_BATCHES: tuple[Peer, ...] = (
    Peer("eventkern IndexSampler", sampler_indices),
    Peer("torch RandomSampler", single_indices),
    Peer("torch BatchSampler(RandomSampler)", batch_sampler_indices),
    Peer("torch.randperm, split", randperm_indices),
    Peer("numpy permutation, sliced", numpy_indices),
)
if find_spec("grain"):
    INDEX_BATCHES += (Peer("Grain index_shuffle", grain_indices, is_slow_to_start=True),)

ROW_BATCHES: tuple[Peer, ...] = (
    Peer("DataLoader(TensorDataset)", item_batches),
    Peer("DataLoader, __getitems__", getitems_batches),
    Peer("torch.randperm, index_select", index_select_batches),
)
if find_spec("torchdata"):
    ROW_BATCHES += (
        Peer("StatefulDataLoader(TensorDataset)", partial(item_batches, is_stateful=True)),
        Peer("StatefulDataLoader, __getitems__", partial(getitems_batches, is_stateful=True)),
    )
