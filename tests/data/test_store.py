import itertools
import pickle
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from eventkern.data.schema import DataError
from eventkern.data.store import EventStore, Split


def positions_by_key(store: EventStore) -> list[list[int]]:
    offsets = store.index("who").offsets
    return [list(range(*edges)) for edges in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]


def test_index_groups_the_rows_of_each_entity(store: EventStore) -> None:
    for entity, column in (("who", 0), ("where", 1)):
        index = store.index(entity)
        rows = defaultdict(list)
        for row, number in enumerate(index.entity_of_row.tolist()):
            rows[number].append(row)
            assert (number == -1) == (column == 0 and store.codes[row, 0] == 1 and row not in index.rows)
        rows.pop(-1, None)
        assert [rows[number] for number in range(len(rows))] == [
            index.rows[start:end].tolist() for start, end in zip(index.offsets[:-1], index.offsets[1:], strict=True)
        ]
        assert (index.entity_of_row.dtype, index.offsets.dtype, index.rows.dtype) == (np.int32, np.int64, np.int64)


def test_an_entity_is_a_value_and_not_a_class(store: EventStore) -> None:
    index = store.index("who")
    unknown = store.codes[:, 0] == 1
    assert len(np.unique(index.entity_of_row[unknown])) >= 4  # missing, and three or more of those new after the split


@pytest.mark.parametrize("split", ["train", "validation"])
def test_limits_end_the_period(store: EventStore, split: Split) -> None:
    rows = store.index("who").rows
    for positions, limit in zip(positions_by_key(store), store.limits(split), strict=True):
        inside = [p for p in positions if split == "validation" or rows[p] < store.split_row]
        assert limit == positions[0] + len(inside)


def test_training_anchors_are_all_events_with_a_successor_in_the_period(store: EventStore) -> None:
    rows = store.index("who").rows
    expected = [
        p
        for positions in positions_by_key(store)
        for p, successor in itertools.pairwise(positions)
        if rows[successor] < store.split_row
    ]
    assert expected
    for tgt_seq_len in (1, 20):
        assert store.anchors("train", tgt_seq_len).tolist() == expected


@pytest.mark.parametrize("tgt_seq_len", [1, 2, 3, 20])
def test_each_validation_event_with_a_predecessor_is_a_label_once(store: EventStore, tgt_seq_len: int) -> None:
    rows = store.index("who").rows
    expected, labels = [], Counter[int]()
    for positions, limit in zip(positions_by_key(store), store.limits("validation"), strict=True):
        training = [p for p in positions if rows[p] < store.split_row]
        anchors = [p for p in range(training[-1] if training else positions[0], limit, tgt_seq_len) if p + 1 < limit]
        expected += anchors
        for p in anchors:
            labels.update(range(p + 1, min(p + tgt_seq_len, limit - 1) + 1))
    anchors = store.anchors("validation", tgt_seq_len)
    assert anchors.tolist() == expected
    assert anchors.dtype == np.int64
    wanted = [p for positions in positions_by_key(store) for p in positions[1:] if rows[p] >= store.split_row]
    assert labels == Counter(wanted)


def test_arguments_are_checked(store: EventStore) -> None:
    with pytest.raises(ValueError, match="tgt_seq_len is 0"):
        store.anchors("train", 0)
    with pytest.raises(ValueError, match="split is 'test'; give 'train' or 'validation'"):
        store.anchors("test", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"entity is 'paid', which owns no sequence .* use one of: who, where"):
        store.index("paid")
    with pytest.raises(ValueError, match="id_category_size is 1"):
        store.sizes(1)
    with pytest.raises(IndexError, match="code is 4, but category 'paid' has 4 classes"):
        store.decode("paid", 4)


def test_sizes(store: EventStore) -> None:
    full = store.class_sizes
    assert full[1:] == (5, 4, 26)
    assert store.sizes(4096) == full
    assert store.sizes(4) == (4, 4, 4, 26)  # only identifiers are cut


def test_uniform_sizes(tmp_path: Path, write_shop: Callable[..., EventStore]) -> None:
    store = write_shop(tmp_path, list("abab"), [1, 2, 301, 302], uniform_sizes=True)
    assert store.sizes(1000) == (1000,) * 4
    assert store.sizes(3) == (3,) * 4
    oov = {category["name"]: category["oov"] for category in store.info["categories"]}
    assert oov["hour"]["100"] == 0


def test_rows_gathers_codes(store: EventStore) -> None:
    indices = torch.tensor([[0, 5, 400], [7, 7, 1]])
    expected = torch.from_numpy(np.asarray(store.codes).astype(np.int64))[indices]
    assert torch.equal(store.rows(indices).long(), expected)
    assert store.rows(indices).dtype == torch.int32
    for dtype in (torch.int32, torch.int64):
        out = torch.full((2, 3, 4), -1, dtype=dtype)
        assert store.rows(indices, out) is out
        assert torch.equal(out.long(), expected)
    assert torch.equal(store.rows(indices.flatten()[::2]).long(), expected.flatten(0, 1)[::2])
    assert store.rows(torch.empty(0, dtype=torch.int64)).shape == (0, 4)


def test_rows_refuses_what_it_cannot_gather(store: EventStore) -> None:
    for bad in (-1, 401):
        with pytest.raises(IndexError, match=f"indices hold {bad}, but .* has 401 events"):
            store.rows(torch.tensor([0, bad]))
    with pytest.raises(TypeError, match=r"indices are torch.int32; give torch.int64"):
        store.rows(torch.tensor([0], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"out is \(1, 3\) torch.int32; give \(1, 4\)"):
        store.rows(torch.tensor([0]), torch.empty(1, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="give a contiguous CPU tensor"):
        store.rows(torch.tensor([0, 1]), torch.empty(4, 2, dtype=torch.int32).t())
    with pytest.raises(ValueError, match="indices are on meta"):
        store.rows(torch.tensor([0], device="meta"))


def test_a_section_on_a_device_is_copied_once_while_it_is_held(store: EventStore) -> None:
    first = store.on_device("rows:where", "cpu")
    assert first.dtype == torch.uint8
    assert first.numpy().view(np.int64).tolist() == store.index("where").rows.tolist()
    assert store.on_device("rows:where", torch.device("cpu")) is first
    assert store.on_device("rows:where", "meta").shape == first.shape
    assert store.on_device("codes", "cpu").numpy().tobytes() == store.codes.tobytes()
    gone = weakref.ref(first)
    del first
    assert gone() is None  # the memory goes with the last who holds it
    first = store.on_device("rows:where", "cpu")
    assert first.numpy().view(np.int64).tolist() == store.index("where").rows.tolist()


def test_an_unknown_or_damaged_section_goes_to_no_device(store: EventStore) -> None:
    with pytest.raises(
        ValueError, match=r"name is 'rows:paid', which is no section of .*; use one of: codes, timestamps"
    ):
        store.on_device("rows:paid", "cpu")
    section = store.sections["rows:where"]
    section.map(store.path / "store.bin", "r+")[3] = 10**9
    with pytest.raises(DataError, match="section 'rows:where' holds 1000000000"):
        store.on_device("rows:where", "cpu")


def test_a_pickled_store_maps_the_same_file(store: EventStore) -> None:
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    assert np.array_equal(pickle.loads(pickled).codes, store.codes)


def test_floor(tmp_path: Path, write_shop: Callable[..., EventStore]) -> None:
    floors = {3: [0.1, 0.2, 0.3, 0.4], 1000: [1, 2, 3, 4]}
    store = write_shop(tmp_path, list("abab"), [1, 2, 301, 302], floor=floors)
    assert store.floor(3) is not None
    assert store.floor(3).tolist() == floors[3]
    assert store.floor(1000).tolist() == store.floor(5000).tolist() == floors[1000]  # neither cuts a class
    assert store.floor(4) is None
    with pytest.raises(ValueError, match=r"floor\[3\] holds 1 values for 4 categories"):
        write_shop(tmp_path, list("abab"), [1, 2, 301, 302], floor={3: [1.0]}, overwrite=True)
    store = write_shop(tmp_path, list("abab"), [1, 2, 301, 302], floor=lambda s: {3: s.class_sizes}, overwrite=True)
    assert store.floor(3).tolist() == list(store.class_sizes)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: holds no event store"):
        EventStore.open(tmp_path / "nowhere")
