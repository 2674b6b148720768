"""A store that is not what was written is named in one line, at its opening or when it is read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eventkern.data import entity_index
from eventkern.data import store as store_module
from eventkern.data.checksums import file_checksum, info_checksum, sizes_checksum
from eventkern.data.schema import DataError
from eventkern.data.store import EventStore


def positions_by_key(store: EventStore) -> list[list[int]]:
    offsets = store.index("who").offsets
    return [list(range(*edges)) for edges in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]


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
        (lambda s: (s.path / "store.json").write_text("[" * 100_000), r"store.json: damaged, not JSON \(.*prepare"),
        (lambda s: (s.path / "store.json").write_text("[1]"), "store.json: is not of an event store"),
        (lambda s: edit(s, format="other"), "store.json: is not of an event store"),
        (lambda s: edit(s, format_version=2), "store.json: key 'format_version' is 2; this eventkern reads 1; prepare"),
        (lambda s: edit(s, sections=None), "store.json: key 'sections' is missing: damaged; prepare"),
        (lambda s: edit(s, sections=[{}]), "store.json: damaged .*; prepare"),
        (lambda s: edit(s, checksum={}), r"store.json: damaged \(KeyError: 'sizes'\); prepare"),
        (lambda s: edit(s, checksum=[]), "store.json: damaged .*; prepare"),
        (
            lambda s: edit(s, num_events="abc"),
            r"store.json: damaged \(ValueError: num_events is 'abc'; want .*; prepare",
        ),
        (lambda s: edit(s, schema=[]), "store.json: damaged .*; prepare"),
        (
            lambda s: edit(s, categories=[{"size": "big"}] * 4),
            "store.json: damaged .*who' has the size 'big'; want .*; prep",
        ),
        (lambda s: edit(s, categories=s.info["categories"][:3]), "store.json: damaged .*; prepare"),
        (lambda s: edit_codes(s, dtype="bogus"), "store.json: damaged .*dtype 'bogus'; want uint8 or .*; prepare"),
        (lambda s: edit_codes(s, dtype="float64"), "store.json: damaged .*dtype 'float64'; want .*; prepare"),
        (lambda s: edit_codes(s, dtype="uint16"), "store.bin: row 0 holds code"),
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


def seal(store: EventStore, info: dict[str, Any]) -> None:
    """Write what `info` says with checksums that fit it: what is refused now is refused for what it says."""
    info["checksum"] = {
        "sizes": sizes_checksum(info),
        "store.bin": file_checksum(store.path / "store.bin"),
        "store.json": info_checksum(info),
    }
    (store.path / "store.json").write_text(json.dumps(info))


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("codes", "shape", [402, 4], r"section 'codes' has the shape \[402, 4\]; want \(401, 4\)"),
        ("codes", "shape", [401, 2**63], "section 'codes' has the shape"),
        ("codes", "shape", [401.0, 4], "section 'codes' has the shape"),
        ("codes", "dtype", "int64", "section 'codes' has the dtype 'int64'; want uint8 or uint16 or int32"),
        ("codes", "offset", 1, "section 'codes' has the offset 1; want a multiple of 4096 of at least 0"),
        ("codes", "offset", -4096, "section 'codes' has the offset -4096"),
        ("codes", "name", "rows:who", r"sections are \['rows:who', .*; want \['codes', "),
        ("entity_of_row:who", "dtype", "int64", "section 'entity_of_row:who' has the dtype 'int64'; want int32"),
        ("entity_of_row:who", "shape", [400], r"section 'entity_of_row:who' has the shape \[400\]; want \(401\)"),
        ("rows:who", "dtype", "uint64", "section 'rows:who' has the dtype 'uint64'; want int64"),
        ("offsets:who", "shape", [5, 7], r"section 'offsets:who' has the shape \[5, 7\]; want \(any\)"),
        (None, "num_events", 402, r"section 'codes' has the shape \[401, 4\]; want \(402, 4\)"),
        (None, "num_events", True, "num_events is True; want an integer"),
        (None, "num_events", 2**63, "num_events is 9223372036854775808; want an integer"),
        (None, "split_row", 402, "split_row is 402; want an integer from 0 to 401"),
        (None, "split_row", -1, "split_row is -1; want an integer from 0 to 401"),
        (None, "floor", {"100": [1.0]}, "floor '100' is .*; want 4 numbers"),
    ],
)
def test_what_the_extension_reads_by_is_checked_whatever_the_checksums(
    store: EventStore, section: str | None, key: str, value: Any, message: str
) -> None:
    info = json.loads((store.path / "store.json").read_text())
    place = info if section is None else next(told for told in info["sections"] if told["name"] == section)
    place[key] = value
    seal(store, info)
    with pytest.raises(DataError, match=f"store.json: damaged .*{message}.*; prepare") as caught:
        EventStore.open(store.path)
    assert "\n" not in str(caught.value)


def test_a_class_without_a_word_is_named(store: EventStore) -> None:
    info = json.loads((store.path / "store.json").read_text())
    del info["categories"][1]["values"][0]
    seal(store, info)
    with pytest.raises(DataError, match="category 'where' has 5 classes and 2 values; want 2 fewer"):
        EventStore.open(store.path)


def test_a_change_of_any_word_of_store_json_is_seen(store: EventStore) -> None:
    file = store.path / "store.json"
    text = file.read_text()
    file.write_text(text.replace('"w1"', '"w7"'))
    with pytest.raises(DataError, match=r"store\.json: was changed after it was written; prepare"):
        EventStore.open(store.path)
    info = json.loads(text.replace('"w1"', '"w7"'))
    del info["checksum"]["store.json"]  # as stores were written before there was one
    file.write_text(json.dumps(info))
    assert "w7" in {EventStore.open(store.path).decode("where", code) for code in range(2, 5)}
