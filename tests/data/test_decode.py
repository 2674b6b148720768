"""Decoding: values of a store's own rows come back, kind by kind; times follow from what the categories read."""

import dataclasses
import datetime
from collections.abc import Callable
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pytest

from eventkern.data import Category, DataError, EventStore, Schema
from eventkern.data.decode import decode_events, decode_times

NEW_YORK = ZoneInfo("America/New_York")
LINES = (
    "2024-01-01T09:00:00,Ann,true,1.5,1980-05-05",
    "2024-01-01T09:01:30,Ann,no,3,1980-05-05",
    "2024-01-01T10:00:00,Bob,,7,",
    "2024-01-01T10:00:59,Bob,1,12,1991-01-31",
    "2024-01-01T11:00:00,Ann,0,,1980-05-05",
    "2024-01-01T13:10:00,Cid,0,100,1985-12-31",
)


@pytest.fixture
def columns(schema: Schema) -> list[str]:
    return list(schema.columns)


def test_values_of_a_stores_rows_come_back(run: Callable[..., EventStore], columns: list[str], tmp_path: Path) -> None:
    assert columns == ["at", "who", "paid", "price", "birth"]
    store = run(tmp_path, *LINES)
    table = decode_events(store, store.codes)
    assert table.column_names == list(store.schema.category_names)
    assert table["who"].to_pylist() == ["Ann", "Ann", "Bob", "Bob", "Ann", None]  # Cid comes after the split
    assert table["paid"].to_pylist() == [True, False, None, True, False, False]
    assert table["hour"].to_pylist() == [9, 9, 10, 10, 11, 13]
    assert table["born"].to_pylist() == [1980, 1980, None, 1991, 1980, 1985]
    assert table["pause"].to_pylist() == [None, 1, None, 0, 3, None]  # 3 minutes is the limit: 3 and more
    prices = [1.5, 3.0, 7.0, 12.0, None, 100.0]
    edges = store.info["categories"][2]["edges"]
    assert edges
    for price, interval in zip(prices, table["price"].to_pylist(), strict=True):
        if price is None:
            assert interval is None
        else:
            low = max((edge for edge in edges if edge <= price), default=None)
            high = min((edge for edge in edges if edge > price), default=None)
            words = (
                f"below {high:g}"
                if low is None
                else f"{low:g} and more"
                if high is None
                else f"{low:g} to below {high:g}"
            )
            assert interval == words
    assert [str(field.type) for field in table.schema] == ["string", "bool", "string", "int32", "int32", "int32"]


def test_every_class_is_what_the_store_says(run: Callable[..., EventStore], tmp_path: Path) -> None:
    store = run(tmp_path, *LINES)
    num_classes = max(store.class_sizes)
    codes = np.stack([np.minimum(np.arange(num_classes), size - 1) for size in store.class_sizes], -1)
    table = decode_events(store, codes)
    for number, (name, size) in enumerate(zip(table.column_names, store.class_sizes, strict=True)):
        values = table[name].to_pylist()[:size]
        assert values[:2] == [None, None]
        told = [store.decode(name, int(code)).removesuffix(" and more") for code in codes[2:size, number]]
        shown = [str(value).removesuffix(" and more") for value in values[2:]]
        assert ([value.lower() for value in shown] if name == "paid" else shown) == told


def test_a_weekday_has_its_name(run: Callable[..., EventStore], schema: Schema, tmp_path: Path) -> None:
    categories = (*schema.categories, Category("weekday", "time", "at", field="weekday"))
    store = run(tmp_path, *LINES, schema=dataclasses.replace(schema, categories=categories))
    assert decode_events(store, store.codes)["weekday"].to_pylist() == ["Monday"] * 6


def test_a_code_outside_its_category_is_named(run: Callable[..., EventStore], tmp_path: Path) -> None:
    store = run(tmp_path, *LINES)
    codes = np.ones((3, 6), np.int64)
    codes[1, 1] = 4
    with pytest.raises(DataError, match=r"codes\[..., 1\] holds 4, but category 'paid' has 4 classes"):
        decode_events(store, codes)


def times_of(store: EventStore, anchors: list[str], **columns: list[object]) -> list[datetime.datetime | None]:
    """The times of events with these columns, after anchors of these local times."""
    nanoseconds = [
        int(datetime.datetime.fromisoformat(a).replace(tzinfo=NEW_YORK).timestamp()) * 10**9 for a in anchors
    ]
    return decode_times(store, np.array(nanoseconds), pa.table(columns)).to_pylist()


def local(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=NEW_YORK)


def test_elapsed_units_and_the_clock_give_the_first_moment_that_fits(
    run: Callable[..., EventStore], tmp_path: Path
) -> None:
    store = run(tmp_path, *LINES)
    times = times_of(store, ["2024-01-01T22:30:00"], pause=[1, 1, 3, 0], hour=[22, 23, 1, None])
    expected = ["2024-01-01T22:31:00", "2024-01-01T23:00:00", "2024-01-02T01:00:00", "2024-01-02T01:00:00"]
    assert times == [local(text) for text in expected]
    assert str(decode_times(store, np.array([0]), pa.table({"pause": [0], "hour": [1]})).type) == (
        "timestamp[s, tz=America/New_York]"
    )


def test_each_key_goes_on_from_its_own_anchor_until_elapsed_units_are_missing(
    run: Callable[..., EventStore], tmp_path: Path
) -> None:
    store = run(tmp_path, *LINES)
    anchors = ["2024-01-01T09:00:00", "2024-01-01T12:00:00"]
    times = times_of(store, anchors, pause=[1, None, 1, 2, 0, 1], hour=[None] * 6)
    assert times[:3] == [local("2024-01-01T09:01:00"), None, None]
    assert times[3:] == [local("2024-01-01T12:02:00")] * 2 + [local("2024-01-01T12:03:00")]


def test_a_date_that_the_schema_reads_is_the_date(
    run: Callable[..., EventStore], schema: Schema, tmp_path: Path
) -> None:
    fields = tuple(Category(field, "time", "at", field=field) for field in ("year", "month", "day", "minute"))
    store = run(tmp_path, *LINES, schema=dataclasses.replace(schema, categories=(*schema.categories, *fields)))
    columns = {"year": [2024, 2024, 2024], "month": [2, 2, 7], "day": [29, 30, 4], "hour": [9, 9, 18]}
    times = times_of(store, ["2024-01-01T09:00:00"], pause=[None] * 3, minute=[15, 15, 0], **columns)
    assert times == [local("2024-02-29T09:15:00"), None, local("2024-07-04T18:00:00")]


def test_a_schema_that_reads_neither_tells_no_time(
    run: Callable[..., EventStore], schema: Schema, tmp_path: Path
) -> None:
    store = run(tmp_path, *LINES, schema=dataclasses.replace(schema, categories=schema.categories[:-1]))
    assert times_of(store, ["2024-01-01T09:00:00"], hour=[9, 10]) == [None, None]


def test_a_time_past_the_year_9999_is_null(run: Callable[..., EventStore], schema: Schema, tmp_path: Path) -> None:
    """By elapsed units, at once or one after another; by a clock that shows the hour a day later; and by a date."""
    long = dataclasses.replace(schema.categories[-1], unit="days")
    store = run(tmp_path, *LINES, schema=dataclasses.replace(schema, categories=(*schema.categories[:-1], long)))
    pauses = [2_000_000, 2_000_000, 0, 1]
    late, *lost = times_of(store, ["2024-01-01T09:00:00"], pause=pauses, hour=[None] * 4)
    assert late is not None
    assert (late.year, lost) == (7499, [None] * 3)
    almost = (datetime.date(9999, 12, 31) - datetime.date(2024, 1, 1)).days
    assert times_of(store, ["2024-01-01T12:00:00"], pause=[almost], hour=[9]) == [None]
    assert times_of(store, ["2024-01-01T12:00:00"], pause=[2**31 - 1], hour=[9]) == [None]
    fields = tuple(Category(field, "time", "at", field=field) for field in ("year", "month", "day"))
    (tmp_path / "dated").mkdir()
    dated = run(
        tmp_path / "dated", *LINES, schema=dataclasses.replace(schema, categories=(*schema.categories, *fields))
    )
    columns = {"year": [9999, 9999], "month": [12, 12], "day": [31, 30], "hour": [23, 23]}
    assert times_of(dated, ["2024-01-01T09:00:00"], pause=[None] * 2, **columns) == [None, local("9999-12-30T23:00:00")]
