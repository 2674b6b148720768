"""Batches of windows, gathered from the store by the C++ (or CUDA) extension.

Shapes: B batch, K streams, S source events, T target events, C categories.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from eventkern import _C
from eventkern.data.sampler import IndexSampler, SamplerState
from eventkern.data.schema import DataError
from eventkern.data.store import EntityIndex, EventStore


@dataclass(frozen=True)
class EventBatch:
    """B windows of events.

    Attributes:
        sources: (B, K, S, C) int32. Stream k holds the last S events strictly before the anchor, of the anchor's own
            entity or of all events, left-padded with class 0.
        targets: (B, T + 1, C) int32. The anchor event and the T events of its key after it, right-padded with class 0.
        num_targets: () int64, labels of a category that are not padding (the same for every category).
    """

    sources: Tensor
    targets: Tensor
    num_targets: Tensor


class EventLoader:
    """Iterates over the windows of a store's split in batches.

    Args:
        store: the events.
        split: "train" (anchors shuffled anew each epoch) or "validation" (anchors in order).
        src_seq_len: S.
        tgt_seq_len: T.
        id_category_size: classes of an `id` category, padding and missing included; rarer classes read 1.
        batch_size: B, per rank.
        seed: of the shuffle.
        rank: of this process, in [0, world_size).
        world_size: number of ranks.
        device: where batches arrive.
        resident: keep the store on a CUDA device and gather there.

    Attributes:
        num_samples: windows of an epoch over all ranks.

    Raises:
        ValueError: an argument out of its range, or a split without windows.
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
    ) -> None:
        for name, value in (("src_seq_len", src_seq_len), ("tgt_seq_len", tgt_seq_len)):
            if value < 1:
                raise ValueError(f"{name} is {value}; want at least 1")
        self.device = torch.device(device)
        if resident and self.device.type != "cuda":
            raise ValueError(f"resident is True on device {self.device}; want a CUDA device")
        anchors = store.anchors(split, tgt_seq_len)
        if len(anchors) == 0:
            raise DataError(f"{store.path}: the {split} period has no event with a successor; move the schema's split")
        self.store = store
        self.num_samples = len(anchors)
        self.sampler = IndexSampler(
            self.num_samples, batch_size, seed=seed, shuffle=split == "train", rank=rank, world_size=world_size
        )
        self._gather = WindowGatherer(
            store,
            anchors,
            store.limits(split),
            src_seq_len=src_seq_len,
            tgt_seq_len=tgt_seq_len,
            id_category_size=id_category_size,
            device=self.device if resident else torch.device("cpu"),
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[EventBatch]:
        for indices in self.sampler:
            yield self._to_device(self._gather(indices))

    def _to_device(self, batch: EventBatch) -> EventBatch:
        if batch.sources.device == self.device:
            return batch
        parts = (batch.sources, batch.targets, batch.num_targets)
        return EventBatch(*(part.to(self.device, non_blocking=True) for part in parts))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order."""
        self.sampler.set_epoch(epoch)

    def state_dict(self) -> SamplerState:
        """The position reached in the epoch's order: batches already yielded are behind it."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: SamplerState) -> None:
        """Go on at a saved position, under any batch size and world size."""
        self.sampler.load_state_dict(state)


class WindowGatherer:
    """Turns window numbers into batches. Holds the arrays that the extension reads by address.

    Args:
        store: the events.
        anchors: (num_windows,) int64 positions in the key's index.
        limits: (num_keys,) int64, exclusive ends in the key's index of what targets may reach.
        src_seq_len: S.
        tgt_seq_len: T.
        id_category_size: classes of an `id` category.
        device: where the arrays live and batches are made: the CPU, or a CUDA device.
    """

    def __init__(
        self,
        store: EventStore,
        anchors: np.ndarray[Any, np.dtype[np.int64]],
        limits: np.ndarray[Any, np.dtype[np.int64]],
        *,
        src_seq_len: int,
        tgt_seq_len: int,
        id_category_size: int,
        device: torch.device,
    ) -> None:
        self.device = device
        self._kept: list[Tensor | np.ndarray[Any, Any]] = []
        streams = store.schema.streams
        indexes = {entity: self._index_addresses(store.index(entity)) for entity in store.schema.entities}
        self._sources_shape = (len(streams), src_seq_len, len(store.schema.categories))
        self._targets_shape = (tgt_seq_len + 1, len(store.schema.categories))
        self._window_gather = _C.WindowGather(
            codes=self._address(store.codes),
            code_bytes=store.codes.itemsize,
            num_categories=len(store.schema.categories),
            cuts=self._address(np.array(store.sizes(id_category_size), dtype=np.int32)),
            key=indexes[store.schema.key],
            anchors=self._address(anchors),
            limits=self._address(limits),
            streams=[indexes[stream.entity] if stream.entity else (0, 0, 0) for stream in streams],
            src_seq_len=src_seq_len,
            num_targets=tgt_seq_len + 1,
            out_bytes=4,
        )

    def _address(self, array: np.ndarray[Any, Any]) -> int:
        """The address of an array on self.device, kept alive as long as this gatherer."""
        if self.device.type == "cpu":
            kept = np.ascontiguousarray(array)
            self._kept.append(kept)
            return int(kept.__array_interface__["data"][0])
        # Bytes travel, since torch has no full set of unsigned dtypes.
        on_device = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).copy()).to(self.device)
        self._kept.append(on_device)
        return on_device.data_ptr()

    def _index_addresses(self, index: EntityIndex) -> tuple[int, int, int]:
        return self._address(index.entity_of_row), self._address(index.offsets), self._address(index.rows)

    def __call__(self, windows: Tensor) -> EventBatch:
        """Gather the windows with the given numbers: (B,) int64."""
        windows = windows.to(self.device)
        batch_size = len(windows)
        sources = torch.empty(batch_size, *self._sources_shape, dtype=torch.int32, device=self.device)
        targets = torch.empty(batch_size, *self._targets_shape, dtype=torch.int32, device=self.device)
        num_targets = torch.empty((), dtype=torch.int64, device=self.device)
        outputs = (sources.data_ptr(), targets.data_ptr(), num_targets.data_ptr())
        if self.device.type == "cpu":
            self._window_gather.cpu(windows.data_ptr(), batch_size, *outputs)
        else:
            stream = torch.cuda.current_stream(self.device).cuda_stream
            self._window_gather.cuda(windows.data_ptr(), batch_size, *outputs, sources.device.index, stream)
        return EventBatch(sources, targets, num_targets)
