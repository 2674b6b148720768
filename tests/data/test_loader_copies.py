"""EventLoader: copies, here and in another process, and states under epochs that were chosen before."""

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from eventkern.data import EventLoader, EventStore, Fold

SETTINGS: dict[str, Any] = {"src_seq_len": 5, "tgt_seq_len": 4, "id_category_size": 30, "batch_size": 7, "seed": 3}
WAYS = [copy.copy, copy.deepcopy, lambda loader: pickle.loads(pickle.dumps(loader))]
OPTIONS: list[dict[str, Any]] = [
    {"split": "train"},
    {"split": "train", "prefetch": 0, "rank": 1, "world_size": 2, "drop_last": True},
    {"split": "validation", "fold": Fold(0, 2), "pad_last": True},
    {"split": "validation", "by_length": True},
]


def parts(batches: Any) -> list[list[torch.Tensor]]:
    return [[batch.sources.clone(), batch.targets.clone(), batch.num_targets.clone()] for batch in batches]


def assert_same(these: list[list[torch.Tensor]], those: list[list[torch.Tensor]]) -> None:
    assert len(these) == len(those) > 0
    for one, other in zip(these, those, strict=True):
        for mine, yours in zip(one, other, strict=True):
            assert mine.equal(yours)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_copy_goes_on_by_itself(store: EventStore, way: Callable[[EventLoader], EventLoader], options: Any) -> None:
    loader = EventLoader(store, **SETTINGS, **options)
    loader.set_epoch(2)
    whole = parts(loader)
    loader.load_state_dict({**loader.state_dict(), "position": 14})
    made = way(loader)
    assert (made.num_samples, len(made)) == (loader.num_samples, len(loader))
    assert made.state_dict() == loader.state_dict()
    made.set_epoch(3)  # a state of its own
    assert loader.state_dict()["epoch"] == 2
    rest = parts(loader)
    assert_same(rest, whole[len(whole) - len(rest) :])
    if options["split"] == "train":
        assert not made.state_dict()["position"]
    made.set_epoch(2)
    assert_same(parts(made), whole)


def test_a_copy_made_amid_an_iteration_leaves_it_alone(store: EventStore) -> None:
    loader = EventLoader(store, "train", **SETTINGS)
    whole = parts(loader)
    batches = iter(loader)
    seen = parts([next(batches), next(batches)])
    made = pickle.loads(pickle.dumps(loader))
    assert made.state_dict() == loader.state_dict()
    resumed = copy.copy(made)
    resumed.load_state_dict(made.state_dict())
    assert_same(parts(made), whole)
    assert_same(parts(resumed), whole[2:])
    assert_same([*seen, *parts(batches)], whole)


def gathered_elsewhere(loader: EventLoader, results: Any) -> None:
    results.put([[part.tolist() for part in batch] for batch in parts(loader)])


def test_a_spawned_process_takes_a_loader(store: EventStore) -> None:
    loader = EventLoader(store, "train", **SETTINGS)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=gathered_elsewhere, args=(loader, results))
    process.start()
    found = results.get(timeout=120)
    process.join(timeout=60)
    assert process.exitcode == 0
    assert found == [[part.tolist() for part in batch] for batch in parts(loader)]


def test_an_epoch_that_was_chosen_wins_over_a_state_with_nothing_left(store: EventStore) -> None:
    loader = EventLoader(store, "train", **SETTINGS)
    for _ in loader:
        pass
    done = loader.state_dict()
    loader.set_epoch(1)
    whole = parts(loader)
    again = EventLoader(store, "train", **SETTINGS)
    again.set_epoch(1)
    again.load_state_dict(done)
    assert_same(parts(again), whole)
    again = EventLoader(store, "train", **SETTINGS)
    again.load_state_dict(done)
    assert list(again) == []
