"""What a table of events means: its categories, streams, key, clock and split, read from a TOML file.

Class 0 is padding and class 1 missing or out-of-vocabulary in every category; real classes start at 2:

    kind      classes, from 2 on                                                                   source column
    id        values by frequency in the training period, ties by value                            numbers or text
    flag      false, true                                                                          0/1, true/false
    bins      `bins` quantile bins of the training period (fewer where quantiles coincide)         numbers
    time      `field` of a timestamp column, read in the schema's time zone                        timestamps
    elapsed   whole `unit`s since the key's previous event: 0, 1, ..., `limit` and more            none
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import tomllib
import zoneinfo
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from eventkern import _C
from eventkern.plain import item

Kind = Literal["id", "flag", "bins", "time", "elapsed"]

FIRST_CLASS = 2
"""The first real class: 0 is padding, 1 missing or out-of-vocabulary."""

FIELD_SIZES: dict[str, int | None] = {"year": None, "month": 12, "day": 31, "weekday": 7, "hour": 24, "minute": 60}
"""Number of values of each calendar field; the years are those that the table spans."""

MOST_CLASSES = 1 << 20
"""Most bins, and most units of an elapsed time: each is a class that store.json tells by name."""

UNIT_SECONDS = {"days": 86_400, "hours": 3_600, "minutes": 60}

SHIPPED = Path(__file__).parent.parent / "schemas"


class DataError(ValueError):
    """A mistake in the user's data, schema or store, told in one line: the place, what is there, and the mend."""


@dataclass(frozen=True)
class Category:
    """One of the C integers of an event.

    Args:
        name: name of the category, unique in its schema.
        kind: `id`, `flag`, `bins`, `time` or `elapsed` (see the module's table).
        column: source column; the name itself unless given. `elapsed` reads none.
        bins: number of quantile bins (kind `bins`), at least 2, at most 2^20.
        field: `year`, `month`, `day`, `weekday`, `hour` or `minute` (kind `time`).
        unit: `days`, `hours` or `minutes` (kind `elapsed`).
        limit: the top class of kind `elapsed` holds `limit` units and more, at least 1, at most 2^20.

    Raises:
        DataError: an option does not fit the kind; it names the category and the option.
    """

    name: str
    kind: Kind
    column: str = ""
    bins: int = 20
    field: str | None = None
    unit: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        place = f"category {self.name!r}"
        for option in ("bins", "limit"):
            object.__setattr__(self, option, item(getattr(self, option)))
        for option in ("name", "column"):
            value = getattr(self, option)
            if not isinstance(value, str) or (option == "name" and not _is_name(value)):
                raise DataError(f"{place}: {option} is {value!r}; write a non-empty text of one line")
        if self.kind not in get_args(Kind):
            raise DataError(f"{place}: kind is {self.kind!r}; write one of {', '.join(get_args(Kind))}")
        if (self.field is not None) != (self.kind == "time"):
            raise DataError(f"{place}: field is {self.field!r}; kind 'time' takes a field, and no other kind does")
        if self.field is not None and not (isinstance(self.field, str) and self.field in FIELD_SIZES):
            raise DataError(f"{place}: field is {self.field!r}; write one of {', '.join(FIELD_SIZES)}")
        if (self.unit is not None, self.limit is not None) != (self.kind == "elapsed",) * 2:
            raise DataError(
                f"{place}: unit is {self.unit!r}, limit is {self.limit!r}; kind 'elapsed' takes both, others none"
            )
        if self.unit is not None and not (isinstance(self.unit, str) and self.unit in UNIT_SECONDS):
            raise DataError(f"{place}: unit is {self.unit!r}; write one of {', '.join(UNIT_SECONDS)}")
        if self.limit is not None and not _is_count(self.limit, 1):
            raise DataError(f"{place}: limit is {self.limit!r}; write an integer from 1 to {MOST_CLASSES}")
        if not _is_count(self.bins, 2):
            raise DataError(f"{place}: bins is {self.bins!r}; write an integer from 2 to {MOST_CLASSES}")
        if self.kind != "bins" and self.bins != Category.bins:
            raise DataError(f"{place}: bins is {self.bins!r}; kind 'bins' takes bins, and no other kind does")
        if self.kind == "elapsed" and self.column:
            raise DataError(f"{place}: kind 'elapsed' reads no column, yet column is {self.column!r}; leave it out")
        if not self.column and self.kind != "elapsed":
            object.__setattr__(self, "column", self.name)

    def to_dict(self) -> dict[str, Any]:
        """The options that matter to this kind, as a TOML table would hold them."""
        options: dict[str, Any] = {"name": self.name, "kind": self.kind}
        if self.column:
            options["column"] = self.column
        if self.kind == "bins":
            options["bins"] = self.bins
        options.update({key: value for key in ("field", "unit", "limit") if (value := getattr(self, key)) is not None})
        return options


@dataclass(frozen=True)
class Stream:
    """The recent history of one entity, or of all events.

    Args:
        name: name of the stream, unique in its schema.
        entity: the category (kind `id`) whose actual value owns the history; None (`"all"` in TOML): all events.
    """

    name: str
    entity: str | None = None

    def __post_init__(self) -> None:
        if not _is_name(self.name):
            raise DataError(f"stream {self.name!r}: name is {self.name!r}; write a non-empty text of one line")


@dataclass(frozen=True)
class Schema:
    """How a source table becomes events.

    Args:
        name: name of the schema.
        timestamp: source column that says when a whole row is known; rows are ordered by it.
        timezone: IANA zone of calendar fields, of `split`, and of source timestamps that carry no zone.
        categories: the C categories, in the order of the store's columns.
        streams: the K histories that the model reads, at most `eventkern._C.max_streams`.
        key: name of the `id` category whose entities have their sequences predicted.
        split: ISO date or date and time; rows before it are the training period, the others validation.
        uniform_sizes: every category has exactly `id_category_size` classes, and a code at or above that reads 1.

    Raises:
        DataError: names the field at fault and the mend.
    """

    name: str
    timestamp: str
    timezone: str
    categories: tuple[Category, ...]
    streams: tuple[Stream, ...]
    key: str
    split: str
    uniform_sizes: bool = False

    def __post_init__(self) -> None:
        for option in ("name", "timestamp", "timezone", "key", "split"):
            value = getattr(self, option)
            if not _is_name(value) and not (option == "timestamp" and value and isinstance(value, str)):
                raise DataError(f"key {option!r}: is {value!r}; write a non-empty text of one line")
        object.__setattr__(self, "uniform_sizes", item(self.uniform_sizes))
        if not isinstance(self.uniform_sizes, bool):
            raise DataError(f"key 'uniform_sizes': is {self.uniform_sizes!r}; write true or false")
        if not self.categories:
            raise DataError("key 'categories': is empty; name at least one category")
        if not self.streams:
            raise DataError("key 'streams': is empty; name at least one stream")
        if len(self.streams) > _C.max_streams:
            raise DataError(f"key 'streams': names {len(self.streams)} streams; name at most {_C.max_streams}")
        for plural, names in (("categories", self.category_names), ("streams", tuple(s.name for s in self.streams))):
            twice = [name for i, name in enumerate(names) if name in names[:i]]
            if twice:
                raise DataError(f"key {plural!r}: names {twice[0]!r} twice; names must differ")
        if "all" in self.category_names:
            raise DataError(
                "key 'categories': a category is called 'all', the word for the stream of all events; rename it"
            )
        for place, entity in [("key 'key'", self.key), *((f"stream {s.name!r}", s.entity) for s in self.streams)]:
            if entity is not None and (entity not in self.category_names or self.category(entity).kind != "id"):
                known = ", ".join(category.name for category in self.categories if category.kind == "id")
                raise DataError(f"{place}: is {entity!r}, which is no category of kind 'id'; write one of: {known}")
        try:
            zoneinfo.ZoneInfo(self.timezone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:  # a folder of zones, a long name
            if not zoneinfo.available_timezones():
                fault = "is not found, for this machine has no time zones; install the system's package tzdata"
            else:
                fault = "is no IANA zone; write e.g. 'UTC'"
            raise DataError(f"key 'timezone': {self.timezone!r} {fault}") from error
        try:
            datetime.datetime.fromisoformat(self.split)
        except ValueError as error:
            raise DataError(f"key 'split': {self.split!r} is no ISO time; write e.g. '2013-11-01'") from error

    @property
    def category_names(self) -> tuple[str, ...]:
        return tuple(category.name for category in self.categories)

    @property
    def entities(self) -> tuple[str, ...]:
        """The categories that own sequences: the key, then the streams' entities, each once."""
        return tuple(dict.fromkeys([self.key, *(s.entity for s in self.streams if s.entity is not None)]))

    @property
    def columns(self) -> tuple[str, ...]:
        """The source columns that prepare reads, each once."""
        return tuple(dict.fromkeys([self.timestamp, *(c.column for c in self.categories if c.column)]))

    @property
    def split_ns(self) -> int:
        """The split as nanoseconds since 1970 in UTC; a split without offset is read in the schema's time zone."""
        moment = datetime.datetime.fromisoformat(self.split)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=zoneinfo.ZoneInfo(self.timezone))
        since = moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
        return (since.days * 86_400 + since.seconds) * 1_000_000_000 + since.microseconds * 1_000

    def category(self, name: str) -> Category:
        """The category of this name."""
        for category in self.categories:
            if category.name == name:
                return category
        raise DataError(f"schema {self.name!r} has no category {name!r}; it has {', '.join(self.category_names)}")

    @classmethod
    def load(cls, path: str | Path) -> Schema:
        """Read a schema.

        Args:
            path: a TOML file, else the name of a schema that ships (`flights`, `workforce`, `notes17`).

        Raises:
            DataError: no such file or name, not TOML, or a key that is unknown, missing or of a wrong value.
        """
        file = Path(path)
        if not file.is_file():
            shipped = SHIPPED / f"{str(path).removesuffix('.toml')}.toml"
            if not shipped.is_file():
                names = sorted(toml.stem for toml in SHIPPED.glob("*.toml"))
                mend = f"{meant} Else give" if (meant := did_you_mean(str(path), names)) else "; give"
                raise DataError(
                    f"{path}: no such schema file{mend} the path of a TOML file, or one of: {', '.join(names)}"
                )
            file = shipped
        try:
            return cls.from_dict(tomllib.loads(file.read_text(encoding="utf-8-sig")))
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 text; save it as UTF-8") from error
        except DataError as error:
            raise DataError(f"{file}: {error}") from error
        except (ValueError, RecursionError) as error:  # of tomllib: integers of thousands of digits, nested too deep
            raise DataError(f"{file}: not TOML: {error}") from error

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Schema:
        """Build a schema from nested plain values (TOML or JSON), refusing unknown and missing keys by name."""
        flat = _checked(cls, options, "schema")
        if isinstance(flat["split"], datetime.date):  # TOML has dates and times of its own
            flat["split"] = flat["split"].isoformat()
        categories = tuple(Category(**_checked(Category, c, "category")) for c in _tables(flat, "categories"))
        streams = []
        for table in _tables(flat, "streams"):
            stream = _checked(Stream, table, "stream", required=("entity",))
            streams.append(Stream(stream["name"], None if stream["entity"] == "all" else stream["entity"]))
        return cls(**{**flat, "categories": categories, "streams": tuple(streams)})

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values that `from_dict` reads back as an equal schema."""
        return {
            "name": self.name,
            "timestamp": self.timestamp,
            "timezone": self.timezone,
            "key": self.key,
            "split": self.split,
            "uniform_sizes": self.uniform_sizes,
            "streams": [{"name": s.name, "entity": "all" if s.entity is None else s.entity} for s in self.streams],
            "categories": [category.to_dict() for category in self.categories],
        }


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != "" and len(value.splitlines()) == 1


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names the closest of the known names; nothing where none is close."""
    closest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {closest[0]}?" if closest else ""


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST_CLASSES


def _tables(options: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    tables = options[key]
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        raise DataError(f"key {key!r}: must be a list of tables")
    return tables


def _checked(owner: type, options: Mapping[str, Any], what: str, required: tuple[str, ...] = ()) -> dict[str, Any]:
    """A copy of options whose keys are the fields of `owner`, none unknown and none missing."""
    fields = {field.name: field for field in dataclasses.fields(owner)}
    where = f"{what} {options['name']!r}" if what != "schema" and "name" in options else what
    for key in options:
        if key not in fields:
            raise DataError(f"{where}: unknown key {key!r}; it takes {', '.join(fields)}")
    for name, field in fields.items():
        if name not in options and (field.default is dataclasses.MISSING or name in required):
            raise DataError(f"{where}: key {name!r} is missing; add it")
    return dict(options)
