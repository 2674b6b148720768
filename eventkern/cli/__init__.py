"""The command line: the only room that knows all the others. torch loads inside the commands."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from eventkern.cli.arguments import Evaluate, Export, Generate, Info, Prepare, RunConfig, Train, load_config, parse
from eventkern.cli.commands import command_line, info, prepare, train
from eventkern.cli.evaluating import evaluate
from eventkern.cli.exporting import export
from eventkern.cli.generating import generate
from eventkern.train.config import ConfigError
from eventkern.train.failures import OtherRankError, RunFailure
from eventkern.train.termination import Terminated, ending_quietly, is_unread, terminable

__all__ = ["RunConfig", "load_config", "main"]

FIRST_TO_END_S = 5.0
"""How long the silent ranks wait for the one that tells a mistake: torchrun ends all as soon as one has ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        Its exit code: 0, 2 for a user's mistake, 1 for a failure, 130 or 143 when stopped, 141 where nobody reads its
        output to the end (`| head`).
    """
    return ending_quietly(lambda: _main(list(sys.argv[1:] if arguments is None else arguments)))


def _main(arguments: list[str]) -> int:
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
                case Generate():
                    generate(command)
                case Export():
                    export(command)
                case Info():
                    info()
        sys.stdout.flush()
        return 0
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError) and is_unread():
            raise
        is_mistake = isinstance(error, (ConfigError, *_user_errors()))
        is_explained = is_mistake or isinstance(error, (OSError, FloatingPointError, RunFailure))
        if not is_explained:
            raise  # of our own making: the traceback is wanted
        if is_mistake and _is_told_by_another_rank():
            time.sleep(FIRST_TO_END_S)
            return 2
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        print(f"eventkern: {rank}{error}{way_on(error, arguments)}", file=sys.stderr)
        return 2 if is_mistake else 1
    except OtherRankError:
        return 1  # the rank that failed tells why
    except Terminated:
        print("eventkern: terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("eventkern: interrupted", file=sys.stderr)
        return 130


def _is_told_by_another_rank() -> bool:
    """Whether this is one of several ranks that have not met yet: a mistake is that of all on the machine then."""
    distributed = sys.modules.get("torch.distributed")
    have_met = distributed is not None and distributed.is_initialized()
    return "RANK" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0" and not have_met


def _user_errors() -> tuple[type[Exception], ...]:
    from eventkern.data import DataError
    from eventkern.train import CheckpointError

    return DataError, CheckpointError


def way_on(error: Exception, arguments: Sequence[str]) -> str:
    """After a damaged checkpoint: the same command from the newest one that verifies, where there is one."""
    from eventkern.train.checkpoint import DamagedCheckpointError

    if not isinstance(error, DamagedCheckpointError) or error.whole is None or arguments[0] != "train":
        return ""
    kept = [
        argument
        for before, argument in zip(["", *arguments], arguments, strict=False)
        if "--resume" not in (before, argument) and not argument.startswith("--resume=")
    ]
    return f"; to go on from it: {command_line([*kept, '--resume', str(error.whole)])}"
