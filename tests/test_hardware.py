import time

import pytest
import torch

from eventkern import hardware


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes a busy machine gets through in milliseconds."""
    monkeypatch.setitem(hardware.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(hardware.GEMM_SIZE, "cpu", 64)


class Clock:
    """A clock that a piece of work moves on by the next of the given durations."""

    def __init__(self, *durations_s: float) -> None:
        self.durations_s = list(durations_s)
        self.now_s = 100.0
        self.calls = 0

    def read(self) -> float:
        return self.now_s

    def work(self) -> None:
        self.calls += 1
        self.now_s += self.durations_s.pop(0)


def test_fastest_leaves_the_warm_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.125, 4.0, 1.0, 2.0)
    monkeypatch.setattr(time, "perf_counter", clock.read)
    assert hardware.fastest_s(clock.work, torch.device("cpu"), budget_s=0) == 1.0
    assert clock.calls == 4


def test_fastest_spends_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(9.0, *[1.0] * 9, 0.5)
    monkeypatch.setattr(time, "perf_counter", clock.read)
    assert hardware.fastest_s(clock.work, torch.device("cpu"), budget_s=9.5) == 0.5
    assert clock.calls == 11


@pytest.mark.usefixtures("small")
def test_copy_counts_bytes_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "fastest_s", lambda work, device, budget_s: (work(), 0.5)[1])
    assert hardware.copy_bandwidth() == 2 * (1 << 20) / 0.5


def test_reads_count_the_bytes_that_all_threads_share(monkeypatch: pytest.MonkeyPatch) -> None:
    summed: list[float] = []

    def timed(work, device, budget_s):
        summed.append(work().item())
        return 0.5

    monkeypatch.setattr(hardware, "fastest_s", timed)
    assert hardware.read_bandwidth(4096) == 4096 / 0.5
    assert summed == [1024]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemm_counts_a_multiply_and_an_add_each(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    products: list[object] = []

    def timed(work, device, budget_s):
        products.append(work())
        return 0.25

    monkeypatch.setattr(hardware, "fastest_s", timed)
    assert hardware.gemm_rate("cpu", dtype) == 2 * 64**3 / 0.25
    assert isinstance(products[0], torch.Tensor)
    assert products[0].dtype == dtype
    assert products[0].abs().max() > 0


@pytest.mark.usefixtures("small")
def test_measured_rates_are_of_this_world() -> None:
    assert 1e7 < hardware.copy_bandwidth(budget_s=0) < 1e14
    assert 1e6 < hardware.gemm_rate(budget_s=0) < 1e16


def test_cores_and_names() -> None:
    assert hardware.usable_cores() >= 1
    assert hardware.cpu_model() == hardware.cpu_model().strip() != ""
    assert hardware.instruction_set() == torch.backends.cpu.get_cpu_capability()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_on_a_gpu(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert hardware.copy_bandwidth("cuda", budget_s=0) > 1e10
    assert hardware.gemm_rate("cuda", dtype, budget_s=0) > 1e11
