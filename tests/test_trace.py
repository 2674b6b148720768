import contextlib
import gzip
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.studies.throughput import __main__ as throughput
from benchmarks.studies.utilization import __main__ as utilization
from benchmarks.training import CONFIGS, Shapes
from eventkern.cli import load_config
from profiling import memory, trace

ROOT = Path(__file__).parents[1]
CONFIG = {
    "src_seq_len": 4,
    "tgt_seq_len": 3,
    "id_category_size": 10,
    "batch_size": 2,
    "model": {"d_model": 8, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1},
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def test_a_trace_holds_the_phases_of_every_step(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "NUM_OPERATORS", 1000)
    out = tmp_path / "out"
    trace.main(["--config", config, "--steps", "2", "--device", "cpu", "--out", str(out)])
    events = json.loads(gzip.decompress((out / "trace.json.gz").read_bytes()))["traceEvents"]
    starts = {name: [event["ts"] for event in events if event.get("name") == name] for name in trace.PHASES}
    assert {name: len(times) for name, times in starts.items()} == dict.fromkeys(trace.PHASES, 2)
    order = sorted((time, name) for name, times in starts.items() for time in times)
    assert [name for _, name in order] == [*trace.PHASES, *trace.PHASES]

    lines = (out / "phases.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == [*trace.PHASES, "step"]
    shares = [float(line.split()[3]) for line in lines[:-1]]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    operators = (out / "operators.txt").read_text()
    assert sum(line.split()[:1][0].startswith("aten::") for line in operators.splitlines() if line.strip()) > 10
    by_phase = [line.split() for line in (out / "operators_by_phase.txt").read_text().splitlines()[1:]]
    assert list(dict.fromkeys(line[0] for line in by_phase)) == list(trace.PHASES)
    found = {(line[0], line[1]): float(line[-2]) for line in by_phase}
    assert found["data", "aten::random_"] == 34  # a column of sources and one of targets for each of 17 categories
    assert found["backward", "eventkern::attention_backward"] == 3  # encoder, decoder, and its cross-attention
    assert found["optimizer", "aten::_fused_adamw_"] == 1
    assert {phase for phase, name in found if name.endswith("_backward")} == {"backward"}
    assert all(0 <= float(line[-1]) <= 100 for line in by_phase)
    assert lines[-1] in capsys.readouterr().out


def test_a_phase_is_a_range_for_both_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, str]] = []

    class Range(contextlib.nullcontext[None]):
        def __init__(self, name: str, domain: str) -> None:
            super().__init__()
            opened.append((domain, name))

    waited: list[torch.device] = []
    monkeypatch.setattr(trace.nvtx, "annotate", Range)
    monkeypatch.setattr(trace, "synchronize", waited.append)
    device = torch.device("cpu")
    with torch.profiler.profile(acc_events=True) as profiler:
        with trace.phase(device, "forward", waits=False):
            pass
        assert waited == []
        with trace.phase(device, "backward", waits=True):
            pass
    assert waited == [device]
    assert opened == [("eventkern", "forward"), ("eventkern", "backward")]
    assert {"forward", "backward"} <= {event.key for event in profiler.key_averages()}


def test_an_operator_is_of_the_phase_it_begins_in() -> None:
    class Recorded:
        """A profile of a forward that ends at 10 and a backward from 20 on."""

        @staticmethod
        def events() -> list[SimpleNamespace]:
            def event(name: str, start: float, end: float, self_us: float = 0.0) -> SimpleNamespace:
                span = SimpleNamespace(start=start, end=end)
                return SimpleNamespace(
                    name=name, time_range=span, device_type=trace.DeviceType.CPU, self_cpu_time_total=self_us
                )

            return [
                event("forward", 0, 10),
                event("backward", 20, 30),
                event("mm", 3, 12, 4000.0),
                event("add", 0, 1, 1000.0),
                event("between", 15, 16, 500.0),
                event("mm", 21, 22, 2000.0),
                event("mm", 22, 23, 2000.0),
                event("before", -1, 1, 500.0),
            ]

    lines = trace.operators_by_phase_table(Recorded(), torch.device("cpu"), 2).splitlines()[1:]
    assert [line.split() for line in lines] == [
        ["forward", "mm", "2.000", "0.5", "80.0"],
        ["forward", "add", "0.500", "0.5", "20.0"],
        ["backward", "mm", "2.000", "1.0", "100.0"],
    ]


@pytest.mark.parametrize(
    ("intervals", "covered", "span"),
    [
        ([], 0, 0),
        ([(3, 5)], 2, 2),
        ([(6, 9), (0, 4)], 7, 9),
        ([(0, 4), (2, 3), (3, 6), (8, 9)], 7, 9),  # nested, overlapping, apart
        ([(1, 2), (2, 4)], 3, 3),
    ],
)
def test_time_that_intervals_cover_counts_once(
    intervals: list[tuple[float, float]], covered: float, span: float
) -> None:
    assert trace.busy(intervals) == (covered, span)


@pytest.mark.gpu
def test_a_gpu_is_busy_and_graphs_launch_less(config: str, tmp_path: Path) -> None:
    launches = []
    for compiled in ("off", "reduce-overhead"):
        out = tmp_path / compiled
        arguments = ["--config", config, "--steps", "3", "--device", "cuda", "--compile", compiled, "--out", str(out)]
        trace.main(arguments)
        lines = [line.split() for line in (out / "utilization.txt").read_text().splitlines()]
        assert [line[0] for line in lines] == ["launches", "kernels", "busy"]
        assert 0 < float(lines[2][3]) <= 100
        launches.append(float(lines[0][1]))
    assert launches[1] < launches[0] / 3


def test_nvtx_ranges_leave_no_trace_behind(config: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    trace.main(["--config", config, "--steps", "1", "--device", "cpu", "--nvtx", "--out", str(out)])
    assert not out.exists()


def run_nsys(*arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    assert bash is not None
    command = [bash, str(ROOT / "profiling" / "nsys.sh"), *arguments]
    return subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False)


def test_without_nsys_the_script_says_how_to_get_it(tmp_path: Path) -> None:
    run = run_nsys(str(tmp_path / "out"), path=str(tmp_path))
    assert run.returncode == 3
    assert "nsys is not on the PATH. Install" in run.stderr
    assert not (tmp_path / "out").exists()


def test_without_a_folder_the_script_says_how_to_call_it() -> None:
    run = run_nsys(path=os.environ["PATH"])
    assert run.returncode == 2
    assert run.stderr.startswith("Captures steady training steps")
    assert "profiling/nsys.sh OUT" in run.stderr


@pytest.mark.parametrize("captures", [True, False])
def test_the_script_captures_the_steps_and_exports_their_figures(captures: bool, tmp_path: Path) -> None:
    """Under a nsys that writes down how it was called."""
    fake, calls = tmp_path / "bin" / "nsys", tmp_path / "calls"
    fake.parent.mkdir()
    report = tmp_path / "out" / "steps.nsys-rep"
    leaves = f'[ "$1" = stats ] || touch {report}' if captures else ":"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{leaves}\n')
    fake.chmod(0o755)
    report.parent.mkdir()
    report.touch()  # of an earlier run
    run = run_nsys(str(report.parent), "--config", "tiny.json", path=f"{fake.parent}:{os.environ['PATH']}")
    profiled, *others = [call.split() for call in calls.read_text().splitlines()]
    assert profiled[0] == "profile"
    command = profiled.index("python")
    assert profiled[command:] == ["python", "-m", "profiling.trace", "--nvtx", "--config", "tiny.json"]
    assert {"--capture-range=cudaProfilerApi", "--capture-range-end=stop"} <= set(profiled[:command])
    assert f"--output={report.parent}/steps" in profiled
    assert any(option.startswith("--trace=") and "nvtx" in option for option in profiled)
    if not captures:
        assert (run.returncode, others) == (4, [])
        assert "captured nothing" in run.stderr
        return
    assert run.returncode == 0, run.stderr
    ((first, *options),) = others
    assert (first, options[-1]) == ("stats", str(report))
    (reports,) = (option.removeprefix("--report=") for option in options if option.startswith("--report="))
    assert {"nvtx_sum", "nvtx_gpu_proj_sum", "nvtx_kern_sum", "cuda_gpu_kern_sum"} <= set(reports.split(","))


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.iterdir()))
def test_every_shipped_configuration_has_its_shapes(name: str) -> None:
    (path,) = CONFIGS.glob(f"{name}.*")
    for given in (name, path.name, str(path)):
        assert Shapes.load(given).batch_size == load_config(name).batch_size
    assert Shapes.load(name).model.d_model == load_config(name).model.d_model
    assert Shapes.load(name).model.dropout == load_config(name).dropout


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "fligths: no such configuration file or name; did you mean flights? There are cpu_baseline, flights"),
        ("{", "fligths: is no configuration: "),
        ("batch_size = 3", "fligths: key 'id_category_size' is missing; add it"),
        ("src_seq_len = 2", "fligths: key "),
    ],
)
@pytest.mark.parametrize("command", [trace.main, memory.main, throughput.main, utilization.main])
def test_a_configuration_that_cannot_be_read_is_one_line(
    command: Callable[[list[str]], Any],
    text: str | None,
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("fligths").write_text(text)
    with pytest.raises(SystemExit) as leave:
        command(["--config", "fligths"])
    assert leave.value.code == 2
    assert f"error: argument --config: {complaint}" in capsys.readouterr().err
