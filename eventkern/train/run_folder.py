"""Where a run lives, and where it goes on."""

from __future__ import annotations

import datetime
from pathlib import Path

from eventkern.train.checkpoint import CHECKPOINTS, last_checkpoint
from eventkern.train.config import ConfigError

RUNS = Path("runs")


def find_run(name: str, run_dir: Path | None = None, resume: str | None = None) -> tuple[Path, Path | None]:
    """The folder of a run, and the checkpoint to go on from, if any.

    Args:
        name: name of the configuration.
        run_dir: the folder asked for; None: that of the run resumed, else runs/<time>-<name>.
        resume: None: a fresh start; "auto": the last checkpoint of run_dir, else of the newest run of this name, else a
            fresh start; or the path of a checkpoint or of a run folder.

    Raises:
        ConfigError: no checkpoint at `resume`, a fresh start in a folder that holds checkpoints, or a file in the place
            of the folder.
    """
    if run_dir is not None:
        require_folder(run_dir, "--run-dir")
    checkpoint = None
    if resume == "auto":
        if run_dir is None:
            run_dir = max(
                (link.parent.parent for link in RUNS.glob(f"????????-??????-{name}/{CHECKPOINTS}/last")), default=None
            )
        checkpoint = last_checkpoint(run_dir) if run_dir is not None else None
    elif resume is not None:
        path = Path(resume)
        checkpoint = last_checkpoint(path) if path.is_dir() else path
        if checkpoint is None or not checkpoint.is_file():
            raise ConfigError(f"--resume {resume}: no checkpoint there; give a checkpoint, a run folder, or auto")
        if run_dir is None and checkpoint.parent.name == CHECKPOINTS:
            run_dir = checkpoint.parent.parent
    elif run_dir is not None and last_checkpoint(run_dir) is not None:
        raise ConfigError(f"{run_dir}: holds checkpoints of a run; add --resume auto, or choose another --run-dir")
    return run_dir or fresh_folder(f"-{name}"), checkpoint


def fresh_folder(suffix: str = "") -> Path:
    """runs/<time><suffix>, with the time of the next second that has no run yet."""
    now = datetime.datetime.now()
    while (path := RUNS / f"{now:%Y%m%d-%H%M%S}{suffix}").exists():
        now += datetime.timedelta(seconds=1)
    return path


def require_folder(path: Path, option: str) -> None:
    """Raises a ConfigError where a folder cannot be, because it or one above it is a file."""
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            where = "is a file" if place == path else f"{place} is a file"
            raise ConfigError(f"{option} {path}: {where}; give the path of a folder, or move the file away")
