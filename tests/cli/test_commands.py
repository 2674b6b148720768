"""The commands from a table to a ledger, and a run that goes on."""

from __future__ import annotations

import dataclasses
import datetime
import json
import shlex
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from eventkern import _C
from eventkern.cli import load_config, main
from eventkern.cli.arguments import DataConfig
from eventkern.cli.commands import load_run
from eventkern.data import EventStore, Fold
from eventkern.data.baselines import baselines
from eventkern.train import Trainer
from eventkern.train.checkpoint import load_checkpoint


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_training_keeps_freed_memory(here: Path, allocator_calls: list[None]) -> None:
    before = len(allocator_calls)
    assert main(["train", "small.toml", "--run-dir", "new", "--max-steps", "1"]) == 0
    assert len(allocator_calls) == before + 1


def test_a_run_folder_holds_everything(made: Path) -> None:
    run = made / "run"
    names = {path.name for path in run.iterdir() if not path.name.startswith("events.out.tfevents.")}
    assert names == {"config.toml", "environment.json", "metrics.jsonl", "ledger.json", "curves.png", "checkpoints"}
    assert [row["step"] for row in rows_of(run)] == [5, 10, 15, 20]
    environment = json.loads((run / "environment.json").read_text())
    assert {"commit", "torch", "threads", "instruction_set"} <= environment.keys()
    ledger = json.loads((run / "ledger.json").read_text())
    assert [category["name"] for category in ledger["categories"]] == ["person", "place", "weekday"]
    assert [category["classes"] for category in ledger["categories"]] == [8, 7, 9]
    assert ledger["sum"]["model"] < ledger["sum"]["ln_classes"]
    written, given = load_config(run / "config.toml"), load_config(made / "small.toml")
    assert written == dataclasses.replace(given, data=DataConfig(store=str(made / "store")))


def test_the_rows_of_a_run_tell_its_work(made: Path) -> None:
    for row in rows_of(made / "run"):
        windows_tokens, windows_labels = 2 * 4 + 3, 3
        least = row["events_per_s"] * windows_tokens / windows_labels  # padding counts as tokens
        assert row["tokens_per_s"] >= least * (1 - 1e-12)
        assert row["mfu"] > 0
        assert row["memory_bytes"] > 1 << 20
        assert row["skipped_steps"] == 0
        assert sum(row[f"loss/{name}"] for name in ("person", "place", "weekday")) == pytest.approx(row["loss_sum"])


def test_every_attempt_at_a_run_is_told(here: Path) -> None:
    for steps in ("1", "2", "3"):
        assert main(["train", "small.toml", "--run-dir", "new", "--max-steps", steps, "--resume", "auto"]) == 0
    told = json.loads((here / "new/environment.json").read_text())
    assert [each["from_step"] for each in (*told["earlier_attempts"], told)] == [0, 1, 2]
    assert {"command", "host", "world_size", "precision", "seed", "commit"} <= told.keys()


def test_a_run_folder_in_use_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = (
        "import sys; from pathlib import Path; from eventkern.train.run_folder import locked\n"
        "with locked(Path('run')): print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        before = {path: path.stat().st_mtime_ns for path in (here / "run").rglob("*")}
        assert main(["train", "small.toml", "--run-dir", "run", "--resume", "auto", "--max-steps", "30"]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"eventkern: run: in use by process {other.pid} on ")
        assert told.count("\n") == 1
        assert {path: path.stat().st_mtime_ns for path in (here / "run").rglob("*")} == before
        other.communicate()
    assert main(["train", "small.toml", "--run-dir", "run", "--resume", "auto", "--max-steps", "21"]) == 0


def test_a_log_without_its_package_is_refused_before_anything_is_written(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("eventkern.train.boards.has", lambda package: package != "wandb")
    assert main(["train", "small.toml", "--run-dir", "new", "--logger", "wandb"]) == 2
    told = capsys.readouterr().err
    assert (
        told
        == "eventkern: logger is 'wandb', but the package is not installed: pip install wandb, or logger = 'none'\n"
    )
    assert not (here / "new").exists()


def test_histograms_leave_the_losses_alone(here: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(["train", "small.toml", "--run-dir", "new", "--histograms"]) == 0
    histories = [[row["loss_sum"] for row in rows_of(here / run)] for run in ("run", "new")]
    assert histories[0] == histories[1]
    board = EventAccumulator(str(here / "new"), size_guidance={"histograms": 0}).Reload()
    tags = set(board.Tags()["histograms"])
    assert {"weights/embedding.weight", "gradients/embedding.weight", "gradients/heads.weight"} <= tags
    assert [each.step for each in board.Histograms("gradients/heads.weight")] == [10, 20]
    assert not EventAccumulator(str(here / "run")).Reload().Tags()["histograms"]


def test_keys_of_the_command_line_win(here: Path) -> None:
    options = ["--run-dir", "other", "--max-steps", "2", "--model.d-model", "8", "--lr", "3e-4", "--seed", "9"]
    assert main(["train", "small.toml", *options]) == 0
    written = load_config(here / "other/config.toml")
    assert (written.max_steps, written.model.d_model, written.lr, written.seed) == (2, 8, 3e-4, 9)
    assert (written.batch_size, written.model.num_heads) == (8, 2)


def test_the_run_folder_is_named_by_time_and_configuration(here: Path) -> None:
    assert main(["train", "small", "--max-steps", "1"]) == 2  # a path needs its extension; a shipped name does not
    assert main(["train", "small.toml", "--max-steps", "1"]) == 0
    (run,) = (here / "runs").iterdir()
    assert datetime.datetime.strptime(run.name, "%Y%m%d-%H%M%S-small")
    assert main(["train", "small.toml", "--max-steps", "2", "--resume", "auto"]) == 0
    assert [path.name for path in (here / "runs").iterdir()] == [run.name]
    assert rows_of(run)[-1]["step"] == 2


@pytest.mark.parametrize("how", ["auto", "run", "checkpoint"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    from eventkern.models import EventTransformer

    calls, forward = 0, EventTransformer.forward

    def interrupt(self: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 13:
            signal.raise_signal(signal.SIGTERM)
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(EventTransformer, "forward", interrupt)
        assert main(["train", "small.toml", "--run-dir", "stopped one"]) == 0
    assert rows_of(here / "stopped one")[-1]["step"] == 13
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "to go on: " in line]
    printed = shlex.split(line.partition("to go on: ")[2])
    commands = {
        "auto": printed[1:],
        "run": ["train", "small.toml", "--resume", "stopped one"],
        "checkpoint": ["train", "small.toml", "--resume", "stopped one/checkpoints/last"],
    }
    assert printed[0] == "eventkern"
    assert main(commands[how]) == 0
    assert (here / "stopped one/ledger.json").read_text() == (here / "run/ledger.json").read_text()
    losses = [{row["step"]: row["loss_sum"] for row in rows_of(here / run)} for run in ("run", "stopped one")]
    assert losses[1] == losses[0] | {13: losses[1][13]}


@pytest.mark.parametrize("what", ["run", "run/checkpoints/best"])
def test_evaluate_prints_the_ledger_of_the_run(here: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    assert main(["evaluate", what, "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    for category in json.loads((here / "run/ledger.json").read_text())["categories"]:
        ledger = shown[: shown.index("Scorecard")]
        (line,) = [line for line in ledger.splitlines() if line.startswith(category["name"] + " ")]
        assert f"{category['model']:.3f}" in line
        assert f"{category['marginal']:.3f}" in line


def test_memory_that_an_evaluation_uses_up_names_its_key(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def use_up(*_: Any) -> None:
        torch.zeros(2**60, dtype=torch.uint8)

    monkeypatch.setattr("eventkern.models.EventTransformer.scores", use_up)
    assert main(["evaluate", "run", "--device", "cpu", "--batch-size", "7"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("eventkern: out of memory at --batch-size 7: lower it (")
    assert "grad_accum" not in told
    assert told.count("\n") == 1


def test_a_fold_trains_and_is_evaluated_on_its_own_keys(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "small.toml", "--run-dir", "folded", "--max-steps", "10", "--folds", "3", "--fold", "1"]
    assert main(arguments) == 0
    told = json.loads((here / "folded/ledger.json").read_text())
    assert told["note"].startswith("fold 1 of 3 by person, over all time; its values of person were no labels")
    found = baselines(EventStore.open("store"), 20, Fold(1, 3))
    assert [category["marginal"] for category in told["categories"]] == found.marginal.tolist()
    capsys.readouterr()
    assert main(["evaluate", "folded", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "fold 1 of 3 by person" in shown
    for category in told["categories"]:
        ledger = shown[: shown.index("Scorecard")]
        (line,) = [line for line in ledger.splitlines() if line.startswith(category["name"] + " ")]
        assert f"{category['model']:.3f}" in line
    again = ["train", "folded/config.toml", "--run-dir", "folded", "--resume", "auto", "--max-steps", "12"]
    assert main([*again, "--fold", "2"]) == 2
    assert "is of fold 1 of 3, and this run of fold 2 of 3; give --folds 3 --fold 1" in capsys.readouterr().err
    assert main(again) == 0


def test_checkpointed_blocks_train_the_same_weights(here: Path) -> None:
    arguments = ["train", "small.toml", "--max-steps", "3", "--dropout", "0.2", "--run-dir"]
    assert main([*arguments, "plain"]) == 0
    assert main([*arguments, "less", "--model.checkpoint-blocks"]) == 0
    plain, less = (load_checkpoint(here / run / "checkpoints/last") for run in ("plain", "less"))
    assert [state["metadata"]["model"]["checkpoint_blocks"] for state in (plain, less)] == [False, True]
    for name, weight in plain["model"].items():
        assert torch.equal(weight, less["model"][name]), name


def test_info_tells_versions_ops_and_speed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("eventkern.hardware.copy_bandwidth", lambda device: 12.5e9)
    monkeypatch.setattr("eventkern.hardware.gemm_rate", lambda device, dtype: 345e9)
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for words in ("torch", "threads", "multi_embedding", "multi_head_cross_entropy", "12.5", "345"):
        assert words in shown
    served = {line.split("  ")[0]: line for line in shown.splitlines()}
    for op in ("permutation", "window gather"):
        assert served[op].split()[-1 if not torch.cuda.is_available() else 2] == "C++"
    assert ("without CUDA" in served["eventkern._C"]) != _C.has_cuda


def test_a_resumed_run_does_not_hold_what_it_has_loaded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[torch.Tensor]] = []

    def load(path: Path) -> dict[str, Any]:
        state = load_run(path)
        loaded.extend(weakref.ref(weight) for weight in state["model"].values())
        return state

    def fit(self: Trainer) -> None:
        assert loaded
        assert {weight() for weight in loaded} == {None}

    monkeypatch.setattr("eventkern.cli.commands.load_run", load)
    monkeypatch.setattr(Trainer, "fit", fit)
    assert main(["train", "small.toml", "--resume", "run", "--max-steps", "30"]) == 0
