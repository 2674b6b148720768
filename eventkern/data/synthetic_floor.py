"""The known floor of the workforce stream: what stays uncertain of an event when everything before it is known.

A label is predicted from all events of all actors up to and with its actor's previous event: the most that any window
can show a model. Given these, the label's place in its shift and block is known, its day and site are known or follow
from one draw (rest, circuit), and the hidden chains are independent of one another and of all else. So a forward filter
gives the exact distribution b of each chain's state at the label's hour, and a signal with emissions E has
probabilities b E. With p_c(v) the probability of class v of category c, added up over the raw values that v stands for,

    floor_c = mean over the validation labels of  -sum_v p_c(v) ln p_c(v).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eventkern.data import synthetic
from eventkern.data.schema import FIRST_CLASS, Category
from eventkern.data.store import EventStore
from eventkern.data.synthetic import Chain, Events, Floats, Ints, WorkforceProcess
from eventkern.data.vocabulary import MISSING_CLASS


@dataclass(frozen=True)
class Predictions:
    """The exact predictive distributions of the validation labels.

    Attributes:
        labels: (n, C) classes.
        probabilities: C arrays, (n, classes).
    """

    labels: Ints
    probabilities: tuple[Floats, ...]

    def entropy(self) -> Floats:
        """(C,) mean entropy in nats."""
        logs = (np.log(p, out=np.zeros_like(p), where=p > 0) for p in self.probabilities)
        return np.array([abs((p * log).sum(1).mean()) for p, log in zip(self.probabilities, logs, strict=True)])

    def losses(self) -> Floats:
        """(n, C) -ln of the probability of each label; its mean differs from the entropy by sampling error only."""
        rows = np.arange(len(self.labels))
        pairs = zip(self.probabilities, self.labels.T, strict=True)
        return np.stack([-np.log(p[rows, label]) for p, label in pairs], axis=1)


def known_floor(
    store: EventStore, process: WorkforceProcess | None = None, id_category_sizes: Sequence[int] = (100, 1000)
) -> dict[int, Floats]:
    """The floor of each category by id_category_size; what `prepare` takes as its `floor`.

    Args:
        store: the prepared stream of `process`, under a schema over the columns of `write_table`, in UTC.
        process: parameters; the defaults unless given.
        id_category_sizes: sizes to compute it for.

    Returns:
        (C,) nats for each size.

    Raises:
        ValueError: the store does not hold this process's stream.
    """
    return {size: predict(store, process or WorkforceProcess(), size).entropy() for size in id_category_sizes}


def predict(store: EventStore, process: WorkforceProcess, id_category_size: int) -> Predictions:
    """Predict every validation event whose actor has an earlier event (see `known_floor`)."""
    events = synthetic.simulate(process)
    moments = (events.milliseconds + _epoch(process)) * 1_000_000
    if not np.array_equal(moments, store.timestamps):
        raise ValueError(f"store is {store.path}, whose events are not those of {process}; prepare it from write_table")
    rows = np.flatnonzero((np.arange(store.num_events) >= store.split_row) & (events.previous >= 0))
    values = value_probabilities(process, events, rows)
    labels, probabilities = store.codes[rows].astype(np.int64), []
    for c, (category, size) in enumerate(zip(store.schema.categories, store.sizes(id_category_size), strict=True)):
        classes = _classes(store, c, category, process, values[category.name].shape[1])
        classes[classes >= size] = MISSING_CLASS
        labels[labels[:, c] >= size, c] = MISSING_CLASS
        merged = np.zeros((len(rows), size))
        np.add.at(merged.T, classes, values[category.name].T)
        probabilities.append(merged)
    return Predictions(labels, tuple(probabilities))


def value_probabilities(process: WorkforceProcess, events: Events, rows: Ints) -> dict[str, Floats]:
    """(n, values) probabilities of the raw values of each category of the events in `rows`, given the past.

    Values are numbered: identifiers as in `process.names`, hours worked in quarters (0: missing), months and days from
    0, years from the one before the stream begins, in which the first references may lie.
    """
    n, past, at = len(rows), events.previous[rows], np.arange(len(rows))
    phase, location, hour = events.phase[rows], events.location[rows], events.hour[rows]
    role, shift, shift_day = events.actor[rows] % len(synthetic.ROLES), events.shift[rows], events.shift_day[rows]
    clock_in, visit, report, clock_out = (np.flatnonzero(synthetic.KINDS[phase] == kind) for kind in range(4))
    sheet, plain = clock_out[shift[clock_out] % 3 == 2], clock_out[shift[clock_out] % 3 < 2]

    all_reports = np.flatnonzero(synthetic.KINDS[events.phase] == synthetic.REPORT)
    on_duty = _beliefs(process.duty, events, events.duty_signals, all_reports, rows[report])
    plan = np.empty((len(report), process.num_plans))
    for site in range(process.num_locations):
        here = np.flatnonzero(location[report] == site)
        site_reports = all_reports[events.location[all_reports] == site]
        plan[here] = _beliefs(process.plan, events, events.plan_signals, site_reports, rows[report[here]])
    report_type, officer, report_hour = (on_duty @ emissions for emissions in process.duty.emissions)
    duration, report_month = (plan @ emissions for emissions in process.plan.emissions)

    tables = {name: np.zeros((n, len(names))) for name, names in process.names.items()}
    event_type, recipient, sites = (tables[name] for name in ("EventType", "RecipientRecordId", "LocationRecordId"))
    event_type[clock_in, synthetic.CLOCKED_IN] = 1
    event_type[visit, synthetic.CANCELLED] = process.cancelled
    event_type[visit, synthetic.FIRST_VISIT + role[visit]] = 1 - process.cancelled
    event_type[report, synthetic.FIRST_REPORT :] = report_type
    event_type[plain, synthetic.CLOCKED_OUT] = event_type[sheet, synthetic.TIMESHEET] = 1
    tables["ActorRecordId"][at, events.actor[rows]] = 1

    chosen = np.full((n, process.num_residents), (1 - process.own_resident) / process.num_residents)
    chosen[at, role] += process.own_resident
    visited = np.where(phase > 0, events.resident[past], -1)
    stays = np.where(visited >= 0, process.same_resident, 0)
    chosen *= 1 - stays[:, None]
    chosen[at, visited] += stays
    residents = location[:, None] * process.num_residents + np.arange(process.num_residents)
    recipient[visit[:, None], residents[visit]] = chosen[visit]
    first_supervisor = process.first_officer + process.num_duties
    recipient[report, process.first_officer : first_supervisor] = officer
    for rest in (clock_in, plain):
        recipient[rest, first_supervisor + role[rest]] = 1
    recipient[sheet, -1] = 1

    onward = (events.location[past] + synthetic.CIRCUIT_STEPS[role]) % process.num_locations
    sites[clock_in] = process.strays / process.num_locations
    sites[clock_in, onward[clock_in]] += 1 - process.strays
    sites[phase > 0, location[phase > 0]] = 1

    tables["IsTimesheet"] = np.zeros((n, 2))
    tables["IsTimesheet"][:, 0] = 1
    tables["IsTimesheet"][sheet] = 0, 1
    quarters = tables["HoursWorked"] = np.zeros((n, synthetic.MOST_QUARTERS + 1))
    quarters[np.r_[clock_in, visit], 0] = 1
    quarters[report, 1 : 1 + process.num_plans] = duration
    worked = events.worked_before[rows[clock_out]] + synthetic.SHIFT_QUARTERS
    quarters[clock_out, worked] = 1 - process.overtime
    quarters[clock_out, worked + synthetic.OVERTIME_QUARTERS] = process.overtime

    # A clock-in after a rest can lie on two days, the reference of a report in any month.
    event_days, event_chances = np.repeat(hour[:, None] // 24, 2, axis=1), np.tile([1.0, 0.0], (n, 1))
    rested = clock_in[shift[clock_in] == 0]
    event_days[rested] = events.shift_day[past[rested], None] + [3, 4]
    event_chances[rested] = 1 - process.long_rest, process.long_rest
    reference_days = np.repeat(shift_day[:, None], process.num_plans, axis=1)
    reference_chances = np.zeros(reference_days.shape)
    reference_days[clock_in, :2], reference_chances[:, :2] = event_days[clock_in], event_chances
    reference_days[sheet] -= 2
    months = np.arange(process.num_plans)
    reference_days[report] = synthetic.first_monday(process, hour[report, None] // 24, months)
    reference_chances[report] = report_month
    tables |= _calendar(process, "Time_Event", event_days, event_chances)
    tables |= _calendar(process, "Time_Reference", reference_days, reference_chances)

    event_hours = tables["Time_Event_Hour"] = np.zeros((n, 24))
    event_hours[at, hour % 24] = 1
    reference_hours = tables["Time_Reference_Hour"] = np.zeros((n, 24))
    reference_hours[at, synthetic.START_HOURS[role, shift // 3]] = 1
    reference_hours[np.r_[report, sheet]] = 0
    reference_hours[report, 1 : 2 * process.num_duties : 2] = report_hour
    reference_hours[sheet, 0] = 1

    minutes = tables["Time_Event_Minute"] = np.zeros((n, 60))
    own = events.own_slot[events.actor[rows]]
    for late, chance in enumerate(process.punctuality):
        slots = (own + late) % synthetic.NUM_SLOTS
        minutes[at, phase * synthetic.PHASE_MINUTES % 60 + slots * synthetic.MINUTE_STEP] = chance
    return tables


def _beliefs(chain: Chain, events: Events, signals: Ints, reports: Ints, labels: Ints) -> Floats:
    """(n, K) distributions of a chain's state at each label, from the reports up to and with its previous event."""
    hours = events.hour[reports]
    unknown = np.full((1, chain.num_states), 1 / chain.num_states)
    beliefs = np.concatenate([unknown, chain.filter(hours, signals[:, reports])])
    latest = np.searchsorted(reports, events.previous[labels], side="right")
    return chain.after(beliefs[latest], events.hour[labels] - np.concatenate([[0], hours])[latest])


def _calendar(process: WorkforceProcess, prefix: str, days: Ints, chances: Floats) -> dict[str, Floats]:
    """(n, values) probabilities of calendar fields, each day of (n, k) days having its chance."""
    dates = np.datetime64(process.start, "D") + days
    months = dates.astype("datetime64[M]")
    fields = {
        "Year": dates.astype("datetime64[Y]").astype(np.int64) + 1970 - _year_before(process),
        "Month": months.astype(np.int64) % 12,
        "Day": (dates - months).astype(np.int64),
        "Weekday": (dates.astype(np.int64) + 3) % 7,
    }
    tables = {}
    for name, values in fields.items():
        table = np.zeros((len(days), values.max(initial=0) + 1))
        np.add.at(table, (np.arange(len(days))[:, None], values), chances)
        tables[f"{prefix}_{name}"] = table
    return tables


def _classes(store: EventStore, column: int, category: Category, process: WorkforceProcess, num_values: int) -> Ints:
    """The full class of each numbered value of a category."""
    fitted = store.info["categories"][column]
    numbers = np.arange(num_values)
    if category.kind == "id":
        ranks = {name: rank for rank, name in enumerate(fitted["values"], FIRST_CLASS)}
        return np.array([ranks.get(name, MISSING_CLASS) for name in process.names[category.name]])
    if category.kind == "bins":
        bins = np.searchsorted(fitted["edges"], numbers / 4, side="right") + FIRST_CLASS
        return np.where(numbers == 0, MISSING_CLASS, bins)
    if category.field == "year":
        years = numbers + _year_before(process) - int(fitted["values"][0])
        return np.where((years < 0) | (years >= len(fitted["values"])), MISSING_CLASS, years + FIRST_CLASS)
    return numbers + FIRST_CLASS


def _epoch(process: WorkforceProcess) -> int:
    """Milliseconds from 1970 to the stream's first midnight."""
    return int(np.datetime64(process.start, "ms").astype(np.int64))


def _year_before(process: WorkforceProcess) -> int:
    return int(np.datetime64(process.start, "Y").astype(np.int64)) + 1970 - 1
