import datetime
import re
from dataclasses import replace
from pathlib import Path

import pytest

from eventkern import _C
from eventkern.data.schema import Category, DataError, Schema, Stream

WORKFORCE = [
    *("EventType", "ActorRecordId", "RecipientRecordId", "LocationRecordId", "IsTimesheet", "HoursWorked"),
    *(f"Time_Reference_{field}" for field in ("Year", "Month", "Day", "Weekday", "Hour")),
    *(f"Time_Event_{field}" for field in ("Year", "Month", "Day", "Weekday", "Hour", "Minute")),
]
FLIGHTS = [
    *("EventType", "Carrier", "Flight", "TailNumber", "Origin", "Destination", "DaysSincePrevious", "Day", "Weekday"),
    *("SchedDepHour", "SchedDepMinute", "SchedArrHour", "DepDelay", "ArrDelay", "AirTime", "Distance", "DepHour"),
]
TOML = """
name = "shop"
timestamp = "at"
timezone = "America/New_York"
key = "customer"
split = "2024-03-10"
streams = [{ name = "mine", entity = "customer" }, { name = "everyone", entity = "all" }]
categories = [
    { name = "customer", kind = "id" },
    { name = "price", kind = "bins", column = "amount", bins = 7 },
    { name = "hour", kind = "time", column = "at", field = "hour" },
    { name = "pause", kind = "elapsed", unit = "hours", limit = 12 },
]
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    file = tmp_path / "shop.toml"
    file.write_text(TOML)
    return file


def test_load_reads_every_option(toml: Path) -> None:
    assert Schema.load(toml) == Schema(
        name="shop",
        timestamp="at",
        timezone="America/New_York",
        categories=(
            Category("customer", "id", column="customer"),
            Category("price", "bins", column="amount", bins=7),
            Category("hour", "time", column="at", field="hour"),
            Category("pause", "elapsed", unit="hours", limit=12),
        ),
        streams=(Stream("mine", "customer"), Stream("everyone", None)),
        key="customer",
        split="2024-03-10",
        uniform_sizes=False,
    )
    assert Schema.load(toml).columns == ("at", "customer", "amount")
    assert Schema.load(toml).entities == ("customer",)


@pytest.mark.parametrize("name", ["flights", "workforce", "notes17", "flights.toml"])
def test_shipped_schemas_survive_a_round_trip(name: str) -> None:
    schema = Schema.load(name)
    assert Schema.from_dict(schema.to_dict()) == schema
    assert schema.category_names == tuple(FLIGHTS if schema.name == "flights" else WORKFORCE)


def test_flights_schema_says_what_the_issue_says() -> None:
    schema = Schema.load("flights")
    assert (schema.key, schema.split, schema.timezone) == ("TailNumber", "2013-11-01", "America/New_York")
    assert [stream.entity for stream in schema.streams] == ["TailNumber", "Origin", None]
    days = schema.category("DaysSincePrevious")
    assert (days.kind, days.unit, days.limit) == ("elapsed", "days", 30)
    assert {c.name: c.bins for c in schema.categories if c.kind == "bins"} == dict.fromkeys(
        ("DepDelay", "ArrDelay", "AirTime", "Distance"), 20
    )


def test_notes17_is_workforce_with_uniform_sizes() -> None:
    assert Schema.load("notes17") == replace(Schema.load("workforce"), name="notes17", uniform_sizes=True)


@pytest.mark.parametrize(
    ("split", "instant"),
    [
        ("2013-11-01", datetime.datetime(2013, 11, 1, 4, tzinfo=datetime.UTC)),  # summer time in New York
        ("2013-12-01", datetime.datetime(2013, 12, 1, 5, tzinfo=datetime.UTC)),
        ("2013-12-01T10:30:00.000001+02:00", datetime.datetime(2013, 12, 1, 8, 30, 0, 1, tzinfo=datetime.UTC)),
        ("1969-12-31T19:00:00", datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)),
        ("1969-12-31T18:59:59", datetime.datetime(1969, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)),
    ],
)
def test_split_is_read_in_the_time_zone(split: str, instant: datetime.datetime) -> None:
    microseconds = (instant - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) // datetime.timedelta(microseconds=1)
    assert replace(Schema.load("flights"), split=split).split_ns == microseconds * 1000


@pytest.mark.parametrize("split", ["2024-03-10", "2024-03-10T00:00:00"])
def test_split_may_be_a_date_of_toml(toml: Path, split: str) -> None:
    toml.write_text(TOML.replace('"2024-03-10"', split))
    assert Schema.load(toml).split_ns == replace(Schema.load(toml), split="2024-03-10T05:00:00Z").split_ns


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "shop"', "name = shop", "shop.toml: not TOML"),
        ('key = "customer"', "", "schema: key 'key' is missing; add it"),
        ('key = "customer"', 'key = "price"', "key 'key': is 'price', which is no category of kind 'id'"),
        ('key = "customer"', 'key = "customer"\ncolour = 1', "schema: unknown key 'colour'; it takes name, timestamp"),
        ('"mine", entity = "customer"', '"mine"', "stream 'mine': key 'entity' is missing"),
        ('"mine", entity = "customer"', '"mine", entity = "shop"', "stream 'mine': is 'shop', which is no category"),
        ('"everyone"', '"mine"', "key 'streams': names 'mine' twice"),
        ('"price"', '"hour"', "key 'categories': names 'hour' twice"),
        ('"price"', '"all"', "key 'categories': a category is called 'all'"),
        ("America/New_York", "Amerika", "key 'timezone': 'Amerika' is no IANA zone"),
        ('split = "2024-03-10"', 'split = "10.3.2024"', "key 'split': '10.3.2024' is no ISO time"),
        ('split = "2024-03-10"', "split = 2024", "key 'split': is 2024; write a non-empty text"),
        ('"bins"', '"bin"', "category 'price': kind is 'bin'; write one of id, flag, bins, time, elapsed"),
        ("bins = 7", "bins = 1", "category 'price': bins is 1; write an integer from 2 to 1048576"),
        ("bins = 7", "bin = 7", "category 'price': unknown key 'bin'"),
        ('field = "hour"', 'field = "second"', "category 'hour': field is 'second'; write one of year, month"),
        ('field = "hour"', 'field = ["hour"]', "category 'hour': field is ['hour']; write one of year, month"),
        ('"hours"', '["hours"]', "category 'pause': unit is ['hours']; write one of days, hours, minutes"),
        (', field = "hour"', "", "category 'hour': field is None; kind 'time' takes a field"),
        ("bins = 7", 'field = "hour"', "category 'price': field is 'hour'; kind 'time' takes a field, and no other"),
        ('"hours"', '"weeks"', "category 'pause': unit is 'weeks'; write one of days, hours, minutes"),
        ("limit = 12", "limit = 0", "category 'pause': limit is 0; write an integer from 1 to 1048576"),
        (", limit = 12", "", "category 'pause': unit is 'hours', limit is None; kind 'elapsed' takes both"),
        ('unit = "hours"', 'column = "at", unit = "hours"', "category 'pause': kind 'elapsed' reads no column"),
        ('column = "amount"', "column = 3", "category 'price': column is 3; write a non-empty text"),
        ("streams = [", "streams = []\nother = [", "unknown key 'other'"),
        ("bins = 7", f"bins = {2**20 + 1}", "category 'price': bins is 1048577; write an integer from 2 to 1048576"),
        ("limit = 12", f"limit = {10**18}", "category 'pause': limit is 1000000000000000000; write an integer from 1"),
        ('field = "hour"', 'field = "hour", bins = 7', "category 'hour': bins is 7; kind 'bins' takes bins, and no"),
        ("bins = 7", f"bins = {'9' * 5_000}", "shop.toml: not TOML: Exceeds the limit"),
        ("bins = 7", f"bins = {'[' * 5_000}", "shop.toml: not TOML: "),
        ("bins = 7", f"bins = {'{a=' * 5_000}", "shop.toml: not TOML: "),
        (
            '"customer", kind',
            '"cust\\nomer", kind',
            "'cust\\nomer': name is 'cust\\nomer'; write a non-empty text of one",
        ),
        ('"mine"', '"my\\nown"', "stream 'my\\nown': name is 'my\\nown'; write a non-empty text of one line"),
        ('"mine"', "7", "stream 7: name is 7; write a non-empty text of one line"),
        ("America/New_York", "America", "key 'timezone': 'America' is no IANA zone"),
        ("America/New_York", "a" * 5_000, "is no IANA zone"),
    ],
)
def test_a_mistake_is_named_in_one_line(toml: Path, old: str, new: str, message: str) -> None:
    assert old in TOML
    toml.write_text(TOML.replace(old, new, 1))
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        Schema.load(toml)
    assert str(caught.value).startswith(str(toml))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["streams", "categories"])
def test_empty_lists_are_refused(key: str) -> None:
    with pytest.raises(DataError, match=f"key '{key}': is empty"):
        replace(Schema.load("flights"), **{key: ()})


def test_more_streams_than_a_batch_holds_are_refused() -> None:
    schema = Schema.load("flights")
    streams = tuple(Stream(f"s{number}", "Carrier") for number in range(_C.max_streams + 1))
    assert len(replace(schema, streams=streams[1:]).streams) == _C.max_streams == 8
    with pytest.raises(DataError, match="key 'streams': names 9 streams; name at most 8"):
        replace(schema, streams=streams)


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(DataError, match=r"fligths: no such schema file; .* one of: flights, notes17, workforce"):
        Schema.load("fligths")
