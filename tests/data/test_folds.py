"""Folds by key: they part the keys, each label is judged once over all folds, and a key stays in its fold."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eventkern.data import EventLoader, EventStore, Fold
from eventkern.data.prepare import prepare
from eventkern.data.schema import Category, DataError, Schema, Stream
from eventkern.data.store import Split

SCHEMA = Schema(
    name="walk",
    timestamp="at",
    timezone="UTC",
    categories=(Category("event", "id"), Category("who", "id"), Category("place", "id")),
    streams=(Stream("mine", "who"), Stream("all")),
    key="who",
    split="1970-01-01T00:08:00",
)
NUM_FOLDS = 3
GOLDEN = {
    "p8": 1,
    "p10": 1,
    "p6": 3,
    "p0": 1,
    "p5": 0,
    "p7": 4,
    "p3": 3,
    "p4": 0,
    "p9": 2,
    "p2": 2,
    "p1": 1,
    "single": 3,
    "(missing)": 2,
}


def make(folder: Path, order: np.ndarray | None = None, late_key: str = "late") -> EventStore:
    """600 events, a second apart, each with an id of its own: of 11 keys, of none, of one that comes after the split,
    and of one with a single event; written in any order."""
    random = np.random.default_rng(4)
    who: list[str | None] = [None if number == 11 else f"p{number}" for number in random.integers(0, 12, 600)]
    who[300] = "single"
    for row in range(500, 600, 7):
        who[row] = late_key
    columns = {"event": [f"e{row}" for row in range(600)], "who": who, "place": random.integers(0, 5, 600).tolist()}
    table = pa.table({"at": pa.array(np.arange(600).astype("datetime64[s]")), **columns})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table if order is None else table.take(order), folder / "table.parquet")
    prepare(folder / "table.parquet", SCHEMA, folder / "store")
    return EventStore.open(folder / "store")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EventStore:
    return make(tmp_path_factory.mktemp("folds"))


def labels(store: EventStore, split: Split, tgt_seq_len: int, fold: Fold) -> Iterator[int]:
    """Rows of the labels of all windows, as the gather reads them: after the anchor, up to the key's limit."""
    index, limits = store.index("who"), store.limits(split, fold)
    anchors = store.anchors(split, tgt_seq_len, fold)
    keys = np.searchsorted(index.offsets, anchors, side="right") - 1
    for anchor, limit in zip(anchors, limits[keys], strict=True):
        yield from index.rows[anchor + 1 : min(anchor + 1 + tgt_seq_len, limit)].tolist()


def keys_by_name(store: EventStore, num_folds: int) -> dict[str, int]:
    index, column = store.index("who"), store.schema.category_names.index("who")
    codes = store.codes[index.rows[index.offsets[:-1]], column]
    folds = store.folds(num_folds)
    return {store.decode("who", int(code)): int(fold) for code, fold in zip(codes, folds, strict=True)}


def test_folds_part_the_keys(store: EventStore) -> None:
    held_out = np.stack([Fold(number, NUM_FOLDS).held_out(store) for number in range(NUM_FOLDS)])
    assert held_out.shape == (NUM_FOLDS, 13)
    assert (held_out.sum(axis=0) == 1).all()
    assert (held_out.sum(axis=1) > 0).all()


@pytest.mark.parametrize("tgt_seq_len", [1, 7, 1000])
def test_over_all_folds_each_event_with_a_predecessor_is_judged_once(store: EventStore, tgt_seq_len: int) -> None:
    index = store.index("who")
    wanted = Counter(np.delete(index.rows, index.offsets[:-1]).tolist())
    found: Counter[int] = Counter()
    for number in range(NUM_FOLDS):
        found.update(labels(store, "validation", tgt_seq_len, Fold(number, NUM_FOLDS)))
    assert found == wanted
    assert len(wanted) > 500


@pytest.mark.parametrize("number", range(NUM_FOLDS))
def test_the_other_keys_train_over_all_time(store: EventStore, number: int) -> None:
    fold, index = Fold(number, NUM_FOLDS), store.index("who")
    held_out = fold.held_out(store)
    trained = set(labels(store, "train", 1, fold))
    assert trained == {
        row for key in np.flatnonzero(~held_out) for row in index.rows[index.offsets[key] + 1 : index.offsets[key + 1]]
    }
    assert min(trained) < store.split_row < max(trained)
    assert set(labels(store, "train", 7, fold)) == trained
    assert not held_out[index.entity_of_row[sorted(trained)]].any()
    assert held_out[index.entity_of_row[list(labels(store, "validation", 7, fold))]].all()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_loader_takes_the_windows_of_a_fold(store: EventStore, split: Split) -> None:
    fold = Fold(1, NUM_FOLDS)
    loader = EventLoader(
        store,
        split,
        src_seq_len=3,
        tgt_seq_len=7,
        id_category_size=1000,
        batch_size=16,
        fold=fold,
    )
    column = store.schema.category_names.index("who")
    codes = {int(store.codes[row, column]) for row in labels(store, split, 7, fold)}
    seen: set[int] = set()
    num_targets = 0
    for batch in loader:
        told = batch.targets[:, 1:, column]
        seen |= set(told[told != 0].tolist())
        num_targets += int(batch.num_targets)
    assert num_targets == len(list(labels(store, split, 7, fold)))
    assert seen == codes


def test_a_key_keeps_its_fold_in_another_store_of_the_same_data(store: EventStore, tmp_path: Path) -> None:
    again = make(tmp_path / "again")
    shuffled = make(tmp_path / "shuffled", np.random.default_rng(0).permutation(600))
    for num_folds in (2, 5):
        folds = keys_by_name(store, num_folds)
        assert again.folds(num_folds).tolist() == store.folds(num_folds).tolist()
        others = keys_by_name(shuffled, num_folds)
        del folds["(missing)"], others["(missing)"]  # the late key has no name in the store
        assert others == folds
        assert len(folds) == 12


def test_the_assignment_is_frozen(store: EventStore) -> None:
    """Golden values: another hash would give the runs of a cross-validation each other's keys."""
    assert keys_by_name(store, 5) == GOLDEN


def test_a_key_without_a_name_is_hashed_by_its_number(store: EventStore, tmp_path: Path) -> None:
    other = make(tmp_path / "other", late_key="of another name")
    assert other.folds(1000).tolist() == store.folds(1000).tolist()


def test_folds_are_of_about_equal_size() -> None:
    from eventkern.data.folds import _hash

    counts = np.bincount([_hash(f"value p{number}") % 5 for number in range(20_000)], minlength=5)
    assert np.abs(counts - 4000).max() < 4 * (20_000 * 0.2 * 0.8) ** 0.5


def test_a_fold_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match="number is 3; want a fold in \\[0, 3\\)"):
        Fold(3, 3)
    with pytest.raises(ValueError, match="number is -1"):
        Fold(-1, 3)
    with pytest.raises(ValueError, match="of is 1; want at least 2 folds"):
        Fold(0, 1)


def test_a_fold_without_labels_is_named(store: EventStore) -> None:
    held_out = store.folds(500)
    empty = next(number for number in range(500) if number not in held_out)
    single = store.index("who").entity_of_row[300]
    for number in (empty, int(held_out[single])):
        with pytest.raises(DataError, match=f"no key that validation takes under fold {number} of 500 has two events"):
            EventLoader(
                store, "validation", src_seq_len=1, tgt_seq_len=1, id_category_size=9, batch_size=1,
                fold=Fold(number, 500),
            )  # fmt: skip
