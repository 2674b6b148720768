"""What counting alone can predict: the marginal and the first-order baseline of each category, in nats a label.

With n the counts over the training labels and V the classes that a label can have (all but padding):

    marginal     p(b)     = (n(b) + 1) / (n + V)               add-one: an unseen class, often class 1, has its price
    first order  p(b | a) = (n(a, b) + k p(b)) / (n(a) + k)    a: the category's own value in the key's previous event

k is 1, 10 or 100, chosen for each category on the last tenth of the training labels, counts being of those before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from eventkern.data.folds import Fold
from eventkern.data.schema import DataError
from eventkern.data.store import EventStore

STRENGTHS = (1, 10, 100)
TAIL = 0.1


@dataclass(frozen=True)
class Baselines:
    """Validation cross-entropies of each category, each a mean over the labels that the model is judged by.

    Attributes:
        names: (C,) names of the categories.
        num_labels: validation labels: events after the split (or of the fold's keys) that have a predecessor of their
            key.
        classes: (C,) int64 classes under `id_category_size`.
        marginal: (C,) float64 nats.
        first_order: (C,) float64 nats.
        first_order_k: (C,) int64, the k chosen.
        floor: (C,) float64 nats, the known entropy given the past; nan where it is not known, and on a fold, since it
            is measured on the labels after the split.
    """

    names: tuple[str, ...]
    num_labels: int
    classes: NDArray[np.int64]
    marginal: NDArray[np.float64]
    first_order: NDArray[np.float64]
    first_order_k: NDArray[np.int64]
    floor: NDArray[np.float64]


def baselines(
    store: EventStore, id_category_size: int, fold: Fold | None = None, counted_on: EventStore | None = None
) -> Baselines:
    """Count over the training labels, judge on the validation labels.

    A label is an event with a predecessor of its key; one of class 1 (missing or out-of-vocabulary) counts like others.

    Args:
        store: a prepared store.
        id_category_size: codes at or above a category's size under it read 1, as they do for the model.
        fold: keys that validate over all time while the others train; None: the store's split decides by time.
        counted_on: the store whose training labels are counted, of the same classes; None: `store` itself.

    Raises:
        DataError: one of the periods, or the fold or all others, holds no label.
    """
    counted_on = counted_on or store
    sizes = store.sizes(id_category_size)
    training = _labels(counted_on, "training", fold)
    validation = _labels(store, "validation", fold)

    marginal, first_order, strengths = [], [], []
    for number, size in enumerate(sizes):
        labels, given = (_column(counted_on, number, size)[rows] for rows in training)
        nine_tenths = max(int(len(labels) * (1 - TAIL)), 1)
        fitted = _Counts(labels[:nine_tenths], given[:nine_tenths], size)
        tail = slice(min(nine_tenths, len(labels) - 1), None)
        losses = [fitted.first_order(labels[tail], given[tail], k) for k in STRENGTHS]
        strengths.append(STRENGTHS[int(np.argmin(losses))])
        counts = _Counts(labels, given, size)
        judged, before = (_column(store, number, size)[rows] for rows in validation)
        marginal.append(float(-np.log(counts.p[judged]).mean()))
        first_order.append(counts.first_order(judged, before, strengths[-1]))

    floor = store.floor(id_category_size) if fold is None else None
    return Baselines(
        names=store.schema.category_names,
        num_labels=len(validation[0]),
        classes=np.array(sizes, np.int64),
        marginal=np.array(marginal),
        first_order=np.array(first_order),
        first_order_k=np.array(strengths, np.int64),
        floor=np.full(len(sizes), np.nan) if floor is None else floor,
    )


def _labels(
    store: EventStore, period: Literal["training", "validation"], fold: Fold | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of a period's labels in their order, and those of their predecessors."""
    index = store.index(store.schema.key)
    has_predecessor = np.ones(len(index.rows), bool)
    has_predecessor[index.offsets[:-1][np.diff(index.offsets) > 0]] = False
    positions = np.flatnonzero(has_predecessor)
    rows, previous = index.rows[positions], index.rows[positions - 1]
    is_held_out = rows >= store.split_row if fold is None else fold.held_out(store)[index.entity_of_row[rows]]
    is_wanted = is_held_out == (period == "validation")
    if not is_wanted.any():
        mend = "move the split" if fold is None else f"take another than {fold}"
        raise DataError(f"{store.path}: no {period} event has a predecessor of its key; {mend}")
    rows, previous = rows[is_wanted], previous[is_wanted]
    by_time = np.argsort(rows, kind="stable")
    return rows[by_time], previous[by_time]


def _column(store: EventStore, number: int, size: int) -> NDArray[np.int64]:
    column = np.array(store.codes[:, number], np.int64)
    column[column >= size] = 1
    return column


class _Counts:
    """Counts of labels and of (previous value, label) pairs; pairs are kept sparse."""

    def __init__(self, labels: NDArray[np.int64], given: NDArray[np.int64], size: int) -> None:
        self.size = size
        self.p = (np.bincount(labels, minlength=size) + 1) / (len(labels) + size - 1)
        self.given = np.bincount(given, minlength=size)
        self.pairs, self.pair_counts = np.unique(given * size + labels, return_counts=True)

    def first_order(self, labels: NDArray[np.int64], given: NDArray[np.int64], k: int) -> float:
        """Mean of -log p(label | given)."""
        pairs = given * self.size + labels
        at = np.minimum(np.searchsorted(self.pairs, pairs), len(self.pairs) - 1)
        together = np.where(self.pairs[at] == pairs, self.pair_counts[at], 0)
        return float(-np.log((together + k * self.p[labels]) / (self.given[given] + k)).mean())
