"""The processes of a run under torchrun, and what they do together; a plain process is alone."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from eventkern.train.config import ConfigError
from eventkern.train.device import select_device
from eventkern.train.failures import OtherRankError, RunFailure, first_line

Value = TypeVar("Value")

TIMEOUT = datetime.timedelta(minutes=10)
"""How long a rank waits for the others: longer than the slowest thing that one does alone (preparing a store)."""
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run.

    Attributes:
        device: where this rank computes; on CUDA a device of its own.
        rank: in [0, world_size); rank 0, the main one, prints and writes files.
        world_size: how many there are.
        is_alone: there is no process group: nothing here touches torch.distributed.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    is_alone: bool = True

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place: the same bits on every rank. Does not wait for the device."""
        if not self.is_alone:
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, value: Value) -> list[Value]:
        """The plain values of all ranks, in their order, on every rank."""
        if self.is_alone:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """A phase that all ranks end before any goes on; inside, none may wait for another.

        Raises:
            OtherRankError: the phase went well here, or failed as it did on a lower rank: that one raises the reason.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.is_alone:
                raise
            failure = error
        failed = self.gather(failure is not None)
        if True not in failed:
            return
        with suppress(RuntimeError):
            torch.distributed.barrier()  # nobody leaves before all have heard: they would find a lost rank
        if failure is not None and failed.index(True) == self.rank:
            raise failure
        raise OtherRankError(f"rank {failed.index(True)} has failed") from failure


@contextmanager
def join(device: str = "auto") -> Iterator[Ranks]:
    """Joins the processes that torchrun has started, over gloo on the CPU and nccl on CUDA; leaves them at the end.

    Args:
        device: of the configuration: auto | cpu | cuda | mps; on CUDA, a rank takes the one of its local rank.

    Raises:
        ConfigError: a device that is not there, or an environment that torchrun did not make.
        RunFailure: the ranks do not find one another, such as where the port is in use.
    """
    chosen = select_device(device)
    if "RANK" not in os.environ:
        yield Ranks(chosen)
        return
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise ConfigError(f"RANK is set, but {', '.join(missing)} is not: start ranks by torchrun, or unset RANK")
    if chosen.type == "cuda":
        wanted, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if wanted > there:  # said by each rank of the node, as every mistake before they meet
            raise ConfigError(f"--nproc-per-node is {wanted}, but there are {there} CUDA devices: give at most that")
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    elif chosen.type != "cpu":
        raise ConfigError(f"device is {device!r}, but ranks compute on cpu or cuda: give one of them")
    # what ranks tell one another as plain values goes over gloo, past the GPU
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    try:
        torch.distributed.init_process_group(backend, timeout=TIMEOUT)
    except RuntimeError as error:  # DistError, and gloo's own
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        mend = "start again, with a --master-port that nothing uses"
        raise RunFailure(f"the ranks do not meet at {where}: {mend} ({first_line(error)})") from error
    group = torch.distributed
    yield Ranks(chosen, group.get_rank(), group.get_world_size(), is_alone=False)
    group.barrier()  # nobody leaves while another still talks to it
    group.destroy_process_group()  # not after an error: it may wait for ranks that are gone
