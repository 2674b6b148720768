"""IndexSampler: shares of ranks, epochs, resuming, windows, and its place in torch's DataLoader."""

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from eventkern.data import IndexSampler, permutation
from eventkern.data.permutation import fill_permutation
from eventkern.data.sampler import WindowedOrder


def in_order(samplers: list[IndexSampler]) -> Tensor:
    """What ranks see, in the global order."""
    together = [torch.cat(batches) for batches in zip(*samplers, strict=True)]
    return torch.cat([torch.empty(0, dtype=torch.int64), *together])


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
    assert in_order(samplers).equal(order[: len(seen)])


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
    resumed = [IndexSampler(100, batch_size, seed=0, rank=rank, world_size=world_size) for rank in range(world_size)]
    for sampler in resumed:
        sampler.load_state_dict(state)
        sampler.set_epoch(2)
    left = in_order(resumed)
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


def test_batches_cut_from_chunks_are_those_of_the_order():
    # More than two of the largest chunks, of both limits: by indices, and by batches.
    for num_samples, batch_size in ((200_003, 1000), (3000, 3), (70_000, 66_000)):
        sampler = IndexSampler(num_samples, batch_size, seed=2)
        batches = list(sampler)
        assert torch.cat(batches).equal(permutation(num_samples, seed=2))
        assert {len(batch) for batch in batches[:-1]} == {batch_size}
        sampler.load_state_dict({**sampler.state_dict(), "position": 1234})
        assert torch.cat(list(sampler)).equal(permutation(num_samples, seed=2, start=1234))


@pytest.mark.parametrize(("batch_size", "largest"), [(1000, 65_000), (10, 2560), (70_000, 70_000)])
def test_chunks_begin_with_one_batch_and_grow_to_a_limit(batch_size, largest):
    batches = IndexSampler(10**12, batch_size).walk()
    sizes = [next(batches)[0].untyped_storage().nbytes() // 8 for _ in range(600 if batch_size < 70_000 else 5)]
    assert sizes[0] == batch_size
    assert sizes[1] == min(2 * batch_size, largest)
    assert sizes == sorted(sizes)
    assert sizes[-1] == largest


@pytest.mark.parametrize("n", [900_000, 10**12, 2**48])
@pytest.mark.parametrize("window", [None, 1 << 16, 1 << 30, 1 << 47])
def test_any_n_starts_at_once_anywhere(n, window):
    sampler = IndexSampler(n, 1000, seed=4, window=window)
    sampler.load_state_dict({**sampler.state_dict(), "position": n // 2})
    batch = next(iter(sampler))
    assert len(batch.unique()) == 1000
    assert 0 <= batch.min() < batch.max() < n
    assert sampler.state_dict()["position"] == n // 2 + 1000


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("drop_last", [True, False])
def test_walking_leaves_the_state_alone_and_tells_positions(world_size, drop_last):
    sampler = IndexSampler(29, 4, seed=5, rank=world_size - 1, world_size=world_size, drop_last=drop_last)
    sampler.load_state_dict({**sampler.state_dict(), "position": 3, "epoch": 2})
    state = sampler.state_dict()
    walked = list(sampler.walk())
    assert sampler.state_dict() == state
    assert sampler.start == 3
    seen = [(batch, sampler.state_dict()["position"]) for batch in sampler]
    assert len(seen) == len(walked) > 2
    for (batch, position), (walked_batch, walked_position) in zip(seen, walked, strict=True):
        assert batch.equal(walked_batch)
        assert position == walked_position
    assert sampler.start == 0


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_whose_last_batch_is_dropped_is_done_under_any_batch_size(world_size):
    sampler = IndexSampler(29, 4, world_size=world_size, drop_last=True)
    assert len(list(sampler)) == len(sampler)
    resumed = IndexSampler(29, 1)
    resumed.load_state_dict(sampler.state_dict())
    assert list(resumed) == []


def test_what_was_walked_but_not_consumed_comes_again():
    sampler = IndexSampler(100, 8, seed=6)
    drawn = list(sampler.walk())
    sampler.advance(drawn[3][1])
    assert sampler.start == 0  # an epoch that breaks off is begun anew, unless its state is loaded
    resumed = IndexSampler(100, 8)
    resumed.load_state_dict(sampler.state_dict())
    assert torch.cat(list(resumed)).equal(torch.cat([batch for batch, _ in drawn[4:]]))


@pytest.mark.parametrize(
    "change", [lambda s: s.set_epoch(1), lambda s: s.load_state_dict({**s.state_dict(), "position": 50})]
)
def test_an_older_iteration_leaves_a_newer_position_alone(change):
    sampler = IndexSampler(100, 10, seed=1)
    batches = iter(sampler)
    next(batches)
    change(sampler)
    before = sampler.state_dict()
    assert next(batches).equal(permutation(100, seed=1, start=10, stop=20))
    assert sampler.state_dict() == before
    assert sampler.start == before["position"]


def test_an_epoch_that_is_being_iterated_keeps_its_order():
    sampler = IndexSampler(100, 10, seed=1)
    batches = sampler.walk()
    sampler.set_epoch(1)
    assert torch.cat([batch for batch, _ in batches]).equal(permutation(100, seed=1))


@hypothesis.given(
    num_samples=strategies.integers(1, 5000),
    batch_size=strategies.integers(1, 300),
    window=strategies.integers(1, 6000),
    world_size=strategies.integers(1, 4),
    drop_last=strategies.booleans(),
    epoch=strategies.integers(0, 3),
)
@hypothesis.settings(deadline=None, max_examples=80)
def test_windows_show_every_sample_once(num_samples, batch_size, window, world_size, drop_last, epoch):
    options = {"seed": 8, "window": window, "world_size": world_size, "drop_last": drop_last}
    samplers = [IndexSampler(num_samples, batch_size, rank=rank, **options) for rank in range(world_size)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    seen = in_order(samplers)
    assert len(seen.unique()) == len(seen) == num_samples - samplers[0].num_dropped
    assert ((seen >= 0) & (seen < num_samples)).all()
    # One rank with another batch size walks the same order, and from any position on.
    other = IndexSampler(num_samples, 2 * batch_size + 1, window=window)
    middle = len(seen) // 3
    other.load_state_dict({**samplers[0].state_dict(), "position": middle})
    assert torch.cat([*other, seen[:0]])[: len(seen) - middle].equal(seen[middle:])


def plain_windowed_order(n: int, window: int, block: int, seed: int, epoch: int) -> list[int]:
    """The definition, sample by sample."""

    def order(n: int, part: int) -> list[int]:
        out = torch.empty(n, dtype=torch.int64)
        fill_permutation(out, n, seed=seed, epoch=epoch, start=0, part=part)
        return out.tolist()

    shift = order(n, 1)[0]
    blocks = [[(number * block + offset + shift) % n for offset in range(block)] for number in order(n // block, 2)]
    if n % block:
        blocks.append([(n // block * block + offset + shift) % n for offset in range(n % block)])
    num_windows = -(-len(blocks) // (window // block))
    samples = []
    for number in range(num_windows):
        own = blocks[len(blocks) * number // num_windows : len(blocks) * (number + 1) // num_windows]
        flat = [sample for part in own for sample in part]
        samples += [flat[place] for place in order(len(flat), 3 + number)]
    return samples


@pytest.mark.parametrize(
    ("n", "window", "block"), [(1000, 100, 4), (1024, 128, 8), (999, 998, 32), (1000, 32, 2), (40_000, 17_000, 1024)]
)
def test_a_windowed_order_is_its_definition(n, window, block):
    sampler = IndexSampler(n, 70, seed=11, window=window)
    sampler.set_epoch(6)
    assert torch.cat(list(sampler)).tolist() == plain_windowed_order(n, window, block, seed=11, epoch=6)


def test_a_window_of_all_or_too_small_for_blocks_is_the_full_shuffle():
    for window in (1, 31, 1000, 10**6):
        assert torch.cat(list(IndexSampler(1000, 64, seed=2, window=window))).equal(permutation(1000, seed=2))
    assert not torch.cat(list(IndexSampler(1000, 64, seed=2, window=32))).equal(permutation(1000, seed=2))


def test_a_window_reads_few_places_of_the_store_and_they_move_each_epoch():
    n, window, block = 100_000, 8192, 512
    borders = set()
    for epoch in range(3):
        order = WindowedOrder(n, window, seed=3, epoch=epoch, device=torch.device("cpu"))
        samples = order(0, n)
        sizes = []
        position = 0
        while position < n:
            end = min(order._first_block(len(sizes) + 1) * block, n)
            places = samples[position:end].sort().values
            starts = places[1:][places.diff() > 1]
            assert len(starts) + 1 <= window // block + 1  # one block may be cut by the end of the store
            borders |= set((starts % block).tolist())
            sizes.append(end - position)
            position = end
        assert window // 2 <= min(sizes)
        assert max(sizes) <= window
    assert 3 <= len(borders) <= 9  # per epoch: the shift, and what the store's end and the short block cut


def spread_of_batch_means(window: int | None, n: int, batch_size: int, epochs: int) -> float:
    """Variance of the batch means of a value that grows with the sample's number, over that of independent draws."""
    sampler = IndexSampler(n, batch_size, seed=12, drop_last=True, window=window)
    means = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        means.append(torch.stack(list(sampler)).double().mean(1))
    return (torch.cat(means) - (n - 1) / 2).square().mean().item() / ((n * n - 1) / 12 / batch_size)


@pytest.mark.parametrize(("window", "blocks"), [(2048, 16), (8192, 16), (32_768, 32)])
def test_batch_means_spread_as_much_as_the_blocks_of_a_window_say(window, blocks):
    n, batch_size = 200_000, 256
    assert spread_of_batch_means(None, n, batch_size, epochs=6) == pytest.approx(1, abs=0.1)
    # Between windows: the mean of `blocks` of all blocks. Inside a window: batch_size of its samples.
    all_blocks = n * blocks / window
    between = batch_size / blocks * (1 - (blocks - 1) / (all_blocks - 1))
    inside = (1 - 1 / blocks) * (1 - (batch_size - 1) / (window - 1))
    spread = spread_of_batch_means(window, n, batch_size, epochs=30)
    assert spread == pytest.approx(between + inside, rel=0.25)
    assert spread < 1 + batch_size / blocks * 1.25


def test_a_loaded_state_does_not_reach_into_another_epoch():
    sampler = IndexSampler(10, 3, seed=5)
    sampler.load_state_dict({**sampler.state_dict(), "position": 6})
    sampler.set_epoch(1)
    assert sampler.state_dict()["position"] == 0
    assert torch.cat(list(sampler)).equal(permutation(10, seed=5, epoch=1))


def test_drop_last_counts_full_batches_from_where_it_resumes():
    sampler = IndexSampler(11, 3, seed=5, drop_last=True)
    sampler.load_state_dict({**sampler.state_dict(), "position": 5})
    assert [batch.tolist() for batch in sampler] == permutation(11, seed=5, start=5).view(2, 3).tolist()
    sampler.load_state_dict({**sampler.state_dict(), "position": 6})
    assert [batch.tolist() for batch in sampler] == permutation(11, seed=5, start=6, stop=9).view(1, 3).tolist()


@pytest.mark.parametrize(("key", "value"), [("n", 11), ("version", 0), ("window", 8)])
def test_a_foreign_state_is_refused_by_name(key, value):
    sampler = IndexSampler(10, 2)
    with pytest.raises(ValueError, match=f"has {key} {value}"):
        sampler.load_state_dict({**sampler.state_dict(), key: value})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"position": 11}, ValueError, "the sampler state's position is 11; want 0 to 10"),
        ({"position": "3"}, TypeError, "the sampler state's position is '3'; want an int"),
        ({"seed": True}, TypeError, "the sampler state's seed is True; want an int"),
        ({"epoch": -1}, ValueError, "the sampler state's epoch is -1"),
        ({"shuffle": None}, TypeError, "the sampler state's shuffle is None; want True or False"),
    ],
)
def test_a_wrong_value_of_a_state_is_named_and_changes_nothing(change, error, message):
    sampler = IndexSampler(10, 2)
    before = sampler.state_dict()
    with pytest.raises(error, match=message):
        sampler.load_state_dict({**before, "epoch": 3, "seed": 7, **change})
    assert sampler.state_dict() == before
    assert len(list(sampler)) == 5


@pytest.mark.parametrize("key", ["version", "n", "seed", "epoch", "position", "shuffle", "window"])
def test_a_state_without_a_key_is_refused(key):
    sampler = IndexSampler(10, 2)
    state = sampler.state_dict()
    del state[key]
    with pytest.raises(ValueError, match=f"the sampler state has no {key}"):
        sampler.load_state_dict(state)
    with pytest.raises(TypeError, match="state is of type list"):
        sampler.load_state_dict([state])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2**63}, "batch_size is 9223372036854775808; want 1 to 281474976710656"),
        ({"world_size": 2, "rank": 2}, "rank is 2; want 0 to 1"),
        ({"num_samples": 2**48 + 1}, "num_samples is 281474976710657"),
        ({"window": 0}, "window is 0; want at least 1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_wrong_argument_of_the_sampler_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        IndexSampler(**{"num_samples": 10, "batch_size": 2, **options})


def test_an_argument_that_is_no_integer_is_named():
    with pytest.raises(TypeError, match=r"batch_size is 2\.0; want an int"):
        IndexSampler(10, 2.0)
    sampler = IndexSampler(10, 2)
    with pytest.raises(ValueError, match="position is 11; want 0 to 10"):
        sampler.advance(11)
    with pytest.raises(ValueError, match="epoch is -1"):
        sampler.set_epoch(-1)
    with pytest.raises(ValueError, match="device is meta"):
        sampler.walk("meta")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    "options", [{}, *({"num_workers": 2, "multiprocessing_context": m} for m in ("fork", "spawn"))]
)
def test_it_serves_torch_as_a_batch_sampler(options):
    sampler = IndexSampler(100, 4, seed=3)
    loader = DataLoader(TensorDataset(torch.arange(100)), batch_sampler=sampler, **options)
    assert len(loader) == 25
    seen = []
    for (batch,) in loader:
        seen.append(batch)
        if len(seen) == 9:
            break
    # Workers draw ahead; what was consumed is the reader's to say.
    assert sampler.state_dict()["position"] == (52 if options else 36)
    sampler.advance(len(seen) * 4)
    state = sampler.state_dict()
    resumed = IndexSampler(100, 4)
    resumed.load_state_dict(state)
    loader = DataLoader(TensorDataset(torch.arange(100)), batch_sampler=resumed)
    assert torch.cat([*seen, *(batch for (batch,) in loader)]).equal(permutation(100, seed=3))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5000])
def test_cuda_walks_the_same_batches(window):
    sampler = IndexSampler(100_003, 1000, seed=9, window=window)
    for (here, position), (there, same) in zip(sampler.walk(), sampler.walk("cuda"), strict=True):
        assert there.is_cuda
        assert there.cpu().equal(here)
        assert position == same
