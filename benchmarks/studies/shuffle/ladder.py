"""The layers in sequence: which Parquet layout gives the ratio of the notes, and what each layer replaced by ours takes
off it."""

from __future__ import annotations

import math
import shutil
import statistics
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import loader_peers
from benchmarks.loader_peers import as_they_come, dataset_batches, first_of
from benchmarks.studies.shuffle import data
from benchmarks.studies.shuffle.data import BatchedParts, MappedBatches, MappedRows, Parser, Parts
from benchmarks.studies.shuffle.layers import (
    BATCH_SIZE,
    IN_ORDER,
    SHUFFLED,
    SMALL_BATCH_SIZE,
    both,
    parts_passes,
)
from benchmarks.studies.shuffle.timing import Contender, Epochs, Figure, measure
from eventkern.data import EventStore, IndexSampler

NOTED_RATIO = 140.0
"""How much slower the notes found a shuffled epoch of 900,000 events."""

LAYOUT_PASSES = 6
"""Passes that a layout has time for: three rounds, where none of them is long."""

NO_COST_RATIO = 1.5
"""Shuffled over in order: below it shuffling is not what costs."""

BASE = "the notes' pipeline"
ORDER, FETCH, STORAGE = "order", "fetch and collate", "storage"
ALONE = {
    ORDER: "order by IndexSampler alone",
    FETCH: "fetch by batch, file by file, alone",
    STORAGE: "storage in mapped rows alone",
}
LARGE_FETCH = f"fetch by batches of {BATCH_SIZE}, file by file, alone"
STEPS = (
    BASE,
    ALONE[ORDER],
    "order, and fetch by batch",
    "order, fetch, and storage in mapped rows",
    "eventkern without a DataLoader",
)
"""The notes' pipeline, replaced layer by layer until all of it is ours."""


@dataclass(frozen=True)
class Layout:
    """One way to keep the events in Parquet files, and what a pass over it cost.

    Attributes:
        parser: how a file is read and an item cut.
        num_files: F.
        rows_per_file: r.
        load_s: L, seconds of reading one file in the shuffled epoch.
        in_order_s: seconds of an in-order epoch.
        in_order_load_s: seconds of it that went into reading files.
        shuffled_s: seconds of a shuffled epoch.
        num_events: N.
        is_row: whether an item is a single row.
    """

    parser: str
    num_files: int
    rows_per_file: int
    load_s: float
    in_order_s: float
    in_order_load_s: float
    shuffled_s: float
    num_events: int
    is_row: bool

    @property
    def ratio(self) -> float:
        return self.shuffled_s / self.in_order_s

    @property
    def item_s(self) -> float:
        """p, seconds of an item in order without the read of its file."""
        return (self.in_order_s - self.in_order_load_s) / self.num_events

    @property
    def noted_item_s(self) -> float:
        """Seconds that everything but the read would have to take an item for the ratio of the notes: p in
        (p + L (1 - 1/F)) / (p + L/r) = 140. Below 0 no item cost gives it, for the ratio stays below 140."""
        reload_s = self.load_s * (1 - 1 / self.num_files)
        return (reload_s - NOTED_RATIO * self.load_s / self.rows_per_file) / (NOTED_RATIO - 1)

    def to_dict(self) -> dict[str, object]:
        return {**vars(self), "ratio": self.ratio, "item_s": self.item_s, "item_s_for_140": self.noted_item_s}


def measure_layouts(
    store: EventStore, folder: Path, counts: list[int], parsers: list[Parser], seed: int, pass_s: float
) -> tuple[list[Figure], list[Layout]]:
    """The notes' pipeline over every number of files and every parser."""
    n, figures, layouts = store.num_events, [], []
    for num_files in counts:
        rows_per_file = math.ceil(n / num_files)
        paths = data.write_files(store.codes, folder / "layout", rows_per_file)
        for parser in parsers:
            files = data.parquet_files(paths, rows_per_file, n, parser)
            passes = parts_passes(files, partial(dataset_batches, batch_size=SMALL_BATCH_SIZE, seed=seed), pass_s)
            name = f"{parser.name}, {len(paths)} files"
            both_orders = measure(
                "layout", n, [Contender(name, passes, SMALL_BATCH_SIZE)], pass_s, LAYOUT_PASSES * pass_s
            )
            found = {figure.order: figure for figure in both_orders}
            layouts.append(
                Layout(
                    parser=parser.name,
                    num_files=len(paths),
                    rows_per_file=rows_per_file,
                    load_s=read_s(found[SHUFFLED]),
                    in_order_s=found[IN_ORDER].seconds,
                    in_order_load_s=found[IN_ORDER].load_s,
                    shuffled_s=found[SHUFFLED].seconds,
                    num_events=n,
                    is_row=parser.is_row,
                )
            )
            figures += both_orders
        shutil.rmtree(folder / "layout")
    return figures, layouts


def read_s(figure: Figure) -> float:
    """Seconds of one read."""
    return statistics.median((timing.load_s or 0.0) / (timing.num_loads or 1) for timing in figure.timings)


def nearest(layouts: list[Layout]) -> Layout:
    """The layout of single rows whose ratio is nearest to the one of the notes."""
    return min(
        (layout for layout in layouts if layout.is_row), key=lambda layout: abs(math.log(layout.ratio / NOTED_RATIO))
    )


def crossings(layouts: list[Layout]) -> dict[str, float | None]:
    """For each parser the number of files at which its ratio passes 140, between two that were measured; None where all
    measured ones lie on one side."""
    found: dict[str, float | None] = {}
    for parser in dict.fromkeys(layout.parser for layout in layouts):
        line = sorted((each for each in layouts if each.parser == parser), key=lambda each: each.num_files)
        found[parser] = None
        for left, right in pairwise(line):
            low, high = math.log(left.ratio / NOTED_RATIO), math.log(right.ratio / NOTED_RATIO)
            if low * high <= 0 and low != high:
                share = low / (low - high)
                found[parser] = math.exp(math.log(left.num_files) + share * math.log(right.num_files / left.num_files))
    return found


def index_sampler_batches(dataset: Dataset[Any], *, shuffle: bool, seed: int, **options: Any) -> Epochs:
    """torch's DataLoader with IndexSampler as its batch_sampler."""
    sampler = IndexSampler(len(dataset), SMALL_BATCH_SIZE, seed=seed, shuffle=shuffle)  # type: ignore[arg-type]
    loader: DataLoader[Tensor] = DataLoader(dataset, batch_sampler=Lists(sampler), **options)
    return lambda: map(first_of, loader)


class Lists:
    """A sampler's batches as lists, which datasets that take one item at a time expect."""

    def __init__(self, sampler: IndexSampler) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Any:
        return (torch.as_tensor(batch).tolist() for batch in self.sampler)


def ladder(store: EventStore, files: Parts, seed: int, pass_s: float) -> list[Contender]:
    """The notes' pipeline; each layer of it replaced by ours alone; and one after the other until all of it is ours."""
    n = store.num_events
    plain = partial(dataset_batches, batch_size=SMALL_BATCH_SIZE, seed=seed)
    large = partial(dataset_batches, batch_size=BATCH_SIZE, seed=seed)
    ordered = partial(index_sampler_batches, seed=seed)
    by_file = BatchedParts(files.load, files.rows_per_part, n, files.item)
    mapped = partial(index_sampler_batches, MappedBatches(store), seed=seed, collate_fn=as_they_come)
    ours = partial(loader_peers.store_batches, store, SMALL_BATCH_SIZE, seed=seed)
    passes = {
        BASE: parts_passes(files, plain, pass_s),
        ALONE[ORDER]: parts_passes(files, ordered, pass_s),
        ALONE[FETCH]: parts_passes(by_file, plain, pass_s),
        LARGE_FETCH: parts_passes(by_file, large, pass_s),
        ALONE[STORAGE]: both(partial(plain, MappedRows(store)), n),
        STEPS[2]: parts_passes(by_file, ordered, pass_s),
        STEPS[3]: both(mapped, n),
        STEPS[4]: both(ours, n),
    }
    return [
        Contender(
            name,
            each,
            BATCH_SIZE if name == LARGE_FETCH else SMALL_BATCH_SIZE,
            is_ours=name == STEPS[-1],
        )
        for name, each in passes.items()
    ]


@dataclass(frozen=True)
class Verdict:
    """What each layer, replaced by ours alone, took off the time that shuffling adds.

    Attributes:
        base_ratio: shuffled over in order, of the notes' pipeline.
        extra_s: seconds that shuffling adds to its epoch.
        removed: by layer, the share of extra_s that is gone once the layer is replaced: the median of the rounds.
        removed_range: by layer, the least and the most of it among the rounds.
        ratios: by layer, the ratio that is left.
        culprit: the layer that removes most, if shuffling costs anything and that is more than half of it.
        read_share: the share of extra_s that went into reading files.
    """

    base_ratio: float
    extra_s: float
    removed: dict[str, float]
    removed_range: dict[str, tuple[float, float]]
    ratios: dict[str, float]
    culprit: str | None
    read_share: float


def judge(figures: list[Figure], num_events: int) -> Verdict:
    """Which layer carries the ratio, from the ladder's figures alone."""
    found = {
        (figure.contender, figure.order): figure
        for figure in figures
        if figure.layer == "ladder" and figure.num_events == num_events
    }

    def extra_s(name: str) -> float:
        return found[name, SHUFFLED].seconds - found[name, IN_ORDER].seconds

    def ratio(name: str) -> float:
        return found[name, SHUFFLED].seconds / found[name, IN_ORDER].seconds

    base_s = extra_s(BASE)

    def rounds_s(name: str) -> list[float]:
        """What shuffling adds, round by round: what the machine does meanwhile happens to all of a round alike."""
        pairs = zip(found[name, SHUFFLED].timings, found[name, IN_ORDER].timings, strict=True)
        return [shuffled.seconds - in_order.seconds for shuffled, in_order in pairs]

    shares = {
        layer: [1 - rest_s / all_s for rest_s, all_s in zip(rounds_s(name), rounds_s(BASE), strict=True)]
        for layer, name in ALONE.items()
    }
    removed = {layer: statistics.median(rounds) for layer, rounds in shares.items()}
    most = max(removed, key=lambda layer: removed[layer])
    return Verdict(
        base_ratio=ratio(BASE),
        extra_s=base_s,
        removed=removed,
        removed_range={layer: (min(rounds), max(rounds)) for layer, rounds in shares.items()},
        ratios={layer: ratio(name) for layer, name in ALONE.items()},
        culprit=most if ratio(BASE) > NO_COST_RATIO and removed[most] > 0.5 else None,
        read_share=(found[BASE, SHUFFLED].load_s - found[BASE, IN_ORDER].load_s) / base_s if base_s > 0 else 0.0,
    )
