"""Arrow columns, typed or text, read as instants, numbers, flags and identifiers; what cannot be is told by row."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from eventkern.data import zones
from eventkern.data.schema import DataError

HAS_ZONE = r"[T ]\d{2}.*(Z|[+-]\d{2}(:?\d{2})?)$"
NULL_TEXTS = ("", "NA", "NaN", "null")
"""Texts that stand for a missing number, flag or time. An identifier may be called NA; for it only "" does."""

FALSE_TEXTS = ("0", "false", "no", "0.0")
TRUE_TEXTS = ("1", "true", "yes", "1.0")
FLOAT_TEXT = re.compile(r"(?P<whole>-?[0-9]+)\.0|-?[0-9](\.[0-9]+)?(?P<exponent>e[+-][0-9]{2,3})|-0|True|False")
"""An identifier that a writer of floats or of Python's booleans has been at."""

WALL_CLOCK = pa.timestamp("ns")
INSTANT = pa.timestamp("ns", "UTC")


@dataclass(frozen=True)
class Times:
    """Instants and the wall clock in the schema's time zone; null where missing or bad.

    Attributes:
        instants: timestamp[ns, UTC].
        wall: timestamp[ns], the local wall clock.
        bad: rows whose value is no timestamp, ascending.
    """

    instants: pa.Array
    wall: pa.Array
    bad: list[int]


def read_times(array: pa.Array, timezone: str) -> Times:
    """Read timestamps, dates, or ISO 8601 text.

    Values without a zone are wall-clock times in `timezone`: of the hour that is repeated in autumn the first, and one
    that the clock leaps over moves forward by the leap (`eventkern.data.zones`). The wall clock is that of the instant.
    A time whose instant or wall clock 64 bits of nanoseconds do not hold, or hold as no time at all, is bad.
    """
    array = _plain(array)
    if pa.types.is_timestamp(array.type):
        return _localized(*_cast_each(array, WALL_CLOCK if array.type.tz is None else INSTANT), timezone)
    if pa.types.is_date(array.type):
        return _localized(*_cast_each(array, WALL_CLOCK), timezone)
    if not pa.types.is_string(array.type):
        raise DataError(f"holds {array.type}; give timestamps, dates or ISO 8601 text")
    zoned = pc.match_substring_regex(array, HAS_ZONE)
    if not pc.any(zoned).as_py():
        return _localized(*_cast_each(array, WALL_CLOCK), timezone)
    if pc.all(zoned).as_py():
        return _localized(*_cast_each(array, INSTANT), timezone)
    absent = pa.scalar(None, pa.string())
    with_zone = _localized(*_cast_each(pc.if_else(zoned, array, absent), INSTANT), timezone)
    without = _localized(*_cast_each(pc.if_else(zoned, absent, array), WALL_CLOCK), timezone)
    return Times(
        pc.coalesce(with_zone.instants, without.instants),
        pc.coalesce(with_zone.wall, without.wall),
        sorted(with_zone.bad + without.bad),
    )


def read_numbers(array: pa.Array) -> tuple[NDArray[np.float64], list[int]]:
    """Numbers as float64, NaN where missing; the bad rows are no numbers, or infinite."""
    array = _plain(array)
    if pa.types.is_string(array.type):
        numbers, bad = _cast_each(array, pa.float64())
    elif pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_decimal(array.type):
        numbers, bad = array.cast(pa.float64(), safe=False), []
    else:
        raise DataError(f"holds {array.type}; give numbers")
    values = numbers.fill_null(np.nan).to_numpy(zero_copy_only=False)
    return values, sorted({*bad, *np.flatnonzero(np.isinf(values)).tolist()})


def read_flags(array: pa.Array) -> tuple[NDArray[np.int16], list[int]]:
    """Flags as 0 and 1, -1 where missing; the bad rows are neither false nor true."""
    array = _plain(array)
    if pa.types.is_boolean(array.type):
        return _filled(array.cast(pa.int16())), []
    if pa.types.is_string(array.type):
        text = pc.utf8_lower(array)
    elif pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        text = _identifier_text(array)
    else:
        raise DataError(f"holds {array.type}; give booleans, 0 and 1, or true and false")
    known = pc.index_in(text, pa.array(FALSE_TEXTS + TRUE_TEXTS))
    flags = pc.greater_equal(known, len(FALSE_TEXTS)).cast(pa.int16())
    bad = np.flatnonzero(pc.and_(text.is_valid(), pc.is_null(known)).to_numpy(zero_copy_only=False))
    return _filled(flags), bad.tolist()


def read_identifiers(array: pa.Array) -> pa.Array:
    """Identifiers as text, null where missing; an integer reads the same from an integer and from a float column.

    `canonical` makes one form of each distinct one.
    """
    array = _plain(array, verbatim=True)
    if pa.types.is_nested(array.type):
        raise DataError(f"holds {array.type}; give integers or text")
    return _identifier_text(array)


def canonical(identifier: str) -> str:
    """An identifier in one form, whatever wrote it: of a column that a missing value made one of floats, 310 is "310.0"
    in CSV by pandas, and 1e5 is "1e+05" in R's, while Parquet's read "310" and "100000".

    `-?[0-9]+\\.0` loses its ".0"; a float with an exponent ("1e+10", "1e-05") reads as a column of floats reads it; -0
    is 0; True and False are true and false. All else stays: "007", "310.00", "1E5", "310.5".
    """
    match = FLOAT_TEXT.fullmatch(identifier)
    if match is None:
        return identifier
    if match["exponent"] and np.isfinite(float(identifier)):
        return str(_identifier_text(pa.array([float(identifier)]))[0])
    whole = match["whole"] or identifier
    return {"-0": "0", "True": "true", "False": "false"}.get(whole, whole)


def field_of(wall: pa.Array, name: str) -> NDArray[np.int16]:
    """A calendar field of wall-clock times (Monday is weekday 0), -1 where missing."""
    compute = {"weekday": pc.day_of_week}.get(name) or getattr(pc, name)
    return _filled(compute(wall).cast(pa.int16()))


def nanoseconds(instants: pa.Array) -> NDArray[np.int64]:
    """Instants as nanoseconds since 1970; none may be null."""
    return np.asarray(instants.cast(pa.int64()).to_numpy(zero_copy_only=False))


def shown(array: pa.Array, row: int) -> str | None:
    """A value as a complaint names it, None where it is null. (Python has no time beyond the year 9999; Arrow has.)"""
    value = array[row]
    if pa.types.is_dictionary(value.type):
        value = value.value
    if not value.is_valid:
        return None
    return str(value.cast(pa.string()).as_py() if pa.types.is_temporal(value.type) else value.as_py())


def _plain(array: pa.Array, verbatim: bool = False) -> pa.Array:
    """Without dictionaries, of one text type, and with null for empty text; trimmed, and NA null, unless verbatim."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_null(array.type):
        array = array.cast(pa.string())
    if pa.types.is_large_string(array.type) or pa.types.is_string_view(array.type):
        array = array.cast(pa.string())
    if pa.types.is_string(array.type):
        array = array if verbatim else pc.utf8_trim_whitespace(array)
        null_texts = pa.array([""] if verbatim else NULL_TEXTS)
        array = pc.if_else(pc.is_in(array, null_texts), pa.scalar(None, pa.string()), array)
    return array


def _identifier_text(array: pa.Array) -> pa.Array:
    if not pa.types.is_floating(array.type):
        return array if pa.types.is_string(array.type) else array.cast(pa.string())
    numbers, absent = array.cast(pa.float64()), pa.scalar(None, pa.float64())
    is_whole = pc.and_(pc.less(pc.abs(numbers), 2.0**63), pc.equal(pc.trunc(numbers), numbers))
    whole = pc.if_else(is_whole, numbers, absent).cast(pa.int64(), safe=False)  # exact: safe refuses beyond 2**53
    text = pc.coalesce(whole.cast(pa.string()), array.cast(pa.string()))
    return pc.if_else(pc.is_nan(numbers), pa.scalar(None, pa.string()), text)


def _filled(array: pa.Array) -> NDArray[np.int16]:
    return np.asarray(array.fill_null(-1).to_numpy(zero_copy_only=False))


def _localized(times: pa.Array, bad: list[int], timezone: str) -> Times:
    absent = times.is_null().to_numpy(zero_copy_only=False)
    given = times.cast(pa.int64()).fill_null(0).to_numpy()
    instants, outside = (given, np.zeros(len(given), bool)) if times.type.tz else zones.to_instants(given, timezone)
    wall, is_wall_outside = zones.to_wall(instants, timezone)
    outside = (outside | is_wall_outside) & ~absent
    absent = absent | outside
    return Times(
        pa.array(instants, mask=absent).cast(INSTANT),
        pa.array(wall, mask=absent).cast(WALL_CLOCK),
        sorted(bad + np.flatnonzero(outside).tolist()),
    )


def _cast_each(array: pa.Array, target: Any) -> tuple[pa.Array, list[int]]:
    """Cast every value that can be; null, and named by row, what cannot. Halving finds the bad rows quickly."""
    try:
        return array.cast(target), []
    except pa.ArrowInvalid:
        if len(array) == 1:
            return pa.nulls(1, target), [0]
    half = len(array) // 2
    left, left_bad = _cast_each(array[:half], target)
    right, right_bad = _cast_each(array[half:], target)
    return pa.concat_arrays([left, right]), left_bad + [half + row for row in right_bad]
