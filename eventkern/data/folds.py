"""k-fold validation by sequence key: whole keys are held out, over all time.

A fold answers another question than the store's split: not what comes next for entities that the model knows, but what
comes next for entities that it never saw. Ids, bins and their sizes stay those of the store, fitted before its split.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from eventkern.data.schema import FIRST_CLASS
from eventkern.data.vocabulary import MISSING_CLASS
from eventkern.plain import check_fields

if TYPE_CHECKING:
    from eventkern.data.store import EventStore

PERSON = b"eventkern fold 1"
"""Personalises the hash: another purpose, or another version of the assignment, is another hash."""


@dataclass(frozen=True)
class Fold:
    """One of several folds of a store's keys; its keys validate, those of the other folds train.

    A key belongs to the fold hash(value) mod `of`, whatever other keys there are: folds differ in size by chance, and
    a key stays where it is when events or keys are added, in any order, on any machine. A key without an event before
    the store's split has no value in the store; its number (keys in the order of their first appearance in the source)
    is hashed instead: another order of the source, or a split that moves across its first event, may move it.

    Args:
        number: of the fold, from 0.
        of: folds in all, at least 2.

    Raises:
        TypeError: a number that is no integer.
        ValueError: a number outside [0, of), or fewer than 2 folds.
    """

    number: int
    of: int

    def __post_init__(self) -> None:
        check_fields(self)
        if self.of < 2:
            raise ValueError(f"of is {self.of}; want at least 2 folds")
        if not 0 <= self.number < self.of:
            raise ValueError(f"number is {self.number}; want a fold in [0, {self.of})")

    def __str__(self) -> str:
        return f"fold {self.number} of {self.of}"

    def held_out(self, store: EventStore) -> NDArray[np.bool_]:
        """(keys,) whether each key of a store belongs to this fold."""
        return store.folds(self.of) == self.number

    def note(self, key: str) -> str:
        """What losses on this fold mean, in one line; `key` names the category of the keys."""
        return (
            f"{self} by {key}, over all time; its values of {key} were no labels in training; vocabulary and bins are "
            "the store's, fitted before its split; streams of other entities may show held-out keys' events"
        )


def folds_of_keys(store: EventStore, num_folds: int) -> NDArray[np.int64]:
    """(keys,) the fold of each key of a store."""
    key = store.schema.key
    index = store.index(key)
    column = store.schema.category_names.index(key)
    values = store.info["categories"][column]["values"]
    numbers = np.flatnonzero(np.diff(index.offsets))
    classes = store.codes[index.rows[index.offsets[numbers]], column]  # the first event of a key tells its class
    folds = np.zeros(len(index.offsets) - 1, np.int64)  # of keys without events any will do
    for number, code in zip(numbers.tolist(), classes.tolist(), strict=True):
        name = f"number {number}" if code == MISSING_CLASS else f"value {values[code - FIRST_CLASS]}"
        folds[number] = _hash(name) % num_folds
    return folds


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=PERSON).digest(), "little")
