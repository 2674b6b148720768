"""Batches ahead: the same as without, in blocks that nobody else looks at, and gone with the iteration."""

import os
import signal
import sys
import time
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from eventkern import _C
from eventkern.data import Category, EventBatch, EventLoader, EventStore, IndexSampler, Schema, Stream
from eventkern.data.prefetch import Blocks, available_cores
from eventkern.data.prepare import prepare

SCHEMA = Schema(
    name="tickets",
    timestamp="at",
    timezone="UTC",
    categories=(Category("ticket", "id"), Category("who", "id")),
    streams=(Stream("who", "who"), Stream("all")),
    key="who",
    split="2020-01-04",
)
SETTINGS = {"src_seq_len": 6, "tgt_seq_len": 5, "id_category_size": 10_000, "batch_size": 4}
PREFETCHES = [0, 1, 2, 5]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EventStore:
    """400 events, each with a ticket of its own."""
    folder = tmp_path_factory.mktemp("tickets")
    random = np.random.default_rng(5)
    at = np.sort(random.integers(0, 4 * 86_400, 400)) + 1_577_836_800
    table = {
        "at": pa.array(at.astype("datetime64[s]")),
        "ticket": [f"t{number}" for number in range(400)],
        "who": [f"w{number}" for number in random.integers(0, 9, 400)],
    }
    pq.write_table(pa.table(table), folder / "tickets.parquet")
    prepare(folder / "tickets.parquet", SCHEMA, folder / "store", progress=False)
    return EventStore.open(folder / "store")


@pytest.fixture
def loader(store: EventStore) -> Callable[..., EventLoader]:
    return lambda **options: EventLoader(store, "train", **{**SETTINGS, "seed": 3, **options})


def values(batch: EventBatch) -> tuple[Tensor, Tensor, int]:
    return batch.sources.clone(), batch.targets.clone(), int(batch.num_targets)


def same(one: tuple[Tensor, Tensor, int], other: tuple[Tensor, Tensor, int]) -> bool:
    return one[0].equal(other[0]) and one[1].equal(other[1]) and one[2] == other[2]


@given(
    prefetch=st.sampled_from(PREFETCHES),
    batch_size=st.integers(1, 40),
    closings=st.lists(st.integers(0, 30), max_size=4),
    drop_last=st.booleans(),
)
@hypothesis_settings(max_examples=30, deadline=None)
def test_batches_and_states_are_the_same_however_many_are_ahead_and_wherever_one_stops(
    store: EventStore, prefetch: int, batch_size: int, closings: list[int], drop_last: bool
) -> None:
    options = {**SETTINGS, "batch_size": batch_size, "seed": 3, "drop_last": drop_last}
    plain = EventLoader(store, "train", **options, prefetch=0)
    expected = [(values(batch), plain.state_dict()) for batch in plain]
    assert len(expected) == len(plain)
    ahead = EventLoader(store, "train", **options, prefetch=prefetch)
    state, number = ahead.state_dict(), 0
    for num_batches in [*closings, len(expected)]:  # stopped after so many, and taken up by another loader each time
        ahead = EventLoader(store, "train", **options, prefetch=prefetch)
        ahead.load_state_dict(state)
        batches = iter(ahead)
        for _, batch in zip(range(num_batches), batches, strict=False):
            wanted, wanted_state = expected[number]
            assert same(values(batch), wanted)
            assert ahead.state_dict() == wanted_state
            number += 1
        batches.close()
        state = ahead.state_dict()
    assert number == len(expected)


@pytest.mark.parametrize("prefetch", PREFETCHES)
@pytest.mark.parametrize("part", ["batch", "sources", "one row", "num_targets", "numpy", "other process"])
def test_a_batch_stays_while_any_of_its_tensors_lives(
    loader: Callable[..., EventLoader], prefetch: int, part: str
) -> None:
    keep: dict[str, Callable[[EventBatch], Any]] = {
        "batch": lambda batch: (batch.sources, batch.targets, batch.num_targets),
        "sources": lambda batch: (batch.sources,),
        "one row": lambda batch: (batch.targets[1, 0],),
        "num_targets": lambda batch: (batch.num_targets,),
        "numpy": lambda batch: (batch.sources.numpy(),),
        "other process": lambda batch: (batch.targets.share_memory_(),),
    }
    batches = iter(loader(prefetch=prefetch))
    held, copies = [], []
    for _ in range(3):
        held.append(keep[part](next(batches)))
        copies.append([tensor.clone() if isinstance(tensor, Tensor) else tensor.copy() for tensor in held[-1]])
    assert sum(1 for _, batch in zip(range(50), batches, strict=False)) == 50
    for kept, copy in zip(held, copies, strict=True):
        assert all((now == before).all() for now, before in zip(kept, copy, strict=True))


def test_a_dropped_block_is_lent_again_as_it_was() -> None:
    blocks = Blocks(256, pinned=False)
    first, second = blocks.new(), blocks.new()
    address = first.data_ptr()
    assert address != second.data_ptr()
    assert address % 64 == second.data_ptr() % 64 == 0
    first.copy_(torch.arange(256).to(torch.uint8))
    view = first.view(torch.int32)[3]
    del first
    assert blocks.new().data_ptr() != address, "a view is still there"
    del view
    again = blocks.new()
    assert again.data_ptr() == address
    assert again.tolist() == list(range(256)), "fresh memory is poisoned"


def allocations(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Tensor]]:
    """All blocks that are allocated from now on."""
    empty, blocks = torch.empty, []

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        if tensor.dtype == torch.uint8:
            blocks.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(torch, "empty", recorded)
    return blocks


@pytest.mark.parametrize("prefetch", PREFETCHES)
def test_an_epoch_takes_a_few_blocks_and_gives_them_back(
    loader: Callable[..., EventLoader], prefetch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = allocations(monkeypatch)
    batches = loader(prefetch=prefetch)
    for epoch in range(3):
        batches.set_epoch(epoch)
        del blocks[:]
        iteration = iter(batches)
        addresses, number, held = set(), 0, None
        for batch in iteration:
            addresses.add(batch.sources.data_ptr())
            number += 1
            if epoch == 2 and number == 20:
                held = batch
                iteration.close()
            del batch
        assert number >= 20
        assert len(addresses) <= len(blocks) <= prefetch + 1  # those ahead and the one that is drawn
        if held is not None:
            assert [block() for block in blocks].count(None) == len(blocks) - 1, (
                "one is held, and the free ones are gone"
            )
            before = values(held)
            assert sum(1 for _ in loader(seed=8)) > 50  # others that draw on freed memory
            assert same(values(held), before)
            del held
        assert {block() for block in blocks} == {None}


def num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def wait_for_threads(number: int) -> None:
    """A thread that was joined leaves /proc a moment later."""
    deadline = time.monotonic() + 10
    while num_threads() != number and time.monotonic() < deadline:
        time.sleep(1e-3)
    assert num_threads() == number


linux = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc and forks")


@linux
@pytest.mark.parametrize("prefetch", PREFETCHES)
@pytest.mark.parametrize("how", ["end", "close", "drop", "error of the consumer"])
def test_the_threads_end_with_the_iteration(loader: Callable[..., EventLoader], prefetch: int, how: str) -> None:
    before = num_threads()
    batches = iter(loader(prefetch=prefetch))
    assert num_threads() == before, "no thread before the first batch is asked for"
    next(batches)
    wait_for_threads(before + min(prefetch, available_cores()))
    if how == "end":
        assert sum(1 for _ in batches) > 50
    elif how == "close":
        batches.close()
    elif how == "drop":
        del batches
    else:

        def fail(batches: Any) -> None:
            for _ in batches:
                raise KeyError("of the consumer")

        with pytest.raises(KeyError, match="of the consumer"):
            fail(batches)
        del batches
    wait_for_threads(before)


@pytest.mark.parametrize("prefetch", PREFETCHES)
def test_an_error_of_a_thread_comes_to_the_consumer(loader: Callable[..., EventLoader], prefetch: int) -> None:
    batches = loader(prefetch=prefetch)
    num_windows = batches.num_samples
    expected = [values(batch) for batch in loader(prefetch=0, shuffle=False)]
    # an order of another split: its last windows are not there
    batches.sampler = IndexSampler(num_windows + 9, SETTINGS["batch_size"], shuffle=False)
    before = num_threads() if sys.platform == "linux" else 0
    seen = []
    with pytest.raises(
        IndexError, match=rf"^windows hold {num_windows} at sample \d, but the split has {num_windows} windows"
    ) as caught:
        seen.extend(values(batch) for batch in batches)
    assert len(seen) == num_windows // SETTINGS["batch_size"]
    assert all(same(one, other) for one, other in zip(seen, expected, strict=False))
    assert batches.state_dict()["position"] == len(seen) * SETTINGS["batch_size"]
    frames = {Path(frame.filename).name for frame in traceback.extract_tb(caught.value.__traceback__)}
    assert {"loader.py", "prefetch.py"} <= frames
    if sys.platform == "linux":
        wait_for_threads(before)


def exit_code_of(in_child: Callable[[], bool]) -> int:
    """0 where a forked child finds it true, 1 where not; a child that hangs is killed by its alarm."""
    child = os.fork()
    if child == 0:
        code = 2
        try:
            signal.alarm(30)
            code = 0 if in_child() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@linux
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("prefetch", PREFETCHES)
def test_a_forked_child_gathers_with_threads_of_its_own(loader: Callable[..., EventLoader], prefetch: int) -> None:
    expected = [values(batch) for batch in loader(prefetch=0)]
    mine = loader(prefetch=prefetch)
    batches = iter(mine)
    seen = [values(next(batches)) for _ in range(5)]

    def anew() -> bool:
        return all(same(values(batch), wanted) for batch, wanted in zip(mine, expected, strict=True))

    def going_on() -> bool:
        try:
            return same(values(next(batches)), expected[5])
        except RuntimeError as error:
            return prefetch > 0 and "begun before this process was forked" in str(error)

    def closing() -> bool:
        batches.close()
        return True

    assert [exit_code_of(each) for each in (anew, going_on, closing)] == [0, 0, 0]
    seen += [values(batch) for batch in batches]
    assert all(same(one, other) for one, other in zip(seen, expected, strict=True))


def test_a_ticket_is_good_for_one_wait_and_a_closed_pool_for_nothing(loader: Callable[..., EventLoader]) -> None:
    gatherer = loader()._gatherer
    pool = _C.GatherPool(num_windows=gatherer.num_windows, num_threads=1)
    windows, block = torch.arange(4), torch.empty(gatherer.block_bytes(4), dtype=torch.uint8)
    ticket = gatherer.submit(pool, windows, block)
    pool.wait(ticket)
    assert gatherer.batch(block, 4).targets.equal(gatherer(windows).targets)
    with pytest.raises(ValueError, match=f"no batch has the ticket {ticket}"):
        pool.wait(ticket)
    left = gatherer.submit(pool, windows, block)
    pool.close()
    pool.close()
    for use in (lambda: pool.wait(left), lambda: gatherer.submit(pool, windows, block)):
        with pytest.raises(RuntimeError, match="the gather pool is closed"):
            use()


@pytest.mark.gpu
@pytest.mark.parametrize("prefetch", PREFETCHES)
@pytest.mark.parametrize("resident", [False, True])
def test_batches_on_a_busy_gpu_are_whole_and_nobody_waits_for_it(
    loader: Callable[..., EventLoader], prefetch: int, resident: bool
) -> None:
    expected = [values(batch) for batch in loader(prefetch=0)]
    batches = loader(prefetch=prefetch, device="cuda", resident=resident)
    stream = torch.cuda.Stream()
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    for epoch in range(2):  # the first allocates pinned memory
        del seen[:]
        batches.set_epoch(epoch)
        batches.set_epoch(0)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if epoch else "default")
        try:
            with torch.cuda.stream(stream):
                for batch in batches:
                    torch.cuda._sleep(2_000_000)  # about 1 ms: the host runs ahead, and drops batches not yet read
                    seen.append((batch.sources.clone(), batch.targets.clone(), batch.num_targets.clone()))
                    del batch
            assert not stream.query(), "the host waited"
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        for (sources, targets, num_targets), wanted in zip(seen, expected, strict=True):
            assert same((sources.cpu(), targets.cpu(), int(num_targets)), wanted)


@pytest.mark.gpu
def test_resident_loaders_of_a_store_share_its_arrays(store: EventStore) -> None:
    options = {**SETTINGS, "device": "cuda", "resident": True}
    before = torch.cuda.memory_allocated()
    train = EventLoader(store, "train", **options)
    one = torch.cuda.memory_allocated() - before
    validation = EventLoader(store, "validation", **options)
    two = torch.cuda.memory_allocated() - before
    assert one >= store.codes.nbytes
    assert two - one < store.codes.nbytes + store.index("who").rows.nbytes
    assert {int(next(iter(each)).num_targets) for each in (train, validation)}
