"""Batches of windows in the sampler's order, gathered ahead and brought to the device."""

import copy
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eventkern.data.folds import Fold
from eventkern.data.prefetch import Placed, gathered, placed
from eventkern.data.sampler import IndexSampler, SamplerState
from eventkern.data.schema import DataError
from eventkern.data.store import EventStore
from eventkern.data.windows import EventBatch, WindowGatherer
from eventkern.plain import check_flag, check_integer

MAX_LENGTH = (1 << 31) - 2
"""Of a window: the extension counts its events in 32 bits."""


class Windows(NamedTuple):
    """Which windows a loader goes over, and where they are gathered."""

    split: Literal["train", "validation"]
    fold: Fold | None
    by_length: bool
    src_seq_len: int
    tgt_seq_len: int
    id_category_size: int
    device: torch.device


class EventLoader:
    """Iterates over the windows of a store's split in batches.

    Threads of the extension gather the next batches while the consumer works on one; they end, and free what they
    gathered, when the iteration ends, is closed or is dropped. A batch stays as it is while any of its tensors lives,
    and only then is its memory used again. On a CUDA device a batch is copied from pinned memory in one transfer, on a
    stream of its own, one batch ahead; work on the stream that is current when the batch is drawn waits for that copy,
    and the host never does.

    It can be copied and pickled. The copy has this loader's state, and threads and memory of its own; in another
    process it also maps the store anew.

    Args:
        store: the events.
        split: "train" or "validation".
        src_seq_len: S.
        tgt_seq_len: T.
        id_category_size: classes of an `id` category, padding and missing included; rarer classes read 1.
        batch_size: B, per rank.
        seed: of the shuffle.
        rank: of this process, in [0, world_size).
        world_size: number of ranks.
        device: where batches arrive.
        resident: keep the store on a CUDA device, where loaders of one store share it, and make indices and batches
            there on the current stream, which stays the same in an iteration, with no copy and nothing ahead.
        shuffle: a new order of the windows each epoch; None: of training, while validation is in order.
        window: of the sampler; None: the order is random over the whole split.
        drop_last: leave out a short last batch.
        pad_last: fill a short last batch with rows of padding, whose labels do not count: a compiled model then meets
            one shape alone.
        prefetch: batches gathered ahead of the consumer; 0: each is gathered when asked for, in the consumer's thread.
        fold: keys that validate over all time while the others train; None: the store's split decides by time.
        by_length: order the windows by their number of labels, and cut each batch's targets to (B, L + 1, C) with L
            the most labels of a window of it (or of another rank's, of that global batch), where padding alone is cut.

    Attributes:
        num_samples: windows of an epoch over all ranks.
        sampler: the order of the windows.

    Raises:
        ValueError: an argument out of its range, or a split without windows.
        DataError: as a ValueError, when an iteration begins: the store's file changed since it was opened.
    """

    def __init__(
        self,
        store: EventStore,
        split: Literal["train", "validation"],
        *,
        src_seq_len: int,
        tgt_seq_len: int,
        id_category_size: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        resident: bool = False,
        shuffle: bool | None = None,
        window: int | None = None,
        drop_last: bool = False,
        pad_last: bool = False,
        prefetch: int = 2,
        fold: Fold | None = None,
        by_length: bool = False,
    ) -> None:
        self.device = torch.device(device)
        resident = check_flag("resident", resident)
        if resident and self.device.type != "cuda":
            raise ValueError(f"resident is True on device {self.device}; want a CUDA device")
        shuffle = split == "train" if shuffle is None else check_flag("shuffle", shuffle)
        by_length = check_flag("by_length", by_length)
        if by_length and shuffle:
            raise ValueError("by_length is True with shuffle; want one of the two: lengths leave no order to shuffle")
        self.store = store
        self._windows = Windows(
            split=split,
            fold=fold,
            by_length=by_length,
            src_seq_len=check_integer("src_seq_len", src_seq_len, 1, MAX_LENGTH),
            tgt_seq_len=check_integer("tgt_seq_len", tgt_seq_len, 1, MAX_LENGTH),
            id_category_size=check_integer("id_category_size", id_category_size),
            device=self.device if resident else torch.device("cpu"),
        )
        self._make_gatherer()
        self.num_samples = self._gatherer.num_windows
        self.pad_last = check_flag("pad_last", pad_last)
        self.prefetch = check_integer("prefetch", prefetch, 0)
        self.sampler = IndexSampler(
            self.num_samples,
            batch_size,
            seed=seed,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
            window=window,
        )

    def _make_gatherer(self) -> None:
        """What holds addresses of this process, of the windows in their order."""
        store, windows = self.store, self._windows
        split, fold = windows.split, windows.fold
        anchors = store.anchors(split, windows.tgt_seq_len, fold)
        if len(anchors) == 0 and fold is not None:
            raise DataError(f"{store.path}: no key that {split} takes under {fold} has two events; take another fold")
        if len(anchors) == 0:
            raise DataError(f"{store.path}: the {split} period has no event with a successor; move the schema's split")
        limits = store.limits(split, fold)
        self._lengths: NDArray[np.int64] | None = None
        if windows.by_length:
            offsets = store.index(store.schema.key).offsets
            ends = limits[np.searchsorted(offsets, anchors, side="right") - 1]
            lengths = np.minimum(ends - anchors - 1, windows.tgt_seq_len)
            by_lengths = np.argsort(lengths, kind="stable")
            anchors, self._lengths = anchors[by_lengths], lengths[by_lengths]
        self._gatherer = WindowGatherer(
            store,
            anchors,
            limits,
            src_seq_len=windows.src_seq_len,
            tgt_seq_len=windows.tgt_seq_len,
            id_category_size=windows.id_category_size,
            device=windows.device,
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy, here or in another process, gathers by itself, from where this loader stands.
        state = {name: value for name, value in vars(self).items() if name not in ("_gatherer", "_lengths")}
        return {**state, "sampler": copy.copy(self.sampler)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make_gatherer()

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[EventBatch]:
        self.store.check_unchanged()
        is_resident = self._gatherer.device.type == "cuda"
        walk, consumed = self.sampler.walk(self.device if is_resident else "cpu"), self.sampler.begin()

        def unwrapped(placed: Placed) -> EventBatch:
            consumed(placed.position)
            batch = placed.batch.padded(self.sampler.batch_size) if self.pad_last else placed.batch
            if self._lengths is None:
                return batch
            longest = int(self._lengths[placed.position - 1])  # windows come in the order of their lengths
            return replace(batch, targets=batch.targets[:, : longest + 1])

        with closing(self._placed(walk)) as batches:
            yield from map(unwrapped, batches)  # no variable here may hold a batch that the consumer dropped

    def _placed(self, walk: Iterator[tuple[Tensor, int]]) -> Generator[Placed]:
        if self._gatherer.device.type == "cuda":
            for windows, position in walk:
                yield Placed(self._gatherer(windows), position)
            return
        batch_size = min(self.sampler.batch_size, self.num_samples)
        pinned = self.device.type == "cuda"
        batches = gathered(self._gatherer, walk, batch_size=batch_size, prefetch=self.prefetch, pinned=pinned)
        with closing(batches):
            yield from placed(batches, self._gatherer, self.device)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order."""
        self.sampler.set_epoch(epoch)

    def state_dict(self) -> SamplerState:
        """The position reached in the epoch's order: batches already yielded are behind it."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: SamplerState) -> None:
        """Go on at a saved position, under any batch size and world size."""
        self.sampler.load_state_dict(state)
