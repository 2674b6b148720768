import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.measure import Row
from benchmarks.report import Case, markdown, write
from profiling.roofline import Work

OURS = Row("eventkern", True, 5, 0.5, 0.0125, 3.0, 2.0**21, 0.25, "gemm")
PEER = Row("plain torch", False, 5, 1.5, 0.05, 1.0, float("nan"), 0.25, "gemm")
CASE = Case(
    "train_step",
    "small fp32",
    "cpu",
    "float32",
    Work(1e9, 1e8, events=100, cache_bytes=1e8, cache_size=64),
    (OURS, PEER),
)


def test_the_table_shows_every_figure() -> None:
    lines = markdown([CASE]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == list(report.HEADINGS)
    assert cells[2] == ["small fp32", "**eventkern**", "500", "12", "200", "0.4", "3.00", "50", "gemm", "2.0"]
    assert cells[3] == ["small fp32", "plain torch", "1500", "50", "67", "0.1", "1.00", "17", "gemm", ""]
    assert len({len(line) for line in lines}) == 1


def test_a_part_of_the_work_has_a_time_and_no_rates() -> None:
    part = replace(PEER, contender="zeros alone", is_part=True)
    (line,) = [line for line in markdown([replace(CASE, rows=(OURS, part))]).splitlines() if "zeros" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["small fp32", "zeros alone", "1500", "50", "", "", "", "", "a part", ""]


def test_results_are_one_dated_pair_of_files_per_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "hardware_slug", lambda device: "some-cpu-2c")
    other = Case("sampler", "large", "cpu", "float32", Work(0, 1e6), (OURS,))
    ceilings = {"cpu": {"copy_bytes_per_s": 1.0}}
    written = write(tmp_path / "new", [CASE, other], {"cpu": {"commit": "abc"}}, ceilings, "pytest benchmarks --full")
    assert len(written) == 4
    path = next(path for path in written if path.name.startswith("train_step_some-cpu-2c_2") and path.suffix == ".json")
    record = json.loads(path.read_text())
    assert (record["environment"], record["ceilings"]) == ({"commit": "abc"}, ceilings["cpu"])
    (case,) = record["cases"]
    assert case["work"] == {
        "operations": 1e9,
        "bytes": 1e8,
        "events": 100,
        "cache_bytes": 1e8,
        "cache_size": 64,
    }
    assert [row["contender"] for row in case["rows"]] == ["eventkern", "plain torch"]
    assert case["rows"][1]["peak_bytes"] is None  # not a number, which JSON has no word for
    text = path.with_suffix(".md").read_text()
    assert "`pytest benchmarks --full`" in text
    assert "- commit: abc" in text
    assert markdown([CASE]) in text
    assert "large" not in text
