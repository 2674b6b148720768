import gzip
import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from eventkern.data import csv_records, ingest, source
from eventkern.data.columns import read_identifiers
from eventkern.data.prepare import prepare
from eventkern.data.schema import DataError, Schema
from eventkern.data.store import EventStore

HEADER = "at,who,paid,price,birth\n"


def messy_table(num_rows: int) -> pa.Table:
    random = np.random.default_rng(3)
    seconds = random.integers(0, 86_400, num_rows)
    at = np.datetime64("2024-01-01T00:00:00", "s") + seconds
    who = [None if n == 0 else int(n) for n in random.integers(0, 40, num_rows)]
    price = [None if n < 0 else round(float(n), 3) for n in random.normal(2, 1, num_rows)]
    return pa.table(
        {
            "extra": pa.array(["a,\n\"b\""] * num_rows),
            "at": pa.array(at, pa.timestamp("s")).cast(pa.timestamp("s", "UTC")),
            "who": pa.array(who, pa.int64()),
            "paid": pa.array(random.random(num_rows) < 0.5),
            "price": pa.array(price),
            "birth": pa.array(at.astype("datetime64[D]") - random.integers(0, 9999, num_rows)),
        }
    )  # fmt: skip


def split_into_folder(table: pa.Table, folder: Path, write: Callable[[pa.Table, Path], None], suffix: str) -> Path:
    folder.mkdir()
    for number, start in enumerate(range(0, table.num_rows, 300)):
        write(table.slice(start, 300), folder / f"part-{number:02}{suffix}")
    (folder / "_SUCCESS").touch()
    return folder


def test_every_form_of_a_table_makes_the_same_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schema: Schema
) -> None:
    table = messy_table(1000)
    column = {"who": table["who"].cast(pa.float64()), "dictionary": table["who"].cast(pa.string()).dictionary_encode()}
    csv_file, parquet_file = tmp_path / "t.csv", tmp_path / "t.parquet"
    pacsv.write_csv(table, csv_file)
    pq.write_table(table, parquet_file)
    sources = [csv_file, parquet_file]
    sources.append(split_into_folder(table, tmp_path / "csvs", pacsv.write_csv, ".csv"))
    sources.append(split_into_folder(table, tmp_path / "parquets", pq.write_table, ".parquet"))
    for name, changed in column.items():
        pq.write_table(table.set_column(2, "who", changed), tmp_path / f"{name}.parquet")
        sources.append(tmp_path / f"{name}.parquet")
    bom = tmp_path / "bom.csv"
    bom.write_bytes(b"\xef\xbb\xbf" + csv_file.read_bytes().replace(b"\n2024", b"\r\n2024"))
    sources.append(bom)

    schema = replace(schema, timezone="UTC")
    made = []
    for small in (False, True):  # small blocks cross every boundary; the default has one block
        if small:
            monkeypatch.setattr(ingest, "BLOCK_ROWS", 7)
            monkeypatch.setattr(source, "BATCH_ROWS", 11)
            monkeypatch.setattr(csv_records, "BATCH_BYTES", 2000)
        for number, path in enumerate(sources):
            out = tmp_path / f"store-{small}-{number}"
            report = prepare(path, schema, out)
            assert report.info["counts"]["rows_read"] == 1000
            info = {key: value for key, value in report.info.items() if key != "source"}
            info["checksum"].pop("store.json")  # of its source too
            made.append((info, (out / "store.bin").read_bytes()))
    assert len(made) == 14
    assert all(other == made[0] for other in made)


def test_a_column_that_a_category_cannot_read_is_named(
    tmp_path: Path, schema: Schema, left_in: Callable[[Path], list[str]]
) -> None:
    for column, values, message in [
        ("at", [1, 2], "column 'at' holds int64; give timestamps, dates or ISO 8601 text"),
        ("who", [[1], [2]], "column 'who' of category 'who' \\(kind 'id'\\) holds list<.*>; give integers or text"),
        ("price", [True, False], "column 'price' of category 'price' \\(kind 'bins'\\) holds bool; give numbers"),
        (
            "paid",
            [np.datetime64("2024", "s")] * 2,
            "column 'paid' of category 'paid' .* holds timestamp.*; give booleans",
        ),
    ]:
        table = messy_table(2)
        pq.write_table(
            table.set_column(table.column_names.index(column), column, pa.array(values)), tmp_path / "t.parquet"
        )
        with pytest.raises(DataError, match=message):
            prepare(tmp_path / "t.parquet", schema, tmp_path / "store")
    assert left_in(tmp_path) == ["t.parquet"]


def test_an_identifier_reads_the_same_whatever_stands_beside_it() -> None:
    values = [1e15, 7.0, -0.0, -3.0, 2.0**53 + 2, 2.5, 1e300, 2.0**63, None, float("nan")]
    texts = ["1000000000000000", "7", "0", "-3", "9007199254740994", "2.5", "1e+300", "9.223372036854776e+18"]
    assert read_identifiers(pa.array(values)).to_pylist() == [*texts, None, None]
    assert [read_identifiers(pa.array([value])).to_pylist()[0] for value in values[:-2]] == texts
    for dtype in (pa.float16(), pa.float32()):
        assert read_identifiers(pa.array(np.array([7, 2.5], dtype.to_pandas_dtype()))).to_pylist() == ["7", "2.5"]


# Bad input

GOOD = "2024-01-01T09:00,a,0,1,2000-01-01"
LATE = "2024-01-01T13:00,a,0,1,2000-01-01"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, "2024-13-01,a,0,1,"], "line 3: column 'at' holds '2024-13-01', which is no timestamp between"),
        ([GOOD, "01/02/2024,a,0,1,"], "line 3: column 'at' holds '01/02/2024', which is no timestamp"),
        ([GOOD, "9999-12-31,a,0,1,"], "line 3: column 'at' holds '9999-12-31', which is no timestamp"),
        ([",a,0,1,"], "line 2: column 'at' is missing, so it is no timestamp between"),
        ([GOOD, "", "  \t,a,0,1,"], "line 4: column 'at' holds '  \\t', which is no timestamp"),
        ([GOOD, "", "2024-01-01,a,2,1,"], "line 4: column 'paid' holds '2', which is neither false nor true; write 0"),
        ([GOOD, "2024-01-01,a,0,cheap,"], "line 3: column 'price' holds 'cheap', which is no finite number; write it"),
        ([GOOD, "2024-01-01,a,0,-inf,"], "line 3: column 'price' holds '-inf', which is no finite number"),
        ([GOOD, "2024-01-01,a,0,1,25:00"], "line 3: column 'birth' holds '25:00', which is no timestamp"),
        (['2024-01-01,"two\nlines",0,1,', "2024-01-01,a,0,x,"], "line 4: column 'price' holds 'x'"),
        ([GOOD, "2024-01-01,a,0"], "line 3: too few fields, 3; the header has 5: complete the line, or skip such rows"),
        ([GOOD, "2024-01-01,a,0,1,,9"], "line 3: too many fields, 6; the header has 5"),
        ([], ": the table is empty; give at least one event"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_in_one_line(
    tmp_path: Path,
    lines: list[str],
    message: str,
    schema: Schema,
    write_csv: Callable[..., Path],
    left_in: Callable[[Path], list[str]],
) -> None:
    file = write_csv(tmp_path, *lines)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        prepare(file, schema, tmp_path / "store")
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)
    assert left_in(tmp_path) == ["visits.csv"]


def test_a_bad_row_far_into_a_file_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schema: Schema, write_csv: Callable[..., Path]
) -> None:
    monkeypatch.setattr(csv_records, "BATCH_BYTES", 1000)
    for bad, message in [("2024-01-01,a,0,x,", "column 'price' holds 'x'"), ("2024-01-01", "too few fields, 1")]:
        file = write_csv(tmp_path, *[GOOD, '2024-01-01,"\n",0,1,', ""] * 200, bad, GOOD, "2024-01-01,a,0,y,")
        with pytest.raises(DataError, match=f"line 802: {message}"):
            prepare(file, schema, tmp_path / "store")


def test_a_bad_row_of_a_parquet_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schema: Schema) -> None:
    monkeypatch.setattr(source, "BATCH_ROWS", 3)
    table = messy_table(10)
    at = [f"2024-01-01T{hour:02}:00" for hour in range(10)]
    pq.write_table(table.set_column(1, "at", pa.array([*at[:7], "soon", "now", at[9]])), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t.parquet, row 8: column 'at' holds 'soon', which is no timestamp"):
        prepare(tmp_path / "t.parquet", schema, tmp_path / "store")
    report = prepare(
        tmp_path / "t.parquet", replace(schema, split="2024-01-01T05:00"), tmp_path / "store", on_error="skip"
    )
    assert [line.split(":")[0].split(", ")[1] for line in report.skipped] == ["row 8", "row 9"]


def test_skip_counts_and_lists(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    schema: Schema,
    rows_of: Callable[..., str],
    decoded: Callable[[EventStore, str], list[str]],
) -> None:
    monkeypatch.setattr(csv_records, "BATCH_BYTES", 300)
    bad = ["2024-01-01,a,0", ",a,0,1,", "", "2024-01-01,new,7,1,"]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.csv").write_text(rows_of(GOOD, *bad, GOOD, LATE))
    (tmp_path / "in" / "2.csv").write_text(rows_of(GOOD, LATE, *["x,a,0,1,"] * 20))
    report = prepare(tmp_path / "in", schema, tmp_path / "store", on_error="skip")
    store = EventStore.open(tmp_path / "store")
    assert store.info["counts"]["rows_read"] == 28
    assert store.info["counts"]["rows_skipped"] == 23
    assert decoded(store, "who") == ["a"] * 5
    assert store.info["counts"]["keys"] == 1  # 'new' stood in a skipped row only
    places = [re.sub(r".*(\d.csv, line \d+).*", r"\1", line) for line in report.skipped]
    assert places == ["1.csv, line 3", "1.csv, line 4", "1.csv, line 6", *(f"2.csv, line {n}" for n in range(4, 11))]
    assert "too few fields, 3" in report.skipped[0]

    from rich.console import Console

    console = Console(width=200, file=io.StringIO())
    console.print(report)
    text = console.file.getvalue()
    assert "28 rows read, 23 skipped" in text
    assert "skipped: 13 more" in text
    assert report.skipped[2] in text
    assert re.search(r"who +id +3 +0.0%", text)


def test_skipping_every_row_leaves_an_empty_table(
    tmp_path: Path, schema: Schema, write_csv: Callable[..., Path], left_in: Callable[[Path], list[str]]
) -> None:
    file = write_csv(tmp_path, "x,a,0,1,", "2024-01-01")
    with pytest.raises(DataError, match=r"the table is empty \(2 rows skipped\)"):
        prepare(file, schema, tmp_path / "store", on_error="skip")
    assert left_in(tmp_path) == ["visits.csv"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "a.csv: is empty; give a CSV file with a header line"),
        (
            "a.csv",
            b"at,who,paid,birth\n",
            "a.csv: column 'price' is missing; the file has 'at', 'who', 'paid', 'birth'",
        ),
        ("a.csv", HEADER.strip().encode(), "a.csv: the table is empty; give at least one event"),
        ("a.csv", b"at,who,who,paid,price,birth\n", "a.csv: column 'who' is named twice"),
        (
            "a.csv",
            HEADER.encode() + b"2024-01-01,\xff\xfe,0,1,\n",
            r"a.csv, line 2: column 'who' holds b'\\xff\\xfe', not UTF-8: save the file as UTF-8 text, or skip",
        ),
        ("a.csv", b"\xff\xfe\x00", "a.csv: not readable as CSV .*save it as UTF-8 text"),
        (
            "a.csv",
            HEADER.encode() + b'2024-01-01,"' + GOOD.encode() * 9999,
            "a.csv, line 2: a quote is left open in column 'who', none",
        ),
        ("a.csv", gzip.compress(HEADER.encode()), "a.csv: not readable as CSV"),
        ("a.parquet", b"", "a.parquet: not readable as Parquet .*; write the file again"),
        ("a.parquet", b"PAR1 and no more", "a.parquet: not readable as Parquet"),
        ("a.txt", b"", "a.txt: ends in '.txt'; give a .csv or .parquet file"),
    ],
)
def test_a_bad_file_is_named_in_one_line(
    tmp_path: Path, name: str, content: bytes, message: str, schema: Schema, left_in: Callable[[Path], list[str]]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        prepare(tmp_path / name, schema, tmp_path / "store")
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert left_in(tmp_path) == [name]


def test_a_missing_column_of_a_parquet_file(tmp_path: Path, schema: Schema) -> None:
    pq.write_table(messy_table(3).drop_columns("who"), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t.parquet: column 'who' is missing; the file has 'extra', 'at', .* rename"):
        prepare(tmp_path / "t.parquet", schema, tmp_path / "store")


def test_a_bad_folder_is_named(tmp_path: Path, schema: Schema) -> None:
    with pytest.raises(DataError, match="nowhere: no such file or folder; give a CSV file"):
        prepare(tmp_path / "nowhere", schema, tmp_path / "store")
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match=r"in: the folder holds no .csv or .parquet file"):
        prepare(tmp_path / "in", schema, tmp_path / "store")
    (tmp_path / "in" / "a.csv").touch()
    (tmp_path / "in" / "a.parquet").touch()
    with pytest.raises(DataError, match="in: the folder holds CSV and Parquet files side by side"):
        prepare(tmp_path / "in", schema, tmp_path / "store")


@pytest.mark.parametrize(("split", "where"), [("2030-01-01", "before"), ("2024-01-01T09:00", "at or after")])
def test_a_split_beside_the_table_is_refused(
    tmp_path: Path,
    split: str,
    where: str,
    schema: Schema,
    write_csv: Callable[..., Path],
    left_in: Callable[[Path], list[str]],
) -> None:
    file = write_csv(tmp_path, GOOD, LATE)
    with pytest.raises(
        DataError, match=f"every event lies {where} the split .* from 2024-01-01T14:00:00 to .*T18:00:00"
    ):
        prepare(file, replace(schema, split=split), tmp_path / "store")
    assert left_in(tmp_path) == ["visits.csv"]


def test_on_error_is_checked(tmp_path: Path, schema: Schema) -> None:
    with pytest.raises(ValueError, match="on_error is 'ignore'; give 'raise' or 'skip'"):
        prepare(tmp_path, schema, tmp_path / "store", on_error="ignore")  # type: ignore[arg-type]
