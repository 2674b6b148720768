"""Parquet's INT96 timestamps, as Impala, Hive and Spark write them: none is read as a time of another century.

Arrow reads them as nanoseconds of 64 bits and lets those wrap: 9999-12-31 becomes a day of 1816. Read once more in
seconds, which do not wrap, they tell which ones did.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

SECOND_NS = 1_000_000_000


def int96_columns(file: pa.parquet.ParquetFile) -> list[str]:
    """The columns of a Parquet file that hold INT96."""
    held = (file.schema.column(number) for number in range(len(file.schema)))
    return [column.path for column in held if column.physical_type == "INT96"]


def unwrapped(
    batches: Iterable[pa.RecordBatch], path: Path, columns: list[str], batch_rows: int
) -> Iterator[pa.RecordBatch]:
    """The batches of a file; a column of INT96 is ISO 8601 text in those of which nanoseconds do not hold it.

    Args:
        batches: rows of the file from the first one on, INT96 read as nanoseconds.
        path: the file.
        columns: which of the batches' columns hold INT96.
        batch_rows: how many rows are read at a time to compare with.
    """
    with pa.parquet.ParquetFile(path, coerce_int96_timestamp_unit="s", buffer_size=1 << 16, pre_buffer=False) as file:
        read = file.iter_batches(batch_rows, columns=columns, use_threads=False)
        held = pa.Table.from_batches([], file.schema_arrow).select(columns)
        for batch in batches:
            while len(held) < batch.num_rows:
                held = pa.concat_tables([held, pa.Table.from_batches([next(read)])])
            for name in columns:
                seconds = held[name][: batch.num_rows].combine_chunks()
                batch = batch.set_column(batch.schema.get_field_index(name), name, _exact(batch[name], seconds))
            held = held[batch.num_rows :]
            yield batch


def _exact(times: pa.Array, seconds: pa.Array) -> pa.Array:
    """Times in nanoseconds that agree with the seconds; as text, those that do not as the seconds have them."""
    nanoseconds = times.cast(pa.int64()).fill_null(0).to_numpy()
    wrapped = nanoseconds // SECOND_NS != seconds.cast(pa.int64()).fill_null(0).to_numpy()
    if not wrapped.any():
        return times
    return pc.if_else(pa.array(wrapped), seconds.cast(pa.string()), times.cast(pa.string()))
