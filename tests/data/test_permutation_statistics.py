"""permutation looks like numpy's: the same tests for both, and weak networks that must fail them.

Every statistic comes out as a standard normal deviate. A case has at most 28 of them and there are six sizes, so with
LIMIT a source of uniform permutations fails anywhere with a probability of about FALSE_ALARM. Seeds are fixed.
"""

import math
from collections.abc import Callable
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from eventkern.data.permutation import fill_permutation, permutation

Array = NDArray[Any]
RoundKeys = Callable[..., list[int]]  # (num_rounds, n, seed, epoch, part)
Order = Callable[..., Array]  # (n, seed, epoch=0, part=0): a permutation of range(n)

NUM_SEEDS = {1_000: 1_000, 65_537: 24, 100_000: 16, 900_000: 4, 1_000_000: 4, 10_000_000: 1}
FALSE_ALARM = 1e-3
LIMIT = NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * 28 * len(NUM_SEEDS)))  # 4.5
CLEAR_FAILURE = 2 * LIMIT
MULTIPLIER = np.uint32(0xD168AAAD)


def ours(n: int, seed: int, epoch: int = 0, part: int = 0) -> Array:
    out = torch.empty(n, dtype=torch.int64)
    fill_permutation(out, n, seed=seed, epoch=epoch, start=0, part=part)
    return out.numpy()


def of_numpy(n: int, seed: int, epoch: int = 0, part: int = 0) -> Array:
    return np.random.default_rng([seed, epoch, part]).permutation(n)


def of_an_affine_map(n: int, seed: int, epoch: int = 0, part: int = 0) -> Array:
    """A linear congruence with a multiplier near n over the golden ratio: well spread, and far from random."""
    multiplier = next(m for m in range(int(n * 0.618) + 1000 * (seed + epoch + part), 2 * n) if math.gcd(m, n) == 1)
    return (np.arange(n) * multiplier + seed) % n


def quadratic(half: Array, key: np.uint32) -> Array:
    """The round function of permutation.h, before its upper bits are cut off."""
    mixed = half * MULTIPLIER + key
    return mixed * mixed + mixed


def linear(half: Array, key: np.uint32) -> Array:
    return (half ^ key) * MULTIPLIER


def network(num_rounds: int, round_function: Callable[[Array, np.uint32], Array], round_keys: RoundKeys) -> Order:
    """permutation.h in numpy, with any number of rounds and any round function."""

    def order(n: int, seed: int, epoch: int = 0, part: int = 0) -> Array:
        domain_bits = max((n - 1).bit_length(), 8)
        high_bits, low_bits = domain_bits // 2, domain_bits - domain_bits // 2
        keys = [np.uint32(key) for key in round_keys(num_rounds, n, seed, epoch, part)]

        def once(values: Array) -> Array:
            high, low = (values >> low_bits).astype(np.uint32), (values & ((1 << low_bits) - 1)).astype(np.uint32)
            for number, key in enumerate(keys):
                if number % 2 == 0:
                    high ^= round_function(low, key) >> np.uint32(32 - high_bits)
                else:
                    low ^= round_function(high, key) >> np.uint32(32 - low_bits)
            return high.astype(np.int64) << low_bits | low

        values = once(np.arange(n))
        outside = np.flatnonzero(values >= n)
        while len(outside):
            values[outside] = once(values[outside])
            outside = outside[values[outside] >= n]
        return values

    return order


def of_chi_squared(chi_squared: float, freedom: int) -> float:
    """As a normal deviate: Wilson and Hilferty, 1931."""
    return float(((chi_squared / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) * math.sqrt(9 * freedom / 2))


def of_poisson(count: int, mean: float) -> float:
    """As the normal deviate of the same two-sided probability."""
    logs = [k * math.log(mean) - mean - math.lgamma(k + 1) for k in range(count + 1)]
    below = min(sum(math.exp(log) for log in logs[:-1]), 1.0)
    at_least, at_most = 1 - below, min(below + math.exp(logs[-1]), 1.0)
    if at_most < at_least:
        return min(NormalDist().inv_cdf(max(at_most, 1e-300)), 0.0)
    return max(-NormalDist().inv_cdf(max(at_least, 1e-15)), 0.0)


def pooled(deviates: Array) -> list[float]:
    """One deviate for their mean, which a bias moves, and one for their spread, which a bias of either sign widens."""
    count = len(deviates)
    return [float(deviates.sum()) / math.sqrt(count), of_chi_squared(float((deviates**2).sum()), count)]


def centred(orders: Array) -> Array:
    """Values with mean 0 and variance 1."""
    n = orders.shape[1]
    return (orders - (n - 1) / 2) / math.sqrt((n * n - 1) / 12)


def of_quintuples(orders: Array) -> list[float]:
    """The 5! orders of five consecutive values, all equally probable and independent for disjoint fives."""
    fives = np.ascontiguousarray(orders[:, : orders.shape[1] // 5 * 5].reshape(-1, 5).T)
    codes = np.zeros(fives.shape[1], np.int16)
    for i in range(4):
        codes = codes * (5 - i) + (fives[i] > fives[i + 1 :]).sum(0, dtype=np.int16)
    counts = np.bincount(codes, minlength=120)
    expected = len(codes) / 120
    return [of_chi_squared(((counts - expected) ** 2).sum() / expected, 119)]


def of_serial_correlation(orders: Array) -> list[float]:
    """Lags 1 to 8: for a permutation the mean product of neighbours is -1 / (n - 1)."""
    n = orders.shape[1]
    values = centred(orders)
    deviates = []
    for lag in range(1, 9):
        products = np.einsum("si,si->s", values[:, lag:], values[:, :-lag])
        deviates += pooled((products + (n - lag) / (n - 1)) / math.sqrt(n - lag))
    return deviates


def of_positions(orders: Array) -> list[float]:
    """The correlation of value and position, of variance 1 / (n - 1)."""
    n = orders.shape[1]
    return pooled(centred(orders) @ centred(np.arange(n)[None])[0] / n * math.sqrt(n - 1))


def of_batches(orders: Array) -> list[float]:
    """The spread of batch means against that of samples without replacement, and how evenly 16 strata of values, once
    of neighbours and once of equal remainder, share the batches."""
    num_orders, n = orders.shape
    batch = 1024 if n > 50_000 else 32
    first = np.arange(0, n, batch)
    sizes = np.diff(np.append(first, n))
    sums = np.add.reduceat(centred(orders), first, axis=1)
    freedom = num_orders * (len(first) - 1)
    deviates = [of_chi_squared((sums**2 / sizes).sum() * (n - 1) / n, freedom)]
    batches = np.arange(num_orders)[:, None] * len(first) + np.arange(n) // batch
    for strata in (orders * 16 // n, orders % 16):
        counts = np.bincount((batches * 16 + strata).ravel(), minlength=freedom + num_orders << 4)
        counts = counts.reshape(num_orders, len(first), 16)
        expected = counts.sum(1, keepdims=True) * (sizes / n)[:, None]
        deviates.append(of_chi_squared(((counts - expected) ** 2 / expected).sum() * (n - 1) / n, freedom * 15))
    return deviates


def of_likeness(orders: Array, others: Array) -> list[float]:
    """The correlation of two orders, and how often they agree: about Poisson with mean 1 for each pair."""
    num_orders, n = orders.shape
    correlations = np.einsum("si,si->s", centred(orders), centred(others)) / n
    deviates = [float(correlations.sum()) * math.sqrt((n - 1) / num_orders)]
    return [*deviates, of_poisson(int((orders == others).sum()), num_orders)]


def deviates_of(order: Order, n: int, num_seeds: int) -> dict[str, list[float]]:
    seeds = range(0, 2 * num_seeds, 2)
    orders = np.stack([order(n, seed) for seed in seeds])
    return {
        "quintuples": of_quintuples(orders),
        "serial": of_serial_correlation(orders),
        "positions": of_positions(orders),
        "batches": of_batches(orders),
        "next seed": of_likeness(orders, np.stack([order(n, seed + 1) for seed in seeds])),
        "next epoch": of_likeness(orders, np.stack([order(n, seed, epoch=1) for seed in seeds])),
        "next part": of_likeness(orders, np.stack([order(n, seed, part=1) for seed in seeds])),
    }


def largest(deviates: dict[str, list[float]]) -> dict[str, float]:
    return {name: max(map(abs, values)) for name, values in deviates.items()}


@pytest.mark.parametrize("n", NUM_SEEDS)
@pytest.mark.parametrize("order", [ours, of_numpy], ids=["ours", "numpy"])
def test_the_order_is_random(order: Order, n: int) -> None:
    deviates = deviates_of(order, n, NUM_SEEDS[n])
    assert sum(map(len, deviates.values())) <= 28
    assert max(largest(deviates).values()) < LIMIT, largest(deviates)


@pytest.mark.parametrize(
    ("make", "n"),
    [
        (partial(network, 2, quadratic), 900_000),
        (partial(network, 4, linear), 900_000),
        (lambda _: of_an_affine_map, 900_000),
        (partial(network, 4, quadratic), 1_000),  # at 900,000 four of our rounds pass
        (partial(network, 6, linear), 1_000),
    ],
    ids=["2 rounds", "4 linear rounds", "affine", "4 rounds of 1,000", "6 linear rounds of 1,000"],
)
def test_a_weak_order_is_seen(make: Callable[[RoundKeys], Order], n: int, round_keys: RoundKeys) -> None:
    deviates = deviates_of(make(round_keys), n, NUM_SEEDS[n])
    assert max(largest(deviates).values()) > CLEAR_FAILURE, largest(deviates)


@pytest.mark.parametrize("n", [1, 5, 255, 256, 257, 1_000, 65_537])
def test_the_network_of_the_controls_is_ours(n: int, round_keys: RoundKeys) -> None:
    for key in ({"seed": 3}, {"seed": 2**63, "epoch": 5}, {"seed": 0, "epoch": 1, "part": 2}):
        assert np.array_equal(network(8, quadratic, round_keys)(n, **key), ours(n, **key))


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_few_are_equally_frequent(n: int) -> None:
    num_seeds = 200 * math.factorial(n)
    orders = np.stack([permutation(n, seed=seed).numpy() for seed in range(num_seeds)])
    _, counts = np.unique(orders @ n ** np.arange(n), return_counts=True)
    assert len(counts) == math.factorial(n)
    assert of_chi_squared(((counts - 200) ** 2).sum() / 200, len(counts) - 1) < LIMIT


@pytest.mark.parametrize("n", [6, 13, 31, 64, 100, 256])
def test_every_position_of_few_takes_every_value(n: int) -> None:
    num_seeds = 10_000
    orders = np.stack([permutation(n, seed=seed).numpy() for seed in range(num_seeds)])
    counts = np.bincount((orders + n * np.arange(n)).ravel(), minlength=n * n)
    chi_squared = ((counts - num_seeds / n) ** 2).sum() * n / num_seeds * (n - 1) / n
    assert of_chi_squared(chi_squared, (n - 1) ** 2) < LIMIT
