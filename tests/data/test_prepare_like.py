"""Prepare with the classes of another store: next year's table, for a model of this year's."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eventkern.data.prepare import prepare
from eventkern.data.schema import Category, DataError, Schema
from eventkern.data.store import EventStore

FIRST = (  # price edges 2, 3, 4; years 1999 to 2001
    "2024-01-01T09:00,b,0,1,1999-01-01",
    "2024-01-01T09:00,b,0,2,2000-01-01",
    "2024-01-01T09:00,a,0,3,2000-01-01",
    "2024-01-01T09:00,c,0,4,2001-01-01",
    "2024-01-01T13:00,d,0,4,2001-01-01",
)
LATER = (
    "2025-01-01T10:00,new,1,9.5,1998-12-31",
    "2025-01-01T09:00,c,1,2.5,2001-05-05",
    "2025-01-01T11:01,a,,,2000-05-05",
    "2025-01-01T11:00,a,0,-7,2002-01-01",
    "2025-01-01T12:00,d,0,3,",
)


@pytest.fixture
def first(tmp_path: Path, run: Callable[..., EventStore]) -> EventStore:
    (tmp_path / "first").mkdir()
    return run(tmp_path / "first", *FIRST)


def test_values_have_the_classes_of_the_other_store(
    first: EventStore, tmp_path: Path, run: Callable[..., EventStore], decoded: Callable[[EventStore, str], list[str]]
) -> None:
    store = run(tmp_path, *LATER, like=first)
    told = [
        {key: category[key] for key in category.keys() - {"missing", "oov"}} for category in store.info["categories"]
    ]
    assert told == [
        {key: category[key] for key in category.keys() - {"missing", "oov"}} for category in first.info["categories"]
    ]
    assert decoded(store, "who") == ["c", "(missing)", "a", "a", "(missing)"]  # d came after the split there, too
    assert decoded(store, "price") == ["2 to below 3", "4 and more", "below 2", "(missing)", "3 to below 4"]
    assert decoded(store, "born") == ["2001", "(missing)", "(missing)", "2000", "(missing)"]
    assert decoded(store, "paid") == ["true", "true", "false", "(missing)", "false"]
    assert decoded(store, "hour") == ["9", "10", "11", "11", "12"]
    assert decoded(store, "pause") == ["(missing)", "(missing)", "(missing)", "1", "(missing)"]
    rates = {category["name"]: (category["missing"], category["oov"]["full"]) for category in store.info["categories"]}
    assert rates["who"] == (0, 2 / 5)
    assert rates["born"] == (1 / 5, 2 / 4)
    assert len(set(store.index("who").entity_of_row.tolist())) == 4  # entities are actual values


def test_no_row_need_lie_before_the_split_but_some_after_it(
    first: EventStore, tmp_path: Path, run: Callable[..., EventStore]
) -> None:
    store = run(tmp_path, *LATER, like=first)
    assert (store.split_row, store.num_events) == (0, 5)
    assert len(store.anchors("train", 3)) == 0
    assert store.index("who").rows[store.anchors("validation", 3)].tolist() == [2]  # the first event of a
    late = replace(first.schema, split="2026-01-01")
    with pytest.raises(DataError, match="every event lies before the split"):
        run(tmp_path / "first", *LATER, like=first, schema=late, overwrite=True)


def test_its_own_table_gives_the_same_codes(first: EventStore, tmp_path: Path, run: Callable[..., EventStore]) -> None:
    again = run(tmp_path, *FIRST, like=first)
    assert np.array_equal(again.codes, first.codes)
    assert (tmp_path / "store/store.bin").read_bytes() == (tmp_path / "first/store/store.bin").read_bytes()


def test_another_schema_is_refused(
    first: EventStore, tmp_path: Path, schema: Schema, write_csv: Callable[..., Path]
) -> None:
    categories = tuple(Category("price", "bins", bins=5) if c.name == "price" else c for c in schema.categories)
    for other in (replace(schema, categories=categories), replace(schema, timezone="UTC")):
        with pytest.raises(DataError, match="its categories or time zone are not those of schema 'visits'"):
            prepare(write_csv(tmp_path, *LATER), other, tmp_path / "store", like=first)
    assert not (tmp_path / "store").exists()
