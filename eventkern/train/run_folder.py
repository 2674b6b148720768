"""Where a run lives, where it goes on, and who may write there."""

from __future__ import annotations

import datetime
import errno
import fcntl
import glob
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from eventkern.train.checkpoint import CHECKPOINTS, last_checkpoint
from eventkern.train.config import ConfigError
from eventkern.train.whole_files import remove_leftovers

RUNS = Path("runs")
LOCK_FILE = ".lock"
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


class InUseError(ConfigError):
    """Another process has the folder."""


_held: set[Path] = set()
"""The folders that this process has locked."""


def find_run(name: str, run_dir: Path | None = None, resume: str | None = None) -> tuple[Path, Path | None]:
    """The folder of a run, and the checkpoint to go on from, if any.

    Args:
        name: name of the configuration.
        run_dir: the folder asked for; None: that of the run resumed, else runs/<time>-<name>.
        resume: None: a fresh start; "auto": the last checkpoint of run_dir, else of the newest run of this name, else a
            fresh start; or the path of a checkpoint or of a run folder.

    Raises:
        ConfigError: no checkpoint at `resume`, a fresh start in a folder that holds checkpoints, a file in the place of
            the folder, or a folder that may not be written to.
    """
    if run_dir is not None:
        require_folder(run_dir, "--run-dir")
        require_folder(run_dir / CHECKPOINTS, "--run-dir")  # before an hour of training finds out
    checkpoint = None
    if resume == "auto":
        if run_dir is None:
            runs = RUNS.glob(f"????????-??????-{glob.escape(name)}")
            run_dir = max((run for run in runs if last_checkpoint(run) is not None), default=None)
        checkpoint = last_checkpoint(run_dir) if run_dir is not None else None
    elif resume is not None:
        path = Path(resume)
        checkpoint = last_checkpoint(path) if path.is_dir() else path
        if checkpoint is None or not os.path.lexists(path):  # a link to nothing is for the loader to name
            raise ConfigError(f"--resume {resume}: no checkpoint there; give a checkpoint, a run folder, or auto")
        if run_dir is None and checkpoint.parent.name == CHECKPOINTS:
            run_dir = checkpoint.parent.parent
    elif run_dir is not None and last_checkpoint(run_dir) is not None:
        raise ConfigError(f"{run_dir}: holds checkpoints of a run; add --resume auto, or choose another --run-dir")
    return run_dir or fresh_folder(f"-{name}"), checkpoint


@contextmanager
def found_and_locked(
    name: str, run_dir: Path | None = None, resume: str | None = None
) -> Iterator[tuple[Path, Path | None]]:
    """`find_run`, with its folder `locked` inside.

    Another process may have trained there between the look and the lock, so that what is there is looked up once more;
    a folder named by time that is another's by then is left to it, for the next second's.

    Args:
        name: as for `find_run`, which raises the same.
        run_dir: likewise.
        resume: likewise.
    """
    with ExitStack() as stack:
        while True:
            folder, checkpoint = find_run(name, run_dir, resume)
            is_named_by_time = run_dir is None and (checkpoint is None or folder not in checkpoint.parents)
            try:
                lock = stack.enter_context(ExitStack())
                lock.enter_context(locked(folder))
            except InUseError:
                if not is_named_by_time:
                    raise
                continue
            if is_named_by_time and os.listdir(folder) != [LOCK_FILE]:
                lock.close()
                continue
            yield find_run(name, folder, resume)
            return


def fresh_folder(suffix: str = "") -> Path:
    """runs/<time><suffix>, with the time of the next second that has no run yet."""
    now = datetime.datetime.now()
    while (path := RUNS / f"{now:%Y%m%d-%H%M%S}{suffix}").exists():
        now += datetime.timedelta(seconds=1)
    return path


def make_fresh_folder() -> Path:
    """Makes the folder that `fresh_folder` names; no other process has made it."""
    while True:
        with suppress(FileExistsError):  # another start of the same second
            path = fresh_folder()
            path.mkdir(parents=True)
            return path


def require_folder(path: Path, option: str) -> None:
    """Raises a ConfigError where a folder cannot be or be written to: it, or the one it would be in, forbids it."""
    for place in (path, *path.parents):
        if not place.exists():
            continue
        where = "" if place == path else f"{place} "
        if not place.is_dir():
            raise ConfigError(f"{option} {path}: {where}is a file; give the path of a folder, or move the file away")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ConfigError(
                f"{option} {path}: {where}may not be written to; give the path of another folder, or its permission"
            )
        return


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keeps other processes out of a run folder, which is made if absent; inside, the same process may lock it again.

    The lock is the kernel's (flock on a file in the folder): it ends with the process, by SIGKILL too, so that none is
    ever left behind. The file tells process and host, and goes with the lock; so does the folder, where it was made
    here and nothing was written to it. What a killed writer left half-written is removed. Under torchrun the main rank
    holds the lock for all.

    On NFS the lock reaches other hosts where the mount has a lock service, and on Lustre with `-o flock`; with an
    option such as `local_lock` it holds on one host only. Where the file system has no locks at all, a line says so.

    Raises:
        InUseError: another process holds the folder.
        ConfigError: nothing may be written to it.
        OSError: no space.

    Source:
        flock(2).
    """
    place = run_dir.resolve()
    if place in _held:
        yield
        return
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    path = run_dir / LOCK_FILE
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path)
    except OSError as error:
        _remove_empty(made)
        if error.errno not in NOT_WRITABLE:
            raise
        raise ConfigError(f"{run_dir}: {error.strerror}; choose a --run-dir where you may write") from error
    _held.add(place)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        remove_leftovers(run_dir)
        yield
    finally:
        _held.discard(place)
        path.unlink(missing_ok=True)  # before the lock ends, so that no file of another process is removed
        os.close(descriptor)
        _remove_empty(made)


def _lock(path: Path) -> int:
    """Opens and locks a file that is at `path` once it is locked; its holder before may have removed it meanwhile."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise InUseError(
                f"{path.parent}: in use by {holder}; wait for it to end, or choose another --run-dir"
            ) from None
        except OSError as error:
            if error.errno in WITHOUT_LOCKS:
                print(f"{path.parent}: its file system has no locks: nothing keeps other processes out", flush=True)
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        told = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # it has just locked the file
        return "another process"
    return f"process {told['pid']} on {told['host']}"


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
