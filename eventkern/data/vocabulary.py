"""The classes of each category, fitted on the training period alone, and the mapping of raw values to them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eventkern.data.schema import FIELD_SIZES, FIRST_CLASS, UNIT_SECONDS, Category

MISSING_CLASS = 1
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass
class ValueNumbers:
    """Numbers the distinct values of an identifier column in the order of their first appearance.

    Attributes:
        form: what a value is written as; a value in its form stays as it is.
        numbers: of each value in its form.
    """

    form: Callable[[str], str] = str
    numbers: dict[str, int] = field(default_factory=dict)
    _others: dict[str, int] = field(default_factory=dict)

    def add(self, values: Iterable[str]) -> NDArray[np.int32]:
        """The number of each value, new ones included."""
        numbers = self.numbers
        return np.array([numbers[value] if value in numbers else self._number(value) for value in values], np.int32)

    def _number(self, value: str) -> int:
        """The number of a value that is new, or not in its form."""
        if value not in self._others:
            written = self.form(value)
            number = self.numbers.setdefault(written, len(self.numbers))
            if written == value:
                return number
            self._others[value] = number
        return self._others[value]


@dataclass(frozen=True)
class Classes:
    """The fitted classes of one category.

    Attributes:
        category: the category.
        values: what the real classes stand for, from class 2 on.
        table: `id`: class of each value number, and class 1 at the end, for number -1.
        edges: `bins`: (bins - 1,) inner edges; bin b holds edges[b - 1] <= value < edges[b].
        first: `time`: the field's value in class 2.
    """

    category: Category
    values: tuple[str, ...]
    table: NDArray[np.int32] | None = None
    edges: NDArray[np.float64] | None = None
    first: int = 0

    @property
    def size(self) -> int:
        """Number of classes, 0 and 1 included."""
        return FIRST_CLASS + len(self.values)

    def encode(self, raw: NDArray[Any]) -> NDArray[Any]:
        """Classes of raw values.

        Args:
            raw: `id`: value numbers, -1 where missing; `bins`: float64, NaN where missing; `flag` and `time`: integers,
                -1 where missing; `elapsed`: nanoseconds since the key's previous event, -1 where there is none.
        """
        if self.table is not None:
            return np.asarray(self.table[raw])
        if self.edges is not None:
            return np.where(np.isnan(raw), MISSING_CLASS, np.searchsorted(self.edges, raw, side="right") + FIRST_CLASS)
        if self.category.unit is not None and self.category.limit is not None:
            units = np.minimum(raw // (UNIT_SECONDS[self.category.unit] * 1_000_000_000), self.category.limit)
            return np.where(raw < 0, MISSING_CLASS, units + FIRST_CLASS)
        known = (raw >= self.first) & (raw < self.first + len(self.values))  # -1, or a year of another table
        return np.where(known, raw - self.first + FIRST_CLASS, MISSING_CLASS)

    def to_dict(self) -> dict[str, Any]:
        """What store.json tells of the classes."""
        told: dict[str, Any] = {"name": self.category.name, "kind": self.category.kind, "size": self.size}
        if self.edges is not None:
            told["edges"] = self.edges.tolist()
        return {**told, "values": list(self.values)}


def fit_id(category: Category, values: list[str], counts: NDArray[np.int64]) -> Classes:
    """Classes by frequency; ties by value, as numbers where all are integers. A value never seen in training has none.

    Args:
        category: a category of kind `id`.
        values: the distinct values by their number.
        counts: how often each occurs in the training period.
    """
    seen = np.flatnonzero(counts)
    integers = all(_is_integer(values[number]) for number in seen)
    order = sorted(seen.tolist(), key=lambda n: (-counts[n], int(values[n]) if integers else 0, values[n]))
    table = np.full(len(values) + 1, MISSING_CLASS, np.int32)
    table[order] = np.arange(FIRST_CLASS, FIRST_CLASS + len(order), dtype=np.int32)
    return Classes(category, tuple(values[number] for number in order), table=table)


def fit_bins(category: Category, numbers: NDArray[np.float64]) -> Classes:
    """Quantile bins. An edge is a value that occurs and opens the bin above it; equal edges are one.

    Args:
        category: a category of kind `bins`.
        numbers: the training period's values, none missing; sorted in place, which needs no second copy.
    """
    numbers.sort()
    at = np.arange(1, category.bins) * len(numbers) // category.bins
    edges = np.unique(numbers[at]) if len(numbers) else np.empty(0)
    edges = edges[edges > numbers[0]] if len(numbers) else edges  # nothing lies below the least value
    text = [f"{edge:.17g}" if float(f"{edge:.6g}") != edge else f"{edge:.6g}" for edge in edges]
    inner = (f"{low} to below {high}" for low, high in itertools.pairwise(text))
    values = (f"below {text[0]}", *inner, f"{text[-1]} and more") if text else ("any",)
    return Classes(category, values, edges=edges)


def fit_fixed(category: Category, years: tuple[int, int] | None) -> Classes:
    """Classes that the category's kind says: flags, calendar fields, elapsed units.

    Args:
        category: a category of kind `flag`, `time` or `elapsed`.
        years: for a `year`, the first and last year of the whole table; None where every value is missing.
    """
    if category.kind == "flag":
        return Classes(category, ("false", "true"))
    if category.limit is not None:
        return Classes(category, (*map(str, range(category.limit)), f"{category.limit} and more"))
    if category.field == "weekday":
        return Classes(category, WEEKDAYS)
    if category.field == "year":
        first, last = years or (1970, 1970)
        return Classes(category, tuple(map(str, range(first, last + 1))), first=first)
    first = 1 if category.field in ("month", "day") else 0
    size = FIELD_SIZES[category.field or ""] or 0
    return Classes(category, tuple(map(str, range(first, first + size))), first=first)


def told_classes(category: Category, told: Mapping[str, Any], numbers: Mapping[str, int]) -> Classes:
    """The classes that store.json tells of, for another table; what they do not cover is out of vocabulary.

    Args:
        category: the category.
        told: as `Classes.to_dict` wrote it.
        numbers: `id`: the number of each distinct value of the other table.
    """
    values = tuple(told["values"])
    if category.kind == "id":
        table = np.full(len(numbers) + 1, MISSING_CLASS, np.int32)
        for code, value in enumerate(values, FIRST_CLASS):
            if value in numbers:
                table[numbers[value]] = code
        return Classes(category, values, table=table)
    if category.kind == "bins":
        return Classes(category, values, edges=np.array(told["edges"], np.float64))
    return fit_fixed(category, (int(values[0]), int(values[-1])) if category.field == "year" else None)


def _is_integer(text: str) -> bool:
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdecimal() and len(digits) < 20 and str(int(text)) == text
