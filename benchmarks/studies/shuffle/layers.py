"""The layers of the shuffle study, each by itself: order, fetch and collate, storage, worker processes, page cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks import loader_peers
from benchmarks.loader_peers import INDEX_BATCHES, ROW_BATCHES, as_they_come, dataset_batches, item_batches
from benchmarks.studies.shuffle import data
from benchmarks.studies.shuffle.data import MappedBatches, MappedRows, Parser, Parts
from benchmarks.studies.shuffle.timing import Contender, Epochs, Pass
from eventkern.data import EventLoader, EventStore

IN_ORDER, SHUFFLED, WINDOWED = "in order", "shuffled", "windowed"
BATCH_SIZE = 1024
SMALL_BATCH_SIZE = 32
"""Of pipelines whose items may take 10 ms each: a batch is the least that can be timed."""
LOADER_BATCH_SIZE = 8
SRC_SEQ_LEN, TGT_SEQ_LEN = 200, 300
ROWS_PER_GROUP = 10_000
WINDOW = 65_536
NUM_WORKERS = 2
COLD_SHARE = 0.01
"""Of a store's pages, the most that may stay in the page cache for a pass to be called cold."""

OURS = "eventkern IndexSampler, EventStore.rows"
PARQUET = "DataLoader, one Parquet file kept"
COLD, WARM = "page cache cold", "page cache warm"


def both(build: Callable[..., Epochs], num_samples: int) -> dict[str, Pass]:
    """In order and shuffled, of a way that takes `shuffle`."""
    return {order: Pass(build(shuffle=order == SHUFFLED), num_samples) for order in (IN_ORDER, SHUFFLED)}


def order_layer(n: int, seed: int) -> list[Contender]:
    """Which sample comes next: nothing is fetched."""
    return [
        Contender(
            peer.name,
            both(partial(peer.build, n, BATCH_SIZE, seed=seed), n),
            BATCH_SIZE,
            is_ours=peer.build is loader_peers.sampler_indices,
        )
        for peer in INDEX_BATCHES
    ]


def fetch_layer(store: EventStore, seed: int) -> list[Contender]:
    """Samples become batches, all in memory: torch's rows are a tensor, ours the mapped store."""
    n = store.num_events
    rows = store.rows(torch.arange(n))
    ours = both(partial(loader_peers.store_batches, store, BATCH_SIZE, seed=seed), n)
    loader = {order: window_pass(store, seed, shuffle=order == SHUFFLED) for order in (IN_ORDER, SHUFFLED)}
    name = f"eventkern EventLoader, 3 x {SRC_SEQ_LEN} + {TGT_SEQ_LEN} events a sample"
    return [
        Contender(OURS, ours, BATCH_SIZE, is_ours=True),
        *(
            Contender(peer.name, both(partial(peer.build, rows, BATCH_SIZE, seed=seed), n), BATCH_SIZE)
            for peer in ROW_BATCHES
        ),
        Contender(name, loader, LOADER_BATCH_SIZE, is_ours=True),
    ]


def window_pass(store: EventStore, seed: int, *, shuffle: bool) -> Pass:
    """Windows of the training period; a sample is 901 events, not one row."""
    loader = EventLoader(
        store,
        "train",
        src_seq_len=SRC_SEQ_LEN,
        tgt_seq_len=TGT_SEQ_LEN,
        id_category_size=data.NUM_IDS + 2,
        batch_size=LOADER_BATCH_SIZE,
        seed=seed,
        shuffle=shuffle,
    )
    next_epoch = 0

    def epoch() -> Iterator[Tensor]:
        nonlocal next_epoch
        next_epoch += 1
        loader.set_epoch(next_epoch)
        return (batch.targets for batch in loader)

    return Pass(epoch, loader.num_samples)


def storage_layer(
    store: EventStore, folder: Path, files: Parts, parser: Parser, seed: int, pass_s: float
) -> list[Contender]:
    """Items as they are stored, one by one, neither collated nor loaded."""
    n = store.num_events
    rows = torch.utils.data.TensorDataset(store.rows(torch.arange(n)))
    groups = folder / "groups.parquet"
    pq.write_table(data.table(store.codes), groups, row_group_size=ROWS_PER_GROUP)
    build = partial(one_by_one, seed=seed)
    contenders = {
        "rows in memory": both(partial(build, rows), n),
        "memory-mapped rows": both(partial(build, MappedRows(store)), n),
    }
    for is_cached, words in ((False, "row group read for each item"), (True, "row group kept")):
        parts = data.parquet_groups(groups, ROWS_PER_GROUP, n, is_cached=is_cached)
        contenders[f"Parquet, one {words}"] = parts_passes(parts, build, pass_s)
    contenders[f"Parquet, one file kept ({parser.name})"] = parts_passes(files, build, pass_s)
    return [
        Contender(OURS, both(partial(loader_peers.store_batches, store, BATCH_SIZE, seed=seed), n), BATCH_SIZE, True),
        *(Contender(name, passes, SMALL_BATCH_SIZE) for name, passes in contenders.items()),
    ]


def one_by_one(dataset: Dataset[Any], *, shuffle: bool, seed: int) -> Epochs:
    """Lists of items, in the order that IndexSampler gives."""
    num_samples = len(dataset)  # type: ignore[arg-type]
    orders = loader_peers.sampler_indices(num_samples, SMALL_BATCH_SIZE, shuffle=shuffle, seed=seed)
    return lambda: ([dataset[index] for index in torch.as_tensor(batch).tolist()] for batch in orders())


def parts_passes(
    parts: Parts, build: Callable[..., Epochs], pass_s: float, *, is_counted: bool = True
) -> dict[str, Pass]:
    """In order over as many whole parts as pass_s has room for, since all items of a part share its read; shuffled over
    all. Each epoch begins with nothing kept.

    Args:
        parts: the items.
        build: makes a dataset and `shuffle` into epochs.
        pass_s: seconds of a pass.
        is_counted: whether reads happen in this process, where they can be counted.
    """
    head = parts
    if parts.is_cached:
        probe = parts.first(1)
        num_probed = min(256, len(probe))
        start_s = time.perf_counter()
        probe[0]
        load_s = time.perf_counter() - start_s
        start_s = time.perf_counter()
        for index in range(num_probed):
            probe[index]
        part_s = load_s + (time.perf_counter() - start_s) / num_probed * parts.rows_per_part
        head = parts.first(max(1, int(pass_s / part_s)))
    is_by_part = isinstance(parts, data.BatchedParts)
    in_order = Pass(
        build(head, shuffle=False),
        len(head),
        stands_for=len(parts),
        is_whole=parts.is_cached,
        reads=head.reads if is_counted else None,
        expected_loads=(lambda num_items: -(-num_items // parts.rows_per_part) if parts.is_cached else num_items)
        if is_counted
        else None,
        prepare=head.forget,
    )
    shuffled = Pass(
        build(parts, shuffle=True),
        len(parts),
        reads=parts.reads if is_counted else None,
        # A batch that is read part by part needs fewer.
        expected_loads=partial(data.expected_loads, parts) if is_counted and not is_by_part else None,
        prepare=parts.forget,
    )
    return {IN_ORDER: in_order, SHUFFLED: shuffled}


def worker_name(name: str, num_workers: int) -> str:
    return f"{name}, {num_workers} workers"


def worker_layer(store: EventStore, files: Parts, seed: int, pass_s: float) -> list[Contender]:
    """The same loaders with and without worker processes."""
    n = store.num_events
    rows = store.rows(torch.arange(n))
    contenders = []
    for num_workers in (0, NUM_WORKERS):
        options: dict[str, Any] = {"seed": seed, "num_workers": num_workers}
        skip = 1 + 2 * num_workers  # torch prefetches two batches a worker
        items = both(partial(item_batches, rows, BATCH_SIZE, **options), n)
        batches = both(
            partial(dataset_batches, MappedBatches(store), BATCH_SIZE, collate_fn=as_they_come, **options), n
        )
        build = partial(dataset_batches, batch_size=SMALL_BATCH_SIZE, **options)
        parquet = parts_passes(files, build, pass_s, is_counted=num_workers == 0)
        contenders += [
            Contender(worker_name("DataLoader(TensorDataset)", num_workers), items, BATCH_SIZE, skip=skip),
            Contender(worker_name("DataLoader, EventStore.rows", num_workers), batches, BATCH_SIZE, skip=skip),
            Contender(worker_name(PARQUET, num_workers), parquet, SMALL_BATCH_SIZE, skip=skip),
        ]
    return contenders


def cold_layer(store: EventStore, seed: int) -> tuple[list[Contender], str]:
    """Our batches from a store that the page cache no longer holds, and how that was verified; nobody where it does."""
    file = store.path / "store.bin"
    store.rows(torch.arange(store.num_events))
    warm_share, cold_share = data.resident_share(store.codes), data.drop_from_cache(file, store.codes)
    ahead_kib = data.read_ahead_kib(file)
    seen = (
        f"mincore saw {warm_share:.1%} of the rows' pages in the page cache before the drop and {cold_share:.1%} after "
        f"it; {f'the system reads up to {ahead_kib:,} KiB ahead, and ' if ahead_kib else ''}caches of the disk itself, "
        "or of a host of this machine, are not dropped"
    )
    if not (warm_share > 1 - COLD_SHARE and cold_share <= COLD_SHARE):
        return [], f"not measured: {seen}"

    def drop() -> None:
        share = data.drop_from_cache(file, store.codes)
        if not share <= COLD_SHARE:
            raise RuntimeError(f"{share:.1%} of {file} stayed in the page cache, though it could be dropped before")

    build = partial(loader_peers.store_batches, store, BATCH_SIZE, seed=seed)
    epochs = {IN_ORDER: build(shuffle=False), SHUFFLED: build(shuffle=True)}
    if store.num_events > WINDOW:
        epochs[WINDOWED] = build(shuffle=True, window=WINDOW)
    n = store.num_events
    # The first rows find less in the cache than the last ones, so a part would not stand for the whole.
    cold = {order: Pass(each, n, is_whole=True, prepare=drop) for order, each in epochs.items()}
    warm = {order: Pass(each, n, is_whole=True) for order, each in epochs.items()}
    contenders = [
        Contender(COLD, cold, BATCH_SIZE, is_ours=True),
        Contender(WARM, warm, BATCH_SIZE, is_ours=True),
    ]
    return contenders, seen
