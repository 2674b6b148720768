"""What a run was made with: enough to tell why two runs differ."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

from eventkern import hardware

PACKAGES = ("eventkern", "torch", "triton", "numpy")
CHECKOUT = Path(__file__).parents[2]


def environment() -> dict[str, str | int]:
    """Time, commit, versions, processor, threads, instruction set and GPUs; a bitwise repeat needs them equal."""
    facts: dict[str, str | int] = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "cpu": hardware.cpu_model(),
        "cores": hardware.usable_cores(),
        "threads": torch.get_num_threads(),
        "instruction_set": hardware.instruction_set(),
    }
    if torch.cuda.is_available():
        facts["gpus"] = ", ".join(torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count()))
        facts["cuda"] = str(torch.version.cuda)
    return facts


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
