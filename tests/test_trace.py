import gzip
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from profiling import trace

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
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    assert lines[-1] in capsys.readouterr().out


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


def test_without_nsys_the_script_says_how_to_get_it(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    script = str(ROOT / "profiling" / "nsys.sh")
    variables = os.environ | {"PATH": str(tmp_path)}
    run = subprocess.run(
        [bash, script, str(tmp_path / "out")], env=variables, capture_output=True, text=True, check=False
    )
    assert run.returncode == 3
    assert "nsys is not on the PATH. Install" in run.stderr
    assert not (tmp_path / "out").exists()
