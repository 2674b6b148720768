"""From classes back to values: the inverse of encoding, as an Arrow table, and the times that events then have.

    kind      value                                                              Arrow type
    id        the identifier, as text                                            string
    flag      false, true                                                        bool
    bins      the interval, as store.json tells it: "-3 to below 0"              string
    time      the number of the field; of a weekday its name                     int32; string
    elapsed   whole units since the previous event; the limit means and more     int32

Class 1, missing or out-of-vocabulary, and class 0 are null in every kind.
"""

from __future__ import annotations

import datetime
import zoneinfo
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eventkern.data.schema import FIRST_CLASS, UNIT_SECONDS, Category, DataError
from eventkern.data.store import EventStore

DATE = ("year", "month", "day")


def decode_events(store: EventStore, codes: NDArray[Any]) -> pa.Table:
    """The values that classes stand for, a column a category.

    Args:
        store: whose classes they are.
        codes: (M, C) integers, full classes or those under any `id_category_size`.

    Raises:
        DataError: as a ValueError: a code outside its category.
    """
    columns = {}
    for number, category in enumerate(store.schema.categories):
        values = _values(category, store.info["categories"][number]["values"])
        column = codes[:, number].astype(np.int64)
        outside = (column < 0) | (column >= len(values) + FIRST_CLASS)
        if outside.any():
            raise DataError(
                f"codes[..., {number}] holds {column[outside][0]}, but category {category.name!r} has "
                f"{len(values) + FIRST_CLASS} classes"
            )
        columns[category.name] = values.take(pa.array(column - FIRST_CLASS, mask=column < FIRST_CLASS))
    return pa.table(columns)


def decode_times(store: EventStore, anchors: NDArray[np.int64], table: pa.Table) -> pa.Array:
    """When generated events are, as far as the schema's categories tell, in seconds and the schema's time zone.

    - Where `time` categories read year, month and day of the schema's timestamp, these are the date; hour and minute
      are those that categories read of it, else 0. Null for a date that does not exist.
    - Else where a category is `elapsed`: that many units after the key's event before, which is the earliest time that
      they allow, since they are whole ones and the limit means and more; where `time` categories read hour (and minute)
      of the schema's timestamp, the first moment from then on at which the clock shows them. Null from the first event
      on whose elapsed units are missing.
    - Else null.

    Past the year 9999, where calendars end, a time is null as well, and so are those that follow from it.

    Args:
        store: whose schema tells.
        anchors: (B,) int64 nanoseconds since 1970, UTC: the newest known event of each key.
        table: of `decode_events`, the events of one key after another, as many of each.
    """
    schema = store.schema
    zone = zoneinfo.ZoneInfo(schema.timezone)
    clock = {c.field: table[c.name].to_pylist() for c in schema.categories if c.field and c.column == schema.timestamp}
    elapsed = next((category for category in schema.categories if category.kind == "elapsed"), None)
    units = None if elapsed is None else table[elapsed.name].to_pylist()
    seconds = UNIT_SECONDS[elapsed.unit] if elapsed is not None and elapsed.unit else 0
    num_events = table.num_rows // max(len(anchors), 1)
    times: list[datetime.datetime | None] = []
    for sample, anchor in enumerate(anchors.tolist()):
        before: datetime.datetime | None = datetime.datetime.fromtimestamp(anchor // 1_000_000_000, datetime.UTC)
        for row in range(sample * num_events, (sample + 1) * num_events):
            fields = {field: values[row] for field, values in clock.items()}
            if all(field in clock for field in DATE):
                before = _moment(fields, zone)
            elif units is not None and before is not None and units[row] is not None:
                before = _shown(before, units[row] * seconds, fields, zone)
            else:
                before = None
            times.append(before)
    return pa.array(times, pa.timestamp("s", "UTC")).cast(pa.timestamp("s", schema.timezone))


def _moment(fields: dict[str, Any], zone: datetime.tzinfo) -> datetime.datetime | None:
    """The moment of calendar fields, hour and minute 0 where there are none."""
    year, month, day, hour, minute = (fields.get(field, 0) for field in (*DATE, "hour", "minute"))
    try:
        if None in (year, month, day, hour, minute):
            return None
        return datetime.datetime(year, month, day, hour, minute, tzinfo=zone).astimezone(datetime.UTC)
    except (ValueError, OverflowError):  # no such date, or none in UTC
        return None


def _shown(
    before: datetime.datetime, seconds: int, fields: dict[str, Any], zone: datetime.tzinfo
) -> datetime.datetime | None:
    """The first moment, seconds after `before` or later, at which a clock shows the hour, and the minute where there
    is one; None past the year 9999."""
    hour, minute = fields.get("hour"), fields.get("minute")
    try:
        least = before + datetime.timedelta(seconds=seconds)
        local = least.astimezone(zone)
        if hour is None or (local.hour == hour and minute in (None, local.minute)):
            return least
        shown = local.replace(hour=hour, minute=minute or 0, second=0)
        if shown < local:
            shown += datetime.timedelta(days=1)
        return shown.astimezone(datetime.UTC)
    except OverflowError:
        return None


def _values(category: Category, names: Sequence[str]) -> pa.Array:
    """The values of the real classes, from class 2 on."""
    if category.kind == "flag":
        return pa.array([name == "true" for name in names])
    if category.kind == "elapsed":
        return pa.array(range(len(names)), pa.int32())
    if category.kind == "time" and category.field != "weekday":
        return pa.array([int(name) for name in names], pa.int32())
    return pa.array(names, pa.string())
