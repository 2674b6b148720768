"""Prepare with the classes of another store: next year's table, for a model of this year's."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

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


def write_winds(folder: Path, write_csv: Callable[..., Path], suffix: str, year: int = 2024) -> Path:
    """Visits of the identifiers 20 and 310 before noon and 40 and 310 after it, with a suffix, some without one."""
    folder.mkdir(exist_ok=True)
    morning = [
        f"{year}-01-01T09:0{n},{who},0,1,2000-01-01" for n, who in enumerate([f"310{suffix}", f"20{suffix}", ""])
    ]
    noon = [f"{year}-01-01T13:0{n},{who},0,1,2000-01-01" for n, who in enumerate([f"310{suffix}", f"40{suffix}"])]
    return write_csv(folder, *morning, *noon)


def test_an_older_store_keeps_its_form(
    tmp_path: Path, schema: Schema, write_csv: Callable[..., Path], decoded: Callable[[EventStore, str], list[str]]
) -> None:
    """One that tells no form took identifiers as they stood; its like must find them, and theirs again."""
    table = write_winds(tmp_path / "old", write_csv, ".0")
    prepare(table, schema, tmp_path / "new")
    new = EventStore.open(tmp_path / "new")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eventkern.data.prepare.IDENTIFIER_FORM", 0)
        prepare(table, schema, tmp_path / "old_store")
    told = json.loads((tmp_path / "old_store/store.json").read_text())
    del told["identifier_form"], told["checksum"]["store.json"]
    (tmp_path / "old_store/store.json").write_text(json.dumps(told))
    old = EventStore.open(tmp_path / "old_store", verify=True)
    assert [store.info["categories"][0]["values"] for store in (old, new)] == [["20.0", "310.0"], ["20", "310"]]

    later = write_winds(tmp_path / "later", write_csv, ".0", 2025)
    prepare(later, schema, tmp_path / "like_old", like=old)
    like_old = EventStore.open(tmp_path / "like_old")
    prepare(later, schema, tmp_path / "again", like=like_old)
    wanted = ["310.0", "20.0", "(missing)", "310.0", "(missing)"]
    assert decoded(like_old, "who") == decoded(EventStore.open(tmp_path / "again"), "who") == wanted
    assert like_old.info["identifier_form"] == 0
    for suffix in ("", ".0"):
        later = write_winds(tmp_path / "later", write_csv, suffix, 2025)
        prepare(later, schema, tmp_path / "like_new", like=new, overwrite=True)
        like_new = EventStore.open(tmp_path / "like_new")
        assert decoded(like_new, "who") == [name.removesuffix(".0") for name in wanted]
    new.info["identifier_form"] = 2
    with pytest.raises(DataError, match="key 'identifier_form' is 2, and this eventkern writes forms up to 1"):
        prepare(later, schema, tmp_path / "newer", like=new)


def test_a_category_that_knows_few_of_its_values_is_warned_of(
    first: EventStore, tmp_path: Path, schema: Schema, write_csv: Callable[..., Path]
) -> None:
    strangers = [f"2025-01-01T09:{n:02},new{n % 7 if n % 2 else 0},0,1,19{90 + n % 3}-01-01" for n in range(30)]
    report = prepare(write_csv(tmp_path, *strangers, *LATER), schema, tmp_path / "store", like=first)
    who, born = report.warnings
    assert who.startswith("who: 91.4 % of its values after the split are out of vocabulary; the commonest of them are ")
    assert "'new0' (17), 'new1' (3), 'new3' (2), " in who
    assert who.count("(") == 5
    assert who.endswith("; it knows 'b', 'a', 'c'")
    assert born.startswith("born: 94.1 % of its values after the split are out of vocabulary; ")
    assert "'1990' (10), '1991' (10), '1992' (10), '1998' (1), '2002' (1); it knows '1999', '2000', '2001'" in born
    out = io.StringIO()
    Console(file=out, width=80).print(report)
    assert "warning: who: 91.4 %" in out.getvalue()


def test_the_validation_period_is_warned_of_and_the_training_period_of_another_table(
    tmp_path: Path, schema: Schema, write_csv: Callable[..., Path], first: EventStore
) -> None:
    known = ["2024-01-01T09:00,a,0,1,2000-01-01"] * 9
    unknown = ["2024-01-01T13:00,z,0,1,2000-01-01"] * 2
    half = prepare(write_csv(tmp_path, *known, *unknown, *["2024-01-01T13:00,a,0,1,"] * 2), schema, tmp_path / "half")
    assert half.warnings == ()
    more = prepare(write_csv(tmp_path, *known, *unknown, "2024-01-01T13:00,a,0,1,"), schema, tmp_path / "more")
    (told,) = more.warnings
    assert told.startswith("who: 66.7 % of its values after the split are out of vocabulary; ")
    assert told.endswith("the commonest of them are 'z' (2); it knows 'a'")
    foreign = ["2024-01-01T09:00,q,0,1,2000-01-01"] * 9
    (told,) = prepare(
        write_csv(tmp_path, *foreign, "2024-01-01T13:00,a,0,1,"), schema, tmp_path / "foreign", like=first
    ).warnings
    assert told.startswith(
        "who: 90.0 % of its values in the table are out of vocabulary; the commonest of them are 'q' (9)"
    )
    missing = prepare(write_csv(tmp_path, *known, *["2024-01-01T13:00,,0,1,"] * 9), schema, tmp_path / "missing")
    assert missing.warnings == ()  # a value that is missing is not unknown
