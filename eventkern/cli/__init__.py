"""The command line: the only room that knows all the others. torch loads inside the commands."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from eventkern.cli.arguments import Evaluate, Info, Prepare, RunConfig, Train, load_config, parse
from eventkern.cli.commands import evaluate, info, prepare, train
from eventkern.train.config import ConfigError
from eventkern.train.failures import OtherRankError, RunFailure
from eventkern.train.termination import Terminated, terminable

__all__ = ["RunConfig", "load_config", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 2 for a user's mistake, 1 for a failure, 130 or 143 when stopped."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command = parse(arguments)
        with terminable():
            match command:
                case Prepare():
                    prepare(command)
                case Train():
                    train(command)
                case Evaluate():
                    evaluate(command)
                case Info():
                    info()
        return 0
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        is_mistake = isinstance(error, (ConfigError, *_user_errors()))
        is_explained = is_mistake or isinstance(error, (OSError, FloatingPointError, RunFailure))
        if not is_explained:
            raise  # of our own making: the traceback is wanted
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        print(f"eventkern: {rank}{error}{_way_on(error, arguments)}", file=sys.stderr)
        return 2 if is_mistake else 1
    except OtherRankError:
        return 1  # the rank that failed tells why
    except Terminated:
        print("eventkern: terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("eventkern: interrupted", file=sys.stderr)
        return 130


def _user_errors() -> tuple[type[Exception], ...]:
    from eventkern.data import DataError
    from eventkern.train import CheckpointError

    return DataError, CheckpointError, FileNotFoundError


def _way_on(error: Exception, arguments: Sequence[str]) -> str:
    """After a damaged checkpoint: the same command from the newest one that verifies, where there is one."""
    from eventkern.train.checkpoint import DamagedCheckpointError

    if not isinstance(error, DamagedCheckpointError) or error.whole is None or arguments[0] != "train":
        return ""
    kept = [
        argument
        for before, argument in zip(["", *arguments], arguments, strict=False)
        if "--resume" not in (before, argument) and not argument.startswith("--resume=")
    ]
    return f"; to go on from it: {shlex.join(['eventkern', *kept, '--resume', str(error.whole)])}"
