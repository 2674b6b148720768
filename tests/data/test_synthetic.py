"""The workforce stream: its floor is exact, reproducible, and far enough below what counting can reach."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from eventkern.data import synthetic
from eventkern.data.baselines import baselines
from eventkern.data.prepare import prepare
from eventkern.data.schema import Schema
from eventkern.data.store import EventStore
from eventkern.data.synthetic import Chain, Events, WorkforceProcess, simulate, write_table
from eventkern.data.synthetic_floor import Predictions, known_floor, predict, value_probabilities

PROCESS = WorkforceProcess()
SIZES = (20, 100, 1000)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EventStore:
    return prepared(tmp_path_factory.mktemp("workforce"), PROCESS)


def prepared(folder: Path, process: WorkforceProcess, schema: Schema | None = None) -> EventStore:
    def floor(store: EventStore) -> dict[int, list[float]]:
        return {size: values.tolist() for size, values in known_floor(store, process).items()}

    table = write_table(folder / "table.parquet", process)
    prepare(table, schema or Schema.load("workforce"), folder / "store", floor=floor)
    return EventStore.open(folder / "store")


@pytest.fixture(scope="module", params=SIZES)
def predictions(request: pytest.FixtureRequest, store: EventStore) -> Predictions:
    return predict(store, PROCESS, request.param)


def test_floor_agrees_with_the_losses_of_the_exact_predictions(store: EventStore, predictions: Predictions) -> None:
    # Losses minus entropies are martingale differences, so their mean is 0 within its standard error.
    for c, (name, p) in enumerate(zip(store.schema.category_names, predictions.probabilities, strict=True)):
        np.testing.assert_allclose(p.sum(1), 1, atol=1e-12, err_msg=name)
        entropies = -(p * np.log(np.where(p > 0, p, 1))).sum(1)
        surprises = predictions.losses()[:, c] - entropies
        error = surprises.std() / len(surprises) ** 0.5
        assert abs(surprises.mean()) <= 4 * error + 1e-12, name


def test_every_probability_is_calibrated(predictions: Predictions) -> None:
    # How often each class occurs is what the predictions add up to, within four standard errors.
    for p, labels in zip(predictions.probabilities, predictions.labels.T, strict=True):
        surplus = np.bincount(labels, minlength=p.shape[1]) - p.sum(0)
        error = np.sqrt((p * (1 - p)).sum(0).clip(0))
        assert (np.abs(surplus) <= 4.5 * error + 1e-9).all()


def test_labels_are_the_validation_labels_under_the_cut(store: EventStore, predictions: Predictions) -> None:
    size = min(len(predictions.probabilities[2][0]), store.class_sizes[2])
    index = store.index(store.schema.key)
    positions = store.anchors("validation", 1) + 1
    codes = np.array(store.codes[np.sort(index.rows[positions])], np.int64)
    codes[codes >= np.array(store.sizes(size))] = 1
    assert np.array_equal(predictions.labels, codes)


def test_the_cut_merges_rare_classes(store: EventStore) -> None:
    full, cut = predict(store, PROCESS, 1000).probabilities[2], predict(store, PROCESS, 20).probabilities[2]
    np.testing.assert_allclose(cut[:, 1], full[:, 1] + full[:, 20:].sum(1), atol=1e-12)
    np.testing.assert_allclose(cut[:, 2:], full[:, 2:20], atol=1e-12)
    assert cut[:, 1].mean() > 0.2


def test_prepare_records_the_floor(store: EventStore) -> None:
    for size in (100, 1000):
        np.testing.assert_allclose(store.floor(size), known_floor(store)[size], rtol=1e-12)
    assert store.floor(50) is None


def test_floor_is_far_below_what_counting_reaches(store: EventStore) -> None:
    for size in (100, 1000):
        table = baselines(store, size)
        assert table.num_labels == len(predict(store, PROCESS, size).labels)
        assert table.floor.sum() < 0.85 * table.marginal.sum()
        assert table.floor.sum() < 0.95 * table.first_order.sum()
        # Counting may beat the floor of a category by sampling error only.
        assert (table.floor < table.first_order + 0.02).all()


def brute_force(chain: Chain, hours: list[int], signals: np.ndarray, ask: int) -> np.ndarray:
    """The state's distribution at hour `ask` by adding up every path of states from hour 0."""
    num_states = chain.num_states
    belief = np.zeros(num_states)
    step = chain.stays * np.eye(num_states) + (1 - chain.stays) / num_states
    for path in itertools.product(range(num_states), repeat=ask + 1):
        weight = np.prod([step[a, b] for a, b in itertools.pairwise(path)]) / num_states
        for hour, values in zip(hours, signals.T, strict=True):
            weight *= np.prod([e[path[hour], v] for e, v in zip(chain.emissions, values, strict=True)])
        belief[path[-1]] += weight
    return belief / belief.sum()


def test_filter_equals_the_sum_over_all_paths() -> None:
    states = np.arange(4)
    chain = Chain.of(0.6, 0.3, states, states % 2, states // 2)
    hours = [0, 0, 1, 3]
    signals = np.array([[2, 1, 1, 3], [0, 1, 0, 1], [1, 1, 0, 0]])
    beliefs = chain.filter(np.array(hours), signals)
    for seen in range(1, len(hours) + 1):
        for ask in range(hours[seen - 1], 5):
            expected = brute_force(chain, hours[:seen], signals[:, :seen], ask)
            actual = chain.after(beliefs[seen - 1 : seen], np.array([ask - hours[seen - 1]]))[0]
            np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_chains_stay_and_emit_as_their_parameters_say() -> None:
    rng = np.random.default_rng(3)
    chain = PROCESS.duty
    states = chain.simulate((200, 500), rng)
    changes = (1 - PROCESS.duty_stays) * (1 - 1 / PROCESS.num_duties)
    assert abs((np.diff(states) != 0).mean() - changes) < 0.01
    signals = chain.emit(states.ravel(), rng)
    for emissions, values in zip(chain.emissions, signals, strict=True):
        joint = np.zeros_like(emissions)
        np.add.at(joint, (states.ravel(), values), 1)
        np.testing.assert_allclose(joint / joint.sum(1, keepdims=True), emissions, atol=0.02)


def test_predictions_use_nothing_after_the_previous_event() -> None:
    # Other signals, sites and visits after a row leave the predictions from rows up to it as they were.
    events = simulate(PROCESS)
    present = len(events.actor) // 2
    later = np.arange(len(events.actor)) > present
    changed = events._replace(
        duty_signals=np.where(later, 0, events.duty_signals),
        plan_signals=np.where(later, 0, events.plan_signals),
        resident=np.where(later, 0, events.resident),
    )
    labels = np.flatnonzero((events.previous >= 0) & (events.previous <= present))[-500:]
    assert (labels > present).any()
    before, after = (value_probabilities(PROCESS, e, labels) for e in (events, changed))
    for name, probabilities in before.items():
        assert np.array_equal(probabilities, after[name]), name


def test_beliefs_hold_every_report_up_to_the_previous_event() -> None:
    # Hour by hour, from scratch for each label: a filter that left out the newest report would be calibrated, too.
    small = replace(PROCESS, num_actors=4, num_days=30, num_locations=2)
    events = simulate(small)
    is_report = synthetic.KINDS[events.phase] == synthetic.REPORT
    labels = np.flatnonzero(is_report & (events.previous >= 0))[-60:]
    actual = value_probabilities(small, events, labels)
    for n, label in enumerate(labels):
        seen = np.flatnonzero(is_report & (np.arange(len(is_report)) <= events.previous[label]))
        here = seen[events.location[seen] == events.location[label]]
        cases = (
            (small.duty, events.duty_signals, seen, "Time_Reference_Hour", slice(1, 24, 2)),
            (small.plan, events.plan_signals, here, "HoursWorked", slice(1, 13)),
        )
        for chain, signals, rows, name, columns in cases:
            belief = np.full(chain.num_states, 1 / chain.num_states)
            for hour in range(events.hour[label] + 1):
                belief = chain.stays * belief + (1 - chain.stays) / chain.num_states
                for row in rows[events.hour[rows] == hour]:
                    belief = belief * [
                        np.prod([e[state, v] for e, v in zip(chain.emissions, signals[:, row], strict=True)])
                        for state in range(chain.num_states)
                    ]
                    belief /= belief.sum()
            emissions = chain.emissions[-1 if name == "Time_Reference_Hour" else 0]
            np.testing.assert_allclose(actual[name][n, columns], belief @ emissions, rtol=1e-9)


def test_stream_follows_from_its_seed(tmp_path: Path) -> None:
    small = replace(PROCESS, num_actors=3, num_days=40)
    simulate.cache_clear()
    first = write_table(tmp_path / "first.parquet", small)
    simulate.cache_clear()
    again, other = write_table(tmp_path / "again.parquet", small), replace(small, seed=1)
    assert pq.read_table(first).equals(pq.read_table(again))
    assert not pq.read_table(first).equals(pq.read_table(write_table(tmp_path / "other.parquet", other)))


def test_shifts_follow_the_description() -> None:
    events: Events = simulate(PROCESS)
    rows = np.flatnonzero(events.previous >= 0)
    past = events.previous[rows]
    assert np.array_equal(events.actor[rows], events.actor[past])
    assert np.array_equal(events.phase[rows], (events.phase[past] + 1) % synthetic.NUM_PHASES)
    assert (np.diff(events.milliseconds) >= 0).all()
    begins = events.phase[rows] == 0
    gap = (events.shift_day[rows] - events.shift_day[past])[begins]
    rested = events.shift[past][begins] == synthetic.SHIFTS_PER_BLOCK - 1
    assert set(gap[~rested]) == {1}
    assert set(gap[rested]) == {3, 4}
    assert abs((gap[rested] == 4).mean() - PROCESS.long_rest) < 0.04


def test_foreign_store_is_refused(store: EventStore) -> None:
    with pytest.raises(ValueError, match="are not those of"):
        predict(store, replace(PROCESS, seed=1), 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_residents": 5}, "num_residents is 5; want 6 to"),
        ({"num_duties": 13}, "num_duties is 13; want 2 to 12"),
        ({"num_actors": 0}, "num_actors is 0; want 1 to"),
        ({"punctuality": (0.5, 0.4)}, "want 4 probabilities"),
    ],
)
def test_parameters_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PROCESS, **options)


def test_floor_holds_for_a_small_stream(tmp_path: Path) -> None:
    # Few actors leave residents, officers and hours unseen in training: their probability falls to class 1.
    small = replace(PROCESS, num_actors=6, num_days=60, seed=4)
    schema = replace(Schema.load("workforce"), split="2023-11-10")
    table = prepared(tmp_path, small, schema)
    exact = predict(table, small, 1000)
    surprises = exact.losses().sum(1)
    assert np.isfinite(surprises).all()
    assert abs(surprises.mean() - exact.entropy().sum()) < 4 * surprises.std() / len(surprises) ** 0.5
