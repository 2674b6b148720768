"""Which folder a run lives in, and which checkpoint it goes on from."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from eventkern.train import ConfigError
from eventkern.train.checkpoint import CheckpointFolder
from eventkern.train.run_folder import find_run, fresh_folder


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_run(path: str, step: int) -> Path:
    CheckpointFolder(Path(path, "checkpoints")).save({}, step, is_best=True)
    return Path(path, f"checkpoints/step-{step:08d}.pt")


def test_a_fresh_run_is_named_by_time_and_configuration() -> None:
    make_run("runs/20250101-000000-flights", 3)
    run_dir, checkpoint = find_run("flights")
    age = datetime.datetime.now() - datetime.datetime.strptime(run_dir.name, "%Y%m%d-%H%M%S-flights")
    assert run_dir.parent == Path("runs")
    assert datetime.timedelta(0) <= age < datetime.timedelta(minutes=1)
    assert checkpoint is None
    assert find_run("flights", Path("mine")) == (Path("mine"), None)


def test_two_runs_of_one_second_have_two_folders() -> None:
    folders = []
    for _ in range(3):
        folders.append(fresh_folder("-flights"))
        folders[-1].mkdir(parents=True)
    assert sorted(set(folders)) == folders
    assert find_run("flights")[0] not in folders
    for folder in folders:
        assert datetime.datetime.strptime(folder.name, "%Y%m%d-%H%M%S-flights")


def test_auto_takes_the_newest_run_of_the_configuration() -> None:
    make_run("runs/20250101-000000-flights", 3)
    newest = make_run("runs/20250102-000000-flights", 4)
    make_run("runs/20250103-000000-my-flights", 5)
    make_run("runs/20250104-000000-other", 6)
    assert find_run("flights", resume="auto") == (Path("runs/20250102-000000-flights"), newest)
    assert find_run("flights", Path("mine"), "auto") == (Path("mine"), None)
    mine = make_run("mine", 7)
    assert find_run("flights", Path("mine"), "auto") == (Path("mine"), mine)
    assert find_run("none", resume="auto")[1] is None


def test_a_path_is_a_run_folder_or_a_checkpoint() -> None:
    mine = make_run("mine", 7)
    assert find_run("flights", resume="mine") == (Path("mine"), mine)
    assert find_run("flights", resume=str(mine)) == (Path("mine"), mine)
    assert find_run("flights", resume="mine/checkpoints/last") == (Path("mine"), Path("mine/checkpoints/last"))
    assert find_run("flights", Path("branch"), "mine") == (Path("branch"), mine)
    mine.rename("moved.pt")
    run_dir, checkpoint = find_run("flights", resume="moved.pt")
    assert (run_dir.parent, checkpoint) == (Path("runs"), Path("moved.pt"))


def test_mistakes_are_named() -> None:
    make_run("mine", 7)
    Path("empty").mkdir()
    with pytest.raises(ConfigError, match="mine: holds checkpoints of a run; add --resume auto"):
        find_run("flights", Path("mine"))
    Path("afile").touch()
    with pytest.raises(ConfigError, match="--run-dir afile: is a file; give the path of a folder, or move the file"):
        find_run("flights", Path("afile"))
    with pytest.raises(ConfigError, match="--run-dir afile/x/y: afile is a file; give"):
        find_run("flights", Path("afile/x/y"), "auto")
    for missing in ("gone", "gone.pt", "empty"):
        with pytest.raises(ConfigError, match=f"--resume {missing}: no checkpoint there"):
            find_run("flights", resume=missing)
