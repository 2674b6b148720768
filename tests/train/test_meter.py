"""What the meter counts."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from eventkern import hardware
from eventkern.train import meter as room
from eventkern.train.meter import MEASURED, Meter, memory_bytes, peak_flops_per_s


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def peak(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A peak of 1000 operations a second, and what was asked for."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(room, "peak_flops_per_s", lambda *about: asked.append(about) or 1000.0)
    return asked


class Counted:
    """A model whose batches are their own sizes."""

    def flops(self, batch: int) -> int:
        return 100 * batch

    def tokens(self, batch: int) -> int:
        return 10 * batch


def test_steps_labels_and_waiting(clock: Clock) -> None:
    meter = Meter()
    meter.start()
    for _ in range(4):
        with meter.waiting():
            clock.now_s += 0.25
        clock.now_s += 0.75
        meter.count(torch.tensor(25), [3])
    assert int(meter.num_targets) == 100
    numbers = meter.read(100.0)
    assert numbers.pop("memory_bytes") > 0
    assert numbers == {"step_ms": 1000.0, "events_per_s": 25.0, "data_wait_ms": 250.0, "data_wait_share": 0.25}
    clock.now_s += 7  # an evaluation
    meter.start()
    clock.now_s += 5
    meter.leave_out(3.0)  # a compilation
    meter.count(torch.tensor(7))
    assert int(meter.num_targets) == 7
    numbers = meter.read(7.0)
    assert (numbers["step_ms"], numbers["events_per_s"], numbers["data_wait_share"]) == (2000.0, 3.5, 0.0)


@pytest.mark.parametrize("world_size", [1, 4])
def test_operations_and_tokens_of_all_micro_batches(clock: Clock, peak: list[tuple[Any, ...]], world_size: int) -> None:
    meter = Meter(Counted(), "cpu", "bf16", world_size)
    assert peak == []  # lazily
    for _ in range(2):
        meter.start()
        for batches in ([1, 2], [3]):
            meter.count(torch.tensor(25), batches)
            clock.now_s += 1
        numbers = meter.read(50.0)
        assert (numbers["flops_per_s"], numbers["mfu"]) == (300.0, 0.3)
        assert numbers["tokens_per_s"] == 30.0 * world_size
        assert numbers["events_per_s"] == 25.0  # the labels are those of all ranks
        assert set(numbers) == set(MEASURED)
    assert peak == [(torch.device("cpu"), "bf16", torch.get_num_threads())]  # once


def test_the_peak_is_measured_before_the_clock_starts(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: Any) -> float:
        clock.now_s += 50
        return 1000.0

    monkeypatch.setattr(room, "peak_flops_per_s", measure)
    meter = Meter(Counted())
    meter.start()
    clock.now_s += 1
    meter.count(torch.tensor(25), [1])
    assert meter.read(25.0)["step_ms"] == 1000.0


def test_a_model_that_counts_nothing_has_no_mfu(tiny: Any, peak: list[tuple[Any, ...]]) -> None:
    meter = Meter(tiny.Model())
    meter.start()
    meter.count(torch.tensor(25), [object()])
    assert set(MEASURED) - set(meter.read(25.0)) == {"tokens_per_s", "flops_per_s", "mfu"}
    assert peak == []


def test_the_peak_is_measured_once_for_device_precision_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    state = torch.get_rng_state()
    monkeypatch.setitem(hardware.GEMM_SIZE, "cpu", 32)
    real = hardware.gemm_rate

    def rate(device: torch.device, dtype: torch.dtype, *, budget_s: float) -> float:
        calls.append(dtype)
        return real(device, dtype, budget_s=0)

    monkeypatch.setattr(hardware, "gemm_rate", rate)
    peak_flops_per_s.cache_clear()
    cpu = torch.device("cpu")
    first = peak_flops_per_s(cpu, "fp32", 1)
    assert peak_flops_per_s(cpu, "fp32", 1) == first
    for precision, threads in (("bf16", 1), ("fp16", 1), ("fp32", 2), ("tf32", 2)):  # tf32 is not fp32's
        peak_flops_per_s(cpu, precision, threads)
    peak_flops_per_s.cache_clear()
    assert calls == [torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.float32]
    assert torch.equal(torch.get_rng_state(), state)  # or a resumed run were another


def test_memory_of_the_process_grows_with_what_it_holds() -> None:
    before = memory_bytes(torch.device("cpu"))
    held = torch.ones(64 << 20, dtype=torch.uint8)
    grown = memory_bytes(torch.device("cpu")) - before
    assert 32 << 20 <= grown <= 512 << 20
    assert int(held[0]) == 1


@pytest.mark.gpu
def test_memory_of_a_gpu_is_the_most_that_tensors_took() -> None:
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = memory_bytes(device)
    del_me = torch.ones(64 << 20, dtype=torch.uint8, device=device)
    assert memory_bytes(device) - before == 64 << 20
    del del_me
    assert memory_bytes(device) - before == 64 << 20
