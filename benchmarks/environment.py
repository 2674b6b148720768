"""What a figure was measured on: without it a figure means nothing."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch

from eventkern import hardware
from eventkern.train import environment as run

ROOT = Path(__file__).parents[1]


def environment(device: str | torch.device = "cpu", *, commit: str | None = None) -> dict[str, object]:
    """What a run records (commit, versions, processor, threads, instruction set), and what timings depend on besides.

    To be asked before the work starts: the load average then tells what else kept the machine busy.

    Args:
        device: what is measured; of a CUDA device the driver and the compute capability are told too.
        commit: what is measured, where there is no git to ask.
    """
    facts: dict[str, object] = {**run.environment(), "load_average": round(os.getloadavg()[0], 2)}
    facts["commit"] = commit or f"{facts['commit']}{'+changes' if has_changes(ROOT) else ''}"
    if torch.device(device).type == "cuda":
        facts["driver"] = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
        facts["compute_capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return facts


def has_changes(checkout: Path) -> bool:
    """Whether tracked files differ from the commit; not where there is no git to tell."""
    return first_line("git", "-C", str(checkout), "status", "--porcelain", "--untracked-files=no") != ""


def first_line(*command: str) -> str:
    """The first line a command prints; empty where the command is missing, fails or prints nothing."""
    if shutil.which(command[0]) is None:
        return ""
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = completed.stdout.splitlines() if completed.returncode == 0 else []
    return lines[0].strip() if lines else ""


def hardware_slug(device: str | torch.device) -> str:
    """The device as a file name has it: `amd-epyc-2c`, `nvidia-h200`."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{hardware.cpu_model()}-{hardware.usable_cores()}c"
    # "(R)", "@ 2.60GHz" and "16-Core Processor" tell nothing that cores and model do not.
    name = re.sub(r"\([^)]*\)|@.*?(?=-\d+c$)|\d+-core processor|\bcpu\b|\bprocessor\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")
