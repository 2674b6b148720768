import csv
import io
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eventkern import _C
from eventkern.data import csv_records
from eventkern.data.prepare import prepare
from eventkern.data.schema import DataError, Schema
from eventkern.data.store import EventStore

MANY = 10**6


def read(text: bytes, block_bytes: int = 1 << 18) -> tuple[list[list[str]], list[int], list[tuple[int, str]]]:
    """The records below the header, the line of each, and line and kind of each mistake; the text comes in blocks."""
    reader = _C.CsvReader(most_bytes=1 << 20)
    passed = reader.read_header(text, True)
    reader.select(range(len(reader.header)), 0)
    records: list[list[str]] = []
    lines: list[int] = []
    mistakes: list[tuple[int, str]] = []
    end = passed
    while True:
        end = min(end + block_bytes, len(text))
        passed += reader.read(text[passed:end], end == len(text))
        columns = []
        for offsets, values in reader.columns():
            ends = np.frombuffer(offsets, np.int32)
            columns.append([values[a:b].decode() for a, b in itertools.pairwise(ends)])
        records += map(list, zip(*columns, strict=True))
        lines += np.frombuffer(reader.lines(), np.int64).tolist()
        mistakes += [(line, kind) for kind, _, line, _, _ in reader.mistakes(MANY)]
        assert len(records) == len(lines)
        if end == len(text):
            assert passed == len(text)
            return records, lines, mistakes


# Legal text


@settings(max_examples=200, deadline=None)
@given(
    records=st.lists(st.lists(st.text(st.sampled_from('a",\r\n é'), max_size=6), min_size=3, max_size=3), max_size=8),
    quotes_all=st.booleans(),
    line_end=st.sampled_from(["\n", "\r\n", "\r"]),
    ends=st.booleans(),
    block_bytes=st.integers(1, 40),
)
def test_legal_records_are_read_back_whatever_the_blocks(
    records: list[list[str]], quotes_all: bool, line_end: str, ends: bool, block_bytes: int
) -> None:
    def written(field: str) -> str:
        return f'"{field.replace(chr(34), chr(34) * 2)}"' if quotes_all or set(field) & set(',"\r\n') else field

    text, starts = f"x,y,z{line_end}", []
    for record in records:
        starts.append(len(text))
        text += ",".join(map(written, record)) + line_end
    assert not records or list(csv.reader(io.StringIO(text, newline="")))[1:] == records
    found, lines, mistakes = read((text if ends else text.removesuffix(line_end)).encode(), block_bytes)
    assert not mistakes
    assert found == records
    every_line = io.StringIO(text, newline="")  # ends lines as the reader does, and keeps what ends them
    begins = np.cumsum([0, *map(len, every_line)]).tolist()
    assert [begins[line - 1] for line in lines] == starts


@pytest.mark.parametrize("block_bytes", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("text", "records", "lines"),
    [
        ('x,5" pipe\ny,a"b"c\nz,"\n', [["x", '5" pipe'], ["y", 'a"b"c']], [2, 3]),  # but for z, see below
        ('\n\r\nx,"a\n\r\nb"\r\ry, "c"', [["x", "a\n\r\nb"], ["y", ' "c"']], [4, 8]),
        ('x,\n,""\n"""",""""""\n', [["x", ""], ["", ""], ['"', '""']], [2, 3, 4]),
        ("x,a\0b", [["x", "a\0b"]], [2]),
    ],
)
def test_a_quote_counts_only_where_a_field_begins(
    text: str, records: list[list[str]], lines: list[int], block_bytes: int
) -> None:
    found, of, mistakes = read(b"at,note\n" + text.encode(), block_bytes)
    assert (found, of) == (records, lines)
    assert mistakes == ([(4, "never_closed")] if "z" in text else [])


# Quotes that are left open


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.sampled_from('a",\r\n2'), max_size=60).map(str.encode),
    block_bytes=st.integers(1, 20),
)
@example(text=b'\r"\r\n', block_bytes=1)
def test_any_text_gives_the_same_in_any_blocks_and_loses_no_line(text: bytes, block_bytes: int) -> None:
    whole = read(b"at,note\n" + text)
    assert read(b"at,note\n" + text, block_bytes) == whole
    records, lines, mistakes = whole
    held = sorted(lines + [line for line, _ in mistakes])
    inside = sum(field.count("\n") + field.replace("\r\n", "").count("\r") for record in records for field in record)
    num_lines = len([line for line in io.StringIO(text.decode(), newline="") if line.strip("\r\n")])
    if all(kind != "num_fields" for _, kind in mistakes):  # those may reach over several lines, too
        assert len(held) >= num_lines - inside
    assert len(set(held)) == len(held)


ROWS = [f"2024-01-01T{minute // 60:02}:{minute % 60:02},a,{minute % 2},1,2000-01-01,k,fine" for minute in range(1000)]
OPEN = ROWS[5].replace("fine", '"note 5')


def write_notes(path: Path, changed: dict[int, str], line_end: str = "\n") -> Path:
    """A table of 1,000 rows with columns that are not read, some of whose rows are others."""
    rows = [changed.get(number, row) for number, row in enumerate(ROWS)]
    path.write_bytes((line_end.join(["at,who,paid,price,birth,code,note", *rows]) + line_end).encode())
    return path


@pytest.mark.parametrize("block_bytes", [50, 4000, 1 << 18])
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({5: OPEN}, "line 7: a quote is left open in column 'note', none closes it; close the quote on its line"),
        ({5: OPEN, 499: ROWS[499] + '"'}, r"line 7: .* 'note', for line 8 inside the quotes reads as a record of its"),
        ({5: OPEN, 499: ROWS[499].replace("fine", '"note')}, r"line 7: .* for the next one \(line 501\) stands before"),
        ({5: OPEN, 6: ROWS[6] + '"'}, "line 7: .* 'note', for line 8 inside the quotes reads as a record of its own"),
        ({5: ROWS[5].replace(",k,", ',"k,'), 8: ROWS[8].replace("fine", '",x')}, "line 7: .*'code', for line 8 inside"),
        (
            {5: '"' + ROWS[5], 499: ROWS[499].replace(",a", '",a')},
            "line 7: a quote is left open in column 'at', for li",
        ),
        ({5: ROWS[5].replace("fine", '"fine"ly')}, "line 7: .* 'note', for the next one stands before neither a comma"),
        ({999: OPEN}, "line 1001: a quote is left open in column 'note', none closes it"),
    ],
)
def test_a_quote_left_open_in_a_column_that_is_not_read_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[int, str],
    told: str,
    block_bytes: int,
    schema: Schema,
    left_in: Callable[[Path], list[str]],
) -> None:
    monkeypatch.setattr(csv_records, "BATCH_BYTES", block_bytes)
    (tmp_path / "in").mkdir()
    write_notes(tmp_path / "in" / "1.csv", {})
    write_notes(tmp_path / "in" / "2.csv", changed)
    write_notes(tmp_path / "in" / "3.csv", {})
    with pytest.raises(DataError, match=f"2.csv, {told}") as caught:
        prepare(tmp_path / "in", schema, tmp_path / "store")
    assert "\n" not in str(caught.value)
    assert left_in(tmp_path) == ["in"]


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("block_bytes", [50, 1 << 18])
def test_skip_leaves_out_the_line_of_an_open_quote_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, line_end: str, schema: Schema
) -> None:
    monkeypatch.setattr(csv_records, "BATCH_BYTES", block_bytes)
    changed = {5: OPEN, 499: ROWS[499] + '"', 700: OPEN, 701: "2024,a", 702: OPEN}
    file = write_notes(tmp_path / "t.csv", changed, line_end)
    early = replace(schema, split="2024-01-01T06:00:00")
    report = prepare(file, early, tmp_path / "store", on_error="skip")
    assert report.info["counts"]["rows_read"] == 1000
    assert report.info["counts"]["rows_skipped"] == 4
    assert [line.split(":")[0].split(", ")[1] for line in report.skipped] == [
        "line 7", "line 702", "line 703", "line 704",
    ]  # fmt: skip
    assert EventStore.open(tmp_path / "store").num_events == 996


def test_text_of_several_lines_with_commas_and_times_stays_one_field(
    tmp_path: Path, run: Callable[..., EventStore], schema: Schema
) -> None:
    letters = ["Dear A,\nthanks, bye\nB", "one, two, three\n, 2024-01-01 was cold", "a,\nb,\n2024-01-01,c"]
    file = tmp_path / "letters.csv"
    with file.open("w", newline="") as text:
        writer = csv.writer(text)
        writer.writerow(["note", *schema.columns])
        for day in (1, 2):
            writer.writerows([note, f"2024-01-0{day}T09:00", "a", 0, 1, "2000-01-01"] for note in letters)
    prepare(file, schema, tmp_path / "store")
    assert EventStore.open(tmp_path / "store").num_events == 6


def test_a_header_with_a_quote_left_open_is_named(tmp_path: Path, schema: Schema) -> None:
    header = ",".join(schema.columns)
    for text, told in [
        (f'{header},"note\n{ROWS[0]}\n', "line 1: a quote is left open in column 6, none closes it"),
        (f'{header},"note\n{ROWS[0]}"\n{ROWS[1]}\n', "line 1: a quoted name of the header reaches over records below"),
        (f'{header},"no"te"\n{ROWS[0]}\n', "line 1: a quote is left open in column 6, for the next one stands before"),
    ]:
        (tmp_path / "t.csv").write_text(text)
        for on_error in ("raise", "skip"):
            with pytest.raises(DataError, match=f"t.csv, {told}"):
                prepare(tmp_path / "t.csv", schema, tmp_path / "store", on_error=on_error)  # type: ignore[arg-type]


# Long records, and bytes that are no text


@pytest.mark.parametrize("quote", ["", '"'])
@pytest.mark.parametrize("where", ["row 1", "row 900", "every row", "header"])
def test_records_of_any_length_are_read_and_skipped(tmp_path: Path, where: str, quote: str, schema: Schema) -> None:
    fine = ROWS[:900] if where == "row 900" else ROWS[:10]
    length = 360_000 if where == "every row" else 600_000
    longer = f"{quote}{'x' * length}{quote}"
    rows = [row.replace("fine", longer) if where in ("every row", f"row {n}") else row for n, row in enumerate(fine, 1)]
    name = longer[:500_000] + quote if where == "header" else "note"
    early = replace(schema, split="2024-01-01T00:05:00")
    for bad in ([], ["2024-01-01,a", "2024-01-01T00:00,a,7,1,2000-01-01,k,x"]):
        text = "\n".join([f"at,who,paid,price,birth,code,{name}", rows[0], *bad, *rows[1:], ""])
        (tmp_path / "t.csv").write_text(text)
        report = prepare(tmp_path / "t.csv", early, tmp_path / "store", on_error="skip", overwrite=True)
        assert report.info["counts"]["rows_read"] == len(rows) + len(bad)
        assert [line.split(": ")[0][-6:] for line in report.skipped] == ["line 3", "line 4"][: len(bad)]


def test_a_record_without_end_takes_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schema: Schema
) -> None:
    monkeypatch.setattr(csv_records, "BATCH_BYTES", 1000)
    monkeypatch.setattr(csv_records, "MOST_RECORD_BYTES", 8000)
    file = write_notes(tmp_path / "t.csv", {5: OPEN})
    early = replace(schema, split="2024-01-01T06:00:00")
    with file.open("ab") as text:
        text.write(b"a" * 7000)  # one line, which a quote far before it does not make longer
    with pytest.raises(DataError, match="line 7: a quote is left open in column 'note', none closes it"):
        prepare(file, early, tmp_path / "store")
    report = prepare(file, early, tmp_path / "store", on_error="skip")
    assert [line.split(":")[0].split(", ")[1] for line in report.skipped] == ["line 7", "line 1002"]
    with file.open("ab") as text:
        text.write(b"a" * 2000)
    with pytest.raises(DataError, match="line 1002: has no end within 8,000 bytes; is it CSV text"):
        prepare(file, early, tmp_path / "new", on_error="skip")


@pytest.mark.parametrize("row", [1, 990])
def test_only_what_is_read_must_be_utf_8(tmp_path: Path, row: int, schema: Schema) -> None:
    file = write_notes(tmp_path / "t.csv", {row: ROWS[row].replace("fine", "Müller"), row + 1: ROWS[row + 1]})
    latin = file.read_bytes().replace("Müller".encode(), "Müller".encode("latin-1")).replace(b"note", b"n\xf6te", 1)
    file.write_bytes(latin)
    early = replace(schema, split="2024-01-01T06:00:00")
    assert prepare(file, early, tmp_path / "store").info["counts"]["rows_read"] == 1000

    lines = latin.split(b"\n")
    lines[row + 1] = lines[row + 1].replace(b",a,", b",M\xfcller,")
    file.write_bytes(b"\n".join(lines))
    told = rf"t.csv, line {row + 2}: column 'who' holds b'M\\xfcller', not UTF-8: save the file as UTF-8 text, or skip"
    with pytest.raises(DataError, match=told):
        prepare(file, early, tmp_path / "new")
    report = prepare(file, early, tmp_path / "new", on_error="skip")
    assert report.info["counts"]["rows_skipped"] == 1
    assert report.skipped[0].endswith("not UTF-8: save the file as UTF-8 text")


def test_two_broken_values_are_not_one_whole_one(tmp_path: Path, schema: Schema) -> None:
    """The bytes of a column's values lie side by side, where the end of one and the start of the next make a letter."""
    early = replace(schema, split="2024-01-01T06:00:00")
    file = write_notes(tmp_path / "t.csv", {3: ROWS[3].replace(",a,", ",é,"), 4: ROWS[4].replace(",a,", ",é,")})
    text = file.read_bytes().replace(",é,".encode(), b",\xc3,", 1).replace(",é,".encode(), b",\xa9,", 1)
    file.write_bytes(text)
    report = prepare(file, early, tmp_path / "store", on_error="skip")
    assert [line.split(": ")[0][-6:] for line in report.skipped] == ["line 5", "line 6"]


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=80), block_bytes=st.integers(1, 30), most_bytes=st.integers(0, 100))
def test_the_reader_stays_inside_any_bytes(data: bytes, block_bytes: int, most_bytes: int) -> None:
    reader = _C.CsvReader(most_bytes=most_bytes)
    passed = reader.read_header(data, True)
    assert 0 <= passed <= len(data)
    if not reader.header:
        return
    with pytest.raises(ValueError, match="a wanted field is outside the header"):
        reader.select([len(reader.header)], 0)
    reader.select([0], 0)
    rest = data[passed:]
    while rest:
        block = rest[:block_bytes]
        done = reader.read(block, len(block) == len(rest))
        assert 0 <= done <= len(block)
        rest, block_bytes = rest[done:], block_bytes * (1 if done else 2)
    assert reader.read(b"", True) == 0
