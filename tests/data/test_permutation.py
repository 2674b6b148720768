"""permutation: bijections, the same order everywhere, wrong arguments."""

import subprocess
import sys

import hypothesis
import pytest
import torch
from hypothesis import strategies

from eventkern.data import permutation


@pytest.mark.parametrize("n", [*range(1, 260), 4095, 4096, 4097, 65535, 65536, 65537, 2**20 - 1, 2**20, 2**20 + 1])
def test_it_is_a_bijection(n):
    assert permutation(n, seed=7, epoch=3).sort().values.equal(torch.arange(n))


@hypothesis.given(
    n=strategies.integers(1, 1 << 48), seed=strategies.integers(0, 2**64 - 1), epoch=strategies.integers(0, 2**64 - 1),
    data=strategies.data(),
)  # fmt: skip
@hypothesis.settings(deadline=None, max_examples=60)
def test_a_slice_is_the_same_alone_and_in_range(n, seed, epoch, data):
    start = data.draw(strategies.integers(0, n - 1))
    stop = data.draw(strategies.integers(start, min(n, start + 3000)))
    values = permutation(n, seed=seed, epoch=epoch, start=start, stop=stop)
    assert len(values.unique()) == stop - start
    assert ((values >= 0) & (values < n)).all()
    middle = (start + stop) // 2
    assert values[middle - start :].equal(permutation(n, seed=seed, epoch=epoch, start=middle, stop=stop))


def test_threads_do_not_change_the_order():
    before = torch.get_num_threads()
    try:
        orders = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            orders.append(permutation(100_003, seed=1))
    finally:
        torch.set_num_threads(before)
    assert orders[0].equal(orders[1])
    assert orders[0].equal(orders[2])


FORKED_AFTER_A_PARALLEL_REGION = """
import os, torch
from eventkern.data import permutation
torch.set_num_threads(2)
expected = permutation(200_000, seed=1)
child = os.fork()
if child == 0:
    os._exit(0 if permutation(200_000, seed=1).numpy().tobytes() == expected.numpy().tobytes() else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_does_not_hang():
    subprocess.run([sys.executable, "-c", FORKED_AFTER_A_PARALLEL_REGION], check=True, timeout=60)


def test_seed_and_epoch_are_not_added():
    orders = [permutation(1000, seed=seed, epoch=epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 10


def test_out_is_filled_in_place():
    out = torch.empty(10, dtype=torch.int64)
    assert permutation(100, seed=1, start=5, stop=15, out=out) is out
    assert out.equal(permutation(100, seed=1)[5:15])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0, "seed": 0}, "n is 0; want 1 to 2"),
        ({"n": 2**48 + 1, "seed": 0}, "want 1 to 2"),
        ({"n": 5, "seed": -1}, "seed is -1"),
        ({"n": 5, "seed": 0, "epoch": 2**64}, "epoch is"),
        ({"n": 5, "seed": 0, "start": 3, "stop": 2}, "start, stop is 3, 2"),
        ({"n": 5, "seed": 0, "stop": 6}, "start, stop is 0, 6"),
        ({"n": 5, "seed": 0, "out": torch.zeros(4, dtype=torch.int64)}, r"out is \(4,\) torch.int64; want \(5,\)"),
        ({"n": 5, "seed": 0, "out": torch.zeros(5)}, "want .* torch.int64"),
        ({"n": 5, "seed": 0, "device": "meta"}, "device is meta; want cpu or cuda"),
    ],
)
def test_a_wrong_argument_of_permutation_is_named(arguments, message):
    n = arguments.pop("n")
    with pytest.raises(ValueError, match=message):
        permutation(n, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2, 1000, 65537, 2**23 + 1, 2**40 + 7])
def test_cuda_makes_the_same_integers(n):
    stop = min(n, 1 << 20)
    on_cuda = permutation(n, seed=3, epoch=5, stop=stop, device="cuda")
    assert on_cuda.cpu().equal(permutation(n, seed=3, epoch=5, stop=stop))
