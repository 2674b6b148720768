"""The throughput study: exponents, predictions, turns, kept parts, and a text that follows the figures."""

import copy
import json
import math
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.studies import step_timing, study_run
from benchmarks.studies.shuffle import data as shuffle_data
from benchmarks.studies.step_timing import Contender, PhaseClock, Place, take_turns
from benchmarks.studies.study_run import UNFINISHED, Notebook, Part, Report
from benchmarks.studies.throughput import __main__ as throughput
from benchmarks.studies.throughput import report, scaling, tables
from benchmarks.studies.throughput.scaling import fit_exponent, growth, predict
from benchmarks.training import Shapes, TrainingStep, random_batch

TINY = {
    "src_seq_len": 4,
    "tgt_seq_len": 3,
    "id_category_size": 10,
    "batch_size": 4,
    "model": {"d_model": 8, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1},
}
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_the_fit_recovers_an_exponent(exponent: float) -> None:
    fit = fit_exponent([(size, 3.0 * size**exponent) for size in SIZES])
    assert fit.exponent == pytest.approx(exponent, abs=1e-12)
    assert fit.constant == pytest.approx(3.0)
    assert (fit.least, fit.most) == (1.0, 16.0)
    assert fit.low == pytest.approx(exponent, abs=1e-9)
    assert fit(32.0) == pytest.approx(3.0 * 32.0**exponent)


def test_noise_widens_the_interval_and_shows_in_the_residual() -> None:
    noise = (1.1, 0.9, 1.05, 0.95, 1.0)
    fit = fit_exponent([(size, factor * size) for size, factor in zip(SIZES, noise, strict=True)])
    assert fit.low < 1.0 < fit.high
    # By hand: slopes of the logarithms to base 2, with the residuals' standard error and t(3) = 3.182.
    logs = [math.log(factor) for factor in noise]
    slope = 1 + sum(step * log for step, log in zip((-2, -1, 0, 1, 2), logs, strict=True)) / 10 / math.log(2)
    assert fit.exponent == pytest.approx(slope)
    mean = sum(logs) / 5
    misses = [log - mean - (slope - 1) * math.log(2) * step for step, log in zip((-2, -1, 0, 1, 2), logs, strict=True)]
    error = math.sqrt(sum(miss**2 for miss in misses) / 3 / 10) / math.log(2)
    assert fit.high - fit.exponent == pytest.approx(3.182 * error)
    assert fit.residual == pytest.approx(max(abs(math.exp(miss) - 1) for miss in misses))


def test_two_sizes_have_no_interval_and_one_has_no_exponent() -> None:
    fit = fit_exponent([(2, 1.0), (4, 2.0)])
    assert (fit.low, fit.high) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="points has 1 different sizes; want at least 2"):
        fit_exponent([(2, 1.0), (2, 1.1)])


def test_growth_goes_on_as_the_tail_does() -> None:
    power = growth([(size, size**1.5) for size in SIZES], 2.0, 64.0)
    assert power.seconds == pytest.approx(32**1.5)
    assert (power.low, power.high) == (pytest.approx(power.seconds), pytest.approx(power.seconds))
    # With a part that does not grow, the straight line is right and lies inside the range.
    fixed = growth([(size, 10 + size) for size in SIZES], 1.0, 1024.0)
    assert fixed.seconds == pytest.approx(1034 / 11)
    assert fixed.low < fixed.seconds < fixed.high == pytest.approx(26 * 64 / 11)
    between = growth([(size, size**2) for size in SIZES], 2.0, 3.0)
    assert between.seconds == between.low == between.high == pytest.approx(9 / 4)


def test_noise_is_no_gain_from_growing() -> None:
    grown = growth([(2, 5.8), (4, 5.5), (8, 4.9)], 2.0, 2048.0)
    assert 0 < grown.low <= grown.seconds <= grown.high
    assert grown.seconds == pytest.approx(4.9 / 5.8)


def test_predictions_multiply() -> None:
    twice, thrice = scaling.Prediction(2.0, 1.5, 2.5), scaling.Prediction(3.0, 3.0, 4.0)
    assert predict(10.0, [twice, thrice]) == scaling.Prediction(60.0, 45.0, 100.0)


def test_curves_vary_one_size_around_the_base() -> None:
    base = Shapes.load("gpu_optimized")
    for curve in scaling.curves(base, is_small=False):
        assert curve.shapes[curve.sizes.index(curve.base)] == base, curve.name
        assert list(curve.sizes) == sorted(set(curve.sizes)), curve.name
        assert len(set(map(str, curve.shapes))) == len(curve.sizes) >= 4, curve.name


def test_a_finished_part_is_not_measured_twice(tmp_path: Path) -> None:
    path = tmp_path / "new" / "kept.json"
    assert Notebook(path, {"seed": 0}).part("a", lambda: [1.5]) == [1.5]
    again = Notebook(path, {"seed": 0})
    assert again.num_kept == 1
    assert again.part("a", lambda: pytest.fail("measured twice")) == [1.5]
    other = Notebook(path, {"seed": 1})
    assert other.part("a", lambda: [2.5]) == [2.5]
    other.forget()
    assert not path.exists()
    with pytest.raises(KeyboardInterrupt):
        Notebook(path, {}, deadline_s=0.0).part("a", lambda: pytest.fail("started too late"))


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    options = study_run.parser("throughput", "").parse_args(["--out", str(tmp_path), "--device", "cpu"])
    measured: list[str] = []

    def part(name: str) -> Part:
        def measure() -> str:
            if name == "b" and "b tried" not in measured:
                measured.append("b tried")
                raise KeyboardInterrupt
            measured.append(name)
            return name.upper()

        return Part(name, 1.0, measure)

    def finish(found: dict[str, Any]) -> Report:
        return Report("A study", ["All of it."], [], {"found": dict(found)}, {})

    def go_on() -> int:
        return study_run.run("throughput", options, [], [part(name) for name in "abc"], {}, finish)

    assert go_on() == UNFINISHED
    assert not list(tmp_path.glob("throughput_*.md"))
    assert go_on() == 0
    assert measured == ["a", "b tried", "b", "c"]
    record = json.loads(next(path for path in tmp_path.glob("*.json")).read_text())
    assert record["found"] == {"a": "A", "b": "B", "c": "C"}
    assert not list(tmp_path.glob("*.resume.json"))


def contender(name: str, factor: float = 1.0) -> Contender:
    """A step of a model with one weight, whose loss is the factor."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, batch: Any) -> torch.Tensor:
            return factor * self.weight

    def build(clock: PhaseClock) -> TrainingStep:
        return TrainingStep(Model(), torch.float32, name_range=clock)

    shapes = Shapes.load("cpu_baseline")
    return Contender(name, build, repeat(random_batch(shapes, "cpu")), Place("cpu", "fp32"))


def test_turns_time_every_phase_and_share_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_timing, "BLOCK_S", 1e-4)
    both = [contender("a"), contender("b")]
    take_turns(both, budget_s=0.05)
    for each in both:
        record = each.record()
        assert record["rounds"] == len(both[0].samples) >= step_timing.LEAST_ROUNDS
        assert record["labels"] == 320
        assert record["events_per_s"] == pytest.approx(320 / record["seconds"])
        assert all(record["phases"][name] > 0 for name in step_timing.PHASES)
        for sample in each.samples:
            assert sum(sample.phases.values()) <= sample.seconds
        assert record["energy_note"] == "no NVML"


def test_contenders_that_compute_something_else_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"b and a differ by 0\.01 of their first losses; want at most 0\.0001"):
        take_turns([contender("a"), contender("b", 1.01)], budget_s=0.01)


def test_the_windows_drawn_make_no_row_faster() -> None:
    rows = [
        {"status": "measured", "labels": 10.0, "seconds": 2.0, "events_per_s": 5.0},
        step_timing.not_run("no device"),
        {"status": "measured", "labels": 14.0, "seconds": 4.0, "events_per_s": 3.5},
    ]
    first, missing, second = step_timing.with_equal_labels(rows)
    assert (first["labels"], first["events_per_s"]) == (12.0, 6.0)
    assert (second["labels"], second["events_per_s"]) == (12.0, 3.0)
    assert missing == rows[1]
    assert step_timing.with_equal_labels([missing]) == [missing]


def test_what_runs_out_of_memory_is_a_row_not_run() -> None:
    large = contender("large")

    def build(clock: PhaseClock) -> TrainingStep:
        raise torch.OutOfMemoryError("too large")

    large.build = build
    take_turns([large], budget_s=0.01)
    assert large.record() == {"status": "not run", "reason": "out of memory"}


def test_a_store_with_more_classes_than_the_model_is_refused(tmp_path: Path) -> None:
    store = shuffle_data.make_store(tmp_path, 300, seed=0)
    shapes = step_timing.resized(Shapes.load("cpu_baseline"), num_classes=10, batch_size=1000)
    with pytest.raises(ValueError, match="batch_size is 1000; want at most"):
        step_timing.loader_batches(store, shapes, "cpu")
    batch = next(step_timing.loader_batches(store, step_timing.resized(shapes, batch_size=5), "cpu"))
    assert int(batch.targets.max()) == 9


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a tiny run leaves, the models that it would compile left eager."""
    return json.loads(next(run_tiny(tmp_path_factory.mktemp("tiny")).glob("*.json")).read_text())


def run_tiny(folder: Path) -> Path:
    (folder / "tiny.json").write_text(json.dumps(TINY))
    shuffle_data.make_store(folder, 300, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "QUICK", throughput.Budget(part_s=0.02, curve_s=0.02, step_s=60.0))
        patch.setattr(throughput, "measured_rate", lambda place: 1e12)
        patch.setattr(step_timing, "BLOCK_S", 1e-4)
        patch.setattr(nn.Module, "compile", lambda self, **options: None)
        arguments = ["--quick", "--config", str(folder / "tiny.json"), "--store", str(folder / "store")]
        assert throughput.main([*arguments, "--out", str(folder / "out"), "--device", "auto"]) == 0
    return folder / "out"


def test_a_tiny_run_measures_all_it_can_and_says_what_it_cannot(found: dict[str, Any]) -> None:
    rows = {(row["device"], row["precision"], row["ops"], row["mode"]): row for row in found["sweep"]}
    assert len(rows) == 2 * 2 * 2 + 4 * 2 * 2
    for (device, precision, ops, mode), row in rows.items():
        is_one_compiled = (precision, ops) == ("fp32", "fused")
        if device == "cuda" and not torch.cuda.is_available():
            assert (row["status"], row["reason"]) == ("not run", "torch sees no CUDA device")
        elif device == "cpu" and (mode == "eager" or is_one_compiled):
            assert row["status"] == "measured"
            assert row["mfu"] == pytest.approx(row["operations"] / row["seconds"] / 1e12)
            assert row["tokens"] == 4 * (3 * 4 + 3)
            assert 0 < row["labels"] <= 4 * 3
        elif device == "cpu":
            assert (row["status"], row["reason"]) == ("not run", "--quick compiles one model")
    curves = {name: [row["size"] for row in part] for name, part in found["curves"].items() if "cpu" in name}
    assert curves["cpu tiny batch"] == [2, 4, 8]
    assert all(row["status"] == "measured" for name in curves for row in found["curves"][name])
    assert set(found["fits"]) >= {f"cpu tiny: {name}" for name in ("batch", "sequence length", "classes", "layers")}
    wishes = {row["wish"]: row for row in found["wishes"] if row["device"] == "cpu"}
    assert wishes["batch 512"]["reason"] == "the store has fewer than 512 windows"
    assert wishes["batch 512"]["predicted_s"] > 0
    assert wishes["d_model 128"]["status"] == "measured"


def parts_of(record: dict[str, Any]) -> dict[str, Any]:
    """A record as the report is given it."""
    found = {f"roof {name}": roof for name, roof in record["roofs_flops_per_s"].items()}
    for row in record["sweep"]:
        found.setdefault(f"sweep {row['device']} {row['config']} {row['batch']}", []).append(row)
    found |= {f"curve {name}": part for name, part in record["curves"].items()}
    return found | {f"wish {row['device']} {row['config']} {row['wish']}": row for row in record["wishes"]}


def test_the_conclusion_follows_the_figures(found: dict[str, Any]) -> None:
    parts = parts_of(found)
    assert report.conclusion(parts) == found["conclusion"]
    for row in parts["sweep cpu tiny 4"]:
        row["config"] = "gpu_optimized"
        row |= {"batch": 8, "labels": 2400.0, "operations": 1e11, "tokens": 7200}
        if row["status"] == "measured":
            row |= {"seconds": 2.0, "events_per_s": 1200.0}
    before = report.conclusion(parts)
    text = "\n".join(before)
    assert "the slowest way measured here is 2.4 times faster than 505 events/s" in text
    assert "A step of these shapes is 100 GFLOP; in 4.6 to 4.9 s that is 20.4 to 21.7 GFLOP/s" in text
    assert "neither the arithmetic of the model nor plain operators held it" in text
    slower = copy.deepcopy(parts)
    for row in slower["sweep cpu tiny 4"]:
        if row["status"] == "measured":
            row |= {"seconds": 9.6, "events_per_s": 250.0}
    after = "\n".join(report.conclusion(slower))
    assert "the slowest way measured here is 2 times slower than 505 events/s" in after
    assert "neither the arithmetic" not in after
    steeper = copy.deepcopy(parts)
    for row in steeper["curve cpu tiny batch"]:
        row["seconds"] = row["size"] ** 3
    assert "tiny: batch 3.00 from 2 to 8" in "\n".join(report.conclusion(steeper))


def test_the_readings_are_worked_out_from_the_configurations() -> None:
    told = {reading.words: reading for reading in report.readings()}
    first = told["a predicted event; 8 windows of 300"]
    assert first.events == 2400
    assert first.batch_s == (pytest.approx(2400 / 520), pytest.approx(2400 / 490))
    assert not first.is_consistent
    assert told["an event read or predicted; 8 windows"].events == 8 * (3 * 200 + 300)
    assert [words for words, reading in told.items() if reading.is_consistent] == [
        "a window; 1,024 of them, of the wish list"
    ]
    assert report.Reading("", 980).is_consistent
    assert not report.Reading("", 979).is_consistent
    assert report.Reading("", 1560).is_consistent
    assert not report.Reading("", 1561).is_consistent


def test_rows_not_run_take_one_line_for_each_reason(found: dict[str, Any]) -> None:
    rows = report.sweep_rows(parts_of(found))
    missing = [line for line in tables.missing_table(rows).splitlines() if "torch sees no CUDA device" in line]
    if not torch.cuda.is_available():
        assert [line.split("|")[3].strip() for line in missing] == [
            f"{precision}, reference and fused ops, eager and compiled"
            for precision in ("bf16", "fp16", "fp32", "tf32")
        ]
    measured = [row for row in rows if row["status"] == "measured"]
    assert tables.sweep_table(rows).count("no NVML") == len(measured)
    assert tables.missing_table(measured) == ""


@pytest.mark.parametrize("word", ["tpu", "cpu,gpu"])
def test_unknown_devices_are_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        throughput.main(["--device", word])
    assert "want auto, cpu, cuda or a list of them" in capsys.readouterr().err
