"""Small tables of visits and of a shop, what a test asks of a store of them, and the keys of an order."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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


@pytest.fixture(scope="session")
def write_shop() -> Callable[..., EventStore]:
    """Prepare a table of these customers and times, around the split at second 300, into a folder's `store`."""
    schema = Schema(
        name="shop",
        timestamp="at",
        timezone="UTC",
        categories=(
            Category("who", "id"),
            Category("where", "id"),
            Category("paid", "flag"),
            Category("hour", "time", "at", field="hour"),
        ),
        streams=(Stream("mine", "who"), Stream("there", "where"), Stream("all")),
        key="who",
        split="1970-01-01T00:05:00",
    )

    def write(
        folder: Path, who: list[Any], seconds: list[int], uniform_sizes: bool = False, **options: Any
    ) -> EventStore:
        columns = {
            "at": pa.array(np.array(seconds, "datetime64[s]")),
            "who": who,
            "where": [f"w{second % 3}" for second in seconds],
            "paid": [second % 2 == 0 for second in seconds],
        }
        pq.write_table(pa.table(columns), folder / "table.parquet")
        prepare(folder / "table.parquet", replace(schema, uniform_sizes=uniform_sizes), folder / "store", **options)
        return EventStore.open(folder / "store")

    return write


@pytest.fixture
def store(tmp_path: Path, write_shop: Callable[..., EventStore]) -> EventStore:
    """401 events around the split at second 300; some keys live in one period only, some rows have none."""
    random = np.random.default_rng(0)
    seconds = random.integers(0, 400, 400)
    who = [
        None if w == 0 else f"k{w + (t > 300) * 5}" for w, t in zip(random.integers(0, 30, 400), seconds, strict=True)
    ]
    return write_shop(tmp_path, [*who, "late"], [*seconds.tolist(), 399])


@pytest.fixture(scope="session")
def round_keys() -> Callable[..., list[int]]:
    """The keys of the first rounds of version 1 of `permutation`: a hash of the words, one inside the other."""

    def splitmix64(state: int) -> int:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        return state ^ state >> 31

    def keys(num_rounds: int, n: int, seed: int, epoch: int, part: int) -> list[int]:
        state = 0
        for word in (n, seed, epoch, part):
            state = splitmix64(state ^ word)
        found = []
        for _ in range(num_rounds):
            state = splitmix64(state)
            found.append(state >> 32)
        return found

    return keys
