"""Windows of events without eventkern's loader: as plain code cuts them from memory, and row by row from Parquet files.

Shapes: B batch, K streams, S source events, T target events, C categories.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.studies.shuffle.data import Parts
from benchmarks.studies.shuffle.ladder import Lists
from benchmarks.training import RandomBatch, Shapes
from eventkern.data import EventStore, IndexSampler

Rows = NDArray[np.int64]
Fetch = Callable[[Rows], NDArray[np.int32]]
Item = tuple[Tensor, Tensor, int]

ROWS_PER_FILE = 10_000
"""As in the layout of the shuffle study whose shuffled order costs what the notes report."""


class Windows(Dataset[Item]):
    """The training windows of a store, one an item, cut with numpy.

    Args:
        store: the events.
        shapes: S, T and the number of classes, at and above which a code reads 1.
        fetch: gives the codes (rows, C) of row numbers.
    """

    def __init__(self, store: EventStore, shapes: Shapes, fetch: Fetch) -> None:
        model = shapes.model
        self.sizes = np.array(store.sizes(model.category_sizes[0]))
        self.source_events, self.target_events = model.src_seq_len, model.tgt_seq_len
        self.fetch = fetch
        self.key = store.index(store.schema.key)
        self.anchors = store.anchors("train", self.target_events)
        self.ends = store.limits("train")
        self.streams = [store.index(stream.entity) if stream.entity else None for stream in store.schema.streams]

    def __len__(self) -> int:
        return len(self.anchors)

    def rows(self, number: int) -> tuple[list[Rows], Rows]:
        """The rows of each stream and of the targets."""
        anchor = int(self.anchors[number])
        row = int(self.key.rows[anchor])
        sources = []
        for index in self.streams:
            if index is None:
                sources.append(np.arange(max(0, row - self.source_events), row))
                continue
            entity = int(index.entity_of_row[row])
            own = index.rows[index.offsets[entity] : index.offsets[entity + 1]] if entity >= 0 else index.rows[:0]
            before = int(np.searchsorted(own, row))
            sources.append(own[max(0, before - self.source_events) : before])
        end = int(self.ends[np.searchsorted(self.key.offsets, anchor, side="right") - 1])
        return sources, self.key.rows[anchor : min(anchor + self.target_events + 1, end)]

    def codes(self, rows: Rows) -> NDArray[np.int32]:
        found = self.fetch(rows)
        return np.where(found < self.sizes, found, 1).astype(np.int32)

    def __getitem__(self, number: int) -> Item:
        source_rows, target_rows = self.rows(number)
        sources = np.zeros((len(self.streams), self.source_events, len(self.sizes)), np.int32)
        targets = np.zeros((self.target_events + 1, len(self.sizes)), np.int32)
        for stream, rows in enumerate(source_rows):
            if len(rows):
                sources[stream, -len(rows) :] = self.codes(rows)
        targets[: len(target_rows)] = self.codes(target_rows)
        return torch.from_numpy(sources), torch.from_numpy(targets), len(target_rows) - 1


def from_memory(store: EventStore) -> Fetch:
    """Rows of an array in memory."""
    codes = np.array(store.codes)
    return lambda rows: codes[rows]


def from_files(files: Parts) -> Fetch:
    """Rows one by one, each from the Parquet file that holds it, the last file kept."""
    return lambda rows: np.stack([files[int(row)].numpy() for row in rows])


def collated(items: list[Item]) -> RandomBatch:
    sources, targets, labels = zip(*items, strict=True)
    return RandomBatch(torch.stack(sources), torch.stack(targets), torch.tensor(sum(labels)))


def loader_batches(
    windows: Windows, batch_size: int, device: str, *, is_our_order: bool, seed: int = 0
) -> Iterator[RandomBatch]:
    """torch's DataLoader over windows without end, in its own shuffled order or in IndexSampler's, brought to a device.

    Args:
        windows: the items.
        batch_size: B.
        device: where the batches go, one copy a tensor.
        is_our_order: IndexSampler as the batch_sampler, instead of RandomSampler and BatchSampler.
        seed: of the order.
    """
    options: dict[str, Any] = {"collate_fn": collated}
    sampler = IndexSampler(len(windows), batch_size, seed=seed, drop_last=True)
    if is_our_order:
        options["batch_sampler"] = Lists(sampler)
    else:
        generator = torch.Generator().manual_seed(seed)
        options |= {"batch_size": batch_size, "shuffle": True, "drop_last": True, "generator": generator}
    loader: DataLoader[Any] = DataLoader(windows, **options)

    def endless() -> Iterator[RandomBatch]:
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            for batch in loader:
                yield RandomBatch(*(part.to(device) for part in (batch.sources, batch.targets, batch.num_targets)))

    return endless()


def write_parts(store: EventStore, folder: Path) -> tuple[list[Path], int]:
    """Parquet files of the store's rows in time order, and the rows of each."""
    from benchmarks.studies.shuffle.data import write_files

    rows_per_file = min(ROWS_PER_FILE, max(1, store.num_events // 4))
    return write_files(np.asarray(store.codes, np.uint16), folder, rows_per_file), rows_per_file
