import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from profiling import gpu_suite, memory, roofline_report
from profiling.gpu_suite import Part, Result, parts, run_all, run_part, write

NAMES = [
    *("build", "tests", "benchmarks", "trace", "graphs", "roofline", "memory"),
    *("throughput", "utilization", "loss_gap"),
]


def python(name: str, code: str, limit_s: float = 20.0) -> Part:
    return Part(name, (sys.executable, "-c", code), limit_s)


def test_a_part_that_passes_keeps_its_output() -> None:
    code = "import os, sys; print(os.environ['GREETING']); print('b', file=sys.stderr)"
    result = run_part(python("greets", code), 20, {"GREETING": "hi"})
    assert (result.outcome, sorted(result.output.split())) == ("passed", ["b", "hi"])


def test_a_failed_part_is_recorded_and_the_rest_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    listed = [python("breaks", "raise SystemExit('the build broke')"), python("works", "print('done')")]
    results = run_all(listed, 30, {})
    assert [(result.part.name, result.outcome) for result in results] == [("breaks", "failed"), ("works", "passed")]
    assert results[0].output == "the build broke\n"
    shown = capsys.readouterr().out
    assert "the build broke" in shown
    assert "done" not in shown


def test_a_part_out_of_time_is_killed_with_its_children() -> None:
    code = (
        "import subprocess, sys, time; print('started', flush=True);"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    start_s = time.monotonic()
    # The grandchild holds the pipe: were it alive, reading its end would take the whole minute.
    result = run_part(python("hangs", code), 1.5, {})
    assert time.monotonic() - start_s < 20
    assert (result.outcome, result.output) == ("timed out", "started\n")
    assert 1.5 <= result.seconds < 20


def test_the_whole_suite_keeps_to_its_budget() -> None:
    listed = [python("hangs", "import time; time.sleep(60)", limit_s=50), python("too late", "print('never')")]
    results = run_all(listed, 1.0, {})
    assert [result.outcome for result in results] == ["timed out", "not run"]
    assert results[0].seconds < 20
    assert results[1].seconds == 0


def test_what_a_part_leaves_of_its_time_is_for_the_next() -> None:
    listed = [python("brief", "pass", limit_s=15), python("long", "import time; time.sleep(1)", limit_s=0.01)]
    results = run_all(listed, 30, {})
    assert [result.outcome for result in results] == ["passed", "passed"]


def test_the_parts_fit_into_ten_minutes_and_name_modules_there_are(tmp_path: Path) -> None:
    (tmp_path / "some.whl").touch()
    listed = parts(tmp_path, architecture="90", wheels=tmp_path, site=tmp_path / "site")
    assert sum(part.limit_s for part in listed) <= 600
    assert sum(part.limit_s for part in listed if part.name != "wheels") <= 570
    named = {part.command[part.command.index("-m") + 1] for part in listed}
    modules = sorted(named - {"pip"})  # to look for pip makes setuptools warn
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


@pytest.mark.parametrize("name", ["roofline", "memory"])
def test_the_arguments_of_our_own_parts_are_understood(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (part,) = (part for part in parts(tmp_path, architecture="90") if part.name == name)
    parse = {"roofline": roofline_report.parse, "memory": memory.parse}[name]
    options = parse(list(part.command[part.command.index("-m") + 2 :]))
    assert (options.device, options.quick, options.out) == ("cuda", True, tmp_path)


def test_the_results_file_holds_every_part(tmp_path: Path) -> None:
    results = [
        Result(Part("build", ("make",), 5.0), "passed", 1.25, "built\n"),
        Result(Part("tests", ("pytest",), 5.0), "failed", 2.5, "1 failed\n"),
    ]
    path = write(tmp_path / "new", "some-card", {"gpu": "Some Card", "commit": "abc"}, results)
    record = json.loads(path.read_text())
    assert path.name.startswith("gpu_suite_some-card_")
    assert record["environment"] == {"gpu": "Some Card", "commit": "abc"}
    assert [(part["part"]["name"], part["outcome"]) for part in record["parts"]] == [
        ("build", "passed"),
        ("tests", "failed"),
    ]
    text = path.with_suffix(".md").read_text()
    for line in ("- gpu: Some Card", "| tests | failed | 2.5 |", "1 failed"):
        assert line in text.splitlines()


def test_the_parts_build_for_the_card_and_write_into_the_folder(tmp_path: Path) -> None:
    (tmp_path / "some.whl").touch()
    listed = {part.name: part for part in parts(tmp_path, architecture="80", wheels=tmp_path, site=tmp_path / "site")}
    assert list(listed) == ["wheels", *NAMES]
    assert "cmake.define.CMAKE_CUDA_ARCHITECTURES=80-real" in listed["build"].command
    assert str(tmp_path / "some.whl") in listed["wheels"].command
    assert listed["benchmarks"].command[-2:] == ("--results-dir", str(tmp_path))
    assert "gpu or triton" in listed["tests"].command
    assert all("--no-index" in listed[name].command for name in ("wheels", "build"))
    assert "wheels" not in [part.name for part in parts(tmp_path, architecture="80")]


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main(["--out", str(tmp_path)]) == 3
    assert "no GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_lists_the_parts_and_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a dry run started something"))
    assert gpu_suite.main(["--dry-run", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert all("at most" in line for line in lines)


def test_a_folder_without_wheels_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        gpu_suite.main(["--wheels", str(tmp_path)])
    assert str(tmp_path) in capsys.readouterr().err
