"""The shuffle study: everybody visits everything, reads are as theory has them, and the text follows the figures."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.studies.shuffle import __main__ as shuffle
from benchmarks.studies.shuffle import data as shuffle_data
from benchmarks.studies.shuffle import ladder as shuffle_ladder
from benchmarks.studies.shuffle import report as shuffle_report
from benchmarks.studies.shuffle import timing as shuffle_timing
from benchmarks.studies.shuffle.data import NUM_CATEGORIES, PARSERS, Parts
from benchmarks.studies.shuffle.ladder import ALONE, BASE, FETCH, LARGE_FETCH, ORDER, STORAGE, Layout, judge, ladder
from benchmarks.studies.shuffle.layers import (
    IN_ORDER,
    NUM_WORKERS,
    PARQUET,
    SHUFFLED,
    fetch_layer,
    order_layer,
    storage_layer,
    worker_layer,
    worker_name,
)
from benchmarks.studies.shuffle.timing import Contender, Figure, Pass, Timing, measure, time_pass
from eventkern.data import EventStore

NUM_EVENTS = 300
ROWS_PER_FILE = 64

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def store(folder: Path) -> EventStore:
    return shuffle_data.make_store(folder, NUM_EVENTS, seed=0)


@pytest.fixture(scope="module")
def paths(store: EventStore, folder: Path) -> list[Path]:
    return shuffle_data.write_files(store.codes, folder / "parts", ROWS_PER_FILE)


def rows_of(batches: Iterator[Any]) -> NDArray[np.int64]:
    """All rows of an epoch, whether a batch is a tensor or a list of items."""
    rows = []
    for batch in batches:
        items = (
            batch
            if isinstance(batch, torch.Tensor)
            else [item[0] if isinstance(item, tuple) else item for item in batch]
        )
        rows += [torch.as_tensor(item).numpy().astype(np.int64) for item in items]
    return np.stack(rows)


def in_a_fixed_order(rows: NDArray[Any]) -> NDArray[Any]:
    return rows[np.lexsort(rows.T)]


def all_contenders(store: EventStore, folder: Path, paths: list[Path]) -> list[Contender]:
    parser = PARSERS["pandas frame, a row by iloc"]
    files = shuffle_data.parquet_files(paths, ROWS_PER_FILE, NUM_EVENTS, parser)
    rowwise = fetch_layer(store, 0)[:-1]  # the last one gives windows
    return [
        *rowwise,
        *storage_layer(store, folder, files, parser, 0, pass_s=60),
        *worker_layer(store, files, 0, pass_s=60),
        *ladder(store, files, 0, pass_s=60),
    ]


def test_every_contender_brings_every_row_once(store: EventStore, folder: Path, paths: list[Path]) -> None:
    codes = np.asarray(store.codes, np.int64)
    assert len(np.unique(codes, axis=0)) == NUM_EVENTS
    for contender in all_contenders(store, folder, paths):
        assert np.array_equal(rows_of(contender.passes[IN_ORDER].epochs()), codes), contender.name
        shuffled = rows_of(contender.passes[SHUFFLED].epochs())
        assert not np.array_equal(shuffled, codes), contender.name
        assert np.array_equal(in_a_fixed_order(shuffled), in_a_fixed_order(codes)), contender.name


def test_every_order_visits_every_index_once() -> None:
    for contender in order_layer(NUM_EVENTS, 0):
        for order, each in contender.passes.items():
            indices = np.concatenate([np.asarray(batch) for batch in each.epochs()])
            assert np.array_equal(np.sort(indices), np.arange(NUM_EVENTS)), contender.name
            assert np.array_equal(indices, np.arange(NUM_EVENTS)) == (order == IN_ORDER), contender.name


@pytest.mark.parametrize("parser", PARSERS.values(), ids=lambda parser: parser.name)
def test_parsers_read_the_rows_of_the_store(store: EventStore, paths: list[Path], parser) -> None:
    files = shuffle_data.parquet_files(paths, ROWS_PER_FILE, NUM_EVENTS, parser)
    for index in (0, 1, ROWS_PER_FILE - 1, ROWS_PER_FILE, NUM_EVENTS - 1):
        item = files[index]
        assert item.dtype == torch.int32
        if parser.is_row:
            assert np.array_equal(item, store.codes[index])
        else:  # a file of fewer rows than a window fits in it whole
            start = index // ROWS_PER_FILE * ROWS_PER_FILE
            held = store.codes[start : start + ROWS_PER_FILE]
            assert item.shape == (shuffle_data.WINDOW_ROWS, NUM_CATEGORIES)
            assert np.array_equal(item[: len(held)], held)
            assert not item[len(held) :].any()


def parts_of(num_events: int, rows_per_part: int, **options: Any) -> Parts:
    """Parts that hold their own row numbers."""
    return Parts(
        lambda number: number * rows_per_part, rows_per_part, num_events, lambda part, row: part + row, **options
    )


def test_a_cache_of_one_reads_what_theory_says() -> None:
    parts = parts_of(10_000, 500)
    assert [parts[index] for index in range(10_000)] == list(range(10_000))
    assert parts.num_loads == parts.num_parts == 20

    order = np.random.default_rng(0).permutation(10_000)[:2_000]
    before = parts.num_loads
    parts.forget()
    for index in order.tolist():
        parts[index]
    expected = shuffle_data.expected_loads(parts, 2_000)
    assert expected == pytest.approx(2_000 * (1 - 1 / 20), rel=1e-3)
    assert abs(parts.num_loads - before - expected) < 5 * math.sqrt(2_000 * 0.05 * 0.95)

    uncached = parts_of(10_000, 500, is_cached=False)
    assert [uncached[3], uncached[3]] == [3, 3]
    assert uncached.num_loads == shuffle_data.expected_loads(uncached, 2) == 2
    single = parts_of(500, 500)
    assert [single[index] for index in (400, 3, 77)] == [400, 3, 77]
    assert single.num_loads == shuffle_data.expected_loads(single, 3) == 1


def test_a_batch_is_read_file_by_file() -> None:
    parts = shuffle_data.BatchedParts(lambda number: number * 10, 10, 100, lambda part, row: part + row)
    indices = [95, 3, 94, 41, 4, 99]
    assert parts.__getitems__(indices) == indices
    assert parts.num_loads == 3


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(shuffle_timing.time, "perf_counter", lambda: self.now_s)

    def epoch(self, num_samples: int, batch_size: int, item_s: float, start_s: float = 0.0) -> Iterator[range]:
        self.now_s += start_s
        for start in range(0, num_samples, batch_size):
            batch = range(start, min(start + batch_size, num_samples))
            self.now_s += item_s * len(batch)
            yield batch


def test_a_cut_pass_counts_its_start_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    each = Pass(lambda: clock.epoch(10_000, 10, 0.01, start_s=5.0), 10_000)
    cut = time_pass(each, budget_s=7.0)
    assert 700 < cut.num_timed <= 750  # the budget begins after the first batch
    assert cut.seconds == pytest.approx(5 + 100)
    assert cut.first_s == pytest.approx(5.1)
    whole = time_pass(each, budget_s=1_000)
    assert whole.num_timed == 10_000
    assert whole.seconds == pytest.approx(105)


def test_a_pass_that_must_be_whole_is_not_cut_and_stands_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    timing = time_pass(Pass(lambda: clock.epoch(100, 10, 0.1), 100, stands_for=1_000, is_whole=True), budget_s=0.5)
    assert timing.num_timed == 100
    assert timing.seconds == pytest.approx(100)


def test_an_epoch_of_another_length_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    for length in (90, 110):
        with pytest.raises(RuntimeError, match="an epoch of 100 samples brought"):
            time_pass(Pass(lambda length=length: clock.epoch(length, 10, 0.1), 100), budget_s=1_000)


def test_rounds_interleave_and_stop_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    seen = []

    def named(name: str) -> Pass:
        def epoch() -> Iterator[range]:
            seen.append(name)
            return clock.epoch(10, 5, 0.1)

        return Pass(epoch, 10)

    contenders = [Contender(name, {IN_ORDER: named(f"{name} in order"), SHUFFLED: named(name)}, 5) for name in "ab"]
    figures = measure("order", 10, contenders, pass_s=10, layer_s=9)
    assert seen == ["a in order", "a", "b in order", "b"] * 2
    assert [len(figure.timings) for figure in figures] == [2] * 4
    assert {figure.seconds for figure in figures} == {1.0}


def figures_of(seconds: dict[str, tuple[float, float]]) -> list[Figure]:
    """A ladder with the given seconds in order and shuffled."""
    figures = []
    for name, both in seconds.items():
        for order, value, num_loads in zip((IN_ORDER, SHUFFLED), both, (10, 900), strict=True):
            timing = Timing(value, 0.0, 1_000, num_loads, load_s=0.1 * num_loads)
            figures.append(Figure("ladder", name, 1_000, order, 1_000, 32, timings=[timing]))
    return figures


@pytest.mark.parametrize("culprit", [ORDER, FETCH, STORAGE])
def test_the_verdict_follows_the_figures(culprit: str) -> None:
    seconds = {BASE: (1.0, 141.0), **dict.fromkeys(ALONE.values(), (1.0, 131.0))}
    seconds[ALONE[culprit]] = (0.5, 7.5)
    verdict = judge(figures_of(seconds), 1_000)
    assert verdict.culprit == culprit
    assert verdict.base_ratio == 141
    assert verdict.removed[culprit] == pytest.approx(0.95)
    assert verdict.removed_range[culprit] == pytest.approx((0.95, 0.95))
    assert verdict.read_share == pytest.approx(890 * 0.1 / 140)
    assert f"the layer that carries the ratio is **{culprit}**" in judged_in_words(seconds)


def test_rounds_are_compared_with_their_own() -> None:
    figures = figures_of({BASE: (1.0, 101.0), **dict.fromkeys(ALONE.values(), (1.0, 51.0))})
    # A second round in which everything takes ten times as long, and a third in which the storage alone does.
    for factor, storage_s in ((10, 500.0), (1, 80.0)):
        for figure in figures:
            first = figure.timings[0]
            seconds = storage_s + factor if figure.contender == ALONE[STORAGE] else factor * first.seconds
            seconds = factor if figure.order == IN_ORDER else seconds
            figure.timings.append(Timing(seconds, 0.0, 1_000, first.num_loads, first.load_s))
    verdict = judge(figures, 1_000)
    assert verdict.removed == pytest.approx({ORDER: 0.5, FETCH: 0.5, STORAGE: 0.5})
    assert verdict.removed_range[ORDER] == pytest.approx((0.5, 0.5))
    assert verdict.removed_range[STORAGE] == pytest.approx((0.2, 0.5))


def test_no_layer_is_blamed_for_what_it_does_not_carry() -> None:
    shared = {BASE: (1.0, 141.0), **dict.fromkeys(ALONE.values(), (1.0, 90.0))}
    assert judge(figures_of(shared), 1_000).culprit is None
    free = {BASE: (1.0, 1.1), **dict.fromkeys(ALONE.values(), (1.0, 1.0))}
    assert judge(figures_of(free), 1_000).culprit is None
    assert "several of them carry the ratio together" in judged_in_words(shared)
    assert "no layer is to blame" in judged_in_words(free)


def judged_in_words(seconds: dict[str, tuple[float, float]]) -> str:
    """What the study says of a ladder with these seconds."""
    figures = figures_of({**seconds, LARGE_FETCH: (1.0, 2.0)})
    workers = figures_of({worker_name(PARQUET, NUM_WORKERS): (1.0, 2.0)})
    for figure in workers:
        figure.layer = "workers"
    base = Layout("parser", 9, 112, 0.1, 1.0, 0.5, 141.0, 1_000, is_row=True)
    text = shuffle_report.culprit_text(figures + workers, base, judge(figures, 1_000))
    assert f"{seconds[BASE][1]:.3g} s shuffled" in text
    return text


def layout(num_files: int, ratio: float, load_s: float = 0.01) -> Layout:
    return Layout("parser", num_files, 9_000 // num_files, load_s, 1.0, 0.5, ratio, 9_000, is_row=True)


def test_layouts_find_where_the_ratio_passes_140() -> None:
    layouts = [layout(9, 560.0), layout(36, 35.0), layout(90, 20.0)]
    assert shuffle_ladder.crossings(layouts)["parser"] == pytest.approx(18)  # halfway, both on a logarithmic scale
    assert shuffle_ladder.crossings(layouts[1:])["parser"] is None
    assert shuffle_ladder.nearest([layout(9, 300.0), layout(30, 100.0)]).num_files == 30
    each = layouts[0]
    item_s = each.noted_item_s
    shuffled_s, in_order_s = item_s + each.load_s * 8 / 9, item_s + each.load_s / 1_000
    assert shuffled_s / in_order_s == pytest.approx(140)
    assert each.item_s == pytest.approx(0.5 / 9_000)
    assert layout(90, 20.0).noted_item_s < 0  # 100 rows a file: a read for each costs at most 100 times


def test_the_page_cache_is_seen_and_dropped(store: EventStore, tmp_path: Path) -> None:
    store.rows(torch.arange(NUM_EVENTS))
    before = shuffle_data.resident_share(store.codes)
    if math.isnan(before):
        pytest.skip("this system has no mincore")
    assert before == 1
    unmapped = tmp_path / "copy"
    unmapped.write_bytes((store.path / "store.bin").read_bytes())
    with unmapped.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if shuffle_data.resident_share(np.memmap(unmapped, np.uint8, "r")) > 0:
        pytest.skip("this file system keeps its pages")
    # The store's pages are mapped as well, and go all the same.
    assert shuffle_data.drop_from_cache(store.path / "store.bin", store.codes) == 0
    assert shuffle_data.resident_share(store.codes) == 0
    rows = store.rows(torch.arange(NUM_EVENTS))
    assert shuffle_data.resident_share(store.codes) == 1
    assert np.array_equal(rows, store.codes)


def test_the_study_is_consistent_with_itself(tmp_path: Path) -> None:
    out, work = tmp_path / "results", tmp_path / "work"
    work.mkdir()
    arguments = ["--events", "500", "1500", "--files", "3", "30", "--pass-seconds", "0.01"]
    assert shuffle.main([*arguments, "--out", str(out), "--work-dir", str(work)]) == 0
    assert not list(work.iterdir())

    (path,) = out.glob("shuffle_*.json")
    record = json.loads(path.read_text())
    figures = record["figures"]
    seen = {(figure["layer"], figure["num_events"]) for figure in figures}
    assert seen >= {(layer, n) for layer in ("order", "fetch", "storage", "workers", "ladder") for n in (500, 1500)}
    for figure in figures:
        assert figure["fastest_s"] <= figure["seconds"] <= figure["slowest_s"]
        assert figure["is_extrapolated"] == (figure["samples_timed"] < figure["num_samples"])
        for timing in figure["timings"]:
            if timing["expected_loads"] is None:
                continue
            assert 0 < timing["load_s"] < 60
            off = abs(timing["num_loads"] - timing["expected_loads"])
            is_random = figure["order"] == SHUFFLED and "row group" not in figure["contender"]
            assert off <= (5 * math.sqrt(timing["num_timed"] / 3) if is_random else 0), figure
    # What theory expects of a whole in-order pass, and that it was seen.
    one_file = [each for each in figures if "30 files" in each["contender"] and each["order"] == IN_ORDER]
    assert one_file
    assert all(each["timings"][0]["num_loads"] * 50 == each["timings"][0]["num_timed"] for each in one_file)

    text = path.with_suffix(".md").read_text()
    verdict = record["verdicts"]["1500"]
    assert (f"**{verdict['culprit']}**" in text) == (verdict["culprit"] is not None)
    assert all(title in text for layer, title in shuffle_report.TITLES.items() if layer != "cold")
    picture = path.with_name(f"{path.stem}-layers.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"]({picture.name})" in text


def test_an_interrupted_study_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, work = tmp_path / "results", tmp_path / "work"
    work.mkdir()

    def interrupted(folder: Path, num_events: int, seed: int) -> EventStore:
        (folder / "half").write_text("a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(shuffle_data, "make_store", interrupted)
    assert shuffle.main(["--events", "500", "--out", str(out), "--work-dir", str(work)]) == 130
    assert not list(work.iterdir())
    assert not out.exists()


def test_a_full_disk_is_told_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"GiB free, and 1,000,000,000,000,000 events want"):
        shuffle.main(["--events", str(10**15), "--work-dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())
