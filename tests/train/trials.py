"""Runs commands in processes that are made to die. A program of its own: it loads what training needs once, forks one
child for each trial, and so pays the imports once. Trials come as lines of JSON, and an exit code answers each."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from eventkern.train.checkpoint import CheckpointFolder

CAPABILITIES_VERSION = 0x20080522


def serve() -> None:
    torch.set_num_threads(1)
    load_rooms()
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # what the commands print goes elsewhere
    answers.write("ready\n")
    for line in sys.stdin:
        answers.write(json.dumps(run(json.loads(line))) + "\n")


def load_rooms() -> None:
    """What the commands would otherwise load in each child."""
    import matplotlib.figure  # noqa: F401
    import tomli_w  # noqa: F401
    import torch._dynamo
    import torch.utils.tensorboard  # noqa: F401

    import eventkern.data.loader
    import eventkern.data.shipped
    import eventkern.models
    import eventkern.train.lineage
    import eventkern.train.trainer  # noqa: F401


def run(trial: dict[str, Any]) -> int:
    """The exit code of a trial; that of a child that a signal ended is the signal's number, negative."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code = 1
        try:
            code = command(trial, writer)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    os.close(writer)
    if "kill_after_steps" in trial and os.read(reader, 1):
        time.sleep(trial["delay_s"])
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reader)
    return os.waitstatus_to_exitcode(status)


def command(trial: dict[str, Any], writer: int) -> int:
    """In the child: what the trial asks for is made to happen, then the command runs."""
    from eventkern.cli import main

    os.chdir(trial["folder"])
    output = os.open(trial["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if "kill_after_steps" in trial:
        at_step(trial["kill_after_steps"], lambda: os.write(writer, b"!"))
    if "signal_at_step" in trial:
        number, step = trial["signal_at_step"]
        at_step(step, lambda: os.kill(os.getpid(), number))
    if "fill_at_step" in trial:  # the disk of a file, but for some bytes
        step, file, room = trial["fill_at_step"]
        at_step(step, lambda: Path(file).write_bytes(bytes(shutil.disk_usage(Path(file).parent).free - room)))
    if "kill_in_forward" in trial:
        kill_at_forward(trial["kill_in_forward"])
    if "kill_at_call" in trial:
        kill_at_call(*trial["kill_at_call"])
    if "kill_at_byte" in trial:  # of any file: the kernel ends the process inside the write
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (trial["kill_at_byte"], -1))
    if trial.get("without_privileges"):
        drop_privileges()
    if "save" in trial:
        return save(**trial["save"])
    return main(trial["arguments"])


def save(path: str, value: float, step: int, is_best: bool) -> int:
    """One save alone, of a state in which every number is `value`."""
    state = {"model": {"weight": torch.full((100,), value)}, "step": step}
    CheckpointFolder(Path(path)).save(state, step, is_best=is_best)
    return 0


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(step: int, action: Any) -> None:
    """After the `step`-th optimizer step of this process."""
    taken = 0

    def count(*_: Any) -> None:
        nonlocal taken
        taken += 1
        if taken == step:
            action()

    register_optimizer_step_post_hook(count)


def kill_at_forward(number: int) -> None:
    """In the `number`-th forward of training in this process, before it does anything."""
    from eventkern.models import EventTransformer

    calls, forward = 0, EventTransformer.forward

    def counted(self: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            kill()
        return forward(self, batch)

    EventTransformer.forward = counted  # type: ignore[method-assign]


def kill_at_call(name: str, number: int, moment: str) -> None:
    """Before or after the `number`-th call of os.<name> in this process."""
    calls, function = 0, getattr(os, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and moment == "before":
            kill()
        result = function(*arguments, **options)
        if calls == number and moment == "after":
            kill()
        return result

    setattr(os, name, counted)


def drop_privileges() -> None:
    """Root keeps its name but none of its powers, so that the permissions of files hold for it too."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(CAPABILITIES_VERSION, 0), (ctypes.c_uint32 * 6)()
    if os.geteuid() == 0 and libc.capset(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    serve()
