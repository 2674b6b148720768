"""Schema, store, sampler and loader of event tables."""

from eventkern.data.entity_index import EntityIndex
from eventkern.data.folds import Fold
from eventkern.data.history import History
from eventkern.data.length_bucketed_sampler import LengthBucketedSampler
from eventkern.data.loader import EventLoader
from eventkern.data.permutation import permutation
from eventkern.data.sampler import IndexSampler
from eventkern.data.schema import Category, DataError, Schema, Stream
from eventkern.data.store import EventStore
from eventkern.data.windows import EventBatch

__all__ = [
    "Category",
    "DataError",
    "EntityIndex",
    "EventBatch",
    "EventLoader",
    "EventStore",
    "Fold",
    "History",
    "IndexSampler",
    "LengthBucketedSampler",
    "Schema",
    "Stream",
    "permutation",
]
