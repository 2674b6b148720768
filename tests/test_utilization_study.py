"""The utilisation study: idle time is shared out whole, plain windows are the loader's, texts follow the figures."""

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.studies import step_timing
from benchmarks.studies.shuffle import data as shuffle_data
from benchmarks.studies.step_timing import Place
from benchmarks.studies.study_run import parser
from benchmarks.studies.utilization import __main__ as utilization
from benchmarks.studies.utilization import data, report
from benchmarks.studies.utilization.trace import Moment, account, merged, minus, shared_out
from benchmarks.training import Shapes
from eventkern.data import EventLoader, EventStore

TINY = {
    "src_seq_len": 4,
    "tgt_seq_len": 3,
    "id_category_size": 10,
    "batch_size": 4,
    "model": {"d_model": 8, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("study")
    (made / "tiny.json").write_text(json.dumps(TINY))
    shuffle_data.make_store(made, 300, seed=0)
    return made


@pytest.fixture(scope="module")
def store(folder: Path) -> EventStore:
    return EventStore.open(folder / "store")


def test_intervals_are_joined_and_taken_away() -> None:
    assert merged([(4, 6), (0, 2), (1, 3), (5, 5), (6, 7)]) == [(0, 3), (4, 7)]
    assert minus([(0, 10)], [(2, 3), (5, 6)]) == [(0, 2), (3, 5), (6, 10)]
    assert minus([(0, 4), (6, 8)], [(-1, 1), (3, 7)]) == [(1, 3), (7, 8)]
    assert minus([(0, 4)], [(0, 4)]) == []
    assert minus([(0, 1), (2, 3)], [(0, 3)]) == []


def test_interval_arithmetic_agrees_with_counting() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        ticks = np.zeros((2, 40), bool)
        both = []
        for side in (0, 1):
            starts = generator.integers(0, 39, 6)
            both.append(merged([(start, start + generator.integers(0, 40 - start)) for start in starts.tolist()]))
            for start, end in both[side]:
                ticks[side, start:end] = True
        left = np.zeros(40, bool)
        for start, end in minus(both[0], both[1]):
            assert not left[start:end].any()
            left[start:end] = True
        assert np.array_equal(left, ticks[0] & ~ticks[1])


def test_every_idle_moment_goes_to_the_first_cause() -> None:
    causes = {"sync": [(1.0, 3.0)], "data": [(2.0, 5.0)], "forward": [(4.0, 9.0)]}
    shared = shared_out((0.0, 12.0), [(2.5, 4.5), (8.0, 10.0)], causes)
    assert shared == {"sync": 1.5, "data": 0.5, "forward": 3.0, "other": 3.0}
    assert sum(shared.values()) == 12.0 - 4.0


def moment(name: str, start: float, end: float, **where: bool) -> Moment:
    return Moment(name, start, end, where.pop("is_on_device", False), **where)


PHASES = [
    moment("data", 0, 1_000),
    moment("forward", 1_000, 4_000),
    moment("backward", 4_000, 8_000),
    moment("optimizer", 8_000, 10_000),
]


def test_a_step_on_a_cpu_is_accounted_for() -> None:
    seen = [
        *PHASES,
        moment("aten::addmm", 1_000, 2_000),
        moment("aten::copy_", 1_200, 1_300, is_nested=True),
        moment("aten::item", 2_000, 2_500),
        moment("aten::empty", 2_500, 2_600),
        moment("AddmmBackward0", 4_000, 7_000),
        moment("eventkern::attention_backward", 4_500, 7_000),
        moment("aten::_fused_adamw_", 8_000, 9_500),
    ]
    told = account(seen, 2, "cpu")
    assert told["span_ms"] == 5.0
    assert told["busy_ms"] == 2.5
    assert told["busy_share"] == 0.5
    assert (told["kernels"], told["operators"], told["launches"], told["syncs"]) == (1.5, 3.0, 0.0, 0.5)
    gaps = {"sync": 0.25, "allocator": 0.05, "data": 0.5, "optimizer": 0.25, "forward": 0.7, "backward": 0.75}
    assert told["gaps_ms"] == pytest.approx(gaps | {"other": 0.0})
    assert sum(told["gaps_ms"].values()) + told["busy_ms"] == pytest.approx(told["span_ms"])
    assert next(iter(told["top_ms"])) == "eventkern::attention_backward"


def test_a_step_on_a_gpu_is_busy_with_kernels_and_waits_for_the_host() -> None:
    seen = [
        *PHASES,
        moment("cudaLaunchKernel", 1_500, 1_510),
        moment("kernel", 2_000, 3_000, is_on_device=True),
        moment("kernel", 2_500, 4_500, is_on_device=True),
        moment("cudaStreamSynchronize", 8_500, 9_000),
        moment("kernel", 9_500, 10_500, is_on_device=True),
    ]
    told = account(seen, 1, "cuda")
    assert told["span_ms"] == 10.5
    assert told["busy_ms"] == 3.5
    assert (told["kernels"], told["launches"], told["syncs"]) == (3, 1, 1)
    gaps = {"sync": 0.5, "allocator": 0.0, "data": 1.0, "optimizer": 1.0, "forward": 1.0, "backward": 3.5}
    assert told["gaps_ms"] == pytest.approx(gaps | {"other": 0.0})


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_plain_windows_are_those_of_the_loader(kind: str, folder: Path, store: EventStore, tmp_path: Path) -> None:
    shapes = Shapes.load(folder / "tiny.json")
    fetch = data.from_memory(store)
    if kind == "files":
        paths, rows_per_file = data.write_parts(store, tmp_path / "files")
        assert len(paths) > 1
        files = shuffle_data.parquet_files(paths, rows_per_file, store.num_events, shuffle_data.ARRAY)
        fetch = data.from_files(files)
    windows = data.Windows(store, shapes, fetch)
    sizes = {"src_seq_len": 4, "tgt_seq_len": 3, "id_category_size": 10}
    loader = EventLoader(store, "train", **sizes, batch_size=16, shuffle=False)
    assert len(windows) == loader.num_samples > 100
    start = 0
    for batch in loader:
        ours = data.collated([windows[number] for number in range(start, start + len(batch.sources))])
        assert torch.equal(ours.sources, batch.sources)
        assert torch.equal(ours.targets, batch.targets)
        assert int(ours.num_targets) == int(batch.num_targets)
        start += len(batch.sources)
    assert start == len(windows)


@pytest.mark.parametrize("is_our_order", [False, True])
def test_plain_loaders_visit_other_windows_each_epoch_and_never_end(
    is_our_order: bool, folder: Path, store: EventStore
) -> None:
    windows = data.Windows(store, Shapes.load(folder / "tiny.json"), data.from_memory(store))
    per_epoch = len(windows) // 4
    running = data.loader_batches(windows, 4, "cpu", is_our_order=is_our_order)
    epochs = [[next(running).targets for _ in range(per_epoch)] for _ in range(2)]
    assert not torch.equal(epochs[0][0], epochs[1][0])
    everything = torch.stack([windows[number][1] for number in range(len(windows))]).flatten(1).unique(dim=0)
    for epoch in epochs:
        seen = torch.cat(epoch).flatten(1)
        assert len(seen) == 4 * per_epoch
        # All but the windows that no full batch takes, equal ones counted once.
        assert len(everything) - 3 <= len(seen.unique(dim=0)) <= len(everything)


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    """What a tiny run leaves, the model that it would compile left eager."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utilization, "QUICK", utilization.Budget(part_s=0.02, profiled_steps=1))
        patch.setattr(step_timing, "BLOCK_S", 1e-4)
        patch.setattr(nn.Module, "compile", lambda self, **options: None)
        arguments = ["--quick", "--config", str(folder / "tiny.json"), "--store", str(folder / "store")]
        assert utilization.main([*arguments, "--out", str(folder / "out")]) == 0
    return json.loads(next((folder / "out").glob("*.json")).read_text())


def test_a_tiny_run_climbs_the_ladder(record: dict[str, Any]) -> None:
    rows = {row["feature"]: row for row in record["ladders"]["cpu tiny"]}
    assert list(rows) == list(report.FEATURES)
    assert rows.pop(report.GRAPHS) == {
        "feature": report.GRAPHS,
        "status": "not run",
        "reason": "CUDA graphs need a GPU",
    }
    for row in rows.values():
        seen = row["profile"]
        assert 0 < seen["busy_share"] < 1
        assert seen["busy_ms"] + sum(seen["gaps_ms"].values()) == pytest.approx(seen["span_ms"])
    plain, ours = rows[report.LOADER]["profile"], rows[report.OPS]["profile"]
    assert plain["kernels"] > 2 * ours["kernels"] > 100
    steps = list(rows.values())
    for before, after in pairwise(steps):
        told = record["ratios"]["cpu tiny"][after["feature"]]
        assert told == pytest.approx(after["events_per_s"] / before["events_per_s"])
    if not torch.cuda.is_available():
        missing = record["ladders"]["cuda tiny"]
        assert {row["reason"] for row in missing} == {"torch sees no CUDA device"}
    assert [row["loader"] for row in record["loaders"]["cpu tiny"]] == list(report.LOADERS)
    assert all(row["status"] == "measured" for row in record["dispatch"]["cpu tiny"])


def parts_of(record: dict[str, Any]) -> dict[str, Any]:
    """A record as the report is given it."""
    kinds = {"loaders": "loaders", "dispatch": "dispatch", "ladder": "ladders"}
    return {f"{kind} {where}": part for kind, key in kinds.items() for where, part in record[key].items()}


def test_the_conclusion_follows_the_figures(record: dict[str, Any]) -> None:
    found = copy.deepcopy(parts_of(record))
    assert report.conclusion(found) == record["conclusion"]
    found = {name.replace("tiny", "gpu_optimized"): part for name, part in found.items()}
    rates = (100.0, 300.0, 300.0, 330.0, 660.0, 1320.0, 1980.0)
    for row, rate in zip(found["ladder cpu gpu_optimized"], rates, strict=False):
        row |= {"events_per_s": rate, "labels": 2400.0, "seconds": 2400 / rate, "spread_s": 0.0}
    for row, window_s in zip(found["loaders cpu gpu_optimized"], (0.3, 0.001, 0.001, 0.0001), strict=True):
        row |= {"window_s": window_s, "windows_per_batch": 8}
    for row, seconds in zip(found["dispatch cpu gpu_optimized"], (0.024, 0.012, 0.012), strict=True):
        row["seconds"] = seconds
    for row, wait_s in zip(found["ladder cpu gpu_optimized"], (2.4, 0.008, 0.006, 0.001), strict=False):
        row["phases"]["data"] = wait_s
    text = "\n".join(report.conclusion(found))
    assert f"2.4 s with {report.FILES} and 8 ms with {report.MEMORY} and 6 ms with {report.ORDER} and 1 ms" in text
    assert "from 100 events/s" in text
    assert "to 1,980, 19.8 times as many" in text
    assert f"{report.ORDER} 1.00x; {report.LOADER} 1.10x; {report.MODEL} 2.00x" in text
    assert f"Most came with: {report.MEMORY}." in text
    assert "could not pass 100,000 and 200,000 events/s" in text
    assert "launching operators cannot be what held the notes' run" in text
    assert "300 ms row by row from Parquet files (inside that range)" in text
    found["loaders cpu gpu_optimized"][0]["window_s"] = 0.03
    found["dispatch cpu gpu_optimized"][0]["seconds"] = 4.0
    found["ladder cpu gpu_optimized"][6]["events_per_s"] = 13_200.0
    found["ladder cpu gpu_optimized"][3]["spread_s"] = 1.0
    text = "\n".join(report.conclusion(found))
    assert "30 ms row by row from Parquet files (below that range, which is 8 to 18 times as much)" in text
    assert "launching operators can by itself explain the notes' rate" in text
    assert f"Most came with: {report.COMPILED}." in text
    assert f"{report.ORDER} 1.00x; {report.LOADER} 1.10x (within the spread); {report.MODEL} 2.00x;" in text


def test_models_that_compute_something_else_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = parser("utilization", "").parse_args(["--config", str(folder / "tiny.json")])
    study = utilization.Study(options, tmp_path)
    shapes, place = study.shapes["tiny"], Place("cpu", "fp32")
    study.check(shapes, place)
    right = study.model

    def wrong(shapes: Shapes, place: Place, feature: str) -> nn.Module:
        model = right(shapes, place, feature)
        if feature == report.MODEL:
            with torch.no_grad():
                model.heads.bias[0] += 0.1  # type: ignore[union-attr, operator]
        return model

    monkeypatch.setattr(study, "model", wrong)
    with pytest.raises(RuntimeError, match="the losses of 'EventTransformer on reference ops' and 'fused ops' differ"):
        study.check(shapes, place)
