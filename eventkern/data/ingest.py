"""The first pass over a source: every column as numbers, spilled to files so that memory stays bounded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eventkern.data import columns as read
from eventkern.data.schema import Category, DataError, Schema
from eventkern.data.source import MOST_LISTED, SKIP, Advance, Batch, Skipped, SourceFile
from eventkern.data.store import BLOCK_ROWS, IDENTIFIER_FORM
from eventkern.data.vocabulary import ValueNumbers
from eventkern.disk import wanting, write_all

TIMESTAMP = ""  # no category has an empty name
SPILLED_BYTES = {"id": 4, "flag": 2, "bins": 8, "time": 2, "elapsed": 0}
MENDS = {
    "timestamp": "no timestamp between 1678 and 2261; write it like 2013-11-01T09:30:00",
    "number": "no finite number; write it like 7.5, or leave it empty",
    "flag": "neither false nor true; write 0, 1, false or true",
}


class Spill:
    """Columns of numbers in files, written and read in blocks (maps of the files would count as memory in use).

    Attributes:
        num_bytes: of all of them.
    """

    num_bytes = 0

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._files: dict[str, FileIO] = {}
        self._dtypes: dict[str, np.dtype[Any]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._files)

    def append(self, name: str, values: NDArray[Any]) -> None:
        """Add values at the end of a column, which the first call creates."""
        if name not in self._files:
            # Files are numbered, for a category's name need not be a file's.
            self._files[name] = (self._folder / str(len(self._files))).open("w+b", buffering=0)
            self._dtypes[name] = values.dtype
        self._files[name].seek(0, os.SEEK_END)
        write_all(self._files[name], values)
        self.num_bytes += values.nbytes

    def read(self, name: str, block: slice) -> NDArray[Any]:
        """The values of a block of rows."""
        file, dtype = self._files[name], self._dtypes[name]
        return np.fromfile(file.name, dtype, block.stop - block.start, offset=block.start * dtype.itemsize)

    def reorder(self, name: str, order: NDArray[np.int64]) -> None:
        """Let row i of a column be what its row order[i] was."""
        values = self.read(name, slice(0, len(order)))
        self._files[name].seek(0)
        for block in blocks(len(order)):
            write_all(self._files[name], values[order[block]])

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def blocks(num_rows: int) -> Iterator[slice]:
    """Consecutive slices of at most `BLOCK_ROWS` rows."""
    return (slice(start, min(start + BLOCK_ROWS, num_rows)) for start in range(0, num_rows, BLOCK_ROWS))


@dataclass
class Ingested:
    """What the first pass leaves behind.

    Attributes:
        spill: `TIMESTAMP` (int64 nanoseconds, UTC) and raw numbers of each category but the elapsed, in source order.
        num_events: rows kept.
        values: distinct values of each `id` category, by number.
        years: first and last year of each category that is one.
        skipped: rows left out.
    """

    spill: Spill
    num_events: int = 0
    values: dict[str, ValueNumbers] = field(default_factory=dict)
    years: dict[str, tuple[int, int]] = field(default_factory=dict)
    skipped: Skipped = field(default_factory=Skipped)


def ingest(
    files: list[SourceFile],
    schema: Schema,
    spill: Spill,
    on_error: Literal["raise", "skip"],
    advance: Advance,
    identifier_form: int = IDENTIFIER_FORM,
) -> Ingested:
    """Read every file once, identifiers in the form that `store.IDENTIFIER_FORM` tells of.

    Raises:
        DataError: the first row that cannot be read (unless on_error is "skip"), a column of a type that its category
            cannot read, or no row at all.
    """
    form = read.canonical if identifier_form else str
    ingested = Ingested(spill, values={c.name: ValueNumbers(form) for c in schema.categories if c.kind == "id"})
    total_bytes = sum(file.path.stat().st_size for file in files)
    done_bytes, num_rows = 0.0, 0
    for file in files:
        complaints: list[tuple[int, str]] = []
        num_bad = 0
        for batch in file.batches(skip_malformed=on_error == "skip"):
            share_done = (done_bytes + file.share_read * file.path.stat().st_size) / total_bytes
            num_rows += batch.columns.num_rows
            with wanting(partial(_foreseen_bytes, schema, int(num_rows / share_done))):
                bad = _ingest_batch(batch, schema, ingested, file)
            if bad and on_error == "raise":
                first = min(bad)
                raise DataError(f"{file.described(int(batch.places[first]), bad[first])}, {SKIP}")
            complaints += [(int(batch.places[b]), bad[b]) for b in sorted(bad)[: MOST_LISTED - len(complaints)]]
            num_bad += len(bad)
            advance(share_done, 1)
        ingested.skipped.add(file, complaints, num_bad)
        done_bytes += file.path.stat().st_size
    if not ingested.num_events:
        skipped = f" ({ingested.skipped.count} rows skipped)" if ingested.skipped.count else ""
        raise DataError(f"{files[0].path}: the table is empty{skipped}; give at least one event")
    return ingested


def _foreseen_bytes(schema: Schema, num_rows: int) -> int:
    """What the spilled columns and the store of so many rows take on the disk together."""
    spilled = 8 + sum(SPILLED_BYTES[category.kind] for category in schema.categories)
    stored = 8 + 2 * len(schema.categories) + 12 * len(schema.entities)  # times, codes, both ways of each index
    return (spilled + stored) * num_rows


def _ingest_batch(batch: Batch, schema: Schema, ingested: Ingested, file: SourceFile) -> dict[int, str]:
    """Spill a batch without its bad rows; returns the complaint about each of those."""
    complaints = dict(batch.complaints)
    raw: dict[str, Any] = {}
    for name, category, values, bad, wanted in _read_columns(batch.columns, schema, file):
        column = category.column if category else schema.timestamp
        for row in bad:
            value = read.shown(batch.columns.column(column), row)
            held = "is missing, so it is" if value in (None, "") else f"holds {value[:60]!r}, which is"
            complaints.setdefault(row, f"column {column!r} {held} {MENDS[wanted]}")
        raw[name] = values
    keep = np.ones(batch.columns.num_rows, bool)
    keep[list(complaints)] = False
    if not keep.any():
        return complaints
    for name, values in raw.items():
        numbers = values
        if complaints:
            numbers = values[keep] if isinstance(values, np.ndarray) else values.filter(pa.array(keep))
        if name == TIMESTAMP:
            numbers = read.nanoseconds(numbers)
        elif name in ingested.values:
            numbers = _numbered(numbers, ingested.values[name])
        elif schema.category(name).field == "year" and (numbers >= 0).any():
            seen = numbers[numbers >= 0]
            first, last = ingested.years.get(name, (int(seen.min()), int(seen.max())))
            ingested.years[name] = min(first, int(seen.min())), max(last, int(seen.max()))
        ingested.spill.append(name, numbers)
    ingested.num_events += int(keep.sum())
    return complaints


def _read_columns(
    batch: pa.RecordBatch, schema: Schema, file: SourceFile
) -> Iterator[tuple[str, Category | None, Any, list[int], str]]:
    """Name, category (None: the timestamp), raw values, bad rows and what was wanted, for each column of the store."""
    times: dict[str, read.Times] = {}
    for category in (None, *schema.categories):
        column = schema.timestamp if category is None else category.column
        if not column:
            continue
        try:
            if category is None or category.kind == "time":
                if column not in times:
                    times[column] = read.read_times(batch.column(column), schema.timezone)
                wall, bad = times[column].wall, times[column].bad
                if category is None:
                    instants = times[column].instants
                    missing = np.flatnonzero(instants.is_null().to_numpy(zero_copy_only=False)).tolist()
                    yield TIMESTAMP, None, instants, missing, "timestamp"
                else:
                    yield category.name, category, read.field_of(wall, category.field or ""), bad, "timestamp"
            elif category.kind == "bins":
                yield category.name, category, *read.read_numbers(batch.column(column)), "number"
            elif category.kind == "flag":
                yield category.name, category, *read.read_flags(batch.column(column)), "flag"
            else:
                yield category.name, category, read.read_identifiers(batch.column(column)), [], ""
        except (DataError, pa.ArrowException) as error:
            what = "" if category is None else f" of category {category.name!r} (kind {category.kind!r})"
            told = str(error) if isinstance(error, DataError) else _told(error, schema)
            raise DataError(f"{file.path}: column {column!r}{what} {told}") from error


def _told(error: Exception, schema: Schema) -> str:
    """What Arrow says of a column, in one line with the mend."""
    reason = str(error).splitlines()[0]
    if "imezone" in reason:  # Arrow reads the system's zones alone, not those of Python's package
        return f"needs the system's time zones ({reason}); install its package tzdata, for {schema.timezone!r}"
    return f"is not readable ({reason}); write it as text"


def _numbered(identifiers: pa.Array, values: ValueNumbers) -> NDArray[np.int32]:
    """The number of each identifier, -1 where missing."""
    encoded = identifiers.dictionary_encode()
    numbers = np.append(values.add(encoded.dictionary.to_pylist()), np.int32(-1))
    return np.asarray(numbers[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)])
