"""permutation: bijections, their definition in Python, the same order everywhere, wrong arguments."""

import random
import subprocess
import sys
from typing import NamedTuple

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies

from eventkern.data import permutation
from eventkern.data.permutation import PERMUTATION_VERSION, fill_permutation

MULTIPLIER = 0xD168AAAD
# Of every width, the least and the largest n with that domain among them.
SIZES = [1, 2, 3, 200, 256, 257, 1000, *(2**bits + more for bits in range(10, 48) for more in (0, 1)), 2**48 - 1, 2**48]


class Definition(NamedTuple):
    """Version 1 in Python's integers, forward and backward."""

    n: int
    high_bits: int
    low_bits: int
    keys: list[int]

    @classmethod
    def of(cls, n: int, keys: list[int]) -> "Definition":
        domain_bits = max((n - 1).bit_length(), 8)
        return cls(n, domain_bits // 2, domain_bits - domain_bits // 2, keys)

    def once(self, value: int, direction: int) -> int:
        high, low = value >> self.low_bits, value % 2**self.low_bits
        for number, key in list(enumerate(self.keys))[::direction]:
            mixed = ((high if number % 2 else low) * MULTIPLIER + key) % 2**32
            bits = self.low_bits if number % 2 else self.high_bits
            output = (mixed * mixed + mixed) % 2**32 >> (32 - bits)
            if number % 2:
                low ^= output
            else:
                high ^= output
        return high << self.low_bits | low

    def value_at(self, position: int) -> int:
        return self.walk(position, 1)

    def position_of(self, value: int) -> int:
        return self.walk(value, -1)

    def walk(self, start: int, direction: int) -> int:
        value = self.once(start, direction)
        while value >= self.n:
            value = self.once(value, direction)
        return value


def is_bijection(values: torch.Tensor) -> bool:
    return np.array_equal(np.bincount(values.numpy(), minlength=len(values)), np.ones(len(values)))


def test_every_small_n_is_a_bijection():
    assert [n for n in range(1, 4097) if not is_bijection(permutation(n, seed=7, epoch=n))] == []


@pytest.mark.parametrize("bits", range(13, 23))
def test_around_a_power_of_two_it_is_a_bijection(bits):
    for n in (2**bits - 1, 2**bits, 2**bits + 1):
        assert is_bijection(permutation(n, seed=bits, epoch=3))


@pytest.mark.parametrize("n", SIZES)
def test_it_is_its_definition(n, round_keys):
    """At the start, in the middle and at the end, of slices that no whole number of vectors fills; and backward, which
    no two positions of one value would allow."""
    generator = random.Random(n)
    for count in (1, 97):
        for start in {0, max(0, n // 2 - count // 2), max(0, n - count), generator.randrange(n)}:
            seed, epoch, part = (generator.randrange(2**64) for _ in range(3))
            positions = range(start, min(n, start + count))
            out = torch.empty(len(positions), dtype=torch.int64)
            fill_permutation(out, n, seed=seed, epoch=epoch, start=start, part=part)
            definition = Definition.of(n, round_keys(8, n, seed, epoch, part))
            assert out.tolist() == [definition.value_at(position) for position in positions]
            assert [definition.position_of(value) for value in out.tolist()] == list(positions)


@pytest.mark.parametrize("n", [2**32 + 9_999, 2**47 + 1, 2**48])
def test_slices_of_many_blocks_are_its_definition(n, round_keys):
    definition = Definition.of(n, round_keys(8, n, 5, 1, 0))
    for start in (0, 2**32 - 5000, n - 10_000):
        values = permutation(n, seed=5, epoch=1, start=start, stop=start + 10_000)
        assert values.min() >= 0
        assert values.max() < n
        assert len(values.unique()) == 10_000
        assert [definition.value_at(start + i) for i in range(0, 10_000, 61)] == values[::61].tolist()


# Version 1, frozen: (n, seed, epoch, part, start) and the values from there on. Orders of saved samplers depend on
# them. Who means to change them raises PERMUTATION_VERSION, by which a saved sampler refuses another order, and then
# writes the new values here.
GOLDEN = [
    ((1, 0, 0, 0, 0), [0]),
    ((2, 0, 0, 0, 0), [1, 0]),
    ((5, 1, 2, 3, 0), [3, 4, 1, 2, 0]),
    ((256, 9, 0, 0, 100), [210, 14, 228, 204, 164, 60, 4, 216]),
    ((1000, 0, 0, 0, 0), [200, 438, 825, 358, 717, 747]),
    ((1000, 0, 1, 0, 0), [439, 43, 687, 5, 191, 361]),
    ((1000, 0, 0, 1, 0), [810, 33, 462, 253, 171, 900]),
    ((65537, 7, 3, 0, 65529), [22948, 3802, 16172, 10151, 47888, 21511]),
    ((900000, 1, 0, 0, 0), [276926, 691343, 547104, 89623, 277020, 379487]),
    ((900000, 1, 0, 0, 450000), [54671, 753428, 695492, 819093, 142468, 333333]),
    (
        (900000, 18446744073709551615, 18446744073709551615, 18446744073709551615, 123456),
        [179725, 297849, 460244, 336299, 872051, 689156],
    ),
    ((8388609, 42, 5, 0, 4194304), [7815887, 4359652, 1566536, 4540921, 4875821, 7891470]),
    ((8589934593, 42, 5, 1, 4294967292), [861218448, 5189163976, 4350666244, 5529306919, 95227769, 1692041169]),
    (
        (1000000000000, 0, 0, 0, 999999999992),
        [546809039875, 827011894748, 801381150182, 784238962287, 589085843551, 462760050315],
    ),
    ((140737488355329, 3, 1, 4, 70368744177664), [135508158540200, 45229145579607, 139390681888078, 41906714837967]),
    ((281474976710656, 11, 0, 0, 0), [145202047003884, 277712623182062, 60882245343514, 39166701917284]),
    ((281474976710656, 11, 0, 0, 281474976710648), [280518880260554, 154640976820936, 58314745003369, 8935584596709]),
]


@pytest.mark.parametrize(("where", "values"), GOLDEN)
def test_the_order_of_version_1_is_frozen(where, values):
    n, seed, epoch, part, start = where
    out = torch.empty(len(values), dtype=torch.int64)
    fill_permutation(out, n, seed=seed, epoch=epoch, start=start, part=part)
    assert out.tolist() == values
    assert PERMUTATION_VERSION == 1


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


def test_every_part_of_the_key_changes_the_order():
    """Added, rather than hashed, seed and epoch would give some of these the same order; and an n that were no part of
    the key would share most of its order with the next."""
    keys = [(1000, *key) for key in [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (0, 0, 1), (0, 1, 1)]] + [
        (1001, 0, 0, 0)
    ]
    orders = []
    for n, seed, epoch, part in keys:
        orders.append(torch.empty(n, dtype=torch.int64))
        fill_permutation(orders[-1], n, seed=seed, epoch=epoch, start=0, part=part)
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one[:1000] == other[:1000]).sum() < 10


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


@pytest.mark.parametrize("name", ["n", "seed", "epoch", "start", "stop"])
@pytest.mark.parametrize("value", [3.0, "3", None, torch.tensor([1, 2])])
def test_an_argument_that_is_no_integer_is_named(name, value):
    arguments = {"n": 5, "seed": 0, name: value}
    if (name, value) == ("stop", None):
        return
    with pytest.raises(TypeError, match=f"^{name} is .*; want an integer$"):
        permutation(arguments.pop("n"), **arguments)


def test_an_integer_of_any_kind_is_one():
    integers = {"seed": np.uint64(2**64 - 1), "epoch": torch.tensor(3), "start": np.int32(1), "stop": True + 3}
    assert permutation(np.int64(5), **integers).equal(permutation(5, seed=2**64 - 1, epoch=3, start=1, stop=4))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2, 1000, 65537, 2**23 + 1, 2**40 + 7])
def test_cuda_makes_the_same_integers(n):
    stop = min(n, 1 << 20)
    on_cuda = permutation(n, seed=3, epoch=5, stop=stop, device="cuda")
    assert on_cuda.cpu().equal(permutation(n, seed=3, epoch=5, stop=stop))
