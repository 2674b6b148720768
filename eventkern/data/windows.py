"""Windows of events, gathered from the store by the C++ (or CUDA) extension into one block of bytes per batch.

Shapes: B batch, K streams, S source events, T target events, C categories.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eventkern import _C
from eventkern.data.store import EventStore

SECTION_BYTES = 64
"""Each tensor of a block begins on a cache line of its own."""
ID_BYTES = 4


@dataclass(frozen=True)
class EventBatch:
    """B windows of events.

    Attributes:
        sources: (B, K, S, C) int32. Stream k holds the last S events strictly before the anchor, of the anchor's own
            entity or of all events, left-padded with class 0.
        targets: (B, T + 1, C) int32. The anchor event and the T events of its key after it, right-padded with class 0.
        num_targets: () int64, labels of a category that are not padding (the same for every category).

    From a loader the three are views of one block of memory, which each of them keeps.
    """

    sources: Tensor
    targets: Tensor
    num_targets: Tensor

    def padded(self, batch_size: int) -> "EventBatch":
        """This batch with rows of padding up to `batch_size`, whose labels do not count."""
        missing = batch_size - len(self.sources)
        if missing <= 0:
            return self
        sources, targets = (
            F.pad(part, (0, 0) * (part.ndim - 1) + (0, missing)) for part in (self.sources, self.targets)
        )
        return EventBatch(sources, targets, self.num_targets)


class WindowGatherer:
    """Turns window numbers into batches. Holds the arrays that the extension reads by address.

    A batch is one block of bytes, so that one transfer moves all of it: num_targets, sources, targets, each from a
    multiple of 64 bytes on.

    Args:
        store: the events.
        anchors: (num_windows,) int64 positions in the key's index.
        limits: (num_keys,) int64, exclusive ends in the key's index of what targets may reach.
        src_seq_len: S.
        tgt_seq_len: T.
        id_category_size: classes of an `id` category.
        device: where the arrays live and batches are made: the CPU, or a CUDA device, where gatherers of one store
            share its arrays.
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
        self.num_windows = len(anchors)
        self._kept: list[Tensor | np.ndarray[Any, Any]] = []
        self._stream: torch.cuda.Stream | None = None
        schema = store.schema
        num_streams, num_categories = len(schema.streams), len(schema.categories)
        self._sources_shape = (num_streams, src_seq_len, num_categories)
        self._targets_shape = (tgt_seq_len + 1, num_categories)
        source_size, target_size = src_seq_len * num_categories, (tgt_seq_len + 1) * num_categories
        self._sources_strides = (num_streams * source_size, source_size, num_categories, 1)
        self._targets_strides = (target_size, num_categories, 1)
        indexes = {entity: self._index_addresses(store, entity) for entity in schema.entities}
        self._window_gather = _C.WindowGather(
            codes=self._section(store, "codes", store.codes),
            code_bytes=store.codes.itemsize,
            num_categories=num_categories,
            cuts=self._address(np.array(store.sizes(id_category_size), dtype=np.int32)),
            key=indexes[schema.key],
            anchors=self._address(anchors),
            limits=self._address(limits),
            streams=[indexes[stream.entity] if stream.entity else (0, 0, 0) for stream in schema.streams],
            src_seq_len=src_seq_len,
            num_targets=tgt_seq_len + 1,
            out_bytes=ID_BYTES,
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

    def _section(self, store: EventStore, name: str, array: np.ndarray[Any, Any]) -> int:
        """The address of a section of the store: of the map itself, or of the copy that the device shares."""
        if self.device.type == "cpu":
            return self._address(array)
        shared = store.on_device(name, self.device)
        self._kept.append(shared)
        return shared.data_ptr()

    def _index_addresses(self, store: EventStore, entity: str) -> tuple[int, int, int]:
        index = store.index(entity)
        return (
            self._section(store, f"entity_of_row:{entity}", index.entity_of_row),
            self._section(store, f"offsets:{entity}", index.offsets),
            self._section(store, f"rows:{entity}", index.rows),
        )

    def _targets_offset(self, batch_size: int) -> int:
        return SECTION_BYTES + _in_sections(batch_size * self._sources_strides[0] * ID_BYTES)

    def block_bytes(self, batch_size: int) -> int:
        """Bytes of a batch of B windows."""
        return self._targets_offset(batch_size) + _in_sections(batch_size * self._targets_strides[0] * ID_BYTES)

    def batch(self, block: Tensor, batch_size: int) -> EventBatch:
        """The B windows in a block of bytes, as views of it."""
        ids = block.view(torch.int32)
        sources, targets = (batch_size, *self._sources_shape), (batch_size, *self._targets_shape)
        return EventBatch(
            sources=ids.as_strided(sources, self._sources_strides, SECTION_BYTES // ID_BYTES),
            targets=ids.as_strided(targets, self._targets_strides, self._targets_offset(batch_size) // ID_BYTES),
            num_targets=block.view(torch.int64)[0],
        )

    def outputs(self, block: Tensor, batch_size: int) -> tuple[int, int, int]:
        """Where in a block the extension writes sources, targets and num_targets of B windows."""
        address = block.data_ptr()
        return address + SECTION_BYTES, address + self._targets_offset(batch_size), address

    def submit(self, pool: _C.GatherPool, windows: Tensor, block: Tensor) -> int:
        """Has a pool gather windows of the CPU into a block; both must live until the ticket was waited for."""
        batch_size = len(windows)
        return pool.submit(self._window_gather, windows.data_ptr(), batch_size, *self.outputs(block, batch_size))

    def __call__(self, windows: Tensor) -> EventBatch:
        """Gather the windows with the given numbers, (B,) int64 on self.device, there and now (on its stream)."""
        batch_size = len(windows)
        block = torch.empty(self.block_bytes(batch_size), dtype=torch.uint8, device=self.device)
        outputs = self.outputs(block, batch_size)
        if self.device.type == "cpu":
            self._window_gather.cpu(windows.data_ptr(), batch_size, *outputs)
        else:
            stream = torch.cuda.current_stream(self.device)
            if stream != self._stream:
                for kept in self._kept:  # whose memory is not given to others before this stream has read it
                    if isinstance(kept, Tensor):
                        kept.record_stream(stream)
                self._stream = stream
            self._window_gather.cuda(windows.data_ptr(), batch_size, *outputs, block.device.index, stream.cuda_stream)
        return self.batch(block, batch_size)


def _in_sections(num_bytes: int) -> int:
    return -(-num_bytes // SECTION_BYTES) * SECTION_BYTES
