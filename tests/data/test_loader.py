"""EventLoader: every window against a brute-force oracle, leak tests, epochs, resuming, ranks, and the CUDA gather."""

import itertools
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from eventkern.data import Category, DataError, EventLoader, EventStore, Fold, IndexSampler, Schema, Stream
from eventkern.data.loader import WindowGatherer
from eventkern.data.prepare import prepare

SCHEMA = Schema(
    name="clicks",
    timestamp="at",
    timezone="UTC",
    categories=(Category("who", "id"), Category("where", "id"), Category("what", "id"), Category("ok", "flag")),
    streams=(Stream("who", "who"), Stream("where", "where"), Stream("all", None)),
    key="who",
    split="2020-01-04",
)
NUM_ROWS = 900
SETTINGS = {"src_seq_len": 5, "tgt_seq_len": 4, "id_category_size": 30, "batch_size": 7}
SPLITS = ["train", "validation"]


def clicks() -> dict[str, list]:
    """900 rows in time order with ties, some without an actor or a place, some actors new after the split."""
    random = np.random.default_rng(11)
    at = np.sort(random.integers(0, 5 * 86_400, NUM_ROWS)) // 60 * 60 + 1_577_836_800
    newcomers = np.arange(NUM_ROWS) > 600
    who = random.geometric(0.08, NUM_ROWS) + 50 * (newcomers & (random.random(NUM_ROWS) < 0.2))
    where = random.integers(0, 6, NUM_ROWS)
    return {
        "at": [np.datetime64(int(second), "s").item() for second in at],
        "who": [None if random.random() < 0.05 else f"w{number}" for number in who],
        "where": [None if random.random() < 0.05 else f"p{number}" for number in where],
        "what": [f"k{number}" for number in random.geometric(0.03, NUM_ROWS)],
        "ok": random.integers(0, 2, NUM_ROWS).astype(bool).tolist(),
    }


def store_of(table: dict[str, list], folder: Path, schema: Schema = SCHEMA) -> EventStore:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), folder / "clicks.parquet")
    prepare(folder / "clicks.parquet", schema, folder / "store", progress=False)
    return EventStore.open(folder / "store")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> EventStore:
    return store_of(clicks(), tmp_path_factory.mktemp("clicks"))


def windows_by_hand(store: EventStore, split: str, settings: dict) -> list[tuple[list, list, int]]:
    """Sources, targets and labels of every window of a split, from the table's own actor and place columns."""
    table = clicks()
    sizes = store.sizes(settings["id_category_size"])
    length, horizon = settings["src_seq_len"], settings["tgt_seq_len"]
    rows = [[1 if code >= size else int(code) for code, size in zip(row, sizes, strict=True)] for row in store.codes]
    padding = [0] * len(sizes)

    def sources(anchor: int) -> list:
        streams = []
        for column in ("who", "where", None):
            own = table[column][anchor] if column else None
            past = [
                row for row in range(anchor)
                if column is None or (own is not None and table[column][row] == own)
            ][-length:]  # fmt: skip
            streams.append([padding] * (length - len(past)) + [rows[row] for row in past])
        return streams

    windows = []
    for actor in dict.fromkeys(name for name in table["who"] if name is not None):
        events = [row for row in range(NUM_ROWS) if table["who"][row] == actor]
        num_training = sum(row < store.split_row for row in events)
        if split == "train":
            anchors, end = range(num_training - 1), num_training
        else:
            anchors, end = range(max(num_training - 1, 0), len(events) - 1, horizon), len(events)
        for anchor in anchors:
            targets = [rows[row] for row in events[anchor : min(anchor + horizon + 1, end)]]
            padded = targets + [padding] * (horizon + 1 - len(targets))
            windows.append((sources(events[anchor]), padded, len(targets) - 1))
    return windows


@pytest.mark.parametrize("id_category_size", [4, 30, 1000])
@pytest.mark.parametrize("split", SPLITS)
def test_every_window_is_the_one_made_by_hand(store, split, id_category_size):
    settings = {**SETTINGS, "id_category_size": id_category_size}
    loader = EventLoader(store, split, **settings)
    gathered, num_labels = [], []
    for batch in loader:
        assert batch.sources.dtype == batch.targets.dtype == torch.int32
        gathered += zip(batch.sources.tolist(), batch.targets.tolist(), strict=True)
        num_labels.append(batch.num_targets.item())
        assert num_labels[-1] == (batch.targets[:, 1:, 0] != 0).sum()
    expected = windows_by_hand(store, split, settings)
    assert loader.num_samples == len(gathered) == len(expected) > 50
    assert sum(num_labels) == sum(labels for *_, labels in expected)
    assert sorted(gathered) == sorted((sources, targets) for sources, targets, _ in expected)


def test_the_store_really_has_the_hard_cases(store):
    batches = list(EventLoader(store, "validation", **SETTINGS))
    sources = torch.cat([batch.sources for batch in batches])
    targets = torch.cat([batch.targets for batch in batches])
    assert store.codes.dtype == np.uint8
    assert (sources[:, 0] == 0).any(), "an actor with a short history"
    assert ((sources[:, 1] == 0).all((1, 2)) & (targets[:, 0, 1] == 1)).any(), "an anchor without a place"
    assert (sources[:, 2] != 0).all(), "the stream of all events is full"
    assert (targets[:, -1] == 0).any(), "a short tail"


def test_every_validation_event_with_a_predecessor_is_a_label_once(store):
    labels = sum(int(batch.num_targets) for batch in EventLoader(store, "validation", **SETTINGS))
    table, seen, expected = clicks(), set(), 0
    for row, actor in enumerate(table["who"]):
        expected += actor is not None and actor in seen and row >= store.split_row
        seen.add(actor)
    assert labels == expected


def test_no_training_label_comes_from_the_validation_period(tmp_path):
    table = clicks()
    store = store_of(table, tmp_path / "real")
    for row in range(store.split_row, NUM_ROWS):
        table["what"][row], table["ok"][row] = "unheard of", True
    changed = store_of(table, tmp_path / "changed")
    loaders = [EventLoader(each, "train", **SETTINGS) for each in (store, changed)]
    for batch, other in zip(*loaders, strict=True):
        assert batch.targets.equal(other.targets)
        assert batch.sources.equal(other.sources)


@pytest.mark.parametrize("row", [300, 555, 760])
def test_events_from_the_anchor_on_change_no_source_and_the_newest_before_it_does(tmp_path, row):
    table = clicks()
    while table["who"][row] is None or table["where"][row] is None:
        row += 1
    real = store_of(table, tmp_path / "real")

    def sources_before(store: EventStore) -> torch.Tensor:
        index = store.index("who")
        position = int(np.flatnonzero(index.rows == row)[0])
        gather = WindowGatherer(
            store, np.array([position]), store.limits("validation"), src_seq_len=5, tgt_seq_len=4, id_category_size=30,
            device=torch.device("cpu"),
        )  # fmt: skip
        return gather(torch.tensor([0])).sources[0]

    def with_other_values(rows: list[int], name: str) -> EventStore:
        changed = {column: list(values) for column, values in table.items()}
        for other in rows:
            changed["ok"][other] = not changed["ok"][other]
        return store_of(changed, tmp_path / name)

    expected = sources_before(real)
    future = with_other_values(list(range(row, NUM_ROWS)), "future")
    assert sources_before(future).equal(expected)
    for stream, column in enumerate(("who", "where", None)):
        newest = max(r for r in range(row) if column is None or table[column][r] == table[column][row])
        moved = (sources_before(with_other_values([newest], f"newest-{stream}")) != expected).any(-1)
        assert moved[stream, -1]
        assert not moved[stream, :-1].any()


def test_a_training_epoch_is_shuffled_and_validation_is_in_order(store):
    loader = EventLoader(store, "train", **SETTINGS, seed=3)
    epochs = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        epochs.append(torch.cat([batch.targets for batch in loader]))
    assert not epochs[0].equal(epochs[1])
    assert sorted(epochs[0].tolist()) == sorted(epochs[1].tolist())
    validation = EventLoader(store, "validation", **SETTINGS)
    assert torch.cat([b.targets for b in validation]).equal(torch.cat([b.targets for b in validation]))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_state_goes_on_with_the_windows_that_were_left(store, world_size):
    def loader(**options) -> EventLoader:
        return EventLoader(store, "train", **{**SETTINGS, **options})

    whole = loader(seed=3)
    whole.set_epoch(4)
    batches = list(whole)
    interrupted = loader(seed=3)
    interrupted.set_epoch(4)
    for number, _ in enumerate(interrupted, 1):
        if number == 20:
            break
    rest = []
    for rank in range(world_size):
        resumed = loader(batch_size=3, rank=rank, world_size=world_size)
        resumed.load_state_dict(interrupted.state_dict())
        rest.append([batch.targets for batch in resumed])
    left = torch.cat([torch.cat(together) for together in zip(*rest, strict=True)])
    expected = torch.cat([batch.targets for batch in batches[20:]])
    assert left.equal(expected[: len(left)])
    assert len(expected) - len(left) < world_size


@pytest.mark.parametrize("prefetch", [0, 2, 5])
def test_ranks_may_change_again_and_again_within_an_epoch(store, prefetch):
    def loaders(world_size: int, batch_size: int, state: dict) -> list[EventLoader]:
        made = [
            EventLoader(
                store, "train", **{**SETTINGS, "batch_size": batch_size},
                rank=rank, world_size=world_size, prefetch=prefetch,
            )
            for rank in range(world_size)
        ]  # fmt: skip
        for loader in made:
            loader.load_state_dict(state)
        return made

    whole = EventLoader(store, "train", **SETTINGS, seed=3)
    whole.set_epoch(4)
    state = whole.state_dict()
    windows: list[torch.Tensor] = []
    for world_size, batch_size, num_batches in ((1, 7, 11), (2, 4, 9), (3, 5, 6), (2, 3, 1000)):
        ranks = loaders(world_size, batch_size, state)
        for together in itertools.islice(zip(*ranks, strict=True), num_batches):
            windows += [batch.targets for batch in together]
        state = ranks[0].state_dict()
        assert all(rank.state_dict() == state for rank in ranks)
    visited = torch.cat(windows)
    expected = torch.cat([batch.targets for batch in whole])
    assert visited.equal(expected[: len(visited)])
    assert len(expected) - len(visited) < 2


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shuffle", [None, False, True])
def test_the_order_is_that_of_the_sampler_asked_for(store, split, shuffle):
    options = {"seed": 3, "shuffle": shuffle, "drop_last": True, "window": 64}
    loader = EventLoader(store, split, **SETTINGS, **options)
    by_number = loader._gatherer
    is_shuffled = shuffle if shuffle is not None else split == "train"
    sampler = IndexSampler(
        loader.num_samples, SETTINGS["batch_size"], seed=3, shuffle=is_shuffled, drop_last=True, window=64
    )
    assert loader.state_dict() == sampler.state_dict()
    assert (next(iter(sampler)).tolist() != [0, 1, 2, 3, 4, 5, 6]) == is_shuffled
    for batch, windows in zip(loader, sampler, strict=True):
        assert batch.targets.equal(by_number(windows).targets)
        assert len(windows) == SETTINGS["batch_size"]
    assert loader.state_dict() == sampler.state_dict()


def test_a_position_that_leaves_no_batch_is_for_one_iteration(store):
    loader = EventLoader(store, "train", **SETTINGS)
    loader.load_state_dict({**loader.state_dict(), "position": loader.num_samples})
    assert list(loader) == []
    assert len(list(loader)) == len(loader)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefetch": -1}, "prefetch is -1; want at least 0"),
        ({"src_seq_len": 0}, "src_seq_len is 0"),
        ({"tgt_seq_len": 0}, "tgt_seq_len is 0"),
        ({"id_category_size": 1}, "id_category_size is 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"resident": True}, "resident is True on device cpu"),
    ],
)
def test_a_wrong_argument_is_named(store, change, message):
    with pytest.raises(ValueError, match=message):
        EventLoader(store, "train", **{**SETTINGS, **change})


def test_a_split_without_windows_is_an_error(tmp_path):
    table = {column: [values[0], values[1], values[-1]] for column, values in clicks().items()}
    table["who"] = ["a", "b", "c"]
    store = store_of(table, tmp_path)
    with pytest.raises(DataError, match="the train period has no event with a successor"):
        EventLoader(store, "train", **SETTINGS)


def test_an_older_iteration_leaves_the_position_of_another_epoch_alone(store):
    loader = EventLoader(store, "train", **SETTINGS)
    batches = iter(loader)
    next(batches)
    loader.set_epoch(1)
    before = loader.state_dict()
    next(batches)
    assert loader.state_dict() == before


def test_a_store_that_changes_is_named_before_the_next_epoch(tmp_path):
    store = store_of(clicks(), tmp_path)
    loader = EventLoader(store, "train", **SETTINGS)
    next(iter(loader))
    os.truncate(store.path / "store.bin", (store.path / "store.bin").stat().st_size - 1)
    with pytest.raises(DataError, match=r"store\.bin: changed since it was opened"):
        next(iter(loader))


@pytest.mark.gpu
@pytest.mark.parametrize("split", SPLITS)
def test_the_resident_gather_equals_the_cpu(store, split):
    on_cpu = EventLoader(store, split, **SETTINGS)
    on_cuda = EventLoader(store, split, **SETTINGS, device="cuda", resident=True)
    copied = EventLoader(store, split, **SETTINGS, device="cuda")
    for expected, resident, moved in zip(on_cpu, on_cuda, copied, strict=True):
        for batch in (resident, moved):
            assert batch.sources.is_cuda
            assert batch.sources.cpu().equal(expected.sources)
            assert batch.targets.cpu().equal(expected.targets)
            assert batch.num_targets.item() == expected.num_targets.item()


@pytest.mark.parametrize("split", SPLITS)
def test_a_short_last_batch_is_filled_with_padding_that_does_not_count(store, split):
    options = {**SETTINGS, "shuffle": True}
    plain, filled = (list(EventLoader(store, split, **options, pad_last=each)) for each in (False, True))
    short = len(plain[-1].sources)
    assert 0 < short < SETTINGS["batch_size"], "the last batch must be short for this to show anything"
    for one, other in zip(plain[:-1], filled[:-1], strict=True):
        assert one.sources.equal(other.sources)
        assert one.targets.equal(other.targets)
    last = filled[-1]
    assert (
        {len(batch.sources) for batch in filled} == {len(batch.targets) for batch in filled} == {options["batch_size"]}
    )
    assert last.sources[:short].equal(plain[-1].sources)
    assert last.targets[:short].equal(plain[-1].targets)
    assert last.num_targets == plain[-1].num_targets
    assert not last.sources[short:].any()
    assert not last.targets[short:].any()
    assert last.sources.dtype == last.targets.dtype == torch.int32


@pytest.mark.parametrize("fold", [None, Fold(0, 2)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_windows_by_length_are_the_same_with_less_padding(store, world_size, fold):
    settings = SETTINGS | {"tgt_seq_len": 9, "fold": fold}
    (plain,) = EventLoader(store, "validation", **settings | {"batch_size": 10_000})
    shares = [
        [*EventLoader(store, "validation", by_length=True, rank=rank, world_size=world_size, **settings)]
        for rank in range(world_size)
    ]
    horizons = []
    for batches in zip(*shares, strict=True):
        horizon = {batch.targets.shape[1] - 1 for batch in batches}
        labels = torch.cat([(batch.targets[:, 1:, 0] != 0).sum(1) for batch in batches])
        assert horizon == {int(labels.max())}  # nothing but padding is cut, and all of what can be
        assert sum(int(batch.num_targets) for batch in batches) == int(labels.sum())
        horizons += horizon
    assert horizons == sorted(horizons)
    assert len(set(horizons)) > 2
    cut = [batch for batches in shares for batch in batches]
    padded = [torch.nn.functional.pad(batch.targets, (0, 0, 0, 10 - batch.targets.shape[1])) for batch in cut]
    found = torch.cat([torch.cat([batch.sources.flatten(1) for batch in cut]), torch.cat(padded).flatten(1)], 1)
    truth = torch.cat([plain.sources.flatten(1), plain.targets.flatten(1)], 1)
    dropped = len(truth) % world_size
    assert len(found) == len(truth) - dropped
    rows = {tuple(row) for row in truth.tolist()}
    assert {tuple(row) for row in found.tolist()} <= rows
    assert len({tuple(row) for row in found.tolist()}) >= len(rows) - dropped


def test_lengths_and_a_shuffle_exclude_one_another(store):
    with pytest.raises(ValueError, match="by_length is True with shuffle"):
        EventLoader(store, "train", by_length=True, **SETTINGS)
