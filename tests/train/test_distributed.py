"""Ranks equal one process on large batches, resume bitwise, agree on what they skip, and end together.

The processes are started once for all plays that they give (tests/train/ranks.py); each test judges one play.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from eventkern.cli import main
from eventkern.train import ConfigError
from eventkern.train.checkpoint import load_checkpoint
from eventkern.train.distributed import Ranks, join
from eventkern.train.meter import MEASURED

HERE = Path(__file__).parent
ALONE = Ranks(torch.device("cpu"))
CONFIG = """
src_seq_len = 4
tgt_seq_len = 3
id_category_size = 20
epochs = 1000
batch_size = 4
save_every = 5
device = "cpu"
data.store = "store"
model.d_model = 8
model.num_heads = 2
"""


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The module ranks.py, which imports the classes of conftest.py as a program beside it would."""
    sys.path.insert(0, str(HERE))
    spec = importlib.util.spec_from_file_location("ranks", HERE / "ranks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(HERE))
    sys.modules.pop("conftest", None)


def play(ranks: Any, world_size: int, plays: str, folder: Path, device: str = "cpu") -> None:
    running = ranks.start(world_size, [str(HERE / "ranks.py"), plays, str(folder), device])
    told = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0] * world_size, [errors[-3000:] for _, errors in told]
    assert not any(output for output, _ in told[1:])  # the main rank alone prints


@pytest.fixture(scope="module")
def two(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks leave of all plays."""
    folder = tmp_path_factory.mktemp("two")
    ranks.trainer(ALONE, folder / "taken_up", batch_size=6, schedule="constant", max_steps=5).fit()
    shutil.copy(folder / "taken_up/checkpoints/last", folder / "taken_up/one.pt")
    play(ranks, 2, "equal,synchronised,half,resumed,sharded_resume,spoiled,branches,taken_up,handed_on,phases", folder)
    return folder


def rows_of(run_dir: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def assert_equal_to_rounding(one: Any, other: Any, where: str = "state") -> None:
    """Tensors within 8 roundings of their largest element, since each sums a few addends in another order."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal_to_rounding(one[key], other[key], f"{where}.{key}")
    else:
        torch.testing.assert_close(other, one, rtol=0, atol=8 * 2**-24 * one.abs().max().item(), msg=where)


def test_branches_that_some_ranks_or_none_take_train_as_on_one(ranks: Any, two: Path, tmp_path: Path) -> None:
    model = ranks.Branching(lambda call: ranks.takes(*divmod(call - 1, 2)))
    ranks.trainer(ALONE, tmp_path, model, grad_accum=2, max_steps=3, schedule="constant").fit()
    here, there = (load_checkpoint(run / "checkpoints/last") for run in (tmp_path, two / "branches/free"))
    assert_equal_to_rounding(here["model"], there["model"])
    assert_equal_to_rounding(here["optimizer"]["state"], there["optimizer"]["state"])
    assert not there["model"]["branch.weight"].eq(0.25).all()
    steps = {name: there["optimizer"]["state"][number]["step"] for number, name in enumerate(there["trained"])}
    assert (steps["branch.weight"], steps["hidden.weight"]) == (2, 3)


@pytest.mark.parametrize("name", ["first", "last"])
def test_a_branch_of_some_batches_is_named_with_the_setting_for_it(two: Path, name: str) -> None:
    told = {(two / f"branches/{name}-{rank}.txt").read_text() for rank in range(2)}
    assert told == {
        "not every batch gives gradients to branch.weight, branch.bias: set find_unused_parameters "
        "(--find-unused-parameters), or let every batch use them, if only with weight 0"
    }


@pytest.mark.parametrize("grad_accum", [1, 2])
@pytest.mark.parametrize("sharding", ["none", "fully_shard"])
def test_two_ranks_equal_one_on_batches_twice_as_large(
    ranks: Any, two: Path, tmp_path: Path, sharding: str, grad_accum: int
) -> None:
    one = ranks.trainer(ALONE, tmp_path, batch_size=6, grad_accum=grad_accum)
    one.fit()
    counts = [int(batch.num_targets) for batch in ranks.TinyLoader(3)]
    assert len(set(counts)) > 2  # padding makes them unequal, else weights would not matter
    run_dir = two / "equal" / f"{sharding}-{grad_accum}"
    there, here = load_checkpoint(run_dir / "checkpoints/last"), load_checkpoint(tmp_path / "checkpoints/last")
    for part in ("model", "optimizer"):
        states = [state[part]["state"] if part == "optimizer" else state[part] for state in (here, there)]
        assert all(type(tensor) is torch.Tensor for tensor in there["model"].values())
        assert_equal_to_rounding(*states, part)
    assert there["loader"] == here["loader"]
    rows = rows_of(run_dir)
    assert len(rows) == 8 // grad_accum
    for row, wanted in zip(rows, rows_of(tmp_path), strict=True):
        assert row == pytest.approx(wanted, rel=8 * 2**-24)
    assert "validation_loss_sum" in rows[-1]  # of all 5 batches, which two ranks cannot share evenly


@pytest.mark.parametrize("name", ["resumed", "sharded_resume"])
def test_ranks_resume_bitwise(two: Path, name: str) -> None:
    assert_resumed_bitwise(two / name)


def test_three_ranks_resume_bitwise(ranks: Any, tmp_path: Path) -> None:
    """With more than two addends their order matters, which DistributedDataParallel finds out in its first backward."""
    play(ranks, 3, "resumed", tmp_path)
    assert_resumed_bitwise(tmp_path / "resumed")


@pytest.mark.gpu
def test_a_rank_on_a_gpu_trains_in_every_precision(ranks: Any, tmp_path: Path) -> None:
    play(ranks, 1, "on_gpu", tmp_path, "cuda")
    runs = [rows_of(run_dir) for run_dir in (tmp_path / "on_gpu").iterdir()]
    assert len(runs) == 8
    for rows in runs:
        assert rows[-1]["loss_sum"] < rows[0]["loss_sum"]


def assert_resumed_bitwise(folder: Path) -> None:
    whole, parts = (load_checkpoint(folder / run / "checkpoints/last") for run in ("whole", "parts"))
    for part in ("model", "optimizer"):
        torch.testing.assert_close(parts[part], whole[part], rtol=0, atol=0)
    assert len({state["torch"].numpy().tobytes() for state in (whole["random"], *whole["random_of_ranks"])}) > 1
    assert str(parts["random_of_ranks"]) == str(whole["random_of_ranks"])
    assert rows_of(folder / "parts") == rows_of(folder / "whole")


def test_one_process_goes_on_where_two_stopped_and_two_where_one_did(ranks: Any, two: Path, tmp_path: Path) -> None:
    keys = {"batch_size": 6, "schedule": "constant"}
    ranks.trainer(ALONE, tmp_path / "whole", **keys).fit()
    again = ranks.trainer(ALONE, tmp_path / "one", **keys)
    again.resume(two / "handed_on/checkpoints/last")
    assert again.step == 5
    assert again.fit().step == 8
    whole = load_checkpoint(tmp_path / "whole/checkpoints/last")
    for other in (tmp_path / "one", two / "taken_up"):
        state = load_checkpoint(other / "checkpoints/last")
        assert (state["step"], state["loader"]) == (whole["step"], whole["loader"])
        assert_equal_to_rounding(whole["model"], state["model"])


def test_a_bad_number_on_one_rank_skips_the_step_on_all(two: Path) -> None:
    rows = rows_of(two / "spoiled/some")
    assert [row["skipped_steps"] for row in rows] == [0, 1, 2, 2, 2, 2, 2, 2]
    told = [(two / f"spoiled/rank-{rank}.txt").read_text() for rank in range(2)]
    assert told[0].startswith("FloatingPointError: step 3: 3 steps in a row were skipped; at step 1 were not finite: ")
    assert "the loss of place" in told[0]
    assert told[1].startswith("OtherRankError: ")
    assert not list((two / "spoiled/all").glob("checkpoints/*"))


def test_a_phase_ends_on_all_ranks_where_it_fails_on_one(two: Path) -> None:
    told = [(two / f"phases/rank-{rank}.txt").read_text().splitlines() for rank in range(2)]
    assert told == [
        ["went on", "OtherRankError: rank 1 has failed", "ValueError: rank 0 has no data"],
        ["went on", "ValueError: rank 1 has no data", "OtherRankError: rank 0 has failed"],
    ]


def test_a_plain_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with join("cpu") as ranks:
        assert ranks == ALONE
        assert ranks.is_main
        assert not torch.distributed.is_initialized()
        assert ranks.gather("here") == ["here"]
        with pytest.raises(KeyError), ranks.together():
            raise KeyError
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK is set, but LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, "), join("cpu"):
        pass


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visits_schema: Callable[..., str]) -> Path:
    """A folder with a small store and a configuration, the working directory."""
    monkeypatch.chdir(tmp_path)
    lines = [f"2024-{1 + n // 100:02d}-{1 + n // 4 % 25:02d}T{n % 4:02d}:00:00,p{n % 7},s{n % 5}" for n in range(400)]
    Path("visits.csv").write_text("\n".join(["when,person,place", *lines]) + "\n")
    Path("visits.toml").write_text(visits_schema("2024-03-01", "person", "place"))
    Path("small.toml").write_text(CONFIG)
    assert main(["prepare", "visits.csv", "--schema", "visits.toml", "--out", "store"]) == 0
    return tmp_path


TRAIN = "-m eventkern train small.toml --run-dir run"


def test_a_rank_that_is_killed_ends_the_others_and_the_run_resumes(ranks: Any, here: Path) -> None:
    running = ranks.start(2, TRAIN.split())
    deadline = time.monotonic() + 200
    while not (here / "run/checkpoints/last").exists():
        assert time.monotonic() < deadline
        assert [process.poll() for process in running] == [None, None], [p.communicate() for p in running]
        time.sleep(0.05)
    running[1].kill()
    output, errors = running[0].communicate(timeout=200)
    running[1].communicate()
    assert (running[0].returncode, running[1].returncode) == (1, -signal.SIGKILL)
    assert "2 ranks on cpu" in output
    assert errors.startswith("eventkern: rank 0: lost another rank, whose own message says why; --resume auto goes on")
    assert errors.count("\n") == 1, errors
    step = load_checkpoint(here / "run/checkpoints/last")["step"]
    assert main([*TRAIN.split()[2:], "--resume", "auto", "--max-steps", str(step + 2)]) == 0
    assert load_checkpoint(here / "run/checkpoints/last")["step"] == step + 2


def test_torchrun_trains_and_one_process_goes_on(ranks: Any, here: Path) -> None:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *TRAIN.split(), "--max-steps", "6"]
    (torchrun,) = ranks.start(1, command)
    output, errors = torchrun.communicate(timeout=300)
    assert torchrun.returncode == 0, errors[-3000:]
    assert "2 ranks on cpu, step 0 of 6" in output
    assert load_checkpoint(here / "run/checkpoints/last")["step"] == 6
    assert main([*TRAIN.split()[2:], "--resume", "auto", "--max-steps", "8"]) == 0
    assert [row["step"] for row in rows_of(here / "run")] == [5, 6, 8]


def test_a_mistake_is_told_once(ranks: Any, here: Path) -> None:
    running = ranks.start(2, [*TRAIN.split(), "--data.store", "gone"])
    told = [process.communicate(timeout=200)[1] for process in running]
    assert [process.returncode for process in running] == [2, 1]
    assert told[0].startswith("eventkern: rank 0: gone: ")
    assert told[1] == ""


def test_a_port_in_use_is_one_line_and_exit_1(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        for name, value in {**told, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        assert main(TRAIN.split()[2:]) == 1
    errors = capsys.readouterr().err
    wanted = f"eventkern: rank 0: the ranks do not meet at 127.0.0.1:{port}: start again, with a --master-port that"
    assert errors.startswith(wanted)
    assert errors.count("\n") == 1
    assert not (here / "run").exists()


def test_a_failure_of_the_machine_is_one_line_and_exit_1(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def use_up(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("eventkern.models.EventTransformer.forward", use_up)
    assert main(TRAIN.split()[2:]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("eventkern: out of memory at batch_size 4 and grad_accum 1: lower batch_size")
    assert errors.count("\n") == 1
