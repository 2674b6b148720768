"""The workforce stream: a seeded process of 17 categories whose floor is known (`synthetic_floor` computes it).

An employee's role, one of six, sets the hours of the shifts, the event type of visits, and the circuit of sites.

    shift      13 events, 20 minutes apart, at one site: clock-in, 7 visits, 4 reports, clock-out
    block      3 shifts on consecutive days, 3 more at other hours, then 2 or (`long_rest`) 3 days off
    site       at each clock-in the next on the role's circuit, or (`strays`) any
    visit      to the resident visited last in the shift (`same_resident`), else to the role's own resident of the site
               (`own_resident`), else to any; its event type says the role, or (`cancelled`) VisitCancelled
    report     by the duty g, one for all sites: event type g, recipient officer g, reference hour 2g + 1;
               by the site's plan m: hours worked (m + 1) / 4, reference day the first Monday of month m + 1
    clock-out  with the hours since the last timesheet, 4 a shift and at times (`overtime`) half an hour more; every
               third one is the timesheet, to payroll, with the first of the three days as its reference
    minute     the employee's own within the 20 minutes, or (`punctuality`) another

Duty and plans are hidden Markov chains; a signal of theirs is noise with probability `signal_noise`. Where no
probability is named, things follow from the past; the reference of other events is the start of the shift.

What each stream tells that the actor's events in the window do not:

    actor      which of three shifts it is, shown by the last clock-out alone; seven categories of the next hang on it
    location   the site's plan, shown by others' reports; the actor was here a week ago or more
    all        the duty, shown by any report; the actor's own last report is most of a day old

Reports come late in a shift, so most anchors precede them. Sources are as of the anchor: they tell of the reports of
the anchor's shift, hardly of the next.

With the defaults, in nats summed over the categories (validation labels; streams by exact filters on what windows of 20
sources and 20 targets show):

    marginal 38.9   first-order baseline 10.8   best by such windows 2.80   floor 2.41
    a stream taken away adds: actor 0.24, location 0.10, all 0.10

The chains change within hours or days, so that the hour, day and site of a report do not give its signals away, and
the validation period begins inside a month that training has seen: else models learn the calendar by heart.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ROLES = ("Nurse", "Carer", "Therapist", "Driver", "Technician", "Cleaner")
CLOCK_IN, VISIT, REPORT, CLOCK_OUT = range(4)
KINDS = np.array([CLOCK_IN, *[VISIT] * 7, *[REPORT] * 4, CLOCK_OUT])
NUM_PHASES = len(KINDS)
SHIFTS_PER_BLOCK = 6
START_HOURS = np.array([[0, 12], [2, 14], [4, 16], [6, 18], [8, 20], [10, 22]])
"""Hour at which a shift of each role begins, in the first and in the second half of its block."""

CIRCUIT_STEPS = np.array([1, 3, 5, 7, 1, 3])
PHASE_MINUTES, MINUTE_STEP = 20, 5
NUM_SLOTS = PHASE_MINUTES // MINUTE_STEP
SHIFT_QUARTERS, OVERTIME_QUARTERS = 16, 2
MOST_QUARTERS = 3 * (SHIFT_QUARTERS + OVERTIME_QUARTERS)
CLOCKED_IN, CLOCKED_OUT, TIMESHEET, CANCELLED, FIRST_VISIT, FIRST_REPORT = 0, 1, 2, 3, 4, 10
"""Numbers of the event types."""


@dataclass(frozen=True)
class WorkforceProcess:
    """Parameters of the process; the defaults are the stream that `eventkern prepare synthetic` writes.

    Args:
        num_actors: employees; each has about 3,990 events in the default span.
        num_locations: sites.
        num_residents: residents of each site, at least 6.
        num_duties: states of the duty chain, each with an officer; at most 12.
        num_plans: states of the plan chain of each site; at most 12.
        start: first day.
        num_days: days of the stream.
        duty_stays: probability that the duty chain keeps its state at a full hour; else it redraws uniformly.
        plan_stays: the same for the plan chain of each site.
        signal_noise: probability that a signal of a report is uniform noise.
        long_rest: probability of three days off after a block, instead of two.
        strays: probability that the next shift's site is uniform, instead of the next on the role's circuit.
        overtime: probability that a shift takes half an hour more.
        own_resident: probability that a new choice is the role's own resident of the site, instead of a uniform one.
        same_resident: probability that a visit goes where the shift's previous one went, instead of a new choice.
        cancelled: probability that a visit is cancelled.
        punctuality: probabilities that an event lies 0, 5, 10 or 15 minutes after the actor's own slot in each 20
            minutes, cyclically.
        seed: of the generator.
    """

    num_actors: int = 27
    num_locations: int = 8
    num_residents: int = 12
    num_duties: int = 12
    num_plans: int = 12
    start: str = "2023-10-01"
    num_days: int = 427
    duty_stays: float = 0.86
    plan_stays: float = 0.98
    signal_noise: float = 0.05
    long_rest: float = 0.3
    strays: float = 0.15
    overtime: float = 0.2
    own_resident: float = 0.6
    same_resident: float = 0.8
    cancelled: float = 0.1
    punctuality: tuple[float, ...] = (0.7, 0.15, 0.0, 0.15)
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {"num_actors": (1, 10**6), "num_locations": (1, 10**4), "num_days": (1, 10**5)}
        ranges |= {"num_residents": (len(ROLES), 10**4), "num_duties": (2, 12), "num_plans": (2, 12)}
        for name, (least, most) in ranges.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; want {least} to {most}")
        if len(self.punctuality) != NUM_SLOTS or abs(sum(self.punctuality) - 1) > 1e-9:
            raise ValueError(f"punctuality is {self.punctuality}; want {NUM_SLOTS} probabilities")

    @property
    def duty(self) -> Chain:
        """The chain of all sites: state g shows in a report as its type g, recipient g and reference hour g."""
        states = np.arange(self.num_duties)
        return Chain.of(self.duty_stays, self.signal_noise, states, states, states)

    @property
    def plan(self) -> Chain:
        """The chain of one site: state m shows in a report as its duration m and reference month m."""
        states = np.arange(self.num_plans)
        return Chain.of(self.plan_stays, self.signal_noise, states, states)

    @property
    def first_officer(self) -> int:
        """Number of the first officer among recipients: residents site by site, officers, supervisors, payroll."""
        return self.num_locations * self.num_residents

    @property
    def names(self) -> dict[str, list[str]]:
        """The values of the identifier categories."""
        reports = [f"Report{number + 1:02}" for number in range(self.num_duties)]
        sites = [f"site-{site + 1:02}" for site in range(self.num_locations)]
        residents = [f"resident-{site[5:]}-{number + 1:02}" for site in sites for number in range(self.num_residents)]
        officers = [f"officer-{number + 1:02}" for number in range(self.num_duties)]
        supervisors = [f"supervisor-{role.lower()}" for role in ROLES]
        visits = [f"{role}Visit" for role in ROLES]
        return {
            "EventType": ["ClockIn", "ClockOut", "Timesheet", "VisitCancelled", *visits, *reports],
            "ActorRecordId": [f"employee-{actor + 1:03}" for actor in range(self.num_actors)],
            "RecipientRecordId": [*residents, *officers, *supervisors, "payroll"],
            "LocationRecordId": sites,
        }


class Chain(NamedTuple):
    """A hidden Markov chain over K states: each hour it stays with probability `stays`, else it redraws uniformly.

    Attributes:
        stays: probability of staying.
        emissions: of each signal, the (K, values) probabilities given the state.
    """

    stays: float
    emissions: tuple[Floats, ...]

    @classmethod
    def of(cls, stays: float, noise: float, *signals: Ints) -> Chain:
        """A chain whose state k shows as signal[k], or with probability `noise` as any value of the signal."""
        widths = [int(signal.max()) + 1 for signal in signals]
        return cls(stays, tuple((1 - noise) * np.eye(w)[s] + noise / w for s, w in zip(signals, widths, strict=True)))

    @property
    def num_states(self) -> int:
        return len(self.emissions[0])

    def simulate(self, shape: tuple[int, ...], rng: np.random.Generator) -> Ints:
        """States of independent copies of the chain; the last axis is hours."""
        states = rng.integers(self.num_states, size=shape)
        stays = rng.random(shape) < self.stays
        for hour in range(1, shape[-1]):
            states[..., hour] = np.where(stays[..., hour], states[..., hour - 1], states[..., hour])
        return states

    def emit(self, states: Ints, rng: np.random.Generator) -> Ints:
        """(signals, n) values, independent given the states."""
        uniform = rng.random((len(self.emissions), len(states), 1))
        return np.stack([(u > e.cumsum(1)[states, :-1]).sum(1) for u, e in zip(uniform, self.emissions, strict=True)])

    def after(self, belief: Floats, hours: Ints) -> Floats:
        """(n, K) distributions of the state some hours later."""
        stays = self.stays ** hours[:, None]
        return stays * belief + (1 - stays) / self.num_states

    def filter(self, hours: Ints, signals: Ints) -> Floats:
        """(n, K) distributions of the state given all signals up to each one (the forward algorithm).

        Args:
            hours: (n,) hour of the signals, ascending.
            signals: (signals, n) values.
        """
        likelihoods = np.prod([e[:, s] for e, s in zip(self.emissions, signals, strict=True)], axis=0).T
        stays = self.stays ** np.diff(hours, prepend=hours[:1])
        belief = np.full(self.num_states, 1 / self.num_states)
        beliefs = np.empty_like(likelihoods)
        for n, likelihood in enumerate(likelihoods):
            belief = (stays[n] * belief + (1 - stays[n]) / self.num_states) * likelihood
            belief /= belief.sum()
            beliefs[n] = belief
        return beliefs


class Events(NamedTuple):
    """The simulated stream in the order of time; N events.

    Attributes:
        milliseconds: (N,) time of the event since the stream's first midnight.
        reference_hour: (N,) hour of the reference time since the stream's first midnight.
        event_type, recipient, actor, location: (N,) numbers of their names in `WorkforceProcess.names`.
        quarters: (N,) hours worked in quarters of an hour, 0 where missing.
        previous: (N,) row of the actor's previous event, -1 where there is none.
        shift_day: (N,) day on which the shift began, counted from the stream's first.
        shift: (N,) number of the shift in its block.
        phase: (N,) number of the event in its shift.
        resident: (N,) number within the site of the resident visited last in the shift, -1 where there is none yet.
        worked_before: (N,) quarters worked from the last timesheet up to the shift before this one.
        duty_signals: (3, N) signals of the duty chain; of meaning in reports only, as the next.
        plan_signals: (2, N) signals of the site's plan chain.
        own_slot: (actors,) the five minutes of each twenty in which an actor's events mostly lie.
    """

    milliseconds: Ints
    reference_hour: Ints
    event_type: Ints
    recipient: Ints
    quarters: Ints
    previous: Ints
    actor: Ints
    location: Ints
    shift_day: Ints
    shift: Ints
    phase: Ints
    resident: Ints
    worked_before: Ints
    duty_signals: Ints
    plan_signals: Ints
    own_slot: Ints

    @property
    def hour(self) -> Ints:
        """(N,) hour of the event since the stream's first midnight."""
        return self.milliseconds // 3_600_000


@functools.lru_cache(maxsize=2)
def simulate(process: WorkforceProcess) -> Events:
    """Draw the stream."""
    rng = np.random.default_rng(process.seed)
    shape = (process.num_actors, process.num_days, NUM_PHASES)
    role = np.arange(process.num_actors) % len(ROLES)
    own_slot = rng.integers(NUM_SLOTS, size=process.num_actors)

    # Shifts, (actors, shifts): three of one kind, three of another, then two or three days off.
    shift = (3 * rng.integers(2, size=(shape[0], 1)) + np.arange(shape[1])) % SHIFTS_PER_BLOCK
    rest = np.where(shift == SHIFTS_PER_BLOCK - 1, 2 + (rng.random(shift.shape) < process.long_rest), 0)
    shift_day = rng.integers(8, size=(shape[0], 1)) + np.cumsum(1 + rest, axis=1) - (1 + rest)
    location = rng.integers(process.num_locations, size=shift.shape)
    strays = rng.random(shift.shape) < process.strays
    extra = rng.random(shift.shape) < process.overtime
    worked = SHIFT_QUARTERS + OVERTIME_QUARTERS * extra  # quarters of an hour since the last timesheet
    for s in range(1, shape[1]):
        onward = (location[:, s - 1] + CIRCUIT_STEPS[role]) % process.num_locations
        location[:, s] = np.where(strays[:, s], location[:, s], onward)
        worked[:, s] += np.where(shift[:, s] % 3 > 0, worked[:, s - 1], 0)

    # Events, (actors, shifts, phases).
    start = shift_day * 24 + START_HOURS[role[:, None], shift // 3]
    slot = (own_slot[:, None, None] + rng.choice(NUM_SLOTS, p=process.punctuality, size=shape)) % NUM_SLOTS
    minute = start[..., None] * 60 + np.arange(NUM_PHASES) * PHASE_MINUTES + slot * MINUTE_STEP
    milliseconds = minute * 60_000 + rng.integers(60_000, size=shape)
    resident = np.full(shape, -1)
    visited = resident[..., 0]
    for phase in range(1, NUM_PHASES):
        uniform = rng.integers(process.num_residents, size=visited.shape)
        fresh = np.where(rng.random(visited.shape) < process.own_resident, role[:, None], uniform)
        stays = (visited >= 0) & (rng.random(visited.shape) < process.same_resident)
        visited = np.where(stays | (KINDS[phase] != VISIT), visited, fresh)
        resident[..., phase] = visited

    # From here on (N,): events in the order of time, without those beyond the span.
    order = np.argsort(milliseconds, axis=None, kind="stable")
    order = order[minute.ravel()[order] < process.num_days * 24 * 60]
    row_of = np.full(minute.size, -1)
    row_of[order] = np.arange(len(order))
    previous = np.where(order % (shape[1] * NUM_PHASES) == 0, -1, row_of[order - 1])
    actor, shift_number, phase = np.unravel_index(order, shape)
    at = actor, shift_number
    role, shift, shift_day, start, location = role[actor], shift[at], shift_day[at], start[at], location[at]
    worked, worked_before = worked[at], worked[at] - SHIFT_QUARTERS - OVERTIME_QUARTERS * extra[at]
    milliseconds, resident = milliseconds.ravel()[order], resident.ravel()[order]
    hour, kind = milliseconds // 3_600_000, KINDS[phase]

    duty = process.duty.simulate((process.num_days * 24,), rng)
    plan = process.plan.simulate((process.num_locations, process.num_days * 24), rng)
    duty_signals = process.duty.emit(duty[hour], rng)
    plan_signals = process.plan.emit(plan[location, hour], rng)
    report_type, officer, report_hour = duty_signals
    duration, report_month = plan_signals
    report_start = first_monday(process, hour // 24, report_month) * 24 + 2 * report_hour + 1

    visit_type = np.where(rng.random(len(order)) < process.cancelled, CANCELLED, FIRST_VISIT + role)
    is_timesheet = shift % 3 == 2
    supervisor = process.first_officer + process.num_duties + role

    def by_kind(clock_in: Ints | int, visit: Ints | int, report: Ints | int, clock_out: Ints | int) -> Ints:
        return np.choose(kind, [clock_in, visit, report, clock_out])

    return Events(
        milliseconds=milliseconds,
        reference_hour=by_kind(
            start,
            start,
            report_start,
            np.where(is_timesheet, (shift_day - 2) * 24, start),
        ),
        event_type=by_kind(
            CLOCKED_IN,
            visit_type,
            FIRST_REPORT + report_type,
            np.where(is_timesheet, TIMESHEET, CLOCKED_OUT),
        ),
        recipient=by_kind(
            supervisor,
            location * process.num_residents + resident,
            process.first_officer + officer,
            np.where(is_timesheet, supervisor - role + len(ROLES), supervisor),
        ),
        quarters=by_kind(0, 0, 1 + duration, worked),
        previous=previous,
        actor=actor,
        location=location,
        shift_day=shift_day,
        shift=shift,
        phase=phase,
        resident=resident,
        worked_before=worked_before,
        duty_signals=duty_signals,
        plan_signals=plan_signals,
        own_slot=own_slot,
    )


def first_monday(process: WorkforceProcess, day: Ints, month: Ints) -> Ints:
    """The first Monday, as a day since the stream's first, of a month (from 0) in the year of another day."""
    start = np.datetime64(process.start, "D")
    january = (start + day).astype("datetime64[Y]").astype("datetime64[M]")
    first = (january + month).astype("datetime64[D]").astype(np.int64)
    return first + (4 - first) % 7 - start.astype(np.int64)  # 1970 began on a Thursday


def write_table(path: str | Path, process: WorkforceProcess | None = None) -> Path:
    """Write the stream as a Parquet table for the schema `workforce`.

    Args:
        path: file to write.
        process: parameters; the defaults unless given.

    Returns:
        The path.
    """
    import pyarrow as pa
    import pyarrow.parquet

    process = process or WorkforceProcess()
    events = simulate(process)
    names = process.names
    epoch = int(np.datetime64(process.start, "ms").astype(np.int64))

    def named(category: str, numbers: Ints) -> pa.Array:
        return pa.DictionaryArray.from_arrays(numbers.astype(np.int32), names[category])

    def moment(milliseconds: Ints) -> pa.Array:
        return pa.array(milliseconds + epoch).cast(pa.timestamp("ms", "UTC"))

    table = pa.table(
        {
            "EventType": named("EventType", events.event_type),
            "ActorRecordId": named("ActorRecordId", events.actor),
            "RecipientRecordId": named("RecipientRecordId", events.recipient),
            "LocationRecordId": named("LocationRecordId", events.location),
            "IsTimesheet": events.event_type == TIMESHEET,
            "HoursWorked": pa.array(events.quarters / 4, mask=events.quarters == 0),
            "Time_Reference": moment(events.reference_hour * 3_600_000),
            "Time_Event": moment(events.milliseconds),
        }
    )
    path = Path(path)
    pyarrow.parquet.write_table(table, path)
    return path
