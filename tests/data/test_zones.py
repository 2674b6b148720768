"""Wall clocks to instants and back, held against `datetime`."""

import datetime
import zoneinfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventkern.data.zones import EPOCH, to_instants, to_wall

LAST = "2025-03-09T03:59:59.999999999"
LEAST, MOST = np.iinfo(np.int64).min, np.iinfo(np.int64).max
ZONES = (
    "America/New_York",
    "Australia/Lord_Howe",  # half an hour of summer time
    "Europe/Dublin",  # winter time is the negative one
    "Africa/Casablanca",  # summer time but for Ramadan
    "Pacific/Apia",  # no 30th of December 2011
    "Africa/Monrovia",  # 44 minutes and 30 seconds at once, in 1972
    "Asia/Kathmandu",
    "UTC",
)


def nanoseconds(text: str) -> int:
    return int(np.datetime64(text, "ns").astype(np.int64))


@pytest.mark.parametrize(
    ("zone", "wall", "utc", "shown"),
    [
        ("America/New_York", "2025-03-09T02:30", "2025-03-09T07:30", "2025-03-09T03:30"),
        ("America/New_York", "2025-03-09T02:00", "2025-03-09T07:00", "2025-03-09T03:00"),
        ("America/New_York", "2025-03-09T02:59:59.999999999", "2025-03-09T07:59:59.999999999", LAST),
        ("America/New_York", "2025-11-02T01:30", "2025-11-02T05:30", "2025-11-02T01:30"),
        ("America/New_York", "2040-07-01T12:00", "2040-07-01T16:00", "2040-07-01T12:00"),
        ("America/New_York", "2100-03-14T02:30", "2100-03-14T07:30", "2100-03-14T03:30"),
        ("America/New_York", "1850-01-01T00:00", "1850-01-01T04:56:02", "1850-01-01T00:00"),
        ("Australia/Lord_Howe", "2024-10-06T02:10", "2024-10-05T15:40", "2024-10-06T02:40"),
        ("Australia/Lord_Howe", "2050-10-02T02:10", "2050-10-01T15:40", "2050-10-02T02:40"),
        ("Pacific/Apia", "2011-12-30T05:00", "2011-12-30T15:00", "2011-12-31T05:00"),
        ("Europe/Dublin", "2024-03-31T01:30", "2024-03-31T01:30", "2024-03-31T02:30"),
        ("Africa/Casablanca", "2024-04-14T02:30", "2024-04-14T02:30", "2024-04-14T03:30"),
        ("Asia/Kathmandu", "1986-01-01T00:05", "1985-12-31T18:35", "1986-01-01T00:20"),
    ],
)
def test_a_time_that_the_clock_leaps_over_moves_by_the_leap_and_a_repeated_one_is_the_first(
    zone: str, wall: str, utc: str, shown: str
) -> None:
    instants, outside = to_instants(np.array([nanoseconds(wall)]), zone)
    assert instants.astype("datetime64[ns]")[0] == np.datetime64(utc, "ns")
    back, is_back_outside = to_wall(instants, zone)
    assert back.astype("datetime64[ns]")[0] == np.datetime64(shown, "ns")
    assert not (outside | is_back_outside).any()


@settings(max_examples=200, deadline=None)
@given(
    zone=st.sampled_from(ZONES),
    year=st.integers(1679, 2260),
    seconds=st.lists(st.integers(0, 366 * 86_400), min_size=1, max_size=8),
)
def test_datetime_says_the_same(zone: str, year: int, seconds: list[int]) -> None:
    start = datetime.datetime(year, 1, 1)
    clock = zoneinfo.ZoneInfo(zone)
    # The hours around each change of the year's offset, and times drawn from it.
    changes = {at for at in range(366 * 24) if _offset(start, at, clock) != _offset(start, at + 1, clock)}
    near = [3600 * at + minutes * 60 for at in changes for minutes in range(-90, 180, 15)]
    walls = [start + datetime.timedelta(seconds=second) for second in (*seconds, *near)]
    given_ns = np.array([nanoseconds(wall.isoformat()) for wall in walls])
    instants, _ = to_instants(given_ns, zone)
    moments = [wall.replace(tzinfo=clock).astimezone(datetime.UTC) for wall in walls]
    assert instants.tolist() == [(moment - EPOCH) // datetime.timedelta(microseconds=1) * 1000 for moment in moments]
    shown = [nanoseconds(moment.astimezone(clock).replace(tzinfo=None).isoformat()) for moment in moments]
    assert to_wall(instants, zone)[0].tolist() == shown


def _offset(start: datetime.datetime, hours: int, clock: datetime.tzinfo) -> datetime.timedelta | None:
    return (start.replace(tzinfo=datetime.UTC) + datetime.timedelta(hours=hours)).astimezone(clock).utcoffset()


@pytest.mark.parametrize(("zone", "ahead"), [("America/New_York", False), ("Asia/Tokyo", True), ("UTC", None)])
def test_what_64_bits_do_not_hold_is_told(zone: str, ahead: bool | None) -> None:
    edges = np.array([MOST, LEAST + 1, 0, LEAST])
    assert to_instants(edges, zone)[1].tolist() == [ahead is False, ahead is True, False, ahead is not False]
    assert to_wall(edges, zone)[1].tolist() == [ahead is True, ahead is False, False, True]


def test_no_times_are_none() -> None:
    instants, outside = to_instants(np.empty(0, np.int64), "Asia/Tokyo")
    assert (instants.dtype, len(instants), len(outside)) == (np.int64, 0, 0)
