"""A small table of visits in CSV, its schema, and what a test asks of a store of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eventkern.data.prepare import prepare
from eventkern.data.schema import Category, Schema, Stream
from eventkern.data.store import EventStore


@pytest.fixture(scope="session")
def schema() -> Schema:
    return Schema(
        name="visits",
        timestamp="at",
        timezone="America/New_York",
        categories=(
            Category("who", "id"),
            Category("paid", "flag"),
            Category("price", "bins", bins=4),
            Category("hour", "time", "at", field="hour"),
            Category("born", "time", "birth", field="year"),
            Category("pause", "elapsed", unit="minutes", limit=3),
        ),
        streams=(Stream("mine", "who"), Stream("all")),
        key="who",
        split="2024-01-01T12:00:00",
    )


@pytest.fixture(scope="session")
def rows_of(schema: Schema) -> Callable[..., str]:
    """CSV text of these lines below the header."""
    return lambda *lines: "".join(f"{line}\n" for line in (",".join(schema.columns), *lines))


@pytest.fixture(scope="session")
def write_csv(rows_of: Callable[..., str]) -> Callable[..., Path]:
    """Write visits.csv into a folder."""

    def write(folder: Path, *lines: str) -> Path:
        file = folder / "visits.csv"
        file.write_text(rows_of(*lines))
        return file

    return write


@pytest.fixture(scope="session")
def run(schema: Schema, write_csv: Callable[..., Path]) -> Callable[..., EventStore]:
    """Prepare a folder's visits.csv of these lines into its `store`, and open that."""

    def run(folder: Path, *lines: str, schema: Schema = schema, **options: Any) -> EventStore:
        prepare(write_csv(folder, *lines), schema, folder / "store", **options)
        return EventStore.open(folder / "store", verify=True)

    return run


@pytest.fixture(scope="session")
def decoded() -> Callable[[EventStore, str], list[str]]:
    """The values that a category's codes stand for, by row."""

    def decode(store: EventStore, category: str) -> list[str]:
        number = store.schema.category_names.index(category)
        return [store.decode(category, int(code)) for code in store.codes[:, number]]

    return decode


@pytest.fixture(scope="session")
def left_in() -> Callable[[Path], list[str]]:
    """Names of the files in a folder."""
    return lambda folder: sorted(file.name for file in folder.iterdir())
