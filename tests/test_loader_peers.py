"""A way to load counts only if it loads everything: each index and each row once an epoch, in an order of its seed."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.loader_peers import INDEX_BATCHES, ROW_BATCHES, getitems_batches, item_batches, store_batches

NUM_ROWS = 1_037
BATCH_SIZE = 64
NUM_CATEGORIES = 17


def rows_of(num_rows: int) -> Tensor:
    """Rows that tell their own number: every category holds it, each with another offset."""
    return torch.arange(num_rows, dtype=torch.int32)[:, None] + torch.arange(NUM_CATEGORIES, dtype=torch.int32)


class HeldRows:
    """A store in memory, with the two names that the loader asks for."""

    num_events = NUM_ROWS

    def rows(self, indices: Tensor, out: Tensor | None = None) -> Tensor:
        assert out is not None
        return out.copy_(rows_of(NUM_ROWS)[indices])


def order(epoch: Iterator[Any]) -> list[int]:
    """All indices of an epoch, whose batches are full but for the last."""
    batches = [np.asarray(batch).tolist() for batch in epoch]
    assert [len(batch) for batch in batches] == [BATCH_SIZE] * (NUM_ROWS // BATCH_SIZE) + [NUM_ROWS % BATCH_SIZE]
    return [index for batch in batches for index in batch]


def row_order(epoch: Iterator[Tensor]) -> list[int]:
    """Which rows an epoch brought, each found whole."""

    def numbers() -> Iterator[Tensor]:
        for batch in epoch:
            assert torch.equal(batch, rows_of(NUM_ROWS)[batch[:, 0].long()])
            yield batch[:, 0].clone()

    return order(numbers())


def assert_epochs_are_right(build: Callable[..., Any], read: Callable[[Iterator[Any]], list[int]]) -> None:
    in_order = build(shuffle=False, seed=3)
    assert read(in_order()) == list(range(NUM_ROWS))
    assert read(in_order()) == list(range(NUM_ROWS))

    epochs = build(shuffle=True, seed=3)
    first, second = read(epochs()), read(epochs())
    assert sorted(first) == sorted(second) == list(range(NUM_ROWS))
    # Neighbours of a random order are neighbours of the rows twice in an epoch; whole runs of them would be no shuffle.
    for shuffled in (first, second):
        assert np.count_nonzero(np.diff(shuffled) == 1) < 10
    assert np.count_nonzero(np.equal(first, second)) < 10
    again = build(shuffle=True, seed=3)
    assert [read(again()), read(again())] == [first, second]
    assert read(build(shuffle=True, seed=4)()) != first


@pytest.mark.parametrize("peer", INDEX_BATCHES, ids=lambda peer: peer.name)
def test_every_sampler_visits_each_index_once(peer) -> None:
    assert_epochs_are_right(lambda **options: peer.build(NUM_ROWS, BATCH_SIZE, **options), order)


@pytest.mark.parametrize("peer", ROW_BATCHES, ids=lambda peer: peer.name)
def test_every_loader_brings_each_row_once(peer) -> None:
    assert_epochs_are_right(lambda **options: peer.build(rows_of(NUM_ROWS), BATCH_SIZE, **options), row_order)


def test_the_store_brings_each_row_once() -> None:
    assert_epochs_are_right(lambda **options: store_batches(HeldRows(), BATCH_SIZE, **options), row_order)


@pytest.mark.parametrize("build", [item_batches, getitems_batches])
def test_worker_processes_bring_the_same_rows(build: Callable[..., Any]) -> None:
    def epoch(num_workers: int) -> list[int]:
        epochs = build(rows_of(NUM_ROWS), BATCH_SIZE, shuffle=True, seed=5, num_workers=num_workers)
        return row_order(epochs())

    assert epoch(2) == epoch(0)
    assert sorted(epoch(0)) == list(range(NUM_ROWS))
