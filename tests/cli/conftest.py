"""A small store of visits with its configuration and a run, in which commands are given."""

from __future__ import annotations

import datetime
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from eventkern.cli import main
from eventkern.train import device

WEEKDAY = """
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


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """Makes a folder with a table, its schema and store, a configuration and a run of it, of the files' texts."""

    def make(table: str, schema: str, config: str) -> Path:
        folder = tmp_path_factory.mktemp("made")
        (folder / "visits.csv").write_text(table)
        (folder / "visits.toml").write_text(schema)
        (folder / "small.toml").write_text(config)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(device, "keep_freed_memory", lambda: None)
            assert main(["prepare", "visits.csv", "--schema", "visits.toml", "--out", "store"]) == 0
            assert main(["train", "small.toml", "--run-dir", "run"]) == 0
        return folder

    return make


@pytest.fixture(scope="session")
def made(make_run: Callable[[str, str, str], Path], visits_schema: Callable[..., str]) -> Path:
    """A folder with a run of 20 steps; not to be written to."""
    schema = visits_schema("2024-03-01", "person", "place") + WEEKDAY
    return make_run("\n".join(visits()) + "\n", schema, CONFIG)


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder to work in."""
    shutil.copytree(made, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes this process one of four ranks, two on each machine, that have not met."""

    def be(number: int) -> None:
        told = {"RANK": number, "LOCAL_RANK": number % 2, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}
        for name, value in told.items():
            monkeypatch.setenv(name, str(value))

    monkeypatch.setattr("eventkern.cli.FIRST_TO_END_S", 0.0)
    return be
