"""The command line from a table to a ledger, and every mistake in one line with its exit code."""

from __future__ import annotations

import dataclasses
import datetime
import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.run import get_args_parser

from eventkern import _C
from eventkern.cli import RunConfig, load_config, main, way_on
from eventkern.cli.arguments import CONFIGS, DataConfig, Train
from eventkern.cli.commands import command_line, load_run
from eventkern.data import EventStore, Fold
from eventkern.data.baselines import baselines
from eventkern.train import Trainer, device
from eventkern.train.checkpoint import FORMAT, DamagedCheckpointError, load_checkpoint, save_checkpoint
from eventkern.train.config import known_keys

SCHEMA = """
name = "visits"
timestamp = "when"
timezone = "UTC"
key = "person"
split = "2024-03-01"
streams = [{ name = "person", entity = "person" }, { name = "time", entity = "all" }]

[[categories]]
name = "person"
kind = "id"

[[categories]]
name = "place"
kind = "id"

[[categories]]
name = "weekday"
kind = "time"
column = "when"
field = "weekday"
"""
CONFIG = """
src_seq_len = 4
tgt_seq_len = 3
id_category_size = 20
epochs = 50
max_steps = 20
batch_size = 8
lr = 0.01
schedule = "constant"
log_every = 5
evaluate_every = 10
device = "cpu"

[data]
store = "store"

[model]
d_model = 16
num_heads = 2
"""


def visits(num_rows: int = 400) -> list[str]:
    """A person's next place follows from the present one, but for one in ten."""
    draw = random.Random(3)
    at = datetime.datetime(2024, 1, 1)
    places = dict.fromkeys(range(6), 0)
    lines = ["when,person,place"]
    for _ in range(num_rows):
        at += datetime.timedelta(hours=5)
        person = draw.randrange(6)
        places[person] = draw.randrange(5) if draw.random() < 0.1 else (places[person] + 1) % 5
        lines.append(f"{at:%Y-%m-%dT%H:%M:%S},p{person},site {places[person]}")
    return lines


@pytest.fixture(autouse=True, scope="module")
def allocator_calls() -> Iterator[list[None]]:
    """Commands run in the test process here, whose allocator must stay as it was for tests that measure memory."""
    calls: list[None] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "keep_freed_memory", lambda: calls.append(None))
        yield calls


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table, its schema and store, a configuration, and a run of 20 steps; not to be written to."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "visits.csv").write_text("\n".join(visits()) + "\n")
    (folder / "visits.toml").write_text(SCHEMA)
    (folder / "small.toml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["prepare", "visits.csv", "--schema", "visits.toml", "--out", "store"]) == 0
        assert main(["train", "small.toml", "--run-dir", "run"]) == 0
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder to work in."""
    shutil.copytree(made, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_training_keeps_freed_memory(made: Path, allocator_calls: list[None]) -> None:
    assert allocator_calls


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
        assert row["tokens_per_s"] >= row["events_per_s"] * windows_tokens / windows_labels  # padding counts as tokens
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
        (line,) = [line for line in shown.splitlines() if line.startswith(category["name"] + " ")]
        assert f"{category['model']:.3f}" in line
        assert f"{category['marginal']:.3f}" in line


def test_memory_that_an_evaluation_uses_up_names_its_key(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def use_up(*_: Any) -> None:
        torch.zeros(2**60, dtype=torch.uint8)

    monkeypatch.setattr("eventkern.models.EventTransformer.metrics", use_up)
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
        (line,) = [line for line in shown.splitlines() if line.startswith(category["name"] + " ")]
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


def test_sigterm_ends_prepare_without_leavings(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(here.iterdir())
    monkeypatch.setattr("eventkern.data.prepare.write_binary", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert main(PREPARE.split()) == 143
    assert capsys.readouterr().err == "eventkern: terminated\n"
    assert sorted(here.iterdir()) == before


PREPARE = "prepare visits.csv --schema visits.toml --out new"
TRAIN = "train small.toml --run-dir new"
RESUME = TRAIN + " --resume run"
OTHERS = {  # edits of the table or its schema that leave the number of classes as it is
    "other day": ('"weekday"', '"day"'),
    "other values": ("site ", "spot "),
    "other streams": ('"person", entity = "person"', '"place", entity = "place"'),
    "one stream": (', { name = "time", entity = "all" }', ""),
    "other key": ('key = "person"', 'key = "place"'),
    "fewer rows": (f"{visits()[1]}\n", ""),
}


@pytest.mark.parametrize(
    ("arguments", "spoil", "message"),
    [
        ("", "", "Expected one of {prepare, train, evaluate, info}"),
        ("trian small.toml", "", "Expected one of {prepare, train, evaluate, info}"),
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


def test_the_shipped_configurations_are_those_of_the_notes() -> None:
    keys = ("src_seq_len", "tgt_seq_len", "id_category_size", "epochs", "batch_size", "grad_accum")
    sizes = ("d_model", "num_heads", "encoder_layers", "decoder_layers")

    def numbers(config: RunConfig) -> tuple[list[int], list[int]]:
        return [getattr(config, key) for key in keys], [getattr(config.model, key) for key in sizes]

    assert numbers(load_config("cpu_baseline")) == ([20, 20, 100, 20, 16, 1], [32, 4, 1, 1])
    assert numbers(load_config("gpu_optimized.json")) == ([200, 300, 1000, 500, 8, 8], [64, 8, 3, 5])
    assert load_config("cpu_baseline").data.store == load_config("gpu_optimized").data.store == "synthetic"
    for name in ("cpu_baseline.json", "gpu_optimized.json"):
        assert set(json.loads((CONFIGS / name).read_text())) <= {*keys, "model", "data"}
    flights = load_config("flights")
    assert (flights.src_seq_len, flights.tgt_seq_len, flights.data.store) == (20, 20, "flights")


def test_help_needs_no_torch() -> None:
    program = (
        "import sys; from eventkern.cli import main\n"
        "try: main(['train', 'flights', '--help'])\n"
        "except SystemExit as leave: assert not leave.code, leave.code\n"
        "late = {'torch', 'numpy', 'pyarrow', 'matplotlib'} & set(sys.modules); assert not late, late"
    )
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "--model.d-model" in run.stdout


def test_torchrun_takes_no_key_for_an_option_of_its_own() -> None:
    """It reads what stands after the program's name, too, and knows its own options by any beginning of theirs."""
    theirs = {option for action in get_args_parser()._actions for option in action.option_strings}
    ours = {"--" + key.replace("_", "-") for key in known_keys(Train)}
    assert {"--log-dir", "--run-path"} <= theirs
    assert {"--logger", "--run-dir"} <= ours
    assert [option for option in ours if any(their.startswith(option) for their in theirs)] == []


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes this process one of four ranks, two on each machine, that have not met."""

    def be(number: int) -> None:
        told = {"RANK": number, "LOCAL_RANK": number % 2, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}
        for name, value in told.items():
            monkeypatch.setenv(name, str(value))

    monkeypatch.setattr("eventkern.cli.FIRST_TO_END_S", 0.0)
    return be


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


def test_a_file_that_nobody_named_is_a_failure(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose(*_: Any) -> None:
        Path("gone").read_text()

    monkeypatch.setattr(Trainer, "fit", lose)
    assert main(["train", "small.toml", "--run-dir", "new"]) == 1
    assert capsys.readouterr().err == "eventkern: [Errno 2] No such file or directory: 'gone'\n"


def test_the_module_is_the_command() -> None:
    run = subprocess.run([sys.executable, "-m", "eventkern", "nothing"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "eventkern: Expected one of {prepare, train, evaluate, info}.\n"
