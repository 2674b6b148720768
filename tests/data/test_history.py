"""History: sources before any event are the loader's, and those after it what the rule says, written out by hand."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from eventkern.data import Category, EventLoader, EventStore, History, Schema, Stream
from eventkern.data.history import key_values, newest_events
from eventkern.data.prepare import prepare

SCHEMA = Schema(
    name="clicks",
    timestamp="at",
    timezone="UTC",
    categories=(Category("who", "id"), Category("where", "id"), Category("ok", "flag")),
    streams=(Stream("who", "who"), Stream("where", "where"), Stream("all", None)),
    key="who",
    split="2020-01-02",
)
NUM_ROWS = 400
SRC_SEQ_LEN = 5


def store_of(folder: Path, who: list[str | None], where: list[str | None]) -> EventStore:
    random = np.random.default_rng(5)
    seconds = np.sort(random.integers(0, 2 * 86_400, len(who)))
    table = {
        "at": (np.datetime64("2020-01-01", "s") + seconds).tolist(),
        "who": who,
        "where": where,
        "ok": random.integers(0, 2, len(who)).astype(bool).tolist(),
    }
    pq.write_table(pa.table(table), folder / "clicks.parquet")
    prepare(folder / "clicks.parquet", SCHEMA, folder / "store", progress=False)
    return EventStore.open(folder / "store")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EventStore:
    """Some rows without a place; some keys and places that begin after the split, and so have no class."""
    random = np.random.default_rng(7)
    late = np.arange(NUM_ROWS) > 250
    who = [f"w{number}" for number in random.integers(0, 6, NUM_ROWS) + 10 * (late & (random.random(NUM_ROWS) < 0.2))]
    places = random.integers(0, 5, NUM_ROWS) + 10 * (late & (random.random(NUM_ROWS) < 0.2))
    where = [None if random.random() < 0.1 else f"p{number}" for number in places]
    return store_of(tmp_path_factory.mktemp("clicks"), who, where)


def history(store: EventStore, anchors: list[int] | np.ndarray, size: int = 30) -> History:
    return History(store, np.array(anchors, np.int64), src_seq_len=SRC_SEQ_LEN, id_category_size=size)


@pytest.mark.parametrize("size", [30, 4])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_sources_before_any_event_are_those_of_the_loader(store: EventStore, split: str, size: int) -> None:
    options = {"src_seq_len": SRC_SEQ_LEN, "tgt_seq_len": 3, "id_category_size": size, "batch_size": 1000}
    (batch,) = EventLoader(store, split, shuffle=False, **options)
    past = history(store, store.anchors(split, 3), size)
    assert torch.equal(past.anchors, batch.targets[:, 0])
    assert torch.equal(past.sources(torch.empty(len(past.anchors), 0, 3, dtype=torch.int32)), batch.sources)


def test_a_key_alone_in_the_world_looks_back_as_if_its_future_were_in_the_store(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    store = store_of(tmp_path, ["only"] * 60, [f"p{number}" for number in random.integers(0, 3, 60)])
    events = torch.from_numpy(store.codes.astype(np.int32))
    empty = torch.empty(1, 0, 3, dtype=torch.int32)
    for anchor in (0, 1, 3, 40):
        for num_events in range(1, 12):
            made = events[None, anchor + 1 : anchor + 1 + num_events]
            expected = history(store, [anchor + num_events]).sources(empty)
            assert torch.equal(history(store, [anchor]).sources(made), expected), (anchor, num_events)


def by_hand(store: EventStore, anchor_row: int, made: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """The streams of the last made event, from the store's codes and keys."""
    who = store.index("who").entity_of_row
    codes = [tuple(row) for row in store.codes.astype(int).tolist()]
    known = range(anchor_row + 1)
    place = made[-1][1]
    streams = [
        [codes[row] for row in known if who[row] == who[anchor_row]] + made[:-1],
        [codes[row] for row in known if codes[row][1] == place] + [event for event in made[:-1] if event[1] == place],
        [codes[row] for row in known] + made[:-1],
    ]
    if place == 1:
        streams[1] = []
    padding = [(0, 0, 0)] * SRC_SEQ_LEN
    return [(padding + stream)[-SRC_SEQ_LEN:] for stream in streams]


@pytest.mark.parametrize("num_events", [1, 2, 4, 9])
def test_sources_after_generated_events_are_the_rule_written_out(store: EventStore, num_events: int) -> None:
    random = np.random.default_rng(num_events)
    index = store.index("who")
    anchors = np.concatenate([newest_events(store), store.anchors("validation", 3)])
    width = store.class_sizes
    made = np.stack([random.integers(1, size, (len(anchors), num_events)) for size in width], -1).astype(np.int32)
    sources = history(store, anchors).sources(torch.from_numpy(made))
    for sample, anchor in enumerate(anchors):
        own = [tuple(event) for event in made[sample].tolist()]
        assert [list(map(tuple, stream)) for stream in sources[sample].tolist()] == by_hand(
            store, int(index.rows[anchor]), own
        )


def test_the_newest_event_of_each_key_and_its_value(store: EventStore) -> None:
    newest = newest_events(store)
    rows = store.index("who").rows[newest]
    who = store.index("who").entity_of_row
    assert sorted(rows.tolist()) == sorted(int(np.flatnonzero(who == number)[-1]) for number in np.unique(who))
    values = key_values(store, newest)
    named = {value for value in values if value is not None}
    assert named == {f"w{number}" for number in range(6)}
    assert len(values) > len(named)
    for value, row in zip(values, rows, strict=True):
        if value is not None:
            assert store.decode("who", int(store.codes[row, 0])) == value


def test_an_anchor_outside_the_index_is_named(store: EventStore) -> None:
    with pytest.raises(ValueError, match=r"anchors holds 400; want positions in \[0, 400\) of the key's index"):
        history(store, [3, 400])
