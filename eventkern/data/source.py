"""CSV and Parquet files read in batches, each row with its place. (pyarrow loads here.)"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray

from eventkern.data.csv_records import CsvRecords
from eventkern.data.int96 import int96_columns, unwrapped
from eventkern.data.schema import DataError
from eventkern.data.text import readable_text

BATCH_ROWS = 1 << 14
MOST_LISTED = 10
BYTES = "write it as text, such as the hexadecimal digits of its bytes"
SKIP = "or skip such rows (--on-error skip)"

Advance = Callable[[float, float], None]
"""Called with what is done and the total, in any unit."""


@dataclass(frozen=True)
class Batch:
    """Some rows of a file, in their order.

    Attributes:
        columns: the wanted columns; text where the file is CSV.
        places: (rows,) line on which each starts (CSV), or its number (Parquet), from 1.
        complaints: about rows that hold a value which cannot be read at all, by number of the row in `columns`.
    """

    columns: pa.RecordBatch
    places: NDArray[np.int64]
    complaints: dict[int, str] = field(default_factory=dict)


@dataclass
class SourceFile:
    """One CSV or Parquet file. What is not read of it need not be valid, as long as its rows can be told apart.

    Attributes:
        path: the file.
        columns: the columns to read, that of the time first.
        num_malformed: CSV records skipped so far for a wrong number of fields or a quote that is left open.
        malformed: line and fault of the first of them.
        share_read: how much of the file `batches` has passed, 0 to 1.
    """

    path: Path
    columns: tuple[str, ...]
    num_malformed: int = 0
    malformed: list[tuple[int, str]] = field(default_factory=list)
    share_read: float = 0.0

    @property
    def is_csv(self) -> bool:
        return self.path.suffix.lower() == ".csv"

    def check(self) -> None:
        """Raise DataError unless the header names every column once."""
        try:
            if self.is_csv:
                with self.path.open("rb") as file:
                    self._fields(CsvRecords(self.path, file, MOST_LISTED).header)
            else:
                self._require_columns(list(pa.parquet.read_schema(self.path).names))
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self._unreadable(error) from error

    def batches(self, skip_malformed: bool) -> Iterator[Batch]:
        """The wanted columns, a bounded number of rows at a time.

        Args:
            skip_malformed: go on after CSV records that break the rules, and count them.

        Raises:
            DataError: such a record otherwise, or a file that cannot be read.
        """
        try:
            yield from self._csv_batches(skip_malformed) if self.is_csv else self._parquet_batches()
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error, self._damaged_column()) from error

    def described(self, place: int, complaint: str) -> str:
        """A complaint about one row, with its place."""
        return f"{self.path}, {'line' if self.is_csv else 'row'} {place}: {complaint}"

    def _fields(self, header: list[bytes]) -> dict[str, int]:
        """The field number of each column."""
        names = [name.decode(errors="replace") for name in header]
        wanted = [column.encode() for column in self.columns]
        if not set(wanted) <= set(header):
            b"\n".join(header).decode()  # a name is not missing where the file is no UTF-8 at all
        self._require_columns(names)
        return dict(zip(self.columns, map(header.index, wanted), strict=True))

    def _require_columns(self, held: list[str]) -> None:
        for column in self.columns:
            if held.count(column) != 1:
                fault = "is missing" if column not in held else "is named twice"
                raise DataError(
                    f"{self.path}: column {column!r} {fault}; the file has {_listed(held)}: "
                    "rename the file's column, or the schema's"
                )

    def _csv_batches(self, skip_malformed: bool) -> Iterator[Batch]:
        num_bytes = self.path.stat().st_size
        with self.path.open("rb") as file:
            records = CsvRecords(self.path, file, MOST_LISTED)
            fields = self._fields(records.header)
            for block in records.blocks(fields, fields[self.columns[0]]):
                self.share_read = block.num_bytes / max(num_bytes, 1)
                if block.mistakes and not skip_malformed:  # a bad row before it is the first fault of the file
                    first = block.mistakes[0]
                    complaints = {row: told for row, told in block.complaints.items() if row < first.row}
                    yield Batch(block.columns[: first.row], block.lines[: first.row], complaints)
                    raise DataError(f"{self.described(first.line, first.told)}, {SKIP}")
                self.num_malformed += block.num_mistakes
                room = MOST_LISTED - len(self.malformed)
                self.malformed += [(mistake.line, mistake.told) for mistake in block.mistakes[:room]]
                yield Batch(block.columns, block.lines, block.complaints)

    def _parquet_batches(self) -> Iterator[Batch]:
        # Without pre_buffer=False arrow fetches a whole row group, which may be the whole file.
        with pa.parquet.ParquetFile(
            self.path, buffer_size=1 << 16, pre_buffer=False, page_checksum_verification=True
        ) as file:
            rows, num_rows = 0, file.metadata.num_rows
            batches = file.iter_batches(BATCH_ROWS, columns=list(self.columns), use_threads=False)
            if int96 := [column for column in int96_columns(file) if column in self.columns]:
                batches = unwrapped(batches, self.path, int96, BATCH_ROWS)
            for columns in batches:
                places = np.arange(rows + 1, rows + columns.num_rows + 1)
                rows += columns.num_rows
                self.share_read = rows / num_rows
                complaints: dict[int, str] = {}
                read = [readable_text(name, columns.column(name), complaints, BYTES) for name in self.columns]
                yield Batch(pa.RecordBatch.from_arrays(read, list(self.columns)), places, complaints)
        if rows != num_rows:
            raise DataError(f"{self.path}: gave {rows} rows where it says {num_rows}; write the file again")

    def _damaged_column(self) -> str | None:
        """The first column that a Parquet file does not give."""
        if not self.is_csv:
            for column in self.columns:
                try:
                    for _ in SourceFile(self.path, (column,))._parquet_batches():
                        pass
                except (pa.ArrowException, OSError):
                    return column
        return None

    def _unreadable(self, error: Exception, column: str | None = None) -> DataError:
        if isinstance(error, OSError) and error.errno is not None:
            return cannot_be_read(self.path, error)
        reason = str(error).splitlines()[0]
        mend = "save it as UTF-8 text, comma-separated" if self.is_csv else "write the file again"
        where = self.path if column is None else f"{self.path}: column {column!r}"
        return DataError(f"{where}: not readable as {'CSV' if self.is_csv else 'Parquet'} ({reason}); {mend}")


def cannot_be_read(path: Path, error: OSError) -> DataError:
    """What the system says of a file or folder, in one line with its name."""
    return DataError(f"{path}: cannot be read ({error.strerror}); give a file that can, or a folder of such")


def _listed(names: list[str], most: int = 50) -> str:
    """Names in quotes, cut where they would fill a screen."""
    shown = ", ".join(repr(name if len(name) <= 60 else f"{name[:57]}...") for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def source_files(source: str | Path, columns: tuple[str, ...]) -> list[SourceFile]:
    """The files of a source, checked to exist and to hold the columns.

    Args:
        source: a CSV file, a Parquet file, or a folder of either kind, read in the order of their names.
        columns: the columns to read.

    Raises:
        DataError: no such file, no CSV or Parquet in the folder, both kinds at once, a folder of such a name in it, a
            missing column, or what the system or Arrow cannot read.
    """
    path = Path(source)
    try:
        paths = _paths(path)
    except OSError as error:
        raise cannot_be_read(path, error) from error
    files = [SourceFile(file, columns) for file in paths]
    for file in files:
        file.check()
    return files


def _paths(path: Path) -> list[Path]:
    if path.is_dir():
        paths = sorted(file for file in path.iterdir() if file.suffix.lower() in (".csv", ".parquet"))
        if len({file.suffix.lower() for file in paths}) != 1:
            fault = "CSV and Parquet files side by side" if paths else "no .csv or .parquet file"
            raise DataError(f"{path}: the folder holds {fault}; give a folder of one kind")
        for file in paths:
            if file.is_dir():
                raise DataError(f"{file}: is a folder inside the source; give it alone, or move its files out of it")
        return paths
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder; give a CSV file, a Parquet file, or a folder of either")
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise DataError(f"{path}: ends in {path.suffix!r}; give a .csv or .parquet file, or a folder of either")
    return [path]


@dataclass
class Skipped:
    """Rows that on_error="skip" left out: how many, and the first ones in words.

    Attributes:
        count: rows left out.
        listed: the first of them, each with its file and line.
    """

    count: int = 0
    listed: list[str] = field(default_factory=list)

    def add(self, file: SourceFile, complaints: list[tuple[int, str]], num_bad: int) -> None:
        """Count a file's bad rows, and list the first of them in the order of their places."""
        self.count += num_bad + file.num_malformed
        room = MOST_LISTED - len(self.listed)
        first = sorted(complaints + file.malformed)[:room]
        self.listed += [file.described(place, text) for place, text in first]
