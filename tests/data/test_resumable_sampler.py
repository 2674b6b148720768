"""What samplers share under the loaders of others: torch's, torchdata's StatefulDataLoader, and accelerate."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from eventkern.data import IndexSampler, LengthBucketedSampler, permutation
from eventkern.data.resumable_sampler import ResumableSampler

NUM_SAMPLES = 41
LENGTHS = np.random.default_rng(2).integers(1, 60, NUM_SAMPLES)
MAKERS: dict[str, Callable[..., ResumableSampler]] = {
    "indices": lambda **options: IndexSampler(NUM_SAMPLES, 4, seed=3, **options),
    "windows": lambda **options: IndexSampler(NUM_SAMPLES, 4, seed=3, window=32, **options),
    "lengths": lambda **options: LengthBucketedSampler(LENGTHS, 128, seed=3, **options),
}
WORKERS = [
    {},
    {"num_workers": 2, "multiprocessing_context": "fork"},
    {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True},
]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata's own use of it
]


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Callable[..., ResumableSampler]:
    return MAKERS[request.param]


def drawn(batches: Any) -> list[list[int]]:
    return [batch.tolist() for (batch,) in batches]


def epochs(make: Callable[..., ResumableSampler], count: int) -> list[list[list[int]]]:
    """The batches of epochs that nothing interrupted."""
    sampler = make()
    found = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        found.append([batch.tolist() for batch in sampler])
    assert sorted(chain(*found[0])) == list(range(NUM_SAMPLES))
    assert found[0] != found[1]
    return found


def stateful(sampler: ResumableSampler, options: dict[str, Any]) -> Any:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    return torchdata.StatefulDataLoader(TensorDataset(torch.arange(NUM_SAMPLES)), batch_sampler=sampler, **options)


@pytest.mark.parametrize("options", WORKERS)
@pytest.mark.parametrize("stop_after", [0, 1, 5, "all", "end"])
def test_torchdata_goes_on_where_it_was_saved(
    make: Callable[..., ResumableSampler], options: dict[str, Any], stop_after: int | str
) -> None:
    """`all`: saved with the last batch, before anyone knows that it was that; `end`: the epoch is done."""
    whole = epochs(make, 3)
    number = {"all": len(whole[0]), "end": len(whole[0]) + 1}.get(stop_after, stop_after)
    sampler = make()
    loader = stateful(sampler, options)
    state = loader.state_dict() if number == 0 else None
    for count, _ in enumerate(loader, 1):
        if count == number:
            state = loader.state_dict()
    state = loader.state_dict() if state is None else state
    again = make()
    loader = stateful(again, options)
    loader.load_state_dict(state)
    is_done = number >= len(whole[0])
    if is_done:
        again.set_epoch(1)
        assert drawn(loader) == whole[1]
    else:
        again.set_epoch(0)
        assert drawn(loader) == whole[0][number:]
        again.set_epoch(1)
        assert drawn(loader) == whole[1]
    again.set_epoch(2)
    assert drawn(loader) == whole[2]


@pytest.mark.parametrize("options", WORKERS)
def test_torchdata_without_set_epoch_repeats_the_epoch_as_an_undisturbed_run_does(
    make: Callable[..., ResumableSampler], options: dict[str, Any]
) -> None:
    whole = epochs(make, 2)
    loader = stateful(make(), options)
    assert [drawn(loader), drawn(loader)] == [whole[0]] * 2
    again = stateful(make(), options)
    again.load_state_dict(loader.state_dict())
    assert [drawn(again), drawn(again)] == [whole[0]] * 2


@pytest.mark.parametrize("options", WORKERS)
def test_torchs_loader_takes_up_a_state_and_the_epochs_after_it(
    make: Callable[..., ResumableSampler], options: dict[str, Any]
) -> None:
    whole = epochs(make, 3)
    sampler = make()
    for _, position in zip(range(3), (found for _, found in sampler.walk()), strict=False):
        sampler.advance(position)
    again = make()
    again.load_state_dict(sampler.state_dict())
    loader = DataLoader(TensorDataset(torch.arange(NUM_SAMPLES)), batch_sampler=again, **options)
    assert drawn(loader) == whole[0][3:]
    for epoch in (1, 2):
        again.set_epoch(epoch)
        assert drawn(loader) == whole[epoch]


def test_a_later_epoch_wins_over_a_state_with_nothing_left_and_over_no_other(
    make: Callable[..., ResumableSampler],
) -> None:
    whole = epochs(make, 3)
    sampler = make()
    for _ in sampler:
        pass
    done = sampler.state_dict()
    again = make()
    again.set_epoch(2)
    again.load_state_dict(done)
    assert again.state_dict() == {**done, "epoch": 2, "position": 0}
    assert [batch.tolist() for batch in again] == whole[2]
    # Nobody has chosen since that epoch began: the state is taken back to.
    again.load_state_dict(done)
    assert again.state_dict() == done
    assert list(again) == []
    # An epoch that is not later, or with something left, is the state's.
    again = make()
    again.set_epoch(0)
    again.load_state_dict({**done, "epoch": 1})
    assert (again.epoch, list(again)) == (1, [])
    again.set_epoch(2)
    again.load_state_dict({**done, "epoch": 1, "position": 1})
    assert again.state_dict() == {**done, "epoch": 1, "position": 1}


def test_the_last_batches_that_a_rank_has_no_part_in_are_no_rest_of_an_epoch() -> None:
    sampler = IndexSampler(41, 4, rank=1, world_size=2)
    sampler.set_epoch(1)
    sampler.load_state_dict({**sampler.state_dict(), "epoch": 0, "position": 40})
    assert sampler.state_dict()["epoch"] == 1
    buckets = LengthBucketedSampler(LENGTHS, 128, rank=1, world_size=3)
    rest = buckets.num_batches % 3
    assert rest > 0
    buckets.set_epoch(1)
    buckets.load_state_dict({**buckets.state_dict(), "epoch": 0, "position": buckets.num_batches - rest})
    assert buckets.state_dict()["epoch"] == 1


def test_lists_are_the_same_batches(make: Callable[..., ResumableSampler]) -> None:
    plain, lists = list(make()), list(make(as_lists=True))
    assert all(isinstance(batch, Tensor) and batch.dtype == torch.int64 for batch in plain)
    assert all(type(sample) is int for batch in lists for sample in batch)
    assert lists == [batch.tolist() for batch in plain]
    loader = DataLoader({sample: sample for sample in range(NUM_SAMPLES)}, batch_sampler=make(as_lists=True))
    assert [batch.tolist() for batch in loader] == lists


def test_the_attributes_of_torchs_batch_sampler_are_there(make: Callable[..., ResumableSampler]) -> None:
    sampler = make(drop_last=True, as_lists=True)
    theirs = BatchSampler(range(NUM_SAMPLES), 4, drop_last=True)
    for name in ("drop_last", *["batch_size"] * isinstance(sampler, IndexSampler)):
        assert getattr(sampler, name) == getattr(theirs, name)
    samples = sampler.sampler
    flat = [sample for batch in sampler for sample in batch]
    assert list(samples) == flat
    assert len(samples) == len(flat)
    samples.set_epoch(1)
    assert sampler.epoch == 1
    assert list(samples) != flat
    of_rank = make(world_size=2)
    assert len(of_rank.sampler) == sum(map(len, of_rank)) < len(flat)


def shards(sampler: Any, **options: Any) -> list[list[Any]]:
    theirs = pytest.importorskip("accelerate.data_loader")
    return [list(theirs.BatchSamplerShard(sampler, 2, rank, **options)) for rank in range(2)]


@pytest.mark.parametrize("num_samples", [1, 5, 16, 96, 97, 103])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("split_batches", [True, False])
@pytest.mark.parametrize("even_batches", [True, False])
def test_accelerate_shares_our_batches_as_torchs(
    num_samples: int, drop_last: bool, split_batches: bool, even_batches: bool
) -> None:
    options = {"split_batches": split_batches, "even_batches": even_batches}
    order = permutation(num_samples, seed=3).tolist()
    theirs = shards(BatchSampler(order, 8, drop_last), **options)
    assert shards(IndexSampler(num_samples, 8, seed=3, drop_last=drop_last, as_lists=True), **options) == theirs
    seen = [sample for own in theirs for batch in own for sample in batch]
    assert set(seen) <= set(range(num_samples))
    with pytest.raises(TypeError, match="this IndexSampler makes tensors; give it as_lists=True"):
        shards(IndexSampler(num_samples, 8, drop_last=drop_last), **options)
    with pytest.raises(ValueError, match=r"world_size is 2, but accelerate shares .* leave out rank and world_size"):
        shards(IndexSampler(num_samples, 8, world_size=2, as_lists=True), **options)


def test_accelerate_shares_batches_of_differing_sizes() -> None:
    whole = [batch.tolist() for batch in LengthBucketedSampler(LENGTHS, 128, seed=3)]
    sampler = LengthBucketedSampler(LENGTHS, 128, seed=3, as_lists=True)
    assert shards(sampler, even_batches=False) == [whole[0::2], whole[1::2]]
    with pytest.raises(TypeError, match="this LengthBucketedSampler makes tensors"):
        shards(LengthBucketedSampler(LENGTHS, 128))


ACCELERATED = """
import json, sys, torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, TensorDataset
from eventkern.data import IndexSampler

found = {}
for split in (False, True):
    for dispatch in (False, True):
        config = DataLoaderConfiguration(split_batches=split, dispatch_batches=dispatch, even_batches=True)
        accelerator = Accelerator(cpu=True, dataloader_config=config)
        sampler = IndexSampler(97, 8, seed=3, as_lists=True)
        loader = accelerator.prepare(DataLoader(TensorDataset(torch.arange(97)), batch_sampler=sampler))
        epochs = [[batch.tolist() for (batch,) in loader] for _ in range(2)]
        found[f"{split} {dispatch}"] = epochs
json.dump(found, open(sys.argv[1], "w"))
"""


def test_two_processes_of_accelerate_see_every_sample_in_another_order_each_epoch(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ACCELERATED, str(tmp_path / f"{rank}.json")],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, told = process.communicate(timeout=120)
        assert process.returncode == 0, told
    of_ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for way in of_ranks[0]:
        for epoch in range(2):
            counts = Counter(sample for rank in of_ranks for batch in rank[way][epoch] for sample in batch)
            assert set(counts) == set(range(97)), way
            assert sum(counts.values()) <= 97 + 2 * 8, way  # the last round is evened out
        assert of_ranks[0][way][0] != of_ranks[0][way][1], way
