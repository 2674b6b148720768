"""The events of the shuffle study, kept in every way that it compares: mapped rows, row groups, many Parquet files."""

from __future__ import annotations

import ctypes
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from eventkern.data import EventStore, Schema
from eventkern.data.prepare import prepare

NUM_CATEGORIES = 17
NAMES = tuple(f"category_{number:02d}" for number in range(NUM_CATEGORIES))
NUM_IDS = 1000
BLOCK_ROWS = 1 << 20
BYTES_PER_EVENT = 400
"""Of disk, at the most: the source, prepare's spill, the store, and two Parquet copies."""
WINDOW_BEFORE, WINDOW_ROWS = 200, 500
MADV_DONTNEED = 4


def check_space(folder: Path, num_events: int) -> None:
    """Refuse before the work, not in the midst of it."""
    needed, free = BYTES_PER_EVENT * num_events, shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(
            f"{folder} has {free / 2**30:.1f} GiB free, and {num_events:,} events want {needed / 2**30:.1f} GiB: give "
            "a folder with more room (--work-dir), or fewer events (--events)"
        )


def zipf_rows(num_events: int, generator: np.random.Generator) -> NDArray[np.uint16]:
    """(num_events, 17) ids below 1000, the k-th most frequent in proportion to 1 / k."""
    # 2^16 quantiles are enough: the rarest id has 9 of them.
    weights = np.cumsum(1 / np.arange(1, NUM_IDS + 1))
    quantiles = np.searchsorted(weights / weights[-1], (np.arange(1 << 16) + 0.5) / (1 << 16)).astype(np.uint16)
    return np.asarray(quantiles[generator.integers(1 << 16, size=(num_events, NUM_CATEGORIES), dtype=np.uint16)])


def table(codes: NDArray[Any]) -> pa.Table:
    """Rows as columns."""
    return pa.table({name: np.ascontiguousarray(codes[:, column]) for column, name in enumerate(NAMES)})


def make_store(folder: Path, num_events: int, seed: int) -> EventStore:
    """A store of seeded events, prepared from a Parquet file as a user's would be."""
    generator = np.random.default_rng(seed)
    source = folder / "source.parquet"
    schema = Schema.from_dict(
        {
            "name": "shuffle",
            "timestamp": "time",
            "timezone": "UTC",
            "key": NAMES[0],
            # An event a second, nine of ten before the split.
            "split": str(np.datetime64(num_events * 9 // 10, "s")),
            "categories": [{"name": name, "kind": "id"} for name in NAMES],
            "streams": [
                {"name": "actor", "entity": NAMES[0]},
                {"name": "location", "entity": NAMES[1]},
                {"name": "all", "entity": "all"},
            ],
        }
    )
    writer = None
    try:
        for start in range(0, num_events, BLOCK_ROWS):
            size = min(BLOCK_ROWS, num_events - start)
            seconds = pa.array(np.arange(start, start + size) * 10**9, pa.timestamp("ns"))
            block = table(zipf_rows(size, generator)).append_column("time", seconds)
            writer = writer or pq.ParquetWriter(source, block.schema)
            writer.write_table(block)
    finally:
        if writer is not None:
            writer.close()
    prepare(source, schema, folder / "store", progress=False)
    source.unlink()
    return EventStore.open(folder / "store")


@dataclass(frozen=True)
class Parser:
    """How a Parquet file is read, and how an item is cut out of what was read."""

    name: str
    load: Callable[[Path], Any]
    item: Callable[[Any, int], Tensor]
    is_row: bool = True
    """An item is one row; else a window of rows."""


def load_array(path: Path) -> NDArray[np.int32]:
    """A file's columns as one array of rows."""
    columns = pq.read_table(path, use_threads=False).columns
    return np.column_stack([column.to_numpy() for column in columns]).astype(np.int32)


def array_row(rows: NDArray[np.int32], row: int) -> Tensor:
    return torch.from_numpy(rows[row])


def load_frame(path: Path) -> Any:
    import pandas as pd

    return pd.read_parquet(path)


def frame_row(frame: Any, row: int) -> Tensor:
    return torch.from_numpy(frame.iloc[row].to_numpy(np.int32))


def frame_window(frame: Any, row: int) -> Tensor:
    """The rows around one, zeros where the file holds fewer."""
    start = max(0, row - WINDOW_BEFORE)
    rows = frame.iloc[start : start + WINDOW_ROWS].to_numpy(np.int32)
    window = np.zeros((WINDOW_ROWS, NUM_CATEGORIES), np.int32)
    window[: len(rows)] = rows
    return torch.from_numpy(window)


ARRAY = Parser("pyarrow to one array, a row of it", load_array, array_row)
FRAME = Parser("pandas frame, a row by iloc", load_frame, frame_row)
FRAME_WINDOW = Parser(f"pandas frame, {WINDOW_ROWS} rows by iloc", load_frame, frame_window, is_row=False)
PARSERS = {parser.name: parser for parser in (ARRAY, FRAME, FRAME_WINDOW)}


def write_files(codes: NDArray[Any], folder: Path, rows_per_file: int) -> list[Path]:
    """The rows in order, split over Parquet files of rows_per_file; the last one may be short."""
    folder.mkdir()
    paths = []
    for number, start in enumerate(range(0, len(codes), rows_per_file)):
        paths.append(folder / f"part-{number:05d}.parquet")
        pq.write_table(table(codes[start : start + rows_per_file]), paths[-1])
    return paths


class Parts(Dataset[Tensor]):
    """Items out of parts of a table, Parquet files or row groups, the part read last kept in an LRU cache of one.

    Args:
        load: reads the part of a number.
        rows_per_part: rows of every part but the last.
        num_events: rows of all parts.
        item: cuts a row's item out of what `load` gave.
        is_cached: whether a part is kept at all; else each item reads its own.

    Attributes:
        num_loads: parts read so far, by this process.
        load_s: seconds that those reads took.
    """

    def __init__(
        self,
        load: Callable[[int], Any],
        rows_per_part: int,
        num_events: int,
        item: Callable[[Any, int], Tensor] = array_row,
        *,
        is_cached: bool = True,
    ) -> None:
        self.load = load
        self.rows_per_part = rows_per_part
        self.num_events = num_events
        self.item = item
        self.is_cached = is_cached
        self.num_loads = 0
        self.load_s = 0.0
        self.part = lru_cache(maxsize=int(is_cached))(self._load)

    @property
    def num_parts(self) -> int:
        return -(-self.num_events // self.rows_per_part)

    def _load(self, number: int) -> Any:
        start_s = time.perf_counter()
        part = self.load(number)
        self.load_s += time.perf_counter() - start_s
        self.num_loads += 1
        return part

    def reads(self) -> tuple[int, float]:
        """Parts read so far, and the seconds that took."""
        return self.num_loads, self.load_s

    def forget(self) -> None:
        """Drop the part that is kept."""
        self.part.cache_clear()

    def __len__(self) -> int:
        return self.num_events

    def __getitem__(self, index: int) -> Tensor:
        number, row = divmod(index, self.rows_per_part)
        return self.item(self.part(number), row)

    def first(self, num_parts: int) -> Parts:
        """The items of the first parts alone."""
        num_events = min(self.num_events, num_parts * self.rows_per_part)
        return type(self)(self.load, self.rows_per_part, num_events, self.item, is_cached=self.is_cached)


class BatchedParts(Parts):
    """The same parts, asked for a batch at a time: each part that a batch touches is read once for it."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        items: dict[int, Tensor] = {}
        for place in sorted(range(len(indices)), key=lambda place: indices[place] // self.rows_per_part):
            items[place] = self[indices[place]]
        return [items[place] for place in range(len(indices))]


def parquet_files(paths: list[Path], rows_per_file: int, num_events: int, parser: Parser) -> Parts:
    """Many files, one of them kept, as the notes have it."""
    return Parts(lambda number: parser.load(paths[number]), rows_per_file, num_events, parser.item)


def parquet_groups(path: Path, rows_per_group: int, num_events: int, *, is_cached: bool) -> Parts:
    """Row groups of one file."""
    file = pq.ParquetFile(path)

    def load(number: int) -> NDArray[np.int32]:
        columns = file.read_row_group(number, use_threads=False).columns
        return np.column_stack([column.to_numpy() for column in columns]).astype(np.int32)

    return Parts(load, rows_per_group, num_events, is_cached=is_cached)


class MappedRows(Dataset[Tensor]):
    """A store's rows, item by item."""

    def __init__(self, store: EventStore) -> None:
        self.codes = store.codes

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.codes[index].astype(np.int32))


class MappedBatches(Dataset[Tensor]):
    """A store's rows, asked for a batch at a time and gathered by the store."""

    def __init__(self, store: EventStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return self.store.num_events

    def __getitem__(self, index: int) -> Tensor:
        return self.store.rows(torch.tensor(index))

    def __getitems__(self, indices: list[int]) -> Tensor:
        return self.store.rows(torch.as_tensor(indices))


def expected_loads(parts: Parts, num_items: int) -> float:
    """Reads that a random order's first items need. With one part kept, the next item lies in another part with
    probability (N - r) / (N - 1), where each part holds r of the N rows."""
    if not parts.is_cached:
        return num_items
    if parts.num_parts == 1:
        return 1
    return 1 + (num_items - 1) * (parts.num_events - parts.rows_per_part) / (parts.num_events - 1)


def resident_share(mapped: NDArray[Any]) -> float:
    """Share of a memory map's pages that the page cache holds, as mincore(2) tells; nan where it does not."""
    mincore = getattr(ctypes.CDLL(None, use_errno=True), "mincore", None)
    start, num_bytes = _pages(mapped)
    held = (ctypes.c_ubyte * -(-num_bytes // os.sysconf("SC_PAGE_SIZE")))()
    if mincore is None or mincore(ctypes.c_void_p(start), ctypes.c_size_t(num_bytes), held) != 0:
        return float("nan")
    return float((np.ctypeslib.as_array(held) & 1).mean())


def drop_from_cache(file: Path, mapped: NDArray[Any]) -> float:
    """Ask the system to drop a mapped file from the page cache; returns the share of pages that stayed.

    Pages that a process maps stay, so the map lets go of them first; the file must be on the disk for them to go.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not (hasattr(os, "posix_fadvise") and hasattr(libc, "madvise")):
        return float("nan")
    start, num_bytes = _pages(mapped)
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(num_bytes), MADV_DONTNEED)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return resident_share(mapped)


def read_ahead_kib(file: Path) -> int | None:
    """What the file's disk reads ahead at most; None where the system does not say."""
    device = file.stat().st_dev
    for place in ("", "../"):  # a partition is told of beside its disk
        setting = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}") / place / "queue/read_ahead_kb"
        if setting.is_file():
            return int(setting.read_text())
    return None


def _pages(mapped: NDArray[Any]) -> tuple[int, int]:
    """Where a map begins, rounded down to a page, and the bytes from there to its end."""
    start = mapped.ctypes.data // os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PAGE_SIZE")
    return start, mapped.ctypes.data + mapped.nbytes - start
