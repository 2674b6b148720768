"""The extension's gathers against plain loops over a store made by hand, with guards around what they write."""

import ctypes
import mmap
import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from eventkern import _C
from eventkern.data.entity_index import EntityIndex, index_fault

NUM_EVENTS, GUARD = 401, 12345
CATEGORIES = [1, 2, 3, 15, 16, 17, 31, 32, 33, 64]
CODES, OUTS = [np.uint8, np.uint16, np.int32], [np.int32, np.int64]
Array = NDArray[Any]


def address(array: Array) -> int:
    return int(array.ctypes.data)


def some_codes(num_categories: int, dtype: type, seed: int = 0) -> Array:
    """Codes over all of a dtype's range, 0 and its largest value among them, right up to the end of the memory."""
    random = np.random.default_rng(seed)
    bits = random.integers(
        1, 8 * np.dtype(dtype).itemsize - (dtype is np.int32), (NUM_EVENTS, num_categories), endpoint=True
    )
    codes = (random.random(bits.shape) * 2.0**bits).astype(dtype)
    codes[-1, -1] = np.iinfo(dtype).max
    return codes


def some_cuts(num_categories: int, dtype: type) -> NDArray[np.int32]:
    """Cuts below, within and beyond what a dtype holds."""
    cuts = np.array([2, 100, 255, 256, 65_535, 65_536, 2**31 - 1, 7], np.int32)
    return np.resize(cuts, num_categories)


def some_index(num_entities: int, missing: float, seed: int) -> EntityIndex:
    """Rows of entities of very different sizes, some of none at all."""
    random = np.random.default_rng(seed)
    entity_of_row = (num_entities * random.random(NUM_EVENTS) ** 4).astype(np.int32)
    entity_of_row[random.random(NUM_EVENTS) < missing] = -1
    rows = np.argsort(entity_of_row, kind="stable")[(entity_of_row < 0).sum() :].astype(np.int64)
    counts = np.bincount(entity_of_row[entity_of_row >= 0], minlength=num_entities)
    index = EntityIndex(entity_of_row, np.concatenate(([0], np.cumsum(counts))).astype(np.int64), rows)
    assert index_fault(index, NUM_EVENTS) is None
    return index


def addresses(index: EntityIndex | None) -> tuple[int, int, int]:
    return (0, 0, 0) if index is None else (address(index.entity_of_row), address(index.offsets), address(index.rows))


def guarded(size: int, dtype: type, offset: int) -> tuple[Array, Array]:
    """An array of guards and the part of it, at no rounder an address than its items', that is to be written."""
    memory = np.full(size + 96, GUARD, dtype)
    return memory, memory[offset : offset + size]


def assert_guarded(memory: Array, size: int, offset: int) -> None:
    assert (memory[:offset] == GUARD).all()
    assert (memory[offset + size :] == GUARD).all()


@pytest.mark.parametrize("out_dtype", OUTS)
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("num_categories", CATEGORIES)
def test_windows_are_those_of_a_plain_loop(num_categories: int, dtype: type, out_dtype: type) -> None:
    codes, cuts = some_codes(num_categories, dtype), some_cuts(num_categories, dtype)
    key, place = some_index(23, 0.1, 1), some_index(5, 0.3, 2)
    streams = [key, place, None]
    num_sources, num_targets = 37, 18
    random = np.random.default_rng(3)
    limits = random.integers(key.offsets[:-1], key.offsets[1:], endpoint=True)
    anchors = np.flatnonzero(np.arange(len(key.rows)) < limits[key.entity_of_row[key.rows]])
    windows = random.permutation(len(anchors)).astype(np.int64)
    windows = np.concatenate((windows, windows[:1]))
    cut = np.where(codes >= cuts, 1, codes)
    sources = np.zeros((len(windows), 3, num_sources, num_categories), out_dtype)
    targets = np.zeros((len(windows), num_targets, num_categories), out_dtype)
    num_labels = 0
    for sample, anchor in enumerate(anchors[windows]):
        row = key.rows[anchor]
        for number, index in enumerate(streams):
            of_row = np.zeros(NUM_EVENTS) if index is None else index.entity_of_row
            past = np.flatnonzero(of_row[:row] == of_row[row])[-num_sources:] if of_row[row] >= 0 else []
            if len(past):
                sources[sample, number, -len(past) :] = cut[past]
        rows = key.rows[anchor : min(anchor + num_targets, limits[key.entity_of_row[row]])]
        targets[sample, : len(rows)] = cut[rows]
        num_labels += len(rows) - 1
    assert (codes >= cuts).any()
    assert (sources[:, 1] == 0).all((1, 2)).any(), "a row without an entity"
    assert (sources != 0).any(-1).all(-1).any(), "a full history"
    assert (targets[:, -1] == 0).any(), "a short tail"

    gather = _C.WindowGather(
        codes=address(codes), code_bytes=codes.itemsize, num_categories=num_categories, cuts=address(cuts),
        key=addresses(key), anchors=address(anchors), limits=address(limits),
        streams=[addresses(index) for index in streams],
        src_seq_len=num_sources, num_targets=num_targets, out_bytes=np.dtype(out_dtype).itemsize,
    )  # fmt: skip
    for offset in (1, 16):
        source_memory, held_sources = guarded(sources.size, out_dtype, offset)
        target_memory, held_targets = guarded(targets.size, out_dtype, offset)
        counted = np.full(3, GUARD, np.int64)
        gather.cpu(address(windows), len(windows), address(held_sources), address(held_targets), address(counted[1:]))
        np.testing.assert_array_equal(held_sources.reshape(sources.shape), sources)
        np.testing.assert_array_equal(held_targets.reshape(targets.shape), targets)
        assert counted.tolist() == [GUARD, num_labels, GUARD]
        assert_guarded(source_memory, sources.size, offset)
        assert_guarded(target_memory, targets.size, offset)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("out_dtype", OUTS)
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("num_categories", CATEGORIES)
def test_rows_are_widened_whole(num_categories: int, dtype: type, out_dtype: type, num_threads: int) -> None:
    codes = some_codes(num_categories, dtype)
    gather = _C.RowGather(
        codes=address(codes), code_bytes=codes.itemsize, num_categories=num_categories, num_rows=NUM_EVENTS
    )
    random = np.random.default_rng(4)
    for count in (0, 1, 2, 7, 8, 9, 15, 16, 17, 33, 1000, 70_001 if num_threads == 2 else 65):
        rows = random.integers(0, NUM_EVENTS, count)
        rows[:2] = NUM_EVENTS - 1
        memory, out = guarded(count * num_categories, out_dtype, 1)
        assert gather.cpu(address(rows), count, address(out), out.itemsize, num_threads) == -1
        np.testing.assert_array_equal(out.reshape(count, num_categories), codes[rows])
        assert_guarded(memory, out.size, 1)


@pytest.mark.parametrize("bad", [-1, NUM_EVENTS, 2**62, -(2**63)])
@pytest.mark.parametrize("place", [0, 5, 40, 998])
def test_the_first_row_outside_is_found_and_nothing_is_written(bad: int, place: int) -> None:
    codes = some_codes(17, np.uint16)
    gather = _C.RowGather(codes=address(codes), code_bytes=2, num_categories=17, num_rows=NUM_EVENTS)
    rows = np.zeros(999, np.int64)
    rows[[place, 998]] = bad
    out = np.full((999, 17), GUARD, np.int32)
    assert gather.cpu(address(rows), len(rows), address(out), 4, 1) == place
    assert (out == GUARD).all()


@pytest.mark.skipif(sys.platform != "linux", reason="protects memory with Linux's mprotect")
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("num_categories", CATEGORIES)
def test_nothing_outside_the_codes_is_read(num_categories: int, dtype: type) -> None:
    """Three rows lie between pages that nobody may read: once at the start of theirs, once at its end."""
    page = mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, 3 * page), np.uint8)
    for number in (0, 2):
        start, no_access = ctypes.c_void_p(address(memory) + number * page), 0
        assert ctypes.CDLL(None).mprotect(start, ctypes.c_size_t(page), no_access) == 0
    code_bytes = np.dtype(dtype).itemsize
    for codes in (address(memory) + page, address(memory) + 2 * page - 3 * num_categories * code_bytes):
        gather = _C.RowGather(codes=codes, code_bytes=code_bytes, num_categories=num_categories, num_rows=3)
        rows = np.array([2, 0, 1, 2], np.int64)
        out = np.full((4, num_categories), GUARD, np.int64)
        assert gather.cpu(address(rows), 4, address(out), 8, 1) == -1
        assert (out == 0).all()


WINDOWS = {"code_bytes": 2, "num_categories": 3, "src_seq_len": 4, "num_targets": 5, "out_bytes": 4, "streams": []}
ROWS = {"code_bytes": 2, "num_categories": 3, "num_rows": 4}
POOL = {"num_windows": 3, "num_threads": 0}
ADDRESSES = {"codes": 0, "cuts": 0, "key": (0, 0, 0), "anchors": 0, "limits": 0}


@pytest.mark.parametrize(
    ("make", "arguments", "name", "value", "wanted"),
    [
        (_C.WindowGather, WINDOWS | ADDRESSES, "code_bytes", 3, "want 1, 2 or 4"),
        (_C.WindowGather, WINDOWS | ADDRESSES, "out_bytes", 2, "want 4 or 8"),
        (_C.WindowGather, WINDOWS | ADDRESSES, "num_categories", 0, "want at least 1"),
        (_C.WindowGather, WINDOWS | ADDRESSES, "src_seq_len", -1, "want at least 0"),
        (_C.WindowGather, WINDOWS | ADDRESSES, "num_targets", 0, "want at least 1"),
        (_C.RowGather, ROWS | {"codes": 0}, "code_bytes", 8, "want 1, 2 or 4"),
        (_C.RowGather, ROWS | {"codes": 0}, "num_categories", -1, "want at least 1"),
        (_C.RowGather, ROWS | {"codes": 0}, "num_rows", -1, "want at least 0"),
        (_C.GatherPool, POOL, "num_threads", -1, "want 0 to 1024"),
        (_C.GatherPool, POOL, "num_threads", 1025, "want 0 to 1024"),
    ],
)
def test_constructors_name_what_they_refuse(make: Any, arguments: dict, name: str, value: int, wanted: str) -> None:
    make(**arguments)
    with pytest.raises(ValueError, match=f"^{name} is {value}; {wanted}$"):
        make(**{**arguments, name: value})


def test_too_many_streams_are_refused() -> None:
    with pytest.raises(ValueError, match="streams has 9 entries; want at most 8"):
        _C.WindowGather(**{**WINDOWS, **ADDRESSES, "streams": [(0, 0, 0)] * 9})
