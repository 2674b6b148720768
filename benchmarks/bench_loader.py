"""Epochs of rows and of windows: eventkern's store and loader against torch's, a shuffled order against the rows' own.

Every contender goes through a whole epoch and drops each batch before it asks for the next.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import work
from benchmarks.loader_peers import ROW_BATCHES, RowEpochs, store_batches
from benchmarks.measure import Compare, Contender
from benchmarks.studies.shuffle.data import make_store
from eventkern.data import EventLoader, EventStore
from profiling.roofline import Work

CPU = torch.device("cpu")
BATCH_SIZE = 1024
QUICK_EVENTS, FULL_EVENTS = 100_000, 900_000
WINDOWS = {"flights": (20, 20, 32), "gpu_optimized": (200, 300, 8)}
"""src_seq_len, tgt_seq_len, batch_size of the configurations."""
NUM_WINDOW_BATCHES = 500
ID_CATEGORY_SIZE = 1000


@pytest.fixture(scope="module")
def store(is_full: bool) -> Iterator[EventStore]:
    """Seeded events with three streams, prepared as a user's would be."""
    with tempfile.TemporaryDirectory() as folder:
        yield make_store(Path(folder), FULL_EVENTS if is_full else QUICK_EVENTS, seed=0)


def whole_epoch(epochs: RowEpochs) -> int:
    return sum(len(batch) for batch in epochs())


@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "in order"])
def test_epoch_of_rows(shuffle: bool, store: EventStore, compare: Compare, is_full: bool) -> None:
    num_rows = store.num_events
    held = store.rows(torch.arange(num_rows))
    ways = {"eventkern": store_batches(store, BATCH_SIZE, shuffle=shuffle, seed=0)}
    for peer in ROW_BATCHES:
        # An epoch item by item takes seconds; torchdata's loader does as torch's, and the study has it.
        if not peer.name.startswith("StatefulDataLoader"):
            ways[peer.name] = peer.build(held, BATCH_SIZE, shuffle=shuffle, seed=0)
    expected = held.sum(0, dtype=torch.int64)
    for name, epochs in ways.items():
        total = torch.stack([batch.sum(0, dtype=torch.int64) for batch in epochs()]).sum(0)
        assert total.equal(expected), f"{name} brings other rows"
    contenders = [
        # In order, views of rows that are in memory already copy nothing.
        Contender(name, partial(whole_epoch, epochs), name == "eventkern", is_part=not shuffle and "randperm" in name)
        for name, epochs in ways.items()
    ]
    counted = work.gather(num_rows, held.shape[1], store.codes.itemsize)
    case = f"rows, {'shuffled' if shuffle else 'in order'}, n {num_rows:,} batch {BATCH_SIZE:,}"
    compare(case, contenders, counted, device=CPU, dtype=torch.int32)


class PlainWindows(Dataset[tuple[Tensor, Tensor]]):
    """The windows of a store's training period as one writes them with numpy: item by item, from rows in memory.

    Only the sources of the key and the targets depend on the key's list; a place in it is found by bisection.
    """

    def __init__(self, store: EventStore, src_seq_len: int, tgt_seq_len: int) -> None:
        schema = store.schema
        self.rows = store.rows(torch.arange(store.num_events)).numpy()
        self.rows[self.rows >= np.array(store.sizes(ID_CATEGORY_SIZE))] = 1
        self.lengths = src_seq_len, tgt_seq_len
        self.key = store.index(schema.key)
        self.streams = [store.index(stream.entity) if stream.entity else None for stream in schema.streams]
        self.anchors = store.anchors("train", tgt_seq_len)
        self.limits = store.limits("train")

    def __len__(self) -> int:
        return len(self.anchors)

    def __getitem__(self, window: int) -> tuple[Tensor, Tensor]:
        src_seq_len, tgt_seq_len = self.lengths
        place = self.anchors[window]
        anchor = self.key.rows[place]
        sources = np.zeros((len(self.streams), src_seq_len, self.rows.shape[1]), np.int32)
        for number, index in enumerate(self.streams):
            past: Any = np.s_[max(0, anchor - src_seq_len) : anchor]
            if index is not None:
                entity = index.entity_of_row[anchor]
                own = index.rows[index.offsets[entity] : index.offsets[entity + 1]]
                end = np.searchsorted(own, anchor)
                past = own[max(0, end - src_seq_len) : end]
            events = self.rows[past]
            sources[number, src_seq_len - len(events) :] = events
        targets = np.zeros((tgt_seq_len + 1, self.rows.shape[1]), np.int32)
        end = min(place + tgt_seq_len + 1, self.limits[self.key.entity_of_row[anchor]])
        targets[: end - place] = self.rows[self.key.rows[place:end]]
        return torch.from_numpy(sources), torch.from_numpy(targets)


def window_loader(store: EventStore, shapes: str, **options: Any) -> EventLoader:
    src_seq_len, tgt_seq_len, batch_size = WINDOWS[shapes]
    return EventLoader(
        store,
        "train",
        src_seq_len=src_seq_len,
        tgt_seq_len=tgt_seq_len,
        batch_size=batch_size,
        id_category_size=ID_CATEGORY_SIZE,
        **options,
    )


def some_batches(loader: Any) -> int:
    return sum(1 for _ in islice(loader, NUM_WINDOW_BATCHES))


def window_work(store: EventStore, shapes: str) -> Work:
    """Codes read and ids written; an event of a window is one event."""
    src_seq_len, tgt_seq_len, batch_size = WINDOWS[shapes]
    num_rows = NUM_WINDOW_BATCHES * batch_size * (len(store.schema.streams) * src_seq_len + tgt_seq_len + 1)
    return work.gather(num_rows, len(store.class_sizes), store.codes.itemsize)


def window_case(store: EventStore, shapes: str) -> str:
    return f"{NUM_WINDOW_BATCHES} batches of windows, {shapes}, n {store.num_events:,}"


@pytest.mark.parametrize("shapes", WINDOWS)
def test_windows_against_the_plain_way(shapes: str, store: EventStore, compare: Compare) -> None:
    src_seq_len, tgt_seq_len, batch_size = WINDOWS[shapes]
    plain = DataLoader(PlainWindows(store, src_seq_len, tgt_seq_len), batch_size, shuffle=True)
    for ours, (sources, targets) in zip(
        window_loader(store, shapes, shuffle=False), DataLoader(plain.dataset, batch_size), strict=False
    ):
        assert ours.sources.equal(sources)
        assert ours.targets.equal(targets)
        break
    contenders = [
        Contender("eventkern", partial(some_batches, window_loader(store, shapes)), True),
        Contender(
            "eventkern, nothing ahead", partial(some_batches, window_loader(store, shapes, prefetch=0)), is_part=True
        ),
        Contender("DataLoader, numpy item by item", partial(some_batches, plain)),
    ]
    counted = window_work(store, shapes)
    compare(f"{window_case(store, shapes)}, shuffled", contenders, counted, device=CPU, dtype=torch.int32)


@pytest.mark.parametrize("shapes", WINDOWS)
def test_shuffled_windows_against_windows_in_order(shapes: str, store: EventStore, compare: Compare) -> None:
    contenders = [
        Contender("eventkern, shuffled", partial(some_batches, window_loader(store, shapes)), True),
        Contender("eventkern, in order", partial(some_batches, window_loader(store, shapes, shuffle=False))),
    ]
    compare(window_case(store, shapes), contenders, window_work(store, shapes), device=CPU, dtype=torch.int32)


@pytest.mark.gpu
@pytest.mark.parametrize("shapes", WINDOWS)
def test_windows_on_cuda(shapes: str, store: EventStore, compare: Compare) -> None:
    """Resident on the card, against batches that are gathered on the host and copied."""
    resident = window_loader(store, shapes, device="cuda", resident=True)
    copied = window_loader(store, shapes, device="cuda")
    for ours, theirs in zip(islice(resident, 3), islice(copied, 3), strict=True):
        assert ours.sources.equal(theirs.sources)
        assert ours.targets.equal(theirs.targets)
    contenders = [
        Contender("eventkern, resident", partial(some_batches, resident), True),
        Contender("eventkern, gathered on the host", partial(some_batches, copied)),
    ]
    counted = window_work(store, shapes)
    case = f"{window_case(store, shapes)}, shuffled, cuda"
    compare(case, contenders, counted, device=torch.device("cuda"), dtype=torch.int32)
