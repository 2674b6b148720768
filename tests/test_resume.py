"""A training run that is killed in the middle of an epoch and taken up again: every window once, none left out."""

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from eventkern.cli import main
from eventkern.data import EventBatch, EventLoader, EventStore
from eventkern.train.checkpoint import load_checkpoint

CONFIG = """
src_seq_len = 4
tgt_seq_len = 3
id_category_size = 10000
epochs = 2
batch_size = 6
grad_accum = 2
schedule = "constant"
log_every = 100
save_every = 4
device = "cpu"

[data]
store = "store"

[model]
d_model = 8
num_heads = 2
"""
BATCHES_PER_STEP = 2
# A training run that writes down the tickets of the anchors that reach the model, a line per forward pass, and sends
# itself a signal in forward pass KILL_AT. No two anchors have the same ticket.
PROGRAM = """
import json, os, sys, torch
from eventkern.cli import main
from eventkern.models import EventTransformer

torch.set_num_threads(1)
log, number, kill_at = open(sys.argv[1], "a"), int(sys.argv[2]), int(sys.argv[3])
forward, calls = EventTransformer.forward, 0

def recorded(self, batch):
    global calls
    calls += 1
    if calls == kill_at:
        os.kill(os.getpid(), number)
    if self.training:
        print(json.dumps(batch.targets[:, 0, 0].tolist()), file=log, flush=True)
    return forward(self, batch)

EventTransformer.forward = recorded
sys.exit(main(sys.argv[4:]))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visits_schema: Callable[..., str]) -> Path:
    """A folder with a store of 400 visits and a configuration, to work in."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(3)
    lines = ["when,ticket,person"]
    for number in range(400):
        lines.append(f"2024-{1 + number // 112:02}-{1 + number % 112 // 4:02}T{number % 4 * 6:02}:00:00,t{number},")
        lines[-1] += f"p{draw.randrange(6)}"
    Path("visits.csv").write_text("\n".join(lines) + "\n")
    Path("visits.toml").write_text(visits_schema("2024-03-15", "ticket", "person"))
    Path("small.toml").write_text(CONFIG)
    assert main(["prepare", "visits.csv", "--schema", "visits.toml", "--out", "store"]) == 0
    return tmp_path


def train(log: str, number: int = 0, kill_at: int = 0) -> tuple[int, list[list[int]]]:
    """The exit code of a run, and the tickets of each forward pass in training."""
    arguments = ["train", "small.toml", "--run-dir", "run", "--resume", "auto"]
    command = [sys.executable, "-c", PROGRAM, log, str(number), str(kill_at), *arguments]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert run.stderr == ""
    return run.returncode, [json.loads(line) for line in Path(log).read_text().splitlines()]


def tickets(batches: Iterable[EventBatch]) -> list[int]:
    return [ticket for batch in batches for ticket in batch.targets[:, 0, 0].tolist()]


# An epoch is 23 steps of two batches; forward pass 71 begins step 36, in the second epoch. The last checkpoint before
# it is of step 32; on SIGTERM the step is finished and saved.
@pytest.mark.parametrize(
    ("number", "exit_code", "saved_step"), [(signal.SIGKILL, -signal.SIGKILL, 32), (signal.SIGTERM, 0, 36)]
)
def test_a_run_that_is_killed_goes_on_with_exactly_the_windows_that_were_left(
    here: Path, number: signal.Signals, exit_code: int, saved_step: int
) -> None:
    store = EventStore.open("store")

    def loader(batch_size: int, **options: int) -> EventLoader:
        sizes = {"src_seq_len": 4, "tgt_seq_len": 3, "id_category_size": 10_000, "batch_size": batch_size}
        return EventLoader(store, "train", **sizes, **options)

    undisturbed = loader(6)
    epochs = [tickets(undisturbed)]
    undisturbed.set_epoch(1)
    epochs.append(tickets(undisturbed))
    assert len(set(epochs[0])) == len(epochs[0]) == 274
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]

    code, before = train("before", number, kill_at=71)
    assert code == exit_code
    assert len(before) == (70 if number == signal.SIGKILL else 72)
    state = load_checkpoint(here / "run/checkpoints/last")
    assert (state["step"], state["epochs_done"]) == (saved_step, 1)
    code, after = train("after")
    assert code == 0
    consumed = before[: saved_step * BATCHES_PER_STEP]
    assert [ticket for batch in consumed + after for ticket in batch] == epochs[0] + epochs[1]

    left = epochs[1][state["loader"]["position"] :]
    assert left[:6] == after[0]
    for world_size, batch_size in ((1, 5), (2, 6), (3, 4)):
        ranks = [loader(batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
        for rank in ranks:
            rank.load_state_dict(state["loader"])
        visited = tickets(batch for together in zip(*ranks, strict=True) for batch in together)
        assert visited == left[: len(visited)]
        assert len(left) - len(visited) < world_size
