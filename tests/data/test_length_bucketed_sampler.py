"""LengthBucketedSampler: boundaries, budget and shapes, ranks, resuming, and its place in torch's DataLoader."""

from itertools import combinations

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from eventkern.data import LengthBucketedSampler
from eventkern.data.length_bucketed_sampler import MAX_CANDIDATES, choose_boundaries
from eventkern.data.permutation import fill_permutation


@pytest.fixture(scope="module")
def lengths() -> np.ndarray:
    return np.clip(np.random.default_rng(5).lognormal(4, 0.8, 3001), 1, 1000).astype(np.int64)


def shape_of(batch: Tensor, lengths: np.ndarray, sampler: LengthBucketedSampler) -> tuple[int, int]:
    return len(batch), sampler.padded_length(int(lengths[batch].max()))


def steps(samplers: list[LengthBucketedSampler]) -> list[tuple[Tensor, ...]]:
    return list(zip(*samplers, strict=True))


@hypothesis.given(
    lengths=strategies.lists(strategies.integers(1, 60), min_size=1, max_size=300),
    room=strategies.integers(0, 400),
    num_shapes=strategies.integers(1, 6),
    multiple=strategies.integers(1, 9),
    world_size=strategies.integers(1, 4),
    shuffle=strategies.booleans(),
    drop_last=strategies.booleans(),
    epoch=strategies.integers(0, 2),
)
@hypothesis.settings(deadline=None, max_examples=150)
def test_every_sample_comes_once_within_budget_and_shapes(
    lengths, room, num_shapes, multiple, world_size, shuffle, drop_last, epoch
):
    lengths = np.array(lengths)
    max_tokens = -(-int(lengths.max()) // multiple) * multiple + room
    options = {"num_shapes": num_shapes, "multiple": multiple, "world_size": world_size, "seed": 3}
    options |= {"shuffle": shuffle, "drop_last": drop_last}
    samplers = [LengthBucketedSampler(lengths, max_tokens, rank=rank, **options) for rank in range(world_size)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    first = samplers[0]
    assert len(first.boundaries) <= num_shapes
    assert all(boundary % multiple == 0 for boundary in first.boundaries)
    assert len(first.shapes) == len(set(first.shapes)) <= (1 if drop_last else 2) * len(first.boundaries)
    batches = [batch for step in steps(samplers) for batch in step]
    assert len(batches) == len(first) * world_size
    for batch in batches:
        size, padded = shape_of(batch, lengths, first)
        assert (size, padded) in first.shapes
        assert size * padded <= max_tokens
        assert {first.padded_length(int(length)) for length in lengths[batch.numpy()]} == {padded}
    seen = torch.cat([torch.empty(0, dtype=torch.int64), *batches])
    assert len(seen.unique()) == len(seen) == len(lengths) - first.num_dropped
    if world_size == 1 and not drop_last:
        assert first.num_dropped == 0
        assert {shape_of(batch, lengths, first) for batch in batches} == set(first.shapes)
        padded_tokens = sum(size * padded for size, padded in (shape_of(batch, lengths, first) for batch in batches))
        assert first.padding_share == pytest.approx(1 - lengths.sum() / padded_tokens)


@pytest.mark.parametrize("num_shapes", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("seed", range(6))
def test_boundaries_pad_the_least_of_all_choices(seed, num_shapes):
    multiple = 3
    lengths = np.random.default_rng(seed).integers(1, 36, 1 + 9 * seed)
    boundaries = choose_boundaries(lengths, num_shapes, multiple)

    def padded_tokens(boundaries: tuple[int, ...] | list[int]) -> int:
        return sum(min(boundary for boundary in boundaries if boundary >= length) for length in lengths)

    *candidates, last = sorted({-(-length // multiple) * multiple for length in lengths.tolist()})
    choices = (
        (*chosen, last)
        for size in range(min(num_shapes, len(candidates) + 1))
        for chosen in combinations(candidates, size)
    )
    assert padded_tokens(boundaries) == min(map(padded_tokens, choices))
    assert boundaries == sorted(set(boundaries))
    assert len(boundaries) <= num_shapes
    assert boundaries[-1] == last


def test_very_long_samples_get_boundaries_on_a_coarser_grid():
    longest = 3 * MAX_CANDIDATES * 2 + 1
    lengths = np.arange(1, longest + 1, 7)
    lengths[-1] = longest
    boundaries = choose_boundaries(lengths, 5, 2)
    assert boundaries[-1] == longest + 1
    assert len(boundaries) == 5
    assert all(boundary % 8 == 0 for boundary in boundaries[:-1])
    assert np.diff(boundaries).std() < 0.01 * np.diff(boundaries).mean()  # equal steps suit equal numbers of lengths


def test_an_epoch_is_its_definition(lengths):
    def order(n: int, part: int) -> list[int]:
        out = torch.empty(n, dtype=torch.int64)
        fill_permutation(out, n, seed=21, epoch=4, start=0, part=part)
        return out.tolist()

    sampler = LengthBucketedSampler(lengths, 4096, num_shapes=3, seed=21)
    sampler.set_epoch(4)
    batches = []
    shorter = 0
    for number, boundary in enumerate(sampler.boundaries):
        bucket = [sample for sample, length in enumerate(lengths) if shorter < length <= boundary]
        shuffled = [bucket[place] for place in order(len(bucket), 1 + number)]
        size = 4096 // boundary
        batches += [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
        shorter = boundary
    assert len(sampler) == len(batches)
    assert [batch.tolist() for batch in sampler] == [batches[number] for number in order(len(batches), 0)]


def test_an_epoch_has_other_batches_in_another_order_and_comes_again(lengths):
    sampler = LengthBucketedSampler(lengths, 4096, seed=1)
    first = [batch.tolist() for batch in sampler]
    assert [batch.tolist() for batch in sampler] == first
    shapes = [shape_of(torch.tensor(batch), lengths, sampler) for batch in first]
    assert shapes != sorted(shapes)
    sampler.set_epoch(1)
    second = [batch.tolist() for batch in sampler]
    assert not {frozenset(batch) for batch in second} & {frozenset(batch) for batch in first if len(batch) > 3}
    in_order = list(LengthBucketedSampler(lengths, 4096, shuffle=False))
    padded = [shape_of(batch, lengths, sampler)[1] for batch in in_order]
    assert padded == sorted(padded)
    assert torch.cat([batch for batch, length in zip(in_order, padded, strict=True) if length == padded[0]]).equal(
        torch.from_numpy(np.flatnonzero(lengths <= padded[0]))
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_take_the_batches_of_one_order_in_turn(lengths, world_size):
    alone = list(LengthBucketedSampler(lengths, 4096, seed=2))
    samplers = [LengthBucketedSampler(lengths, 4096, seed=2, rank=r, world_size=world_size) for r in range(world_size)]
    together = [batch for step in steps(samplers) for batch in step]
    assert len(together) == len(alone) // world_size * world_size
    assert all(one.equal(other) for one, other in zip(together, alone, strict=False))
    assert samplers[0].num_dropped == sum(len(batch) for batch in alone[len(together) :])


def test_ranks_share_epochs_of_many_steps():
    samplers = [LengthBucketedSampler([8] * 8000, 8, seed=2, rank=rank, world_size=3) for rank in range(3)]
    together = torch.cat([batch for step in steps(samplers) for batch in step])
    assert len(together.unique()) == len(together) == 7998


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_state_goes_on_under_another_world_size(lengths, world_size):
    sampler = LengthBucketedSampler(lengths, 4096, seed=5)
    sampler.set_epoch(2)
    everything = list(sampler)
    batches = iter(sampler)
    for _ in range(7):
        next(batches)
    state = sampler.state_dict()
    assert state["position"] == 7
    resumed = [LengthBucketedSampler(lengths, 4096, rank=r, world_size=world_size) for r in range(world_size)]
    for rank in resumed:
        rank.load_state_dict(state)
    rest = [batch for step in steps(resumed) for batch in step]
    assert len(everything) - 7 - len(rest) < world_size
    assert all(one.equal(other) for one, other in zip(rest, everything[7:], strict=False))
    assert len(list(resumed[0])) == len(resumed[0])  # the next epoch is whole


def test_walking_leaves_the_state_alone_and_tells_positions(lengths):
    sampler = LengthBucketedSampler(lengths, 4096, seed=6, rank=1, world_size=2)
    sampler.load_state_dict({**sampler.state_dict(), "position": 3})
    state = sampler.state_dict()
    walked = list(sampler.walk())
    assert sampler.state_dict() == state
    assert [position for _, position in walked] == list(range(5, 5 + 2 * len(walked), 2))
    assert all(batch.equal(other) for (batch, _), other in zip(walked, sampler, strict=True))
    sampler.advance(walked[4][1])
    resumed = LengthBucketedSampler(lengths, 4096, rank=1, world_size=2)
    resumed.load_state_dict(sampler.state_dict())
    assert all(batch.equal(other) for (batch, _), other in zip(walked[5:], resumed, strict=True))


def test_drop_last_keeps_buckets_that_have_no_full_batch():
    lengths = np.array([10] * 25 + [100] * 2)
    sampler = LengthBucketedSampler(lengths, 300, num_shapes=2, multiple=10, drop_last=True)
    assert sampler.shapes == [(25, 10), (2, 100)]
    assert sampler.num_dropped == 0
    sampler = LengthBucketedSampler(lengths, 200, num_shapes=2, multiple=10, drop_last=True)
    assert sampler.shapes == [(20, 10), (2, 100)]
    assert sorted(len(batch) for batch in sampler) == [2, 20]
    assert sampler.num_dropped == 5


def test_few_shapes_pad_less_than_shuffled_batches(lengths):
    sampler = LengthBucketedSampler(lengths, 4096)
    order = np.random.default_rng(0).permutation(len(lengths))
    size = int(4096 // lengths.mean())
    longest = [lengths[order[start : start + size]].max() for start in range(0, len(order), size)]
    assert sampler.padding_share < 0.5 * (1 - lengths.mean() / np.mean(longest))
    shares = [LengthBucketedSampler(lengths, 4096, num_shapes=num).padding_share for num in (1, 2, 4, 8, 16)]
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("n", {"lengths": [5, 6]}),
        ("lengths", {"lengths": [5, 6, 8]}),
        ("max_tokens", {"max_tokens": 99}),
        ("boundaries", {"num_shapes": 1}),
        ("drop_last", {"drop_last": True}),
    ],
)
def test_a_state_of_other_batches_is_refused_by_name(key, options):
    base = {"lengths": [5, 6, 9], "max_tokens": 100, "num_shapes": 2, "multiple": 1}
    sampler = LengthBucketedSampler(**base)
    with pytest.raises(ValueError, match=f"the sampler state has {key} "):
        sampler.load_state_dict(LengthBucketedSampler(**(base | options)).state_dict())
    with pytest.raises(ValueError, match="the sampler state has version 0"):
        sampler.load_state_dict({**sampler.state_dict(), "version": 0})
    with pytest.raises(ValueError, match=f"the sampler state has no {key}"):
        sampler.load_state_dict({name: value for name, value in sampler.state_dict().items() if name != key})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lengths": []}, ValueError, r"lengths has shape \(0,\)"),
        ({"lengths": [[1, 2]]}, ValueError, r"lengths has shape \(1, 2\)"),
        ({"lengths": [1.5]}, TypeError, "lengths is float64; want integers"),
        ({"lengths": [3, 0, 5]}, ValueError, r"lengths\[1\] is 0; want at least 1"),
        ({"lengths": [3, 41, 5]}, ValueError, r"lengths\[1\] is 41, padded 48; want at most max_tokens = 40"),
        ({"max_tokens": 0}, ValueError, "max_tokens is 0; want at least 1"),
        ({"num_shapes": 0}, ValueError, "num_shapes is 0; want at least 1"),
        ({"multiple": 2.0}, TypeError, r"multiple is 2\.0; want an int"),
        ({"rank": 1}, ValueError, "rank is 1; want 0 to 0"),
    ],
)
def test_a_wrong_argument_is_named(options, error, message):
    with pytest.raises(error, match=message):
        LengthBucketedSampler(**{"lengths": [3, 4, 5], "max_tokens": 40, **options})


def test_a_length_that_no_sample_can_have_is_named():
    sampler = LengthBucketedSampler(torch.tensor([3, 9], dtype=torch.int32), 40)
    assert [sampler.padded_length(length) for length in (1, 8, 9, 16)] == [8, 8, 16, 16]
    with pytest.raises(ValueError, match="length is 17; want 1 to 16"):
        sampler.padded_length(17)


class Ragged(torch.utils.data.Dataset):
    """Sample i: its number, as often as its length says."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = lengths

    def __getitem__(self, sample: int) -> Tensor:
        return torch.full((int(self.lengths[sample]),), int(sample) + 1)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_it_serves_torch_as_a_batch_sampler_with_a_padding_collate(lengths, num_workers):
    sampler = LengthBucketedSampler(lengths, 4096, seed=3, num_shapes=4)

    def collate(samples: list[Tensor]) -> Tensor:
        longest = max(len(sample) for sample in samples)
        padded = pad_sequence(samples, batch_first=True)
        return torch.nn.functional.pad(padded, (0, sampler.padded_length(longest) - longest))

    context = "fork" if num_workers else None
    loader = DataLoader(
        Ragged(lengths),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        multiprocessing_context=context,
    )
    batches = list(loader)
    assert len(batches) == len(loader)
    assert {tuple(batch.shape) for batch in batches} == set(sampler.shapes)
    padding = sum(int((batch == 0).sum()) for batch in batches)
    assert padding / sum(batch.numel() for batch in batches) == pytest.approx(sampler.padding_share)
    seen = torch.cat([batch[:, 0] - 1 for batch in batches])
    assert seen.sort().values.equal(torch.arange(len(lengths)))
