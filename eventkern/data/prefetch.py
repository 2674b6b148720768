"""Batches gathered ahead by threads of the extension, and copied ahead on a stream of their own."""

import functools
import os
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from itertools import islice
from typing import NamedTuple

import nvtx
import torch
from torch import Tensor

from eventkern import _C
from eventkern.data.windows import EventBatch, WindowGatherer

WAIT = nvtx.annotate("wait for batch", domain="eventkern")
COPY = nvtx.annotate("copy batch", domain="eventkern")


class Gathered(NamedTuple):
    """A batch in memory: its block of bytes, its windows, and the position in the epoch's order after them."""

    block: Tensor
    batch_size: int
    position: int


class Placed(NamedTuple):
    """A batch where the consumer wants it, and the position in the epoch's order after it."""

    batch: EventBatch
    position: int


class _Pending(NamedTuple):
    ticket: int
    windows: Tensor  # kept: the pool reads it
    gathered: Gathered


class Blocks:
    """Makes blocks of bytes whose memory is used again once no tensor looks at it; what is free goes with this object.

    Args:
        num_bytes: of a block.
        pinned: as the source of copies to a CUDA device.
    """

    def __init__(self, num_bytes: int, *, pinned: bool) -> None:
        self._num_bytes = num_bytes
        self._pinned = pinned
        self._free: list[Tensor] = []

    def new(self) -> Tensor:
        """A block, (num_bytes,) uint8."""
        if self._pinned:
            # torch's allocator of pinned memory keeps freed blocks for reuse, and waits for the copies out of them.
            return torch.empty(self._num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        owner = self._free.pop() if self._free else torch.empty(self._num_bytes, dtype=torch.uint8, device="cpu")
        lent = owner.numpy()
        weakref.finalize(lent, _give_back, weakref.ref(self), owner).atexit = False
        return torch.from_numpy(lent)  # whose storage holds `lent` until the last view of it is gone


def _give_back(blocks: weakref.ref[Blocks], owner: Tensor) -> None:
    if (held := blocks()) is not None:
        held._free.append(owner)


def gathered(
    gatherer: WindowGatherer, walk: Iterator[tuple[Tensor, int]], *, batch_size: int, prefetch: int, pinned: bool
) -> Generator[Gathered]:
    """Batches in the order of a walk, gathered by threads that end with the iteration.

    Args:
        gatherer: of a store on the CPU.
        walk: window numbers of each batch, at most `batch_size`, and the position after it.
        batch_size: most windows of a batch.
        prefetch: batches gathered ahead while the consumer works on one; 0: each is gathered when asked for, in the
            consumer's thread.
        pinned: gather into pinned memory.
    """
    blocks = Blocks(gatherer.block_bytes(batch_size), pinned=pinned)
    pool = _C.GatherPool(num_windows=gatherer.num_windows, num_threads=min(prefetch, available_cores()))
    pending: deque[_Pending] = deque()
    try:
        while True:
            for windows, position in islice(walk, prefetch + 1 - len(pending)):
                block = blocks.new()
                ticket = gatherer.submit(pool, windows, block)
                pending.append(_Pending(ticket, windows, Gathered(block, len(windows), position)))
                del block  # so that the consumer alone decides when it is free
            if not pending:
                return
            with WAIT:
                pool.wait(pending[0].ticket)
            yield pending.popleft().gathered
    finally:
        pool.close()


@functools.cache
def copy_stream(device_index: int) -> torch.cuda.Stream:
    """The stream for copies to a device: one for all iterations, since torch keeps freed memory for each stream."""
    return torch.cuda.Stream(device_index)


def copied(batches: Iterator[Gathered], gatherer: WindowGatherer, device: torch.device) -> Iterator[Placed]:
    """Batches on a CUDA device, each copied one batch ahead: the copy runs while the device computes on the one before.

    The memory of a batch belongs to the copying stream, which need not wait for the consumer then: the allocator takes
    it back only after the consumer's stream has done what was asked of it when the batch was dropped (record_stream).
    """
    side = copy_stream(torch.cuda.current_device() if device.index is None else device.index)
    ahead: deque[tuple[Gathered, torch.cuda.Event]] = deque()

    def handed_over() -> Placed:
        (block, batch_size, position), is_copied = ahead.popleft()
        consumer = torch.cuda.current_stream(device)
        consumer.wait_event(is_copied)
        block.record_stream(consumer)
        return Placed(gatherer.batch(block, batch_size), position)

    for block, batch_size, position in batches:
        with COPY, torch.cuda.stream(side):
            used = block[: gatherer.block_bytes(batch_size)]
            ahead.append((Gathered(used.to(device, non_blocking=True), batch_size, position), side.record_event()))
        if len(ahead) == 2:
            yield handed_over()
    while ahead:
        yield handed_over()


def placed(batches: Iterator[Gathered], gatherer: WindowGatherer, device: torch.device) -> Iterator[Placed]:
    """Batches on a device: views of their blocks on the CPU, copies elsewhere."""

    def place(gathered: Gathered) -> Placed:
        batch = gatherer.batch(gathered.block, gathered.batch_size)
        if device.type != "cpu":
            with COPY:
                parts = (batch.sources, batch.targets, batch.num_targets)
                batch = EventBatch(*(part.to(device) for part in parts))
        return Placed(batch, gathered.position)

    return copied(batches, gatherer, device) if device.type == "cuda" else map(place, batches)


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
