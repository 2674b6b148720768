"""What comes before events that are yet to come: the store's events, then those generated since.

Shapes: B sequences, K streams, S source events, N generated events, C categories.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eventkern.data.schema import FIRST_CLASS, Stream
from eventkern.data.store import EventStore
from eventkern.data.vocabulary import MISSING_CLASS


class History:
    """The histories of B keys from their newest known events on.

    Of a key whose newest known event is its row r, the store's rows after r count as unknown, whosever they are. A
    generated event belongs to its own key's future alone: the futures of other keys do not show it. The streams before
    a generated event hold, as those of an `EventBatch` do, the last S events strictly before it, left-padded: the
    store's rows up to r, then the generated events before it. Both belong to

    - a stream of the key: all that are the key's;
    - a stream of another entity: those of the class that the event itself has in that category (the store's rows of the
      value that the class stands for; none for class 1, which stands for no value);
    - a stream of all events: all.

    Args:
        store: the events.
        anchors: (B,) int64 positions in index(key).rows of the newest known events.
        src_seq_len: S.
        id_category_size: classes of an `id` category, padding and missing included; rarer classes read 1.

    Attributes:
        anchors: (B, C) int32, the newest known event of each key.

    Raises:
        ValueError: an anchor outside the index.
    """

    def __init__(
        self, store: EventStore, anchors: NDArray[np.int64], *, src_seq_len: int, id_category_size: int
    ) -> None:
        self.store = store
        self.src_seq_len = src_seq_len
        self.sizes = torch.tensor(store.sizes(id_category_size), dtype=torch.int32, device="cpu")
        index = store.index(store.schema.key)
        if len(anchors) and not 0 <= anchors.min() <= anchors.max() < len(index.rows):
            wrong = anchors[(anchors < 0) | (anchors >= len(index.rows))][0]
            raise ValueError(f"anchors holds {wrong}; want positions in [0, {len(index.rows)}) of the key's index")
        self._anchor_rows = np.asarray(index.rows[anchors])
        self._keys = index.entity_of_row[self._anchor_rows]
        self._entities = {entity: _entity_of_class(store, entity) for entity in store.schema.entities}
        self.anchors = self._rows(torch.from_numpy(self._anchor_rows))

    def sources(self, generated_BNC: Tensor) -> Tensor:
        """The streams (B, K, S, C) int32 before the newest event: the last of the N generated, or the anchor."""
        generated = generated_BNC.cpu().numpy()
        num_streams, num_categories = len(self.store.schema.streams), len(self.sizes)
        shape = (len(generated), num_streams, self.src_seq_len)
        rows = np.full(shape, -1, np.int64)
        newer: list[tuple[int, int, NDArray[np.int32]]] = []
        for sample, events in enumerate(generated):
            for number, stream in enumerate(self.store.schema.streams):
                known, made = self._before(stream, sample, events)
                made = made[-self.src_seq_len :]
                known = known[max(len(known) + len(made) - self.src_seq_len, 0) :]
                rows[sample, number, self.src_seq_len - len(known) - len(made) : self.src_seq_len - len(made)] = known
                if len(made):
                    newer.append((sample, number, made))
        sources = self._rows(torch.from_numpy(np.maximum(rows, 0)))
        sources[torch.from_numpy(rows < 0)] = 0
        for sample, number, made in newer:
            sources[sample, number, self.src_seq_len - len(made) :] = torch.from_numpy(made)
        return sources.view(*shape, num_categories)

    def _before(
        self, stream: Stream, sample: int, events: NDArray[np.int32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """The store's rows, at least the last S, and the generated events of a stream, each before the newest event."""
        anchor_row = int(self._anchor_rows[sample])
        end_row = anchor_row + 1 if len(events) else anchor_row
        if stream.entity is None:
            return np.arange(max(end_row - self.src_seq_len, 0), end_row), events[:-1]
        column = self.store.schema.category_names.index(stream.entity)
        if stream.entity == self.store.schema.key:
            entity, made = int(self._keys[sample]), events[:-1]
        elif len(events):
            code = int(events[-1, column])
            entity, made = int(self._entities[stream.entity][code]), events[:-1][events[:-1, column] == code]
            made = made if code != MISSING_CLASS else made[:0]
        else:
            entity, made = int(self.store.index(stream.entity).entity_of_row[anchor_row]), events
        if entity < 0:
            return np.empty(0, np.int64), made
        index = self.store.index(stream.entity)
        rows = index.rows[index.offsets[entity] : index.offsets[entity + 1]]
        return rows[: np.searchsorted(rows, end_row)], made

    def _rows(self, rows: Tensor) -> Tensor:
        """Rows of the store as the model reads them: rare classes as 1."""
        events = self.store.rows(rows)
        return torch.where(events < self.sizes, events, MISSING_CLASS)


def newest_events(store: EventStore) -> NDArray[np.int64]:
    """(keys with events,) int64: the position in index(key).rows of the last event of each."""
    offsets = store.index(store.schema.key).offsets
    return np.asarray(offsets[1:][np.diff(offsets) > 0] - 1)


def key_values(store: EventStore, anchors: NDArray[np.int64]) -> list[str | None]:
    """The value of the key of each event; None: it has no event before the split, so that the store lacks its value.

    Args:
        store: the events.
        anchors: positions in index(key).rows.
    """
    key = store.schema.key
    column = store.schema.category_names.index(key)
    codes = store.codes[store.index(key).rows[anchors], column].tolist()
    values = store.info["categories"][column]["values"]
    return [None if code < FIRST_CLASS else values[code - FIRST_CLASS] for code in codes]


def _entity_of_class(store: EventStore, entity: str) -> NDArray[np.int64]:
    """The number of the entity that each full class of a category stands for, -1 where there is none."""
    column = store.schema.category_names.index(entity)
    index = store.index(entity)
    numbers = np.flatnonzero(np.diff(index.offsets))
    of_class = np.full(store.class_sizes[column], -1, np.int64)
    of_class[store.codes[index.rows[index.offsets[numbers]], column]] = numbers
    of_class[:FIRST_CLASS] = -1
    return of_class
