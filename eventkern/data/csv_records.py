"""Records of a CSV file by RFC 4180, a block at a time, each with its line. (pyarrow loads here.)

A field that begins with a quote ends with the next quote that is not doubled, and after that one a comma, a line end or
the end of the file must come: anything else means a quote that was left open. So does a quoted field of several lines
one of which reads as a record of its own, with as many fields as the header and a time where the time belongs: a quote
that happens to close hundreds of rows later is found, too. A quote anywhere else is text (`5" pipe`). Lines end with
\\n, \\r\\n or \\r; blank ones hold no record.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eventkern import _C
from eventkern.data.schema import DataError
from eventkern.data.text import readable_text

BATCH_BYTES = 1 << 18
"""Of text in a block; a record that is longer makes its block as long as it is."""

MOST_RECORD_BYTES = 1 << 26
"""A quote that is not closed within so many counts as left open, which bounds the memory that it takes."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NEXT_LINE_WITH_TIME = re.compile(rb"[\r\n]([^\r\n]*,)?[ \t]*\d{4}-\d\d-\d\d")
CLOSE = 'close the quote on its line, or double one that is text ("")'


@dataclass(frozen=True)
class Mistake:
    """A record that breaks the rules.

    Attributes:
        row: good records before it, of its block.
        line: where it starts; of a quote that is left open, the line of the quote.
        told: what is wrong with it, and what would mend it.
    """

    row: int
    line: int
    told: str


@dataclass(frozen=True)
class Block:
    """Some records in a row.

    Attributes:
        columns: the wanted fields, as text.
        lines: (records,) where each starts, from 1.
        complaints: about records that hold a wanted field which is not UTF-8, by number.
        mistakes: the first records that break the rules, left out of `columns`.
        num_mistakes: how many there are.
        num_bytes: of the file, read so far.
    """

    columns: pa.RecordBatch
    lines: NDArray[np.int64]
    complaints: dict[int, str]
    mistakes: list[Mistake]
    num_mistakes: int
    num_bytes: int


class CsvRecords:
    """The records of an open file.

    Args:
        path: the file, for messages.
        file: it, open for reading at its beginning.
        most_listed: most mistakes of a block that are told.

    Attributes:
        header: the fields of the first record; any bytes.

    Raises:
        DataError: no record at all, or a header with a quote left open.
    """

    def __init__(self, path: Path, file: BinaryIO, most_listed: int) -> None:
        self._path, self._file, self._most_listed = path, file, most_listed
        self._reader = _C.CsvReader(most_bytes=MOST_RECORD_BYTES)
        self._text, self._is_last = file.read(BATCH_BYTES).removeprefix(BYTE_ORDER_MARK), False
        passed = self._reader.read_header(self._text, self._is_last)
        while not self._reader.header and not self._reader.num_mistakes and not self._is_last:
            self._read_on(passed)
            passed = self._reader.read_header(self._text, self._is_last)
        self._text = self._text[passed:]
        self.header = self._reader.header
        for mistake in self._mistakes():
            raise DataError(f"{path}, line {mistake.line}: {mistake.told}")
        if not self.header:
            raise DataError(f"{path}: is empty; give a CSV file with a header line")
        if any(NEXT_LINE_WITH_TIME.search(name) for name in self.header):
            raise DataError(f"{path}, line 1: a quoted name of the header reaches over records below it; {CLOSE}")

    def blocks(self, columns: dict[str, int], time_field: int) -> Iterator[Block]:
        """The records below the header.

        Args:
            columns: name and field number of each column that is wanted.
            time_field: field number of the time that every record has.

        Raises:
            DataError: a line that is longer than `MOST_RECORD_BYTES`.
        """
        self._reader.select(list(columns.values()), time_field)
        while True:
            passed = self._reader.read(self._text, self._is_last)
            complaints: dict[int, str] = {}
            arrays = []
            for name, (offsets, text) in zip(columns, self._reader.columns(), strict=True):
                array = pa.StringArray.from_buffers(len(offsets) // 4 - 1, pa.py_buffer(offsets), pa.py_buffer(text))
                arrays.append(readable_text(name, array, complaints, "save the file as UTF-8 text"))
            yield Block(
                pa.RecordBatch.from_arrays(arrays, list(columns)),
                np.frombuffer(self._reader.lines(), np.int64),
                complaints,
                self._mistakes(),
                self._reader.num_mistakes,
                self._file.tell(),
            )
            if self._is_last:
                return
            self._read_on(passed)

    def _read_on(self, passed: int) -> None:
        """Drops what was passed, and reads as much again as is left of a record, at least a block."""
        if not passed and len(self._text) >= MOST_RECORD_BYTES:
            line, most = self._reader.next_line, f"{MOST_RECORD_BYTES:,} bytes"
            raise DataError(f"{self._path}, line {line}: has no end within {most}; is it CSV text?")
        rest = self._text[passed:]
        more = self._file.read(max(BATCH_BYTES, len(rest)))
        self._text, self._is_last = rest + more, not more

    def _mistakes(self) -> list[Mistake]:
        return [
            Mistake(row, line, self._told(fault, line, number, other_line))
            for fault, row, line, number, other_line in self._reader.mistakes(self._most_listed)
        ]

    def _told(self, fault: str, line: int, number: int, other_line: int) -> str:
        width = len(self._reader.header)
        if fault == "num_fields":
            few = "few" if number < width else "many"
            return f"too {few} fields, {number}; the header has {width}: complete the line"
        column = repr(self._reader.header[number].decode(errors="replace")) if number < width else f"{number + 1}"
        opens = f"a quote is left open in column {column}"
        if fault == "never_closed":
            return f"{opens}, none closes it; {CLOSE}"
        if fault == "after_quote":
            where = "" if other_line == line else f" (line {other_line})"
            return f"{opens}, for the next one{where} stands before neither a comma nor a line's end; {CLOSE}"
        return (
            f"{opens}, for line {other_line} inside the quotes reads as a record of its own; {CLOSE} (a table whose "
            "text holds such lines: give it as Parquet)"
        )
