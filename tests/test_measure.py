import itertools
import sys
import time

import pytest
import torch

from benchmarks import measure
from benchmarks.measure import Contender, peak_extra_bytes, rotations, rows, seconds
from profiling.roofline import Ceilings, Work

CPU = torch.device("cpu")
CEILINGS = Ceilings(CPU, measured_bandwidth=100.0, measured_rates={torch.float32: 1000.0})


def contender(name: str, *times_s: float, is_ours: bool = False) -> Contender:
    return Contender(name, lambda: None, is_ours, list(times_s))


def test_ratios_are_taken_round_by_round_against_the_strongest_peer() -> None:
    # The machine slows down fourfold in the last round, which a ratio of medians over other rounds would not survive.
    table = rows(
        [
            contender("slow", 6.0, 6.0, 24.0),
            contender("strong", 3.0, 3.0, 12.0),
            contender("ours", 1.5, 1.0, 4.0, is_ours=True),
        ],
        Work(operations=100.0, bytes=10.0),
        CEILINGS,
        torch.float32,
    )
    assert [(row.contender, row.ratio) for row in table] == [("ours", 3.0), ("strong", 1.0), ("slow", 0.5)]
    assert [row.is_ours for row in table] == [True, False, False]


def test_a_part_of_the_work_is_shown_and_is_no_peer() -> None:
    part = Contender("a part", lambda: None, is_part=True, times_s=[0.5, 0.5])
    table = rows(
        [contender("ours", 1.0, 1.0, is_ours=True), contender("peer", 2.0, 2.0), part],
        Work(100.0, 10.0),
        CEILINGS,
        torch.float32,
    )
    assert {row.contender: row.ratio for row in table} == {"a part": 4.0, "ours": 2.0, "peer": 1.0}
    assert [row.contender for row in table if row.is_part] == ["a part"]


def test_a_timed_call_follows_an_untimed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(10.0, 2.5)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    called: list[int] = []
    warm = Contender("warm", lambda: called.append(1))
    warm.time_once(CPU)
    assert (called, warm.times_s) == ([1, 1], [2.5])


def test_a_row_holds_median_spread_and_share_of_the_ceiling() -> None:
    (row,) = rows(
        [contender("ours", 4.0, 1.0, 2.0, 3.0, 5.0, is_ours=True)], Work(1000.0, 150.0), CEILINGS, torch.float32
    )
    assert (row.median_s, row.spread_s, row.rounds) == (3.0, 2.0, 5)
    assert (row.floor_s, row.bound) == (1.5, "copy")
    assert row.ceiling_share == 0.5
    assert row.ratio is None


def test_one_call_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(10.0, 2.5)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    called: list[int] = []
    assert seconds(lambda: called.append(1), CPU) == 2.5
    assert called == [1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_peak_memory_sees_what_a_call_held_and_gave_back() -> None:
    size = 96 << 20

    def holds_and_frees() -> None:
        torch.ones(size // 2, dtype=torch.uint8)
        torch.ones(size, dtype=torch.uint8)

    held = peak_extra_bytes(holds_and_frees, CPU)
    assert 0.9 * size < held < 1.4 * size
    assert peak_extra_bytes(lambda: None, CPU) < size / 8


def test_every_peer_goes_first_in_its_turn() -> None:
    turns = rotations([contender(name) for name in "abc"])
    orders = ["".join(peer.name for peer in next(turns)) for _ in range(4)]
    assert orders == ["abc", "bca", "cab", "abc"]
    assert list(itertools.islice(rotations([]), 2)) == [[], []]


def test_status_fields_are_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.Path, "read_text", lambda self: "VmHWMx:\t9 kB\nVmHWM:\t  12 kB\n")
    assert measure.status_bytes("VmHWM") == 12 * 1024
