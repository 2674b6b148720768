"""The order of an epoch: its first batch, all of its batches, and what an index costs at sizes that suit it and not."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler

from benchmarks.measure import Compare, Contender
from eventkern.data import IndexSampler, permutation
from profiling.roofline import Work

BATCH_SIZE = 1024
NUM_SAMPLES = 900_000
HUGE = 10**12
INDEX_BYTES = 8
SIZES = {"2^20": 2**20, "900,000": 900_000, "2^23+1": 2**23 + 1, "2^33+1": 2**33 + 1}
"""Sizes of the range. No value walks at a power of two, half of them do just above one."""
LARGEST_RANDPERM = 1 << 24


def eventkern_batches(n: int) -> Iterator[Tensor]:
    return iter(IndexSampler(n, BATCH_SIZE))


def torch_batches(n: int) -> Iterator[list[int]]:
    return iter(BatchSampler(RandomSampler(range(n)), BATCH_SIZE, drop_last=False))


def randperm_batches(n: int) -> Iterator[Tensor]:
    return iter(torch.randperm(n).split(BATCH_SIZE))


def first(batches: Callable[[int], Iterator[object]], n: int) -> object:
    return next(batches(n))


def count(batches: Callable[[int], Iterator[object]], n: int) -> int:
    return sum(1 for _ in batches(n))


@pytest.mark.parametrize("n", [NUM_SAMPLES, HUGE])
def test_first_batch(n: int, compare: Compare) -> None:
    contenders = [Contender("eventkern", partial(first, eventkern_batches, n), True)]
    if n == NUM_SAMPLES:  # the others hold the whole order
        contenders.append(Contender("BatchSampler(RandomSampler)", partial(first, torch_batches, n)))
        contenders.append(Contender("randperm, split", partial(first, randperm_batches, n)))
    work = Work(operations=0.0, bytes=INDEX_BYTES * BATCH_SIZE, events=BATCH_SIZE)
    compare(f"first batch n {n:,}", contenders, work, device=torch.device("cpu"), dtype=torch.int64)


def test_epoch_of_batches(compare: Compare) -> None:
    ways = {
        "eventkern": eventkern_batches,
        "BatchSampler(RandomSampler)": torch_batches,
        "randperm, split": randperm_batches,
    }
    for name, way in ways.items():
        batches = [torch.as_tensor(batch) for batch in way(NUM_SAMPLES)]
        assert torch.cat(batches).sort().values.equal(torch.arange(NUM_SAMPLES)), f"{name} is no permutation"
    contenders = [Contender(name, partial(count, way, NUM_SAMPLES), name == "eventkern") for name, way in ways.items()]
    work = Work(operations=0.0, bytes=INDEX_BYTES * NUM_SAMPLES, events=NUM_SAMPLES)
    case = f"epoch n {NUM_SAMPLES:,} batch {BATCH_SIZE}, {torch.get_num_threads()} threads"
    compare(case, contenders, work, device=torch.device("cpu"), dtype=torch.int64)


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
        contenders.append(Contender(f"randperm of all {n:,}", partial(torch.randperm, n), is_part=n > num_indices))
    work = Work(operations=0.0, bytes=INDEX_BYTES * num_indices, events=num_indices)
    compare(f"{num_indices:,} of n {size}, 1 thread", contenders, work, device=torch.device("cpu"), dtype=torch.int64)


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
    work = Work(operations=0.0, bytes=8 * INDEX_BYTES * BATCH_SIZE, events=8 * BATCH_SIZE)
    compare(f"8 batches n {NUM_SAMPLES:,}", contenders, work, device=torch.device("cpu"), dtype=torch.int64)


@pytest.mark.gpu
@pytest.mark.parametrize("size", ["2^23+1", "2^33+1"])
def test_indices_on_cuda(size: str, compare: Compare) -> None:
    n, num_indices, device = SIZES[size], 1 << 26, torch.device("cuda")
    num_indices = min(n, num_indices)
    out = torch.empty(num_indices, dtype=torch.int64, device=device)
    contenders = [
        Contender("eventkern", partial(permutation, n, seed=0, stop=num_indices, out=out), True),
        Contender("fill alone", partial(out.fill_, 0), is_part=True),
    ]
    if n <= LARGEST_RANDPERM:
        contenders.append(Contender("randperm", partial(torch.randperm, n, device=device)))
    work = Work(operations=0.0, bytes=INDEX_BYTES * num_indices, events=num_indices)
    compare(f"{num_indices:,} of n {size} cuda", contenders, work, device=device, dtype=torch.int64)
