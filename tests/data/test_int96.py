"""INT96 timestamps: right to the nanosecond, or told."""

import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eventkern.data.int96 import int96_columns, unwrapped
from eventkern.data.source import BATCH_ROWS, SourceFile

NANOSECONDS = 1_700_000_000_123_456_789
FAR = datetime.datetime(9999, 12, 31)


def write(path: Path, *times: pa.Array) -> Path:
    columns = {f"t{number}": column for number, column in enumerate(times)}
    pq.write_table(pa.table(columns), path, use_deprecated_int96_timestamps=True, row_group_size=700)
    return path


def test_what_is_in_range_stays_exact(tmp_path: Path) -> None:
    held = pa.array([NANOSECONDS, None, -1, -(2**63) + 1, 2**63 - 1], pa.timestamp("ns"))
    (batch,) = SourceFile(write(tmp_path / "t.parquet", held), ("t0",)).batches(skip_malformed=False)
    assert batch.columns.column("t0").equals(held)


@pytest.mark.parametrize("far", [FAR, datetime.datetime(1, 1, 1), datetime.datetime(2262, 4, 12)])
def test_what_is_out_of_range_is_told_as_it_is(tmp_path: Path, far: datetime.datetime) -> None:
    near = datetime.datetime(2024, 1, 2, 3, 4, 5, 678_901)
    path = write(tmp_path / "t.parquet", pa.array([near, far, None], pa.timestamp("us")))
    (batch,) = SourceFile(path, ("t0",)).batches(skip_malformed=False)
    told = far.isoformat(sep=" ")
    assert batch.columns.column("t0").to_pylist() == ["2024-01-02 03:04:05.678901000", told, None]


def test_rows_are_compared_with_themselves_whatever_the_batches(tmp_path: Path) -> None:
    """Columns of other kinds may cut batches elsewhere than those that are compared with."""
    num_rows = 2 * BATCH_ROWS + 100
    times = [datetime.datetime(2024, 1, 1) + datetime.timedelta(seconds=row) for row in range(num_rows)]
    times[BATCH_ROWS + 7] = FAR
    plain = pa.array(times, pa.timestamp("us"))
    path = write(tmp_path / "t.parquet", plain, plain)
    with pq.ParquetFile(path) as file:
        assert int96_columns(file) == ["t0", "t1"]
        cut = list(unwrapped(file.iter_batches(1000), path, ["t1"], 700))
    assert sum(batch.num_rows for batch in cut) == num_rows
    is_text = [pa.types.is_string(batch.column("t1").type) for batch in cut]
    assert [number for number, is_it in enumerate(is_text) if is_it] == [(BATCH_ROWS + 7) // 1000]
    assert not any(pa.types.is_string(batch.column("t0").type) for batch in cut)
    whole = [value for batch in cut for value in batch.column("t1").cast(pa.string()).to_pylist()]
    assert whole[BATCH_ROWS + 7] == "9999-12-31 00:00:00"
    expected = plain.filter(pa.array([time != FAR for time in times])).cast(pa.timestamp("ns")).cast(pa.string())
    assert [value for value in whole if not value.startswith("9999")] == expected.to_pylist()
