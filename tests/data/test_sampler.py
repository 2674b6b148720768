"""IndexSampler: shares of ranks, epochs, resuming, and its place in torch's DataLoader."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from eventkern.data import IndexSampler, permutation


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_samples", [1, 2, 24, 25, 29])
def test_ranks_share_the_epoch_and_no_index_comes_twice(num_samples, world_size, drop_last, shuffle):
    samplers = [
        IndexSampler(num_samples, 4, seed=9, shuffle=shuffle, rank=rank, world_size=world_size, drop_last=drop_last)
        for rank in range(world_size)
    ]
    batches = [list(sampler) for sampler in samplers]
    assert {len(own) for own in batches} == {len(samplers[0])}
    for together in zip(*batches, strict=True):
        assert len({len(batch) for batch in together}) == 1
    seen = torch.cat([batch for own in batches for batch in own] or [torch.empty(0, dtype=torch.int64)])
    assert len(seen.unique()) == len(seen) == num_samples - samplers[0].num_dropped
    order = permutation(num_samples, seed=9) if shuffle else torch.arange(num_samples)
    in_order = [torch.cat(together) for together in zip(*batches, strict=True)]
    assert torch.cat([*in_order, order[:0]]).equal(order[: len(seen)])


def test_an_epoch_is_another_order_and_comes_again():
    sampler = IndexSampler(100, 10, seed=1)
    first = torch.cat(list(sampler))
    assert torch.cat(list(sampler)).equal(first)
    sampler.set_epoch(1)
    assert not torch.cat(list(sampler)).equal(first)
    sampler.set_epoch(0)
    assert torch.cat(list(sampler)).equal(first)


@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 1), (3, 1), (5, 2), (1, 3)])
def test_a_state_goes_on_under_another_batch_and_world_size(batch_size, world_size):
    sampler = IndexSampler(100, 4, seed=5)
    sampler.set_epoch(2)
    seen = []
    for batch in sampler:
        seen.append(batch)
        if len(seen) == 9:
            break
    state = sampler.state_dict()
    assert state["position"] == 36
    rest = []
    for rank in range(world_size):
        resumed = IndexSampler(100, batch_size, seed=0, rank=rank, world_size=world_size)
        resumed.load_state_dict(state)
        resumed.set_epoch(2)
        rest.append(list(resumed))
    left = torch.cat([torch.cat(together) for together in zip(*rest, strict=True)])
    expected = permutation(100, seed=5, epoch=2, start=36)
    assert left.equal(expected[: len(left)])
    assert len(expected) - len(left) < world_size


def test_the_end_of_an_epoch_is_not_its_beginning():
    sampler = IndexSampler(10, 3, seed=5)
    assert len(list(sampler)) == 4
    resumed = IndexSampler(10, 2)
    resumed.load_state_dict(sampler.state_dict())
    assert list(resumed) == []
    assert len(list(sampler)) == 4


def test_a_resumed_epoch_is_followed_by_a_whole_one():
    sampler = IndexSampler(10, 3, seed=5)
    sampler.load_state_dict({**sampler.state_dict(), "position": 6})
    assert [len(batch) for batch in sampler] == [3, 1]
    assert [len(batch) for batch in sampler] == [3, 3, 3, 1]


@pytest.mark.parametrize(("key", "value"), [("n", 11), ("version", 0), ("window", 8), ("position", 11)])
def test_a_foreign_state_is_refused_by_name(key, value):
    sampler = IndexSampler(10, 2)
    with pytest.raises(ValueError, match=f"has {key} {value}"):
        sampler.load_state_dict({**sampler.state_dict(), key: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"world_size": 2, "rank": 2}, "rank is 2; want 0 to world_size - 1 = 1"),
        ({"window": 4}, "window is 4"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_wrong_argument_of_the_sampler_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        IndexSampler(**{"num_samples": 10, "batch_size": 2, **options})


def test_it_serves_torch_as_a_batch_sampler():
    loader = DataLoader(TensorDataset(torch.arange(25)), batch_sampler=IndexSampler(25, 4, seed=3))
    values = torch.cat([batch for (batch,) in loader])
    assert values.equal(permutation(25, seed=3))
    assert len(loader) == 7
