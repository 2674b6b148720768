import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import work
from benchmarks.training import Shapes
from eventkern import hardware, ops
from eventkern.models import EventTransformerConfig
from profiling import roofline_report
from profiling.roofline import Ceilings, Work
from profiling.roofline_cases import Case, Sizes, cases
from profiling.roofline_report import point

CPU = torch.device("cpu")
TINY = EventTransformerConfig(
    ("a", "b"), (40, 7), num_streams=3, src_seq_len=6, tgt_seq_len=5, d_model=16, num_heads=2, encoder_layers=2
)


def test_the_floor_is_the_larger_of_two_times() -> None:
    ceilings = Ceilings(torch.device("cpu"), 100.0, {torch.float32: 1000.0, torch.bfloat16: 4000.0})
    arithmetic = Work(operations=8000.0, bytes=300.0)
    assert (ceilings.floor_s(arithmetic, torch.float32), ceilings.bound(arithmetic, torch.float32)) == (8.0, "gemm")
    assert (ceilings.floor_s(arithmetic, torch.bfloat16), ceilings.bound(arithmetic, torch.bfloat16)) == (3.0, "copy")


def test_each_ceiling_is_measured_once_and_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(hardware, "copy_bandwidth", lambda device: asked.append("copy") or 2.0)
    monkeypatch.setattr(hardware, "gemm_rate", lambda device, dtype: asked.append(dtype) or 5.0)
    ceilings = Ceilings(torch.device("cpu"))
    assert ceilings.to_dict() == {
        "device": "cpu",
        "copy_bytes_per_s": None,
        "read_bytes_per_s": {},
        "gemm_flops_per_s": {},
    }
    monkeypatch.setattr(hardware, "read_bandwidth", lambda size, device: asked.append(size) or 4.0)
    for _ in range(2):
        assert ceilings.floor_s(Work(operations=10.0, bytes=2.0), torch.float32) == 2.0
        assert ceilings.floor_s(Work(0.0, bytes=2.0, cache_bytes=20.0, cache_size=64), torch.float32) == 5.0
        assert ceilings.bound(Work(0.0, bytes=2.0, cache_bytes=20.0, cache_size=64), torch.float32) == "cache"
    assert asked == ["copy", torch.float32, 64]
    assert ceilings.to_dict()["read_bytes_per_s"] == {"64": 4.0}
    assert ceilings.to_dict()["gemm_flops_per_s"] == {"float32": 5.0}


def test_the_highest_ceilings_are_each_the_highest() -> None:
    first = Ceilings(CPU, 10.0, {torch.float32: 5.0}, {64: 7.0, 128: 1.0})
    second = Ceilings(CPU, 20.0, {torch.float32: 4.0, torch.bfloat16: 9.0}, {64: 8.0})
    highest = Ceilings.highest([first, second])
    assert (highest.measured_bandwidth, highest.measured_reads) == (20.0, {64: 8.0, 128: 1.0})
    assert highest.measured_rates == {torch.float32: 5.0, torch.bfloat16: 9.0}
    assert Ceilings.highest([Ceilings(CPU)]).measured_bandwidth is None


def test_work_is_what_torch_counts() -> None:
    """Of the references, whose products FlopCounterMode sees."""
    rows, sizes, dim = 11, (5, 8), 4
    hidden, weight = torch.randn(rows, dim, requires_grad=True), torch.randn(sum(sizes), dim, requires_grad=True)
    targets = torch.zeros(rows, len(sizes), dtype=torch.int64)
    query, key, value = (torch.randn(2, 3, length, dim, requires_grad=True) for length in (6, 9, 9))
    for is_backward in (False, True):
        counter = FlopCounterMode(display=False)
        with ops.use_reference(), counter, torch.set_grad_enabled(is_backward):
            losses = ops.multi_head_cross_entropy(hidden, weight, targets, sizes).sum()
            if is_backward:
                losses.backward()
        counted = work.multi_head_cross_entropy(rows, sizes, dim, torch.float32, 8, is_backward)
        assert counted.operations == counter.get_total_flops()
        num_bytes = hidden.nbytes + weight.nbytes
        assert counted.bytes == (3 if is_backward else 1) * num_bytes + targets.nbytes
        counter = FlopCounterMode(display=False)
        with counter, torch.set_grad_enabled(is_backward):
            # Written out: torch's fused backward makes the scores once more, which is not counted.
            attended = ((query @ key.mT).softmax(-1) @ value).sum()
            if is_backward:
                attended.backward()
        counted = work.attention((2, 3, 6, 9, dim, False), 4, is_backward)
        assert counted.operations == counter.get_total_flops()
    every, seen = (work.attention((1, 1, 8, 8, dim, is_causal), 4, False).operations for is_causal in (False, True))
    assert (seen / every) == pytest.approx(9 / 16)  # of 8 x 8 scores a query sees its own and those before it


def test_what_fits_a_cache_is_held_against_a_cache() -> None:
    small = Case("op", "small", torch.float32, Work(1.0, 3000.0, 5, 500.0, 100), lambda: None)
    assert small.repeated_work == Work(1.0, 0.0, 5, 3500.0, 4096)
    large = Case("op", "large", torch.float32, Work(1.0, 2.0 * work.CACHE_BYTES), lambda: None)
    assert large.repeated_work is large.work
    reused = Case("op", "reused", torch.float32, large.work, lambda: None, touched=5000.0)
    assert reused.repeated_work == Work(1.0, 0.0, 0, 2.0 * work.CACHE_BYTES, 8192)


def test_a_point_under_known_ceilings() -> None:
    ceilings = Ceilings(CPU, 1e9, {torch.float32: 4e9}, {1 << 20: 8e9})
    in_cache = Case("op", "a", torch.float32, Work(operations=2e9, bytes=1e6), lambda: None)
    made = point(in_cache, [1.0, 2.0, 4.0], ceilings)
    assert (made.median_s, made.fastest_s, made.rounds) == (2.0, 1.0, 3)
    assert (made.floor_s, made.bound, made.share, made.intensity) == (0.5, "gemm", 0.25, 2000.0)
    line = [cell.strip() for cell in roofline_report.table([made]).splitlines()[-1].strip("|").split("|")]
    assert line == ["op a", "float32", "2", "1", "2e+03", "2 s", "1 s", "500 ms", "1.0 GFLOP/s", "gemm", "25"]
    words = roofline_report.conclusion([made], ["a reason."])
    assert "at 25 %" in words[0]
    assert words[-1] == "Not run: a reason."


def test_roofs_bend_where_arithmetic_begins_to_bound() -> None:
    across, up = roofline_report._roof(100e9, 20e9, 0.5, 50.0)
    assert (across, up) == ([0.5, 5.0, 50.0], [10.0, 100.0, 100.0])
    assert roofline_report._roof(100e9, 20e9, 8.0, 50.0) == ([8.0, 8.0, 50.0], [100.0, 100.0, 100.0])


@pytest.fixture(scope="module")
def made() -> Iterator[list[Case]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shapes, "load", classmethod(lambda cls, config: Shapes(TINY, 2)))
        with cases(CPU, Sizes(2, 500, 400, 3), ("tiny",)) as made:
            yield made


def test_every_op_and_step_is_there_and_does_its_work(made: list[Case]) -> None:
    assert len({(case.subject, case.name, case.dtype) for case in made}) == len(made) == 2 * 2 * 6 + 2 + 2
    assert {case.subject for case in made} == set(roofline_report.COLOURS)
    for case in made:
        result = case.run()
        tensors = result if isinstance(result, tuple) else (result,)
        is_float = case.dtype.is_floating_point
        if case.subject == "gather":
            assert (result, case.work.events) == (3, 3 * 2 * (3 * 6 + 5 + 1))
        elif case.subject == "permutation":
            assert sorted(result.tolist()) == list(range(500))
        elif case.subject == "training step":
            assert result.shape == (2,)
            assert case.work.events == 2 * 5
        else:
            assert all(tensor.isfinite().all() for tensor in tensors)
            assert len(tensors) == {"multi_embedding": 1, "multi_head_cross_entropy": 2, "attention": 3}[
                case.subject
            ] or ("backward" not in case.name and len(tensors) == 1)
            assert (case.work.operations > 0) == (case.subject != "multi_embedding")
        assert is_float == (case.subject not in ("gather", "permutation"))


def test_the_report_holds_every_case(
    made: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hardware, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(hardware, "gemm_rate", lambda device, dtype: 1e11 * (4 / dtype.itemsize))
    monkeypatch.setattr(hardware, "read_bandwidth", lambda size, device: 1e11)
    monkeypatch.setattr(Shapes, "load", classmethod(lambda cls, config: Shapes(TINY, 2)))
    monkeypatch.setitem(roofline_report.SIZES, ("cpu", True), Sizes(2, 500, 400, 3))
    monkeypatch.setattr(roofline_report, "QUICK_CASE_S", 0.0)
    assert roofline_report.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("roofline_*.json")
    record = json.loads(path.read_text())
    assert record["ceilings"]["gemm_flops_per_s"] == {"float32": 1e11, "bfloat16": 2e11}
    points = record["points"]
    assert len(points) == len(made) + 2  # two configurations
    text = path.with_suffix(".md").read_text()
    for each in points:
        assert each["floor_s"] > 0
        assert each["fastest_s"] <= each["median_s"]
        assert each["rounds"] == roofline_report.NUM_TURNS
        assert each["share_of_roof"] == pytest.approx(each["floor_s"] / each["median_s"])
        assert f"| {each['subject']} {each['name']} " in text
    picture = path.with_name(f"{path.stem}-picture.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.name in text
    shown = capsys.readouterr().out
    assert "arithmetic bounds above 10 operations a byte" in shown
    if not torch.cuda.is_available():
        assert "Not run: CUDA" in text


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        roofline_report.main(["--device", "cuda"])
    assert "sees no CUDA device" in capsys.readouterr().err
