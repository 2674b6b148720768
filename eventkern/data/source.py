"""CSV and Parquet files read in batches, and the way back from a row to its line. (pyarrow loads here.)"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from eventkern.data.schema import DataError

BATCH_ROWS = 1 << 14
BATCH_BYTES = 1 << 18
"""Of CSV text; arrow reads up to 32 such blocks ahead."""

MOST_LISTED = 10

Advance = Callable[[float, float], None]
"""Called with what is done and the total, in any unit."""


@dataclass
class SourceFile:
    """One CSV or Parquet file.

    Attributes:
        path: the file.
        columns: the columns to read.
        width: fields of a CSV record, as its header has them; 0 for Parquet.
        malformed: CSV records skipped so far for having another number of fields.
        share_read: how much of the file `batches` has passed, 0 to 1.
    """

    path: Path
    columns: tuple[str, ...]
    width: int = 0
    malformed: int = 0
    share_read: float = 0.0

    @property
    def is_csv(self) -> bool:
        return self.path.suffix.lower() == ".csv"

    def check(self) -> None:
        """Raise DataError unless the header names every column once."""
        try:
            held = self._header()
        except (pa.ArrowInvalid, UnicodeDecodeError, csv.Error) as error:
            raise self._unreadable(error) from error
        for column in self.columns:
            if held.count(column) != 1:
                fault = "is missing" if column not in held else "is named twice"
                raise DataError(
                    f"{self.path}: column {column!r} {fault}; the file has {', '.join(map(repr, held))}: "
                    "rename the file's column, or the schema's"
                )

    def batches(self, skip_malformed: bool) -> Iterator[pa.RecordBatch]:
        """The wanted columns, a bounded number of rows at a time; text where the file is CSV."""
        try:
            yield from self._csv_batches(skip_malformed) if self.is_csv else self._parquet_batches()
        except pa.ArrowInvalid as error:
            bad = self.malformed_records(1) if self.is_csv else []
            raise (DataError(f"{self.path}, {bad[0][1]}") if bad else self._unreadable(error)) from error

    def places(self, rows: Iterable[int]) -> dict[int, int]:
        """Line (CSV, where the record starts) or row (Parquet) of each row number of `batches`, counted from 1."""
        if not self.is_csv:
            return {row: row + 1 for row in rows}
        wanted, lines, row = set(rows), {}, 0
        for line, record in self._records():
            if len(record) == self.width:
                if row in wanted:
                    lines[row] = line
                row += 1
            if len(lines) == len(wanted):
                break
        return lines

    def malformed_records(self, most: int) -> list[tuple[int, str]]:
        """Line and complaint of the first records whose number of fields is not the header's."""
        found = []
        for line, record in self._records():
            if len(record) != self.width:
                fault = "too few" if len(record) < self.width else "too many"
                mend = f"the header has {self.width}: complete the line, or skip such rows (--on-error skip)"
                found.append((line, f"line {line}: {fault} fields, {len(record)}; {mend}"))
                if len(found) == most:
                    break
        return found

    def _header(self) -> list[str]:
        if not self.is_csv:
            return list(pa.parquet.read_schema(self.path).names)
        with self.path.open(newline="", encoding="utf-8-sig") as file:
            header = next((record for record in csv.reader(file) if record), None)
        if header is None:
            raise DataError(f"{self.path}: is empty; give a CSV file with a header line")
        self.width = len(header)
        return header

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """Each record below the header with the line on which it starts; blank lines hold no record."""
        with self.path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            reader = csv.reader(file)
            line, is_header = 1, True
            try:
                for record in reader:
                    if record and not is_header:
                        yield line, record
                    is_header = is_header and not record
                    line = reader.line_num + 1
            except csv.Error as error:
                raise DataError(f"{self.path}, line {line}: {error}; is a quote left open there?") from error

    def _csv_batches(self, skip_malformed: bool) -> Iterator[pa.RecordBatch]:
        def on_malformed(row: Any) -> str:
            self.malformed += 1
            return "skip" if skip_malformed else "error"

        if next(self._records(), None) is None:  # arrow refuses a header without a line end
            return
        with (
            pa.OSFile(str(self.path)) as file,
            pa.csv.open_csv(
                file,
                pa.csv.ReadOptions(use_threads=False, block_size=BATCH_BYTES),
                pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=on_malformed),
                pa.csv.ConvertOptions(
                    include_columns=list(self.columns),
                    column_types=dict.fromkeys(self.columns, pa.string()),
                    null_values=[""],  # which other texts mean a missing value depends on the category's kind
                    strings_can_be_null=True,
                ),
            ) as reader,
        ):
            for batch in reader:
                self.share_read = file.tell() / file.size()
                yield batch

    def _parquet_batches(self) -> Iterator[pa.RecordBatch]:
        # Without pre_buffer=False arrow fetches a whole row group, which may be the whole file.
        with pa.parquet.ParquetFile(self.path, buffer_size=1 << 16, pre_buffer=False) as file:
            rows = 0
            for batch in file.iter_batches(BATCH_ROWS, columns=list(self.columns), use_threads=False):
                rows += batch.num_rows
                self.share_read = rows / file.metadata.num_rows
                yield batch

    def _unreadable(self, error: Exception) -> DataError:
        reason = str(error).splitlines()[0]
        mend = "save it as UTF-8 text, comma-separated" if self.is_csv else "write the file again"
        return DataError(f"{self.path}: not readable as {'CSV' if self.is_csv else 'Parquet'} ({reason}); {mend}")


def source_files(source: str | Path, columns: tuple[str, ...]) -> list[SourceFile]:
    """The files of a source, checked to exist and to hold the columns.

    Args:
        source: a CSV file, a Parquet file, or a folder of either kind, read in the order of their names.
        columns: the columns to read.

    Raises:
        DataError: no such file, no CSV or Parquet in the folder, both kinds at once, or a missing column.
    """
    path = Path(source)
    if path.is_dir():
        paths = sorted(file for file in path.iterdir() if file.suffix.lower() in (".csv", ".parquet"))
        if len({file.suffix.lower() for file in paths}) != 1:
            fault = "CSV and Parquet files side by side" if paths else "no .csv or .parquet file"
            raise DataError(f"{path}: the folder holds {fault}; give a folder of one kind")
    elif not path.is_file():
        raise DataError(f"{path}: no such file or folder; give a CSV file, a Parquet file, or a folder of either")
    elif path.suffix.lower() not in (".csv", ".parquet"):
        raise DataError(f"{path}: ends in {path.suffix!r}; give a .csv or .parquet file, or a folder of either")
    else:
        paths = [path]
    files = [SourceFile(file, columns) for file in paths]
    for file in files:
        file.check()
    return files


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
        """Count a file's bad rows and list the first of them in the order of their lines."""
        self.count += num_bad + file.malformed
        room = MOST_LISTED - len(self.listed)
        if room > 0 and num_bad + file.malformed:
            places = file.places(row for row, _ in complaints)
            lines = [(places[row], described(file, places[row], text)) for row, text in complaints]
            if file.malformed:
                lines += [(line, f"{file.path}, {text}") for line, text in file.malformed_records(room)]
            self.listed += [text for _, text in sorted(lines)[:room]]


def described(file: SourceFile, place: int, complaint: str) -> str:
    """A complaint about one row, with its place."""
    return f"{file.path}, {'line' if file.is_csv else 'row'} {place}: {complaint}"
