import itertools
import json
import os
import pickle
import shutil
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from eventkern.data import entity_index
from eventkern.data import store as store_module
from eventkern.data.prepare import prepare
from eventkern.data.schema import Category, DataError, Schema, Stream
from eventkern.data.store import EventStore, Split

SPLIT = "1970-01-01T00:05:00"
SCHEMA = Schema(
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
    split=SPLIT,
)


def write(tmp_path: Path, who: list[Any], seconds: list[int], schema: Schema = SCHEMA, **options: Any) -> EventStore:
    table = pa.table(
        {
            "at": pa.array(np.array(seconds, "datetime64[s]")),
            "who": who,
            "where": [f"w{second % 3}" for second in seconds],
            "paid": [second % 2 == 0 for second in seconds],
        }
    )
    pq.write_table(table, tmp_path / "table.parquet")
    prepare(tmp_path / "table.parquet", schema, tmp_path / "store", **options)
    return EventStore.open(tmp_path / "store")


@pytest.fixture
def store(tmp_path: Path) -> EventStore:
    """401 events around the split at second 300; some keys live in one period only, some rows have none."""
    random = np.random.default_rng(0)
    seconds = random.integers(0, 400, 400)
    who = [
        None if w == 0 else f"k{w + (t > 300) * 5}" for w, t in zip(random.integers(0, 30, 400), seconds, strict=True)
    ]
    return write(tmp_path, [*who, "late"], [*seconds.tolist(), 399])


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


def test_uniform_sizes(tmp_path: Path) -> None:
    store = write(tmp_path, list("abab"), [1, 2, 301, 302], replace(SCHEMA, uniform_sizes=True))
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


def test_floor(tmp_path: Path) -> None:
    floors = {3: [0.1, 0.2, 0.3, 0.4], 1000: [1, 2, 3, 4]}
    store = write(tmp_path, list("abab"), [1, 2, 301, 302], floor=floors)
    assert store.floor(3) is not None
    assert store.floor(3).tolist() == floors[3]
    assert store.floor(1000).tolist() == store.floor(5000).tolist() == floors[1000]  # neither cuts a class
    assert store.floor(4) is None
    with pytest.raises(ValueError, match=r"floor\[3\] holds 1 values for 4 categories"):
        write(tmp_path, list("abab"), [1, 2, 301, 302], floor={3: [1.0]}, overwrite=True)
    store = write(tmp_path, list("abab"), [1, 2, 301, 302], floor=lambda s: {3: s.class_sizes}, overwrite=True)
    assert store.floor(3).tolist() == list(store.class_sizes)


def edit(store: EventStore, **changes: Any) -> None:
    file = store.path / "store.json"
    file.write_text(json.dumps({key: value for key, value in {**store.info, **changes}.items() if value is not None}))


def edit_codes(store: EventStore, **changes: Any) -> None:
    codes, *others = store.info["sections"]
    edit(store, sections=[{**codes, **changes}, *others])


def set_code(store: EventStore, row: int, column: int, code: int) -> None:
    section = store.sections["codes"]
    section.map(store.path / "store.bin", "r+")[row, column] = code


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: (s.path / "store.json").unlink(), r"store: holds no event store \(no store.json\); make one with"),
        (lambda s: (s.path / "store.json").write_text('{"format": '), r"store.json: damaged, not JSON \(.*prepare"),
        (lambda s: (s.path / "store.json").write_text("[1]"), "store.json: is not of an event store"),
        (lambda s: edit(s, format="other"), "store.json: is not of an event store"),
        (lambda s: edit(s, format_version=2), "store.json: key 'format_version' is 2; this eventkern reads 1; prepare"),
        (lambda s: edit(s, sections=None), "store.json: key 'sections' is missing: damaged; prepare"),
        (lambda s: edit(s, sections=[{}]), "store.json: damaged .*; prepare"),
        (lambda s: edit(s, checksum={}), r"store.json: damaged \(KeyError: 'sizes'\); prepare"),
        (lambda s: edit(s, checksum=[]), "store.json: damaged .*; prepare"),
        (lambda s: edit(s, num_events="abc"), r"store.json: damaged \(ValueError: .*'abc'\); prepare"),
        (lambda s: edit(s, schema=[]), "store.json: damaged .*; prepare"),
        (lambda s: edit(s, categories=[{"size": "big"}] * 4), r"store.json: damaged \(ValueError: .*'big'\); prepare"),
        (lambda s: edit(s, categories=s.info["categories"][:3]), "store.json: damaged .*; prepare"),
        (lambda s: edit_codes(s, dtype="bogus"), r"store.json: damaged \(TypeError: .*bogus.*\); prepare"),
        (lambda s: edit_codes(s, dtype="float64"), "store.json: its sizes were changed .*; prepare"),
        (lambda s: edit_codes(s, shape=[0, 0]), "store.json: .*; prepare"),
        (lambda s: edit_codes(s, shape="x"), "store.json: damaged .*; prepare"),
        (lambda s: edit_codes(s, shape=[-1, 4]), "store.json: damaged .*; prepare"),
        (lambda s: edit_codes(s, offset=-4096), "store.json: damaged .*; prepare"),
        (lambda s: edit(s, split_row=7), "store.json: its sizes were changed after it was written; prepare"),
        (lambda s: (s.path / "store.bin").unlink(), "store.bin: no such file; prepare"),
        (
            lambda s: set_code(s, 17, 2, 9),
            "store.bin: row 17 holds code 9 in category 'paid', which has 4 classes; prep",
        ),
        (
            lambda s: set_code(s, 400, 3, 26),
            "store.bin: row 400 holds code 26 in category 'hour', which has 26 classes",
        ),
    ],
)
def test_a_damaged_store_is_named_in_one_line(store: EventStore, damage: Any, message: str) -> None:
    damage(store)
    with pytest.raises(DataError, match=message) as caught:
        EventStore.open(store.path)
    assert "\n" not in str(caught.value)


DAMAGED_INDEXES = {
    "first offset": ("offsets", 0, 1, "'offsets:who' does not begin with 0"),
    "offsets back": ("offsets", 3, 1 << 60, "'offsets:who' decreases after entity 3"),
    "offsets back at the end": ("offsets", -1, 0, "'offsets:who' decreases after entity 33"),
    "last offset": ("offsets", -1, 1 << 60, "'offsets:who' ends with 1152921504606846976 where 390 rows are listed"),
    "entity": ("entity_of_row", 7, 34, "'entity_of_row:who' holds 34 at row 7, and there are 34 entities"),
    "negative entity": ("entity_of_row", 400, -2, "'entity_of_row:who' holds -2 at row 400, and there are 34 entities"),
    "no entity": ("entity_of_row", 17, -1, "'rows:who' lists 390 rows where 389 have an entity"),
    "row": ("rows", 10, 401, "'rows:who' holds 401 at position 10, and there are 401 events"),
    "negative row": ("rows", 10, -1, "'rows:who' holds -1 at position 10, and there are 401 events"),
    "another's row": ("rows", 0, None, "'rows:who' holds .* at position 0, a row of another entity"),
    "row twice": ("rows", 1, None, "'rows:who' holds .* at position 1, out of time order"),
}


@pytest.mark.parametrize("block_rows", [1, 2, 7, 1 << 14])
@pytest.mark.parametrize("damage", DAMAGED_INDEXES)
def test_a_damaged_index_is_named_before_it_is_read(
    store: EventStore, monkeypatch: pytest.MonkeyPatch, damage: str, block_rows: int
) -> None:
    monkeypatch.setattr(entity_index, "BLOCK_ROWS", block_rows)
    monkeypatch.setattr(store_module, "CHECKED_AT_OPEN_BYTES", 0)  # a large store: nobody reads it whole
    assert EventStore.open(store.path).index("who").offsets[-1] == 390
    part, place, value, message = DAMAGED_INDEXES[damage]
    section = store.sections[f"{part}:who"].map(store.path / "store.bin", "r+")
    section[place] = {"another's row": section[-1], "row twice": section[0]}.get(damage, value)
    damaged = EventStore.open(store.path)
    with pytest.raises(DataError, match=f"store.bin: section {message}: damaged; prepare the store again") as caught:
        damaged.anchors("train", 20)
    assert "\n" not in str(caught.value)
    assert damaged.index("where").offsets[-1] == 401  # what is whole stays readable


def test_a_size_made_too_small_names_the_category(store: EventStore) -> None:
    categories = [dict(category) for category in store.info["categories"]]
    categories[1]["size"] = 4
    edit(store, categories=categories)
    with pytest.raises(DataError, match="holds code 4 in category 'where', which has 4 classes"):
        EventStore.open(store.path)


@pytest.mark.parametrize("num_bytes", [0, 100, -1])
def test_a_truncated_store_is_refused(store: EventStore, num_bytes: int) -> None:
    binary = store.path / "store.bin"
    content = binary.read_bytes()
    binary.write_bytes(content[:num_bytes])
    with pytest.raises(DataError, match=f"store.bin: holds .* bytes where store.json says {len(content)}: truncated"):
        EventStore.open(store.path)


CHANGED = r"store.bin: its checksum differs from the one in store.json: damaged; prepare"


@pytest.mark.parametrize("name", ["codes", "timestamps", "entity_of_row:who", "offsets:where", "rows:who"])
def test_a_change_of_any_byte_is_seen_at_open(store: EventStore, name: str) -> None:
    EventStore.open(store.path)
    section = store.sections[name].map(store.path / "store.bin", "r+")
    if name == "codes":
        section[7, 2] = 2 + 3 - section[7, 2]  # the other class of a flag: one that is in range
    else:
        section[3] += 1
    with pytest.raises(DataError, match=CHANGED):
        EventStore.open(store.path)


def test_a_large_store_is_read_whole_when_asked(store: EventStore, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (store.path / "store.bin").stat().st_size
    store.sections["timestamps"].map(store.path / "store.bin", "r+")[3] += 1
    monkeypatch.setattr(store_module, "CHECKED_AT_OPEN_BYTES", size - 1)
    EventStore.open(store.path)
    with pytest.raises(DataError, match=CHANGED):
        EventStore.open(store.path, verify=True)
    set_code(store, 17, 2, 9)
    with pytest.raises(DataError, match="row 17 holds code 9"):
        EventStore.open(store.path)
    monkeypatch.setattr(store_module, "CHECKED_AT_OPEN_BYTES", 17 * store.codes[:1].nbytes)
    EventStore.open(store.path)  # row 17 lies beyond what is checked
    with pytest.raises(DataError, match="row 17 holds code 9"):
        EventStore.open(store.path, verify=True)


def shorten(binary: Path) -> None:
    os.truncate(binary, binary.stat().st_size - 1)


def touch(binary: Path) -> None:
    os.utime(binary, ns=(0, binary.stat().st_mtime_ns + 1))


def replace_by_a_copy(binary: Path) -> None:
    shutil.copy2(binary, binary.with_suffix(".copy"))
    binary.with_suffix(".copy").replace(binary)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shorten, r"changed since it was opened \(bytes: (\d+) then, \d+ now\); open it again"),
        (touch, r"changed since it was opened \(time of change: "),
        (replace_by_a_copy, r"changed since it was opened \(file: "),
        (Path.unlink, "is gone since it was opened"),
    ],
)
def test_a_change_after_the_opening_is_named(store: EventStore, change: Callable[[Path], None], message: str) -> None:
    store.check_unchanged()
    change(store.path / "store.bin")
    with pytest.raises(DataError, match=f"store.bin: {message}"):
        store.check_unchanged()


def test_a_store_stays_one_file_when_another_takes_its_name(store: EventStore) -> None:
    timestamps = store.timestamps.copy()
    opened = EventStore.open(store.path)
    assert opened.codes.tolist() == store.codes.tolist()
    (store.path / "store.bin").rename(store.path / "old.bin")
    (store.path / "store.bin").write_bytes(bytes((store.path / "old.bin").stat().st_size))
    assert opened.timestamps.tolist() == timestamps.tolist()  # a section that nobody had asked for


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: holds no event store"):
        EventStore.open(tmp_path / "nowhere")
