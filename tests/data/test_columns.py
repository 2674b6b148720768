"""Columns read as times and identifiers: whatever the type, a time is right or bad, and an identifier has one form."""

import datetime
import decimal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eventkern.data.columns import canonical, field_of, nanoseconds, read_identifiers, read_times
from eventkern.data.prepare import prepare
from eventkern.data.schema import Category, DataError, Schema, Stream
from eventkern.data.store import EventStore

FAR = datetime.datetime(9999, 12, 31)
NEAR = datetime.datetime(2024, 1, 1, 9)


@pytest.fixture
def schema() -> Schema:
    return Schema(
        name="lives",
        timestamp="at",
        timezone="UTC",
        categories=(
            Category("who", "id"),
            Category("born", "time", "birth", field="year"),
            Category("pause", "elapsed", unit="days", limit=30),
        ),
        streams=(Stream("all"),),
        key="who",
        split="2024-01-01T12:00:00",
    )


def far_columns() -> list[Any]:
    """Columns of every type of time, whose first value is near and whose second one nanoseconds do not hold."""
    columns = [pa.array([NEAR, FAR], pa.timestamp(unit)) for unit in ("s", "ms", "us")]
    columns += [pa.array([NEAR, FAR], pa.timestamp("us", "Asia/Tokyo"))]
    columns += [pa.array([NEAR.date(), FAR.date()], kind) for kind in (pa.date32(), pa.date64())]
    columns += [column.dictionary_encode() for column in columns]
    columns += [pa.array([NEAR.isoformat(), f"{FAR.isoformat()}{zone}"]) for zone in ("", "Z", "-05:00")]
    columns += [pa.array([0, edge], pa.timestamp("ns", zone)) for edge in (2**63 - 1, -(2**63)) for zone in ("UTC",)]
    return [pytest.param(column, id=f"{column.type} {number}") for number, column in enumerate(columns)]


@pytest.mark.parametrize("column", far_columns())
def test_no_time_wraps(column: pa.Array) -> None:
    zones = ("America/New_York", "Asia/Tokyo") if pa.types.is_timestamp(column.type) else ("UTC",)
    is_edge = pa.types.is_timestamp(column.type) and column.type.unit == "ns"
    bad = [read_times(column, zone).bad for zone in zones]
    assert [1] in bad
    assert is_edge or bad == [[1]] * len(zones)  # at the very edge the zone decides on which side it is
    for zone in zones:
        times = read_times(column, zone)
        assert times.instants.is_valid().to_pylist() == times.wall.is_valid().to_pylist() == [True, times.bad == []]


@pytest.mark.parametrize("is_int96", [False, True])
@pytest.mark.parametrize("name", ["at", "birth"])
def test_a_time_out_of_range_is_refused_by_its_value(tmp_path: Path, schema: Schema, name: str, is_int96: bool) -> None:
    column = pa.array([NEAR, FAR], pa.timestamp("us"))
    near = pa.array([NEAR, NEAR.replace(day=2)], pa.timestamp("us"))
    table = pa.table({"at": near, "who": ["a", "a"], "birth": near, name: column})
    pq.write_table(table, tmp_path / "t.parquet", use_deprecated_int96_timestamps=is_int96)
    with pytest.raises(DataError, match=rf"row 2: column '{name}' holds '9999-12-31 .* no timestamp between"):
        prepare(tmp_path / "t.parquet", schema, tmp_path / "store")
    more = pa.concat_tables([table, table.set_column(table.column_names.index(name), name, near)])
    pq.write_table(more, tmp_path / "t.parquet", use_deprecated_int96_timestamps=is_int96)
    report = prepare(tmp_path / "t.parquet", schema, tmp_path / "store", on_error="skip")
    assert report.info["counts"]["rows_skipped"] == 1
    assert EventStore.open(tmp_path / "store").info["categories"][1]["values"] == ["2024"]


def test_a_time_beyond_every_calendar_is_refused_too(tmp_path: Path, schema: Schema) -> None:
    far = pa.array([2**55], pa.timestamp("ms"))
    near = pa.array([NEAR])
    pq.write_table(pa.table({"at": near, "who": ["a"], "birth": far}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=f"column 'birth' holds .*{2**55}.* no timestamp between"):
        prepare(tmp_path / "t.parquet", schema, tmp_path / "store")


def test_centuries_between_two_events_are_the_limit_and_more(tmp_path: Path, schema: Schema) -> None:
    at = pa.array([datetime.datetime(year, 1, 1) for year in (1850, 1850, 2190, 2200)], pa.timestamp("us"))
    pq.write_table(pa.table({"at": at, "who": ["a", "b", "a", "a"], "birth": at}), tmp_path / "t.parquet")
    prepare(tmp_path / "t.parquet", schema, tmp_path / "store")
    store = EventStore.open(tmp_path / "store")
    pauses = [store.decode("pause", int(code)) for code in store.codes[:, 2]]
    assert pauses == ["(missing)", "(missing)", "30 and more", "30 and more"]


@pytest.mark.parametrize(
    ("zone", "text", "fields"),
    [
        ("America/New_York", "2025-03-09T02:30:00", (2025, 9, 3, 30)),
        ("America/New_York", "2025-11-02T01:30:00", (2025, 2, 1, 30)),
        ("America/New_York", "2040-07-01T00:00:00", (2040, 1, 0, 0)),
        ("Australia/Lord_Howe", "2050-10-02T02:10:00", (2050, 2, 2, 40)),
        ("Pacific/Apia", "2011-12-30T05:00:00", (2011, 31, 5, 0)),
        ("Europe/Amsterdam", "1850-05-05T00:00:00", (1850, 5, 0, 0)),
    ],
)
def test_timestamp_fields_and_split_read_one_instant(
    schema: Schema, zone: str, text: str, fields: tuple[int, ...]
) -> None:
    split_ns = replace(schema, timezone=zone, split=text).split_ns
    for column in (pa.array([text]), pa.array([datetime.datetime.fromisoformat(text)])):
        times = read_times(column, zone)
        assert nanoseconds(times.instants).tolist() == [split_ns]
        assert tuple(int(field_of(times.wall, name)[0]) for name in ("year", "day", "hour", "minute")) == fields
        told = read_times(times.instants, zone)  # as one with a zone reads
        assert told.wall.equals(times.wall)


@pytest.mark.parametrize(
    ("form", "columns"),
    [
        (["310", "20", None], [["310.0", "20.0", ""], ["310", "20", None], [310.0, 20.0, None], [310, 20, None]]),
        (["310", "-7"], [[decimal.Decimal("310.0"), decimal.Decimal("-7.0")], ["310", "-7.0"]]),
        (["310.00"], [["310.00"], [decimal.Decimal("310.00")]]),
        (["310.5", "0.1"], [["310.5", "0.1"], [310.5, 0.1]]),
        (["0", "0"], [["-0.0", "-0"], [-0.0, 0.0], [0, 0]]),
        (["10000000000000000", "1e+20"], [["1e+16", "1e+20"], [1e16, 1e20]]),
        (["123456789012345680"], [["1.2345678901234568e+17"], [1.2345678901234568e17], [123456789012345680]]),
        (["100000", "0.00001", "1.5e-7"], [["1e+05", "1e-05", "1.5e-07"], [1e5, 1e-5, 1.5e-7]]),
        (["9007199254740992"], [["9.007199254740992e+15"], ["9007199254740992.0"], [2.0**53], [2**53]]),
        (["true", "false"], [["True", "False"], ["true", "false"], [True, False]]),
        (
            ["007", "1E5", "1e5", "12e+5", "1.0.0", ".0", "x.0", "1e+999", "5.0\n", "TRUE", "+3.0", "N1.0"],
            [["007", "1E5", "1e5", "12e+5", "1.0.0", ".0", "x.0", "1e+999", "5.0\n", "TRUE", "+3.0", "N1.0"]],
        ),
        (["007", "007"], [["007.0", "007"]]),
    ],
)
def test_an_identifier_has_one_form_from_every_source(form: list[str | None], columns: list[list[Any]]) -> None:
    for values in columns:
        for array in (pa.array(values), pa.array(values).dictionary_encode()):
            read = read_identifiers(array).to_pylist()
            assert [value if value is None else canonical(value) for value in read] == form
    assert [value if value is None else canonical(value) for value in form] == form  # what has the form keeps it


def test_one_table_makes_one_store_as_csv_and_as_parquet(tmp_path: Path, schema: Schema) -> None:
    """Keys, entities and categories alike; pandas writes integers beside missing values as floats."""
    categories = (*schema.categories, Category("wind_dir", "id"))
    schema = replace(schema, categories=categories, streams=(Stream("mine", "who"), Stream("wind", "wind_dir")))
    winds = [310, 20, None, 310, 20, 40]
    at = [datetime.datetime(2024, 1, 1, hour) for hour in (8, 9, 10, 11, 13, 14)]
    columns: dict[str, Any] = {"at": pa.array(at, pa.timestamp("us")), "birth": pa.array(at, pa.timestamp("us"))}
    floats = pa.array(winds, pa.float64())
    tables = {
        "integers": pa.table({**columns, "who": pa.array([7, 8, 7, None, 7, 8]), "wind_dir": pa.array(winds)}),
        "floats": pa.table({**columns, "who": pa.array([7.0, 8, 7, None, 7, 8]), "wind_dir": floats}),
        "coded": pa.table({**columns, "who": pa.array([7, 8, 7, None, 7, 8]), "wind_dir": floats.dictionary_encode()}),
    }
    sources = []
    for name, table in tables.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
        sources.append(tmp_path / f"{name}.parquet")
    texts = [
        ["" if value is None else f"{value:.1f}" for value in tables["floats"][name].to_pylist()]
        for name in ("who", "wind_dir")
    ]
    lines = [f"{time.isoformat()},{time.isoformat()},{who},{wind}" for time, who, wind in zip(at, *texts, strict=True)]
    sources.append(tmp_path / "text.csv")
    sources[-1].write_text("\n".join(["at,birth,who,wind_dir", *lines]) + "\n")
    for source in sources:
        prepare(source, schema, tmp_path / source.stem)
    first, *others = (EventStore.open(tmp_path / source.stem) for source in sources)
    assert first.info["categories"][0]["values"] == ["7", "8"]
    assert first.info["categories"][3]["values"] == ["310", "20"]
    assert first.info["identifier_form"] == 1
    for other in others:
        assert (other.path / "store.bin").read_bytes() == (first.path / "store.bin").read_bytes()
        assert other.info["categories"] == first.info["categories"]
