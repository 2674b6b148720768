import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eventkern.data.baselines import baselines
from eventkern.data.folds import Fold
from eventkern.data.prepare import prepare
from eventkern.data.schema import Category, Schema, Stream
from eventkern.data.store import EventStore

SCHEMA = Schema(
    name="walk",
    timestamp="at",
    timezone="UTC",
    categories=(Category("who", "id"), Category("place", "id"), Category("noise", "id"), Category("paid", "flag")),
    streams=(Stream("mine", "who"), Stream("all")),
    key="who",
    split="1970-01-01T00:30:00",
)
FLOORS = {4096: [0.0, 0.5, 1.5, 0.6]}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EventStore:
    """2000 events of 12 keys and some of none: a place that mostly stays, noise, a rare flag, late new values."""
    random = np.random.default_rng(1)
    who = random.integers(0, 13, 2000)
    place = np.zeros(2000, np.int64)
    for row in range(1, 2000):
        place[row] = place[row - 1 - random.integers(0, 3)] if random.random() < 0.9 else random.integers(0, 9)
    place[1950:1960] = 77
    table = pa.table(
        {
            "at": pa.array(np.arange(2000).astype("datetime64[s]")),
            "who": [None if w == 12 else w for w in who.tolist()],
            "place": place,
            "noise": random.geometric(0.3, 2000),
            "paid": random.random(2000) < 0.01,
        }
    )
    folder = tmp_path_factory.mktemp("baselines")
    pq.write_table(table, folder / "table.parquet")
    prepare(folder / "table.parquet", SCHEMA, folder / "store", floor=FLOORS)
    return EventStore.open(folder / "store")


def test_counts_of_another_store_judge_this_one(store: EventStore, tmp_path: Path) -> None:
    own = baselines(store, 100)
    table = store.path.parent / "table.parquet"
    prepare(table, replace(SCHEMA, split="1970-01-01T00:00:00"), tmp_path / "late", like=store)
    late = EventStore.open(tmp_path / "late")
    assert late.split_row == 0
    found = baselines(late, 100, counted_on=store)
    assert found.num_labels > own.num_labels
    assert found.first_order_k.tolist() == own.first_order_k.tolist()
    rows = late.index("who").rows
    judged = np.delete(rows, late.index("who").offsets[:-1])
    labels = np.array(store.codes, np.int64)
    training = judged[judged < store.split_row]
    for number in range(4):
        counts = np.bincount(labels[training, number], minlength=own.classes[number]) + 1
        p = counts / (len(training) + own.classes[number] - 1)
        assert found.marginal[number] == pytest.approx(-np.log(p[labels[judged, number]]).mean())
    assert baselines(store, 100, counted_on=store).first_order.tolist() == own.first_order.tolist()


def brute_force(
    store: EventStore, number: int, size: int, k: int | None, held_out: list[bool] | None = None
) -> tuple[float, float, int, int]:
    """Marginal, first order, k and number of labels of a category, one label at a time; of the split, or of a fold."""
    last: dict[int, int] = {}
    training, validation = [], []
    for row in range(store.num_events):
        code = int(store.codes[row, number])
        code = code if code < size else 1
        key = int(store.index("who").entity_of_row[row])
        if key == -1:
            continue
        if key in last:
            is_training = row < store.split_row if held_out is None else not held_out[key]
            (training if is_training else validation).append((last[key], code))
        last[key] = code

    def marginal(pairs: list[tuple[int, int]]) -> dict[int, float]:
        counts = Counter(b for _, b in pairs)
        return {b: (counts[b] + 1) / (len(pairs) + size - 1) for b in range(1, size)}

    def first_order(fitted: list[tuple[int, int]], judged: list[tuple[int, int]], k: int) -> float:
        p, pairs, given = marginal(fitted), Counter(fitted), Counter(a for a, _ in fitted)
        losses = [-math.log((pairs[a, b] + k * p[b]) / (given[a] + k)) for a, b in judged]
        return sum(losses) / len(losses)

    nine_tenths = int(len(training) * 0.9)
    if k is None:
        k = min((1, 10, 100), key=lambda k: first_order(training[:nine_tenths], training[nine_tenths:], k))
    p = marginal(training)
    return (
        sum(-math.log(p[b]) for _, b in validation) / len(validation),
        first_order(training, validation, k),
        k,
        len(validation),
    )


@pytest.mark.parametrize("id_category_size", [4, 4096])
def test_baselines_equal_the_brute_force(store: EventStore, id_category_size: int) -> None:
    found = baselines(store, id_category_size)
    sizes = store.sizes(id_category_size)
    assert found.names == ("who", "place", "noise", "paid")
    assert found.classes.tolist() == list(sizes)
    for number, size in enumerate(sizes):
        marginal, first_order, k, num_labels = brute_force(store, number, size, None)
        assert found.marginal[number] == pytest.approx(marginal, rel=1e-12)
        assert found.first_order[number] == pytest.approx(first_order, rel=1e-12)
        assert found.first_order_k[number] == k
        assert found.num_labels == num_labels
    assert len(set(found.first_order_k.tolist())) > 1  # a choice is made


@pytest.mark.parametrize("number", [0, 1])
def test_baselines_of_a_fold_equal_the_brute_force(store: EventStore, number: int) -> None:
    fold = Fold(number, 3)
    found, held_out = baselines(store, 4096, fold), fold.held_out(store).tolist()
    for category, size in enumerate(store.sizes(4096)):
        marginal, first_order, k, num_labels = brute_force(store, category, size, None, held_out)
        assert found.marginal[category] == pytest.approx(marginal, rel=1e-12)
        assert found.first_order[category] == pytest.approx(first_order, rel=1e-12)
        assert found.first_order_k[category] == k
        assert found.num_labels == num_labels
    index, anchors = store.index("who"), store.anchors("validation", 7, fold)
    key = np.searchsorted(index.offsets, anchors, side="right") - 1
    assert found.num_labels == np.minimum(7, store.limits("validation", fold)[key] - 1 - anchors).sum()
    assert np.isnan(found.floor).all()  # known for the labels after the split alone


def test_a_fold_without_labels_is_refused(store: EventStore) -> None:
    empty = next(number for number in range(99) if not Fold(number, 99).held_out(store).any())
    with pytest.raises(
        ValueError, match=f"no validation event has a predecessor of its key; take another than fold {empty}"
    ):
        baselines(store, 100, Fold(empty, 99))


def test_labels_are_those_of_the_validation_windows(store: EventStore) -> None:
    index, limits = store.index("who"), store.limits("validation")
    anchors = store.anchors("validation", 7)
    key = np.searchsorted(index.offsets, anchors, side="right") - 1
    assert baselines(store, 100).num_labels == np.minimum(7, limits[key] - 1 - anchors).sum()


def test_a_key_is_known_from_its_previous_event(store: EventStore) -> None:
    found = baselines(store, 4096)
    assert found.first_order[0] < 0.1 < 2 < found.marginal[0]  # 12 keys: about ln 12


def test_the_floor_is_that_of_the_store(store: EventStore) -> None:
    assert baselines(store, 4096).floor.tolist() == FLOORS[4096]
    assert np.isnan(baselines(store, 4).floor).all()


def test_a_period_without_labels_is_refused(store: EventStore, tmp_path: Path) -> None:
    table = pa.table({"at": pa.array(np.array([0, 1, 2], "datetime64[s]")), "who": [1, 1, 2]})
    table = table.append_column("place", table["who"]).append_column("noise", table["who"])
    pq.write_table(table.append_column("paid", pa.array([True] * 3)), tmp_path / "table.parquet")
    schema = replace(SCHEMA, split="1970-01-01T00:00:02")
    prepare(tmp_path / "table.parquet", schema, tmp_path / "store")
    with pytest.raises(ValueError, match="no validation event has a predecessor of its key; move the split"):
        baselines(EventStore.open(tmp_path / "store"), 100)
