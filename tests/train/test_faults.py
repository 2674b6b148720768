"""A run that is killed, filled up, cut or flipped loses nothing but time, and says what is wrong."""

from __future__ import annotations

import datetime
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file

from eventkern.train import TrainerConfig
from eventkern.train.checkpoint import (
    CheckpointFolder,
    load_checkpoint,
    save_checkpoint,
)

CONFIG = """
src_seq_len = 4
tgt_seq_len = 3
id_category_size = 20
epochs = 500
max_steps = 120
batch_size = 8
grad_accum = 3
lr = 0.01
dropout = 0.2
schedule = "plateau"
warmup_steps = 3
log_every = 1
save_every = 2
evaluate_every = 7
device = "cpu"
precision = "fp32"

[data]
store = "store"

[model]
d_model = 8
num_heads = 2
"""
STEPS_OF_AN_EPOCH = 5
SCHEDULES = get_args(get_type_hints(TrainerConfig)["schedule"])
REPEATED = ("step", "epoch", "loss_sum", "loss_mean", "lr", "grad_norm", "validation_loss_sum", "validation_loss_mean")
"""What a row of metrics.jsonl tells beside times."""


class Trials:
    """The program of trials.py, and what was printed in its last trial."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said = ""
        program = [sys.executable, str(Path(__file__).with_name("trials.py"))]
        self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def __call__(self, arguments: str | list[str] = "", **fault: Any) -> int:
        """Runs a command (or a single save) and returns its exit code, or the negative number of what killed it."""
        output = self.folder / "said.txt"
        words = arguments.split() if isinstance(arguments, str) else arguments
        trial = {"arguments": words, "folder": str(self.folder), "output": str(output), **fault}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(trial) + "\n")
        code = int(self._process.stdout.readline())
        self.said = output.read_text() if output.exists() else ""
        return code

    def close(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory, visits_schema: Callable[..., str]) -> Iterator[Trials]:
    """Commands in a folder that has a store, a configuration, and `whole`: the run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("faults")
    draw, at, lines = random.Random(3), datetime.datetime(2024, 1, 1), ["when,person,place"]
    for _ in range(150):
        at += datetime.timedelta(hours=6)
        lines.append(f"{at:%Y-%m-%dT%H:%M:%S},p{draw.randrange(4)},site {draw.randrange(5)}")
    (folder / "visits.csv").write_text("\n".join(lines) + "\n")
    (folder / "visits.toml").write_text(visits_schema("2024-02-01", "person", "place"))
    (folder / "small.toml").write_text(CONFIG)
    trials = Trials(folder)
    try:
        assert trials("prepare visits.csv --schema visits.toml --out store") == 0
        assert trials("train small.toml --run-dir whole") == 0, trials.said
        yield trials
    finally:
        trials.close()


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in REPEATED if key in row} for row in rows]


def assert_equal_runs(one: Path, other: Path, assert_same: Any) -> None:
    """Bitwise: weights, moments, generators, positions, the best, and every number of the log but times."""
    for name in ("last", "best"):
        assert os.readlink(one / "checkpoints" / name) == os.readlink(other / "checkpoints" / name)
        states = [load_checkpoint(run / "checkpoints" / name) for run in (one, other)]
        for state in states:
            for moment in ("time", "commit"):  # of the attempt: a commit in between loses nothing
                del state["environment"][moment]
            state["metadata"]["run"].pop("data")
        assert_same(*states)
    assert rows_of(one) == rows_of(other)
    weights = [(run / "checkpoints/best.safetensors") for run in (one, other)]
    assert_same(load_file(weights[0]), load_file(weights[1]))
    assert_same(load_file(weights[0]), load_checkpoint(one / "checkpoints/best")["model"])
    assert files_of(one) == files_of(other)


def files_of(run: Path) -> list[str]:
    """Every file, but for the event files, of which each attempt writes its own."""
    return sorted(
        str(path.relative_to(run)) for path in run.rglob("*") if not path.name.startswith("events.out.tfevents.")
    )


def saved_step(run: Path) -> int:
    """The step that the run would go on from; its checkpoint must load."""
    last = CheckpointFolder(run / "checkpoints").last
    return 0 if last is None else load_checkpoint(last)["step"]


def test_twenty_kills_lose_nothing(trials: Trials, assert_same: Any) -> None:
    draw = random.Random(20261124)
    run, step = trials.folder / "killed", 0
    size = (trials.folder / "whole/checkpoints/last").stat().st_size
    in_saves: list[dict[str, Any]] = [
        {"kill_at_call": ["replace", draw.randrange(6, 16), moment]} for moment in ("before", "after")
    ]
    in_saves += [{"kill_at_call": ["fsync", draw.randrange(6, 20), moment]} for moment in ("before", "after")]
    in_saves += [
        {"kill_at_call": ["symlink", draw.randrange(1, 4), "after"]},
        {"kill_at_call": ["unlink", 1, "before"]},
    ]
    in_saves += [{"kill_at_byte": draw.randrange(size // 2, size)} for _ in range(3)]
    at_any_time = [{"kill_after_steps": draw.randrange(1, 4), "delay_s": draw.uniform(0, 0.03)} for _ in range(11)]
    kills = [*in_saves, *at_any_time]
    draw.shuffle(kills)
    assert len(kills) == 20
    for kill in kills:
        code = trials("train small.toml --run-dir killed --resume auto", **kill)
        assert code in (-signal.SIGKILL, -signal.SIGXFSZ), (kill, code, trials.said)
        assert saved_step(run) >= step
        step = saved_step(run)
        for file in (run / "checkpoints").glob("step-*.pt"):
            load_checkpoint(file)  # whole, also where no link names it
        for file in (run / "checkpoints").glob("best.safetensors"):
            load_file(file)
    assert 0 < step < 120
    assert trials("train small.toml --run-dir killed --resume auto") == 0, trials.said
    assert_equal_runs(trials.folder / "whole", run, assert_same)


@pytest.mark.parametrize("is_best", [False, True])
def test_a_save_that_is_killed_anywhere_leaves_the_one_before_or_itself(
    trials: Trials, tmp_path: Path, is_best: bool
) -> None:
    deaths = 0
    for name in ("mkdir", "fsync", "replace", "symlink", "unlink"):
        for moment in ("before", "after"):
            for number in range(1, 10):
                folder = CheckpointFolder(tmp_path / f"{name} {moment} {number}")
                folder.save({"model": {"weight": torch.zeros(100)}, "step": 1}, 1, is_best=True)
                folder.save({"model": {"weight": torch.ones(100)}, "step": 2}, 2, is_best=False)
                save = {"path": str(folder.path), "value": 3.0, "step": 3, "is_best": is_best}
                code = trials(save=save, kill_at_call=[name, number, moment])
                assert code in (0, -signal.SIGKILL), trials.said
                if code == 0:
                    break
                deaths += 1
                assert folder.last is not None
                assert folder.best is not None
                assert load_checkpoint(folder.last)["step"] in (2, 3)
                best = load_checkpoint(folder.best)
                assert best["step"] in ((1, 3) if is_best else (1,))
                if best["step"] == 3:  # what best names is there alone too
                    assert torch.equal(load_file(folder.path / "best.safetensors")["weight"], best["model"]["weight"])
                if load_checkpoint(folder.last)["step"] == 3 and is_best:
                    assert best["step"] == 3  # else a run that goes on from 3 would never name it
                folder.save({"model": {"weight": torch.full((100,), 3.0)}, "step": 3}, 3, is_best=is_best)
                kept = {"best", "last", "best.safetensors", "step-00000003.pt"}
                assert set(os.listdir(folder.path)) == (kept if is_best else kept | {"step-00000001.pt"})
    assert deaths >= (24 if is_best else 14)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_killed_run_goes_on_bitwise(trials: Trials, assert_same: Any, schedule: str) -> None:
    """Between the micro-batches of a step, in the middle and at the end of an epoch, and for the third time."""
    command = f"train small.toml --schedule {schedule} --max-steps 24 --save-every 1 --evaluate-every 2"
    if schedule == "cosine_restarts":
        command += " --restart-steps 5"
    assert trials(f"{command} --run-dir {schedule}-whole") == 0, trials.said
    run = trials.folder / f"{schedule}-parts"
    kills = {  # forwards of the process, and the step it had saved
        3 * 7 + 2: 7,  # in the second micro-batch of the third step of the second epoch
        3 * 3 + 1: 2 * STEPS_OF_AN_EPOCH,  # in the first of the third epoch
        3 * 1 + 3: 2 * STEPS_OF_AN_EPOCH + 1,
    }
    for number, step in kills.items():
        assert trials(f"{command} --run-dir {run.name} --resume auto", kill_in_forward=number) == -signal.SIGKILL
        state = load_checkpoint(run / "checkpoints/last")
        assert (state["step"], state["epochs_done"]) == (step, step // STEPS_OF_AN_EPOCH)
    assert trials(f"{command} --run-dir {run.name} --resume auto") == 0, trials.said
    assert_equal_runs(trials.folder / f"{schedule}-whole", run, assert_same)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_exits_0_and_goes_on_bitwise(
    trials: Trials, assert_same: Any, number: signal.Signals
) -> None:
    run = trials.folder / f"stopped by {number.name}"
    command = ["train", "small.toml", "--max-steps", "12", "--save-every", "100"]
    whole = trials.folder / "twelve"
    if not whole.exists():
        assert trials([*command, "--run-dir", "twelve"]) == 0
    assert trials([*command, "--run-dir", run.name], signal_at_step=[int(number), 4]) == 0
    assert saved_step(run) == 4
    (said,) = re.findall("to go on: (.*)", trials.said)
    assert trials(shlex.split(said)[1:]) == 0
    assert rows_of(run) == rows_of(whole)
    states = [load_checkpoint(each / "checkpoints/last") for each in (run, whole)]
    for part in ("model", "optimizer", "schedule", "random", "loader"):
        assert_same(states[0][part], states[1][part], part)


@pytest.fixture
def small_disk(trials: Trials) -> Iterator[Path]:
    """A file system of 2 MB in memory, at `disk`."""
    disk = trials.folder / "disk"
    disk.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a tmpfs may not be mounted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def assert_told(trials: Trials, told: str, size: int) -> None:
    """The last line ends with a message, whose numbers are the size of a checkpoint and fewer bytes free."""
    pattern = r"([\d,]+) ".join(map(re.escape, told.split("# ")))
    found = re.search(pattern + "$", trials.said.splitlines()[-1])
    assert found is not None, trials.said
    wanted, free = (int(number.replace(",", "")) for number in found.groups())
    assert free < wanted
    assert 0.99 * size < wanted < 1.3 * size  # a run's first look counts best.safetensors too


def test_a_full_disk_leaves_the_checkpoint_before_and_goes_on(
    trials: Trials, assert_same: Any, small_disk: Path
) -> None:
    command = "train small.toml --run-dir disk/run --resume auto --max-steps"
    whole = trials.folder / "ten"
    assert trials("train small.toml --run-dir ten --max-steps 10") == 0
    assert trials(f"{command} 4") == 0
    before = {path.name: path.read_bytes() for path in (small_disk / "run/checkpoints").iterdir()}
    size, filler = len(before["step-00000004.pt"]), small_disk / "filler"
    no_space = "No space left on device: # bytes wanted"
    assert trials(f"{command} 10", fill_at_step=[1, str(filler), size // 4]) == 1
    assert_told(trials, f"step-00000006.pt: {no_space}, # free; earlier files are as they were", size)
    assert {path.name: path.read_bytes() for path in (small_disk / "run/checkpoints").iterdir()} == before
    assert trials(f"{command} 10") == 1
    assert_told(trials, f"disk/run/checkpoints: {no_space} for a checkpoint, # free; nothing was trained yet", size)
    assert {path.name: path.read_bytes() for path in (small_disk / "run/checkpoints").iterdir()} == before
    filler.unlink()
    assert trials(f"{command} 10") == 0, trials.said
    rows = rows_of(small_disk / "run")
    assert [row["loss_sum"] for row in rows] == [row["loss_sum"] for row in rows_of(whole)]
    for part in ("model", "optimizer", "random"):
        assert_same(*(load_checkpoint(run / "checkpoints/last")[part] for run in (small_disk / "run", whole)))


DAMAGES = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "truncated, or no checkpoint"),
    "flipped": (lambda path: path.write_bytes(path.read_bytes()[:-500] + b"?" + path.read_bytes()[-499:]), "damaged"),
    "gone": (lambda path: path.unlink(), "no such checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_last_is_named_and_never_passed_over(trials: Trials, assert_same: Any, damage: str) -> None:
    run = trials.folder / f"with damage {damage}"
    shutil.copytree(trials.folder / "whole", run, symlinks=True)
    last = os.readlink(run / "checkpoints/last")
    assert last == "step-00000120.pt"
    spoil, fault = DAMAGES[damage]
    spoil(run / "checkpoints" / last)
    before = (run / "metrics.jsonl").read_text()
    command = ["train", "small.toml", "--max-steps", "121", "--run-dir", run.name, "--resume"]
    assert trials([*command, "auto"]) == 2
    offered = f"{run.name}/checkpoints/step-00000119.pt"  # of the evaluation before
    told = re.fullmatch(
        rf"eventkern: {run.name}/checkpoints/{last}: {fault}.*; the newest beside it that verifies is {offered}; "
        r"to go on from it: eventkern (.*)\n",
        trials.said,
    )
    assert told is not None, trials.said
    assert shlex.split(told[1]) == [*command, offered]
    assert (run / "metrics.jsonl").read_text() == before
    assert trials(shlex.split(told[1])) == 0, trials.said
    assert saved_step(run) == 121
    reference = trials.folder / "longer"
    if not reference.exists():
        assert trials("train small.toml --run-dir longer --max-steps 121") == 0
    for part in ("model", "optimizer", "random"):
        assert_same(*(load_checkpoint(each / "checkpoints/last")[part] for each in (run, reference)))


def test_where_nothing_verifies_that_is_said(trials: Trials) -> None:
    run = trials.folder / "lost"
    shutil.copytree(trials.folder / "whole", run, symlinks=True)
    for file in (run / "checkpoints").glob("step-*.pt"):
        file.write_bytes(file.read_bytes()[:-1])
    assert trials("train small.toml --run-dir lost --resume auto") == 2
    assert trials.said.endswith("do not end in a checksum; no other beside it verifies\n")
    assert trials("evaluate lost") == 2
    assert re.match(r"eventkern: lost/checkpoints/best: truncated.*; no other beside it verifies\n", trials.said)


def test_a_folder_without_its_links_goes_on_from_the_newest(trials: Trials) -> None:
    run = trials.folder / "unlinked"
    shutil.copytree(trials.folder / "whole", run, symlinks=True)
    (run / "checkpoints/last").unlink()
    assert trials("train small.toml --run-dir unlinked") == 2
    assert "holds checkpoints of a run" in trials.said
    assert trials("train small.toml --run-dir unlinked --resume auto --max-steps 121") == 0
    assert "step 120 of 121" in trials.said
    assert os.readlink(run / "checkpoints/last") == "step-00000121.pt"


def test_a_folder_whose_links_became_files_goes_on(trials: Trials) -> None:
    run = trials.folder / "dereferenced"
    shutil.copytree(trials.folder / "whole", run)
    assert not (run / "checkpoints/last").is_symlink()
    assert trials("train small.toml --run-dir dereferenced --resume auto --max-steps 121") == 0, trials.said
    assert os.readlink(run / "checkpoints/last") == "step-00000121.pt"


def test_a_folder_without_permission_is_named_before_any_training(trials: Trials) -> None:
    run = trials.folder / "closed"
    shutil.copytree(trials.folder / "whole", run, symlinks=True)
    command = "train small.toml --resume auto --max-steps 121 --run-dir closed"
    for place in (run / "checkpoints", run):
        place.chmod(0o555)
        assert trials(command, without_privileges=True) == 2
        named = f"--run-dir {place.relative_to(trials.folder)}"
        mend = "give the path of another folder, or its permission"
        assert trials.said == f"eventkern: {named}: may not be written to; {mend}\n"
        place.chmod(0o755)
    (run / "checkpoints/last").resolve().chmod(0)
    assert trials(command, without_privileges=True) == 1
    assert re.fullmatch(r"eventkern: \[Errno 13\] Permission denied: 'closed/checkpoints/step-.*'\n", trials.said)


def test_a_checkpoint_of_a_newer_version_is_refused(trials: Trials) -> None:
    state = load_checkpoint(trials.folder / "whole/checkpoints/last")
    save_checkpoint({**state, "format": 2}, trials.folder / "newer.pt")
    assert trials("train small.toml --run-dir newer --resume newer.pt") == 2
    told = "newer.pt: checkpoint format 2, but this version reads 1; use the version of eventkern that wrote it"
    assert trials.said == f"eventkern: {told}\n"
    assert not (trials.folder / "newer").exists()
