"""What a run was made with: enough to tell why two runs differ."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from eventkern import hardware
from eventkern.train.whole_files import write_file

CONFIG_FILE = "config.toml"
ENVIRONMENT_FILE = "environment.json"
EARLIER = "earlier_attempts"
PACKAGES = ("eventkern", "triton", "numpy")
CHECKOUT = Path(__file__).parents[2]


def environment() -> dict[str, str | int]:
    """Time, commit, versions, processor, threads, instruction set and GPUs; a bitwise repeat needs them equal."""
    facts: dict[str, str | int] = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "torch": str(torch.__version__),  # with its build, which the package's metadata may lack: 2.11.0+cu130
        "cpu": hardware.cpu_model(),
        "cores": hardware.usable_cores(),
        "threads": torch.get_num_threads(),
        "instruction_set": hardware.instruction_set(),
    }
    if torch.cuda.is_available():
        facts["gpus"] = ", ".join(torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count()))
        facts["cuda"] = str(torch.version.cuda)
    return facts


def record_run(run_dir: Path, settings: Mapping[str, Any], **facts: str | int) -> None:
    """Writes config.toml and environment.json, each whole or not at all; under torchrun the main rank does, for all.

    environment.json is this attempt at the run: `environment()`, the command line, host, process, number of ranks, and
    `facts`. Under "earlier_attempts" it keeps those before it, oldest first.

    Args:
        run_dir: the run's folder, made if absent.
        settings: the resolved configuration, as plain values.
        **facts: what only the caller knows, such as precision, seed and the step that the attempt starts from.
    """
    import tomli_w

    run_dir.mkdir(parents=True, exist_ok=True)
    write_file(run_dir / CONFIG_FILE, tomli_w.dumps(settings))
    path = run_dir / ENVIRONMENT_FILE
    attempt: dict[str, Any] = {
        **environment(),
        "command": shlex.join(sys.orig_argv),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        **facts,
    }
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        attempt[EARLIER] = [*before.pop(EARLIER, []), before]
    write_file(path, json.dumps(attempt, indent=2) + "\n")


def git_commit() -> str:
    """The commit of the checkout that eventkern runs from, or "none" for an installed package."""
    if not (CHECKOUT / ".git").exists():
        return "none"
    try:
        command = ["git", "-C", str(CHECKOUT), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # no git here, or nothing committed yet


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
