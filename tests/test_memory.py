"""The memory of a step: two ways of counting agree, peaks are those of the history, and the text holds the figures."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measure
from benchmarks.training import Shapes, TrainingStep, random_batch
from eventkern.models import EventTransformer, EventTransformerConfig
from profiling import memory, memory_step
from profiling.memory_step import PHASES, History, record_history, record_kept, static_bytes, system_peaks

SIZES = {"src_seq_len": 4, "tgt_seq_len": 3, "num_streams": 2, "d_model": 8, "num_heads": 2}
SHAPES = Shapes(EventTransformerConfig(("a", "b"), (50, 7), encoder_layers=1, decoder_layers=2, **SIZES), 3)


@pytest.fixture
def step() -> TrainingStep:
    torch.manual_seed(0)
    step = TrainingStep(EventTransformer(SHAPES.model), torch.float32)
    step(random_batch(SHAPES, "cpu"))
    return step


def test_what_the_forward_leaves_is_what_autograd_keeps(step: TrainingStep) -> None:
    batch = random_batch(SHAPES, "cpu")
    history, kept = record_history(step, batch), record_kept(step, batch)
    after_forward = history.held_at(history.phases["forward"][1])
    # The losses themselves are held, too, and kept for nobody.
    assert 0 <= after_forward - kept.num_bytes <= 64
    assert kept.num_bytes == sum(num_bytes for _, _, num_bytes in kept.groups)
    weights = sum(parameter.nbytes for parameter in step.parameters)
    assert history.held_at(history.phases["backward"][1]) == pytest.approx(weights, abs=64)  # the gradients
    assert history.held_at(math.inf) == 0
    assert history.peak_bytes("forward") >= after_forward
    assert history.peak_bytes("backward") >= max(after_forward, weights)
    assert max(history.by_slice(7)) == max(map(history.peak_bytes, PHASES))


def test_a_larger_batch_leaves_as_much_more(step: TrainingStep) -> None:
    batches = [random_batch(Shapes(SHAPES.model, size), "cpu") for size in (4, 8, 12)]
    small, middle, large = (record_kept(step, batch).num_bytes for batch in batches)
    assert 0 < large - middle == middle - small  # some of it is of the weights alone


def test_what_is_held_all_along(step: TrainingStep) -> None:
    batch = random_batch(SHAPES, "cpu")
    num_weights = sum(parameter.numel() for parameter in step.parameters)
    events = 3 * (2 * 4 + 3 + 1)
    assert static_bytes(step, batch) == {
        "weights": 4 * num_weights,
        "moments of Adam": 8 * num_weights,
        "batch": 4 * 2 * events,
    }


def test_peaks_of_a_history() -> None:
    phases = {"forward": (0.0, 2.0), "backward": (3.0, 5.0), "optimizer": (6.0, 8.0)}
    history = History([0.5, 1.0, 1.5, 4.0, 7.0, 7.5], [10.0, 30.0, 20.0, 15.0, 18.0, 0.0], phases)
    assert [history.peak_bytes(phase) for phase in PHASES] == [30.0, 20.0, 18.0]
    assert [history.held_at(time_ms) for time_ms in (0.0, 0.5, 2.9, 6.0, 9.0)] == [0.0, 10.0, 20.0, 15.0, 0.0]
    assert history.by_slice(2) == [30.0, 18.0]


def test_the_resident_set_grows_with_what_a_phase_takes(step: TrainingStep) -> None:
    taken = 48 << 20

    class Greedy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, losses: torch.Tensor) -> torch.Tensor:
            return losses.clone()

        @staticmethod
        def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
            torch.ones(taken // 4)
            return upstream[0]

    model = step.model
    step.model = lambda batch: Greedy.apply(model(batch))
    peaks = system_peaks(step, random_batch(SHAPES, "cpu"), 1)
    if math.isnan(peaks["backward"]):
        pytest.skip("this system does not tell the peak of the resident set")
    assert 0.9 * taken < peaks["backward"] < 1.3 * taken
    assert peaks["forward"] < taken / 2
    assert peaks["optimizer"] < taken / 2


def test_a_system_that_tells_nothing_is_said_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tiny.json"
    model = {"d_model": 8, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    sizes = {"src_seq_len": 4, "tgt_seq_len": 3, "id_category_size": 10, "batch_size": 2}
    config.write_text(json.dumps({**sizes, "model": model}))
    monkeypatch.setattr(memory_step, "reset_peak_resident", lambda: False)
    out = tmp_path / "out"
    assert memory.main(["--config", str(config), "--quick", "--device", "cpu", "--out", str(out)]) == 0
    (path,) = out.glob("memory_*.json")
    record = json.loads(path.read_text())
    assert record["subject"] == "memory"
    (step,) = record["steps"]
    assert step["name"] == "tiny fp32"
    assert all(step["phases"][phase]["system_peak_bytes"] is None for phase in PHASES)
    forward = step["phases"]["forward"]
    assert forward["tensors_peak_bytes"] >= forward["tensors_end_bytes"] >= step["kept_for_backward_bytes"] > 0
    text = path.with_suffix(".md").read_text()
    assert f"| {forward['tensors_peak_bytes'] / 2**20:,.1f} |" in text
    assert "not told" in text
    assert any("the resident set" in line for line in record["not_run"])
    assert any("snapshot" in line for line in record["not_run"]) != torch.cuda.is_available()
    picture = path.with_name(f"{path.stem}-timeline.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.name in text
    assert "not told" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        memory.main(["--device", "cuda"])
    assert "sees no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_the_allocators_agree(tmp_path: Path) -> None:
    config = ["--config", "cpu_baseline.json", "--quick", "--device", "cuda", "--out", str(tmp_path)]
    assert memory.main(config) == 0
    (path,) = tmp_path.glob("memory_*.json")
    (step,) = json.loads(path.read_text())["steps"]
    for phase in PHASES:
        # The caching allocator rounds each block up to 512 bytes.
        told = step["phases"][phase]
        assert told["system_peak_bytes"] == pytest.approx(told["tensors_peak_bytes"], rel=0.1)
    (pickled,) = tmp_path.glob("*.pickle")
    assert pickled.stat().st_size > 1000


def test_the_peak_of_the_resident_set_begins_anew() -> None:
    if not measure.reset_peak_resident():
        pytest.skip("this system does not tell the peak of the resident set")
    torch.ones(16 << 20)
    high = measure.status_bytes("VmHWM")
    assert measure.reset_peak_resident()
    assert measure.status_bytes("VmHWM") < high - (32 << 20)
