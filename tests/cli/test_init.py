"""Every mistake and every failure is one line with its exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eventkern.cli import main, way_on
from eventkern.cli.commands import command_line
from eventkern.train import Trainer
from eventkern.train.checkpoint import FORMAT, DamagedCheckpointError, save_checkpoint

PREPARE = "prepare visits.csv --schema visits.toml --out new"
TRAIN = "train small.toml --run-dir new"
RESUME = TRAIN + " --resume run"
OTHERS = {  # edits of the table or its schema that leave the number of classes as it is
    "other day": ('"weekday"', '"day"'),
    "other values": ("site ", "spot "),
    "other streams": ('"person", entity = "person"', '"place", entity = "place"'),
    "one stream": (', { name = "time", entity = "all" }', ""),
    "other key": ('key = "person"', 'key = "place"'),
    "fewer rows": ("2024-01-01T05:00:00,p1,site 1\n", ""),
}


@pytest.mark.parametrize(
    ("arguments", "spoil", "message"),
    [
        ("", "", "Expected one of {prepare, train, evaluate, generate, export, info}"),
        ("trian small.toml", "", "unknown command 'trian'; did you mean train? Expected one of {prepare, train"),
        ("--hlep", "", "unknown command '--hlep'; did you mean --help?"),
        ("train fligths", "", "fligths: no such configuration file; did you mean flights? Else give the path of one"),
        ("prepare flihgts --out new", "", "flihgts: no such file or folder; did you mean flights?"),
        ("prepare visits.csv --schema workforec --out new", "", "no such schema file; did you mean workforce?"),
        ("prepare visits.csv --schema visits.toml --otu new", "", "'--otu'; the closest known option is --out"),
        ("evaluate run --stoer new", "", "unknown argument '--stoer'; the closest known option is --store"),
        ("generate run --no-mising", "", "unknown argument '--no-mising'; the closest known option is --missing"),
        (TRAIN + " --data.store sythetic", "", "sythetic: no such folder of a store; did you mean synthetic?"),
        ("train", "", "train takes CONFIG as its first argument"),
        ("train gone.toml", "", "gone.toml: no such configuration file; give the path of one, or one of: cpu_baseline"),
        (TRAIN + " --lrr 3", "", "unknown argument '--lrr'; the closest known option is --lr"),
        (TRAIN + " --lr many", "", "Error parsing --lr: could not convert string to float: 'many'"),
        (TRAIN + " --grad-accum 0", "", "grad_accum is 0, but must be at least 1"),
        (TRAIN + " --model.d-model 15", "", "d_model is 15, but must be a multiple of num_heads = 2"),
        (TRAIN + " --seed 18446744073709551616", "", "seed is 18446744073709551616, but must be at least 0 and below"),
        ("train small.toml --run-dir visits.csv", "", "--run-dir visits.csv: is a file; give the path of a folder"),
        (TRAIN + " --dropout 1", "", "dropout is 1.0, but must be in [0, 1)"),
        (TRAIN + " --fold 1", "", "fold is 1, but must be None unless folds is given"),
        (TRAIN + " --folds 1 --fold 0", "", "folds is 1, but must be at least 2, or None"),
        (TRAIN + " --folds 3", "", "fold is None, but must be in [0, 3), as folds is 3"),
        (TRAIN + " --folds 3 --fold 3", "", "fold is 3, but must be in [0, 3), as folds is 3"),
        (TRAIN + " --folds 999 --fold 0", "", "no key that validation takes under fold 0 of 999 has two events"),
        (RESUME + " --folds 3 --fold 1", "", "is of the store's split in time, and this run of fold 1 of 3; leave out"),
        (TRAIN + " --schedule warm", "", "invalid choice 'warm' for argument '--schedule'. Expected one of ("),
        (TRAIN + " --data.store gone", "", "gone: holds no event store"),
        (TRAIN + " --resume gone", "", "--resume gone: no checkpoint there; give a checkpoint, a run folder, or auto"),
        ("train small.toml --run-dir run", "", "run: holds checkpoints of a run; add --resume auto, or choose another"),
        (TRAIN, "small.toml:d_model=d_modle", "unknown key 'model.d_modle'; the closest known key is 'model.d_model'"),
        (TRAIN, "small.toml:= 16=16", "small.toml: not valid TOML"),
        (TRAIN, 'store/store.json:"format_version": 1="format_version": 7', "store.json: key 'format_version' is 7"),
        (TRAIN, "cut store/store.bin", "store.bin: holds"),
        (TRAIN + " --resume run/checkpoints/step-00000020.pt", "cut run/checkpoints/step-00000020.pt", "truncated"),
        (RESUME + " --id-category-size 6", "", "category 'person' has 8 classes in the checkpoint and 6 in"),
        (RESUME + " --model.d-model 8", "", "parameter 'embedding.weight' is (24, 16) in the checkpoint and (24"),
        ("evaluate gone.pt", "", "gone.pt: no such checkpoint"),
        ("evaluate foreign.pt", "foreign", "foreign.pt: names no model: it is no checkpoint of `eventkern train`"),
        ("evaluate run --store gone", "", "gone: holds no event store"),
        ("evaluate run --batch-size 0", "", "batch_size is 0, but must be at least 1"),
        ("evaluate run --store other", "other day", "another schema than other: the categories differ (day, weekday)"),
        ("evaluate run --store other", "other values", "the classes of place stand for other values; give the store"),
        ("evaluate run --store other", "other streams", "streams person of person, time of all in the checkpoint and"),
        ("evaluate run --store other", "one stream", "time of all in the checkpoint and person of person in the store"),
        ("evaluate run --store other", "other key", "key person in the checkpoint and place in the store; give the"),
        (RESUME + " --data.store other", "other values", "the classes of place stand for other values"),
        (RESUME + " --data.store other", "fewer rows", "is of other training data: the sampler state has n"),
        (PREPARE.replace("visits.csv", "gone.csv"), "", "gone.csv"),
        (PREPARE.replace(" --schema visits.toml", ""), "", "visits.csv: has no schema of its own; give one"),
        (PREPARE.replace("visits.toml", "gone.toml"), "", "gone.toml: no such schema file"),
        (PREPARE, "visits.csv:when,person,place=when,person,palce", "place"),
        (PREPARE, "visits.csv:2024-01-02T=2024-13-02T", "2024-13-02T"),
        (PREPARE, "visits.csv:,p0,=,", "visits.csv"),
        (PREPARE.replace("--out new", "--out store"), "", "store: a store is already there"),
        (PREPARE.replace("--out new", "--out visits.csv/x"), "", "--out visits.csv/x: visits.csv is a file; give the"),
        (PREPARE + " --on-error maybe", "", "invalid choice 'maybe' for argument '--on-error'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_2(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: str, spoil: str, message: str
) -> None:
    spoil_file(here, spoil)
    before = sorted(path for path in here.rglob("*") if path.is_file())
    capsys.readouterr()
    assert main(arguments.split()) == 2
    told = capsys.readouterr().err
    assert told.startswith("eventkern: ")
    assert message in told
    assert told.count("\n") == 1, told
    assert sorted(path for path in here.rglob("*") if path.is_file()) == before  # nothing half-written


def spoil_file(folder: Path, spoil: str) -> None:
    """`cut FILE` halves a file, `FILE:OLD=NEW` edits it; a key of OTHERS prepares the store `other`, `foreign` saves a
    checkpoint of another program."""
    if spoil in OTHERS:
        old, new = OTHERS[spoil]
        for name in ("visits.toml", "visits.csv"):
            (folder / name.replace("visits", "other")).write_text((folder / name).read_text().replace(old, new))
        assert main(["prepare", "other.csv", "--schema", "other.toml", "--out", "other"]) == 0
    elif spoil == "foreign":
        save_checkpoint({"format": FORMAT, "metadata": {}}, folder / "foreign.pt")
    elif spoil.startswith("cut "):
        path = folder / spoil.removeprefix("cut ")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif spoil:
        name, _, edit = spoil.partition(":")
        old, _, new = edit.rpartition("=")
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))


def test_rows_that_cannot_be_read_are_skipped_when_asked(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil_file(here, "visits.csv:2024-01-02T=2024-13-02T")
    assert main([*PREPARE.split(), "--on-error", "skip"]) == 0
    assert "2024-13-02T" in capsys.readouterr().out
    assert json.loads((here / "new/store.json").read_text())["counts"]["rows_skipped"] == 1


def test_sigterm_ends_prepare_without_leavings(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(here.iterdir())
    monkeypatch.setattr("eventkern.data.prepare.write_binary", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert main(PREPARE.split()) == 143
    assert capsys.readouterr().err == "eventkern: terminated\n"
    assert sorted(here.iterdir()) == before


def test_failures_exit_1_in_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("eventkern.train.checkpoint.write_whole", no_space)
    assert main(["train", "small.toml", "--run-dir", "new", "--max-steps", "1"]) == 1
    assert capsys.readouterr().err == "eventkern: [Errno 28] No space left on device\n"


def test_no_space_for_the_run_leaves_no_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    assert main(["train", "small.toml", "--run-dir", "new", "--max-steps", "1"]) == 1
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("eventkern: [Errno 28] new/config.toml: No space left on device: ")
    assert not (here / "new").exists()


def test_a_file_that_nobody_named_is_a_failure(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose(*_: Any) -> None:
        Path("gone").read_text()

    monkeypatch.setattr(Trainer, "fit", lose)
    assert main(["train", "small.toml", "--run-dir", "new"]) == 1
    assert capsys.readouterr().err == "eventkern: [Errno 2] No such file or directory: 'gone'\n"


@pytest.mark.parametrize("mistake", ["gone.toml", "small.toml --lrr 3", "small.toml --device mps"])
def test_a_mistake_before_the_ranks_meet_is_told_once_on_a_machine(
    here: Path, rank: Callable[[int], None], capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    for number in range(4):
        rank(number)
        assert main(["train", *mistake.split()]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"eventkern: rank {number}: ") if number % 2 == 0 else told == ""
        assert told.count("\n") == 1 - number % 2


def test_the_way_on_names_as_many_processes(rank: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = DamagedCheckpointError("cut", Path("a whole.pt"))
    arguments = ["train", "small.toml", "--resume", "auto", "--lr", "1"]
    wanted = "train small.toml --lr 1 --resume 'a whole.pt'"
    assert way_on(damaged, arguments) == f"; to go on from it: eventkern {wanted}"
    rank(3)
    assert command_line(["train", "my run"]) == "torchrun --nnodes 2 --nproc-per-node 2 -m eventkern train 'my run'"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert way_on(damaged, arguments) == f"; to go on from it: torchrun --nproc-per-node 2 -m eventkern {wanted}"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert command_line(["info"]) == "eventkern info"


def test_the_module_is_the_command() -> None:
    run = subprocess.run([sys.executable, "-m", "eventkern", "nothing"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "eventkern: Expected one of {prepare, train, evaluate, generate, export, info}.\n"


@pytest.mark.parametrize("command", ["--help", "train --help", PREPARE, "evaluate run"])
def test_every_command_ends_quietly_where_nobody_reads_it(here: Path, command: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    program = [sys.executable, "-m", "eventkern", *command.split()]
    run = subprocess.run(program, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (run.returncode, run.stderr) == (141, "")
