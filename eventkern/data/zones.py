"""Wall clocks and instants of a time zone, for whole arrays, by the database that `zoneinfo` reads.

A wall clock that shows a time twice (autumn) means the first; a time that it leaps over (spring) moves forward by the
leap, so that 02:30 reads 03:30 where the clock goes from 2 to 3. `datetime` with fold 0 says the same. (Arrow's own
conversion knows no rule for the leap, and no summer time after 2037.)
"""

from __future__ import annotations

import datetime
import functools
import zoneinfo

import numpy as np
from numpy.typing import NDArray

SECOND_NS = 1_000_000_000
DAY_S = 86_400
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
NOT_A_TIME = np.iinfo(np.int64).min
"""What numpy, and so a store's reader, takes for no time at all."""


def to_instants(wall: NDArray[np.int64], timezone: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Instants of what a zone's clock shows.

    Args:
        wall: (N,) nanoseconds from 1970 on that clock.
        timezone: IANA name.

    Returns:
        (N,) int64 nanoseconds since 1970 in UTC, and (N,) bool: those that int64 does not hold, or holds as no time,
        whose number means nothing.
    """
    seconds = wall // SECOND_NS
    changes, offsets = _offsets(timezone, *_years(seconds))
    # Up to the larger of both clocks the old offset holds: to the end of a leap, and through the first of two passes.
    until = changes + np.maximum(offsets[:-1], offsets[1:])
    offset = offsets[np.searchsorted(until, seconds, side="right")] * SECOND_NS
    instants = wall - offset
    return instants, ((instants > wall) != (offset < 0)) | (instants == NOT_A_TIME)


def to_wall(instants: NDArray[np.int64], timezone: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """What a zone's clock shows at instants; the inverse of `to_instants`, in the same terms."""
    seconds = instants // SECOND_NS
    changes, offsets = _offsets(timezone, *_years(seconds))
    offset = offsets[np.searchsorted(changes, seconds, side="right")] * SECOND_NS
    wall = instants + offset
    is_no_time = (instants == NOT_A_TIME) | (wall == NOT_A_TIME)
    return wall, ((wall > instants) != (offset > 0)) | is_no_time


def _years(seconds: NDArray[np.int64]) -> tuple[int, int]:
    """The first and last year of these times, with one more on either side."""
    edges = np.array([seconds.min(), seconds.max()] if len(seconds) else [0, 0], "datetime64[s]")
    first, last = edges.astype("datetime64[Y]").astype(int) + 1970
    return int(first) - 1, int(last) + 1


@functools.lru_cache(maxsize=64)
def _offsets(timezone: str, first_year: int, last_year: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """When a zone's offset from UTC changes in these years, and the offsets before, between and after: in seconds."""
    zone = zoneinfo.ZoneInfo(timezone)
    changes = [change for year in range(first_year, last_year + 1) for change in _changes(timezone, year)]
    start = _second(first_year)
    offsets = [_offset(zone, second) for second in (start, *changes)]
    return np.array(changes, np.int64), np.array(offsets, np.int64)


@functools.lru_cache(maxsize=4096)
def _changes(timezone: str, year: int) -> tuple[int, ...]:
    """The seconds since 1970 in UTC at which a zone's offset changes in a year. (Nowhere does it twice in a day.)"""
    zone = zoneinfo.ZoneInfo(timezone)
    changes = []
    for day in range(_second(year), _second(year + 1), DAY_S):
        before, end = day - 1, day + DAY_S - 1
        old = _offset(zone, before)
        if old != _offset(zone, end):
            while end - before > 1:
                middle = (before + end) // 2
                before, end = (middle, end) if _offset(zone, middle) == old else (before, middle)
            changes.append(end)
    return tuple(changes)


def _second(year: int) -> int:
    return int((datetime.datetime(year, 1, 1, tzinfo=datetime.UTC) - EPOCH).total_seconds())


def _offset(zone: zoneinfo.ZoneInfo, second: int) -> int:
    offset = (EPOCH + datetime.timedelta(seconds=second)).astimezone(zone).utcoffset()
    assert offset is not None, "a ZoneInfo knows its offset at every instant"
    return int(offset.total_seconds())
