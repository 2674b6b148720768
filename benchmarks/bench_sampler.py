"""The order of an epoch: its first batch, all of its batches, and what an index costs at sizes that suit it and not."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import work
from benchmarks.loader_peers import INDEX_BATCHES, IndexEpochs, sampler_indices
from benchmarks.measure import Compare, Contender
from eventkern.data import IndexSampler, permutation

BATCH_SIZE = 1024
NUM_SAMPLES = 900_000
HUGE = 10**12
SIZES = {"1,000": 1_000, "2^20": 1 << 20, "900,000": 900_000, "2^23+1": (1 << 23) + 1, "2^33+1": (1 << 33) + 1}
"""Sizes of the range. No value walks at a power of two; half of them do just above one."""
LARGEST_RANDPERM = 1 << 24
CPU = torch.device("cpu")


def first_batch(epochs: IndexEpochs) -> object:
    return next(epochs())


def whole_epoch(epochs: IndexEpochs) -> int:
    return sum(1 for _ in epochs())


def test_first_batch(compare: Compare) -> None:
    contenders = [
        Contender(
            peer.name,
            partial(first_batch, peer.build(NUM_SAMPLES, BATCH_SIZE, shuffle=True, seed=0)),
            peer.build is sampler_indices,
        )
        for peer in INDEX_BATCHES
    ]
    compare(f"first batch n {NUM_SAMPLES:,}", contenders, work.permutation(BATCH_SIZE), device=CPU, dtype=torch.int64)


def test_first_batch_of_a_range_that_no_other_holds(compare: Compare) -> None:
    ours = partial(first_batch, sampler_indices(HUGE, BATCH_SIZE, shuffle=True, seed=0))
    contenders = [Contender("eventkern IndexSampler", ours, True)]
    compare(f"first batch n {HUGE:,}", contenders, work.permutation(BATCH_SIZE), device=CPU, dtype=torch.int64)


def test_epoch_of_batches(compare: Compare, has_slow_starters: bool) -> None:
    contenders = []
    for peer in INDEX_BATCHES:
        if peer.is_slow_to_start and not has_slow_starters:
            continue
        epochs = peer.build(NUM_SAMPLES, BATCH_SIZE, shuffle=True, seed=0)
        order = np.concatenate([np.asarray(batch) for batch in epochs()])
        assert np.array_equal(np.sort(order), np.arange(NUM_SAMPLES)), f"{peer.name} is no permutation"
        contenders.append(Contender(peer.name, partial(whole_epoch, epochs), peer.build is sampler_indices))
    case = f"epoch n {NUM_SAMPLES:,} batch {BATCH_SIZE:,}, {torch.get_num_threads()} threads"
    compare(case, contenders, work.permutation(NUM_SAMPLES), device=CPU, dtype=torch.int64)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("size", SIZES)
def test_indices_on_one_thread(size: str, compare: Compare) -> None:
    n = SIZES[size]
    num_indices = min(n, 1 << 20)
    out = torch.empty(num_indices, dtype=torch.int64)
    contenders = [Contender("eventkern", partial(permutation, n, seed=0, stop=num_indices, out=out), True)]
    if n <= LARGEST_RANDPERM:  # it makes all of them or none
        contenders.append(Contender(f"torch.randperm({n:,})", partial(torch.randperm, n), is_part=n > num_indices))
    case = f"{num_indices:,} of n {size}, 1 thread"
    compare(case, contenders, work.permutation(num_indices), device=CPU, dtype=torch.int64)


def test_seek(compare: Compare) -> None:
    """Ours goes on from the middle of an epoch; its own start is what that is held against."""

    def batches_from(position: int) -> int:
        sampler = IndexSampler(NUM_SAMPLES, BATCH_SIZE)
        sampler.load_state_dict({**sampler.state_dict(), "position": position})
        batches = iter(sampler)
        return sum(len(next(batches)) for _ in range(8))

    contenders = [
        Contender("eventkern, from the middle", partial(batches_from, NUM_SAMPLES // 2), True),
        Contender("eventkern, from the start", partial(batches_from, 0)),
    ]
    compare(f"8 batches n {NUM_SAMPLES:,}", contenders, work.permutation(8 * BATCH_SIZE), device=CPU, dtype=torch.int64)


@pytest.mark.gpu
@pytest.mark.parametrize("size", ["2^23+1", "2^33+1"])
def test_indices_on_cuda(size: str, compare: Compare) -> None:
    n, device = SIZES[size], torch.device("cuda")
    num_indices = min(n, 1 << 26)
    out = torch.empty(num_indices, dtype=torch.int64, device=device)
    contenders = [
        Contender("eventkern", partial(permutation, n, seed=0, stop=num_indices, out=out), True),
        Contender("fill_, the writes alone", partial(out.fill_, 0), is_part=True),
    ]
    if n <= LARGEST_RANDPERM:
        contenders.append(Contender("torch.randperm", partial(torch.randperm, n, device=device)))
    compare(
        f"{num_indices:,} of n {size} cuda", contenders, work.permutation(num_indices), device=device, dtype=torch.int64
    )
