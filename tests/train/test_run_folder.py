"""Which folder a run lives in, which checkpoint it goes on from, and who may write there."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eventkern.train import ConfigError, Trainer, TrainerConfig
from eventkern.train import run_folder as room
from eventkern.train.checkpoint import CheckpointFolder
from eventkern.train.run_folder import (
    LOCK_FILE,
    InUseError,
    find_run,
    found_and_locked,
    fresh_folder,
    locked,
    make_fresh_folder,
)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_run(path: str, step: int) -> Path:
    CheckpointFolder(Path(path, "checkpoints")).save({"model": {}}, step, is_best=True)
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


def test_a_name_with_brackets_is_found_again() -> None:
    newest = make_run("runs/20250102-000000-a[1]*", 4)
    make_run("runs/20250103-000000-a1", 5)
    assert find_run("a[1]*", resume="auto") == (newest.parents[1], newest)


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


HOLD = """
import sys, time
from pathlib import Path
from eventkern.train.run_folder import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def hold(run_dir: str) -> subprocess.Popen[str]:
    """Another process that holds the lock until its input ends."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", HOLD, run_dir], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_folder_in_use_is_refused_until_its_process_ends() -> None:
    with hold("mine") as process:
        Path("mine/metrics.jsonl").touch()
        Path("link").symlink_to("mine")
        wanted = rf"in use by process {process.pid} on \S+; wait for it to end, or choose another --run-dir"
        for name in ("mine", "link"):
            with pytest.raises(ConfigError, match=wanted), locked(Path(name)):
                pass
        with locked(Path("other")):
            pass
        process.communicate()
    assert process.returncode == 0
    assert os.listdir("mine") == ["metrics.jsonl"]
    with locked(Path("mine")):
        assert json.loads(Path("mine", LOCK_FILE).read_text())["pid"] == os.getpid()


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], object]], None]:
    """Has another process do something in the folder between the look and the lock."""

    def have(action: Callable[[Path], object]) -> None:
        actions = [action]

        def late(folder: Path) -> Any:
            if actions:
                actions.pop()(folder)
            return locked(folder)

        monkeypatch.setattr(room, "locked", late)

    return have


def test_a_run_that_came_between_the_look_and_the_lock_is_seen(meanwhile: Any) -> None:
    meanwhile(lambda folder: make_run(str(folder), 7))
    with pytest.raises(ConfigError, match="mine: holds checkpoints of a run"), found_and_locked("x", Path("mine")):
        pass
    assert os.listdir("mine") == ["checkpoints"]
    meanwhile(lambda folder: make_run(str(folder), 9))
    with found_and_locked("x", Path("mine"), "auto") as (folder, checkpoint):
        assert (folder, checkpoint) == (Path("mine"), Path("mine/checkpoints/step-00000009.pt"))


@pytest.mark.parametrize("is_over", [True, False])
@pytest.mark.parametrize("resume", [None, "auto"])
def test_two_starts_of_one_second_have_two_folders(meanwhile: Any, is_over: bool, resume: str | None) -> None:
    others: list[Path] = []
    descriptors: list[int] = []

    def start(folder: Path) -> None:
        others.append(folder)
        folder.mkdir(parents=True)
        descriptors.append(os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT))
        fcntl.flock(descriptors[0], fcntl.LOCK_EX)
        if is_over:
            (folder / "config.toml").touch()
            os.close(descriptors.pop())

    meanwhile(start)
    with found_and_locked("flights", resume=resume) as (folder, checkpoint):
        assert [folder, *others] == sorted({folder, *others}, reverse=True)
        assert (os.listdir(folder), checkpoint) == ([LOCK_FILE], None)
    assert not folder.exists()
    if not is_over:
        with pytest.raises(InUseError, match=f"{others[0]}: in use by"), found_and_locked("flights", others[0]):
            pass
        os.close(descriptors.pop())


def test_a_folder_that_another_has_made_meanwhile_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(["runs/1", "runs/1", "runs/2"])
    monkeypatch.setattr(room, "fresh_folder", lambda: Path(next(names)))
    assert [make_fresh_folder() for _ in range(2)] == [Path("runs/1"), Path("runs/2")]


def test_a_trainer_keeps_out_of_a_folder_in_use(tiny: Any) -> None:
    loaders = (tiny.Loader(6), tiny.Loader(4, num_samples=9, seed=1))
    trainer = Trainer(tiny.Model(), TrainerConfig(max_steps=1, device="cpu"), loaders, run_dir="mine")
    with hold("mine") as process:
        with pytest.raises(ConfigError, match=f"mine: in use by process {process.pid}"):
            trainer.fit()
        assert os.listdir("mine") == [LOCK_FILE]
        process.communicate()
    assert trainer.fit().step == 1
    assert LOCK_FILE not in os.listdir("mine")


def test_sigkill_leaves_no_lock_behind() -> None:
    with hold("mine") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert Path("mine", LOCK_FILE).exists()
        with locked(Path("mine")):
            assert json.loads(Path("mine", LOCK_FILE).read_text())["pid"] == os.getpid()
        assert not Path("mine", LOCK_FILE).exists()


def test_one_process_may_lock_its_folder_again() -> None:
    run_dir = Path("mine")
    with locked(run_dir):
        with locked(run_dir.absolute()):
            pass
        assert (run_dir / LOCK_FILE).exists()
        program = HOLD.replace("sys.stdin.read()", "")
        other = subprocess.run([sys.executable, "-c", program, "mine"], capture_output=True, text=True, check=False)
        assert f"in use by process {os.getpid()}" in other.stderr
        assert other.returncode == 1
    with locked(run_dir):
        pass


def test_folders_made_for_nothing_go_and_others_stay() -> None:
    Path("there").mkdir()
    for name in ("there", "a/b/c"):
        with locked(Path(name)):
            assert os.listdir(name) == [LOCK_FILE]
    assert os.listdir() == ["there"]
    with locked(Path("a/b/c")):
        Path("a/b/x").touch()
    assert os.listdir("a/b") == ["x"]
    with pytest.raises(KeyboardInterrupt), locked(Path("new")):
        raise KeyboardInterrupt
    assert not Path("new").exists()


def test_a_lock_file_that_its_holder_has_just_removed_is_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened by this process, then unlinked by its holder, then locked: a third process may have made another."""
    lock, opened = fcntl.flock, []

    def lock_late(descriptor: int, how: int) -> None:
        if not opened:
            Path("mine", LOCK_FILE).unlink()
        opened.append(descriptor)
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    with locked(Path("mine")):
        assert len(opened) == 2
        assert Path("mine", LOCK_FILE).exists()
        monkeypatch.setattr(fcntl, "flock", lock)
        program = HOLD.replace("sys.stdin.read()", "")
        assert subprocess.run([sys.executable, "-c", program, "mine"], capture_output=True, check=False).returncode == 1


@pytest.mark.parametrize(
    ("number", "error"), [(errno.EACCES, ConfigError), (errno.EROFS, ConfigError), (errno.ENOSPC, OSError)]
)
@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_no_permission_is_the_users_mistake_and_no_space_a_failure(
    monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception], call: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    before = os.listdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path if call == "mkdir" else os, call, refuse)
        with pytest.raises(error, match=os.strerror(number)) as caught, locked(Path("a/b")):
            pass
    assert isinstance(caught.value, ConfigError) == (error is ConfigError)
    assert os.listdir() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named() -> None:
    Path("mine").mkdir(mode=0o555)
    with pytest.raises(ConfigError, match="mine: Permission denied; choose a --run-dir"), locked(Path("mine")):
        pass


def test_a_file_system_without_locks_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(Path("mine")):
        assert Path("mine", LOCK_FILE).exists()
    assert capsys.readouterr().out == "mine: its file system has no locks: nothing keeps other processes out\n"
