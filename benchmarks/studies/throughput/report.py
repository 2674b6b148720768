"""The throughput study in words; every number is worked out from the figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.studies.results import seconds_text
from benchmarks.studies.step_timing import PHASES
from benchmarks.studies.throughput import scaling
from benchmarks.training import Shapes

NOTED_EVENTS_PER_S = (490.0, 520.0)
NOTED_BATCH_S = (2.0, 3.0)
NOTED_ACCUMULATION = 8
"""Of gpu_optimized.json."""

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Reading:
    """What "an event" and "a batch" of the notes may mean.

    Attributes:
        words: the reading.
        events: of a batch.
    """

    words: str
    events: float

    @property
    def batch_s(self) -> tuple[float, float]:
        """Seconds of a batch at the events/s of the notes."""
        return self.events / NOTED_EVENTS_PER_S[1], self.events / NOTED_EVENTS_PER_S[0]

    @property
    def rate(self) -> tuple[float, float]:
        """Events/s at the seconds a batch of the notes."""
        return self.events / NOTED_BATCH_S[1], self.events / NOTED_BATCH_S[0]

    @property
    def is_consistent(self) -> bool:
        """Whether both figures of the notes can be true of one run."""
        return self.batch_s[0] <= NOTED_BATCH_S[1] and self.batch_s[1] >= NOTED_BATCH_S[0]


def readings() -> list[Reading]:
    """The readings that the notes' configurations and wish list allow."""
    large, small = Shapes.load("gpu_optimized"), Shapes.load("cpu_baseline")
    windows, labels = large.batch_size, large.num_events
    streams = large.model.num_streams * large.model.src_seq_len
    tokens = windows * (streams + large.model.tgt_seq_len)
    steps = NOTED_ACCUMULATION
    return [
        Reading(f"a predicted event; {windows} windows of {large.model.tgt_seq_len}", labels),
        Reading(f"a predicted event; {steps} x {windows} windows, an optimizer step", steps * labels),
        Reading(f"an event read or predicted; {windows} windows", tokens),
        Reading(f"an event read or predicted; {steps} x {windows} windows", steps * tokens),
        Reading(f"a window; {windows} of them", windows),
        Reading(f"a window; {steps} x {windows} of them", steps * windows),
        Reading(f"a predicted event of cpu_baseline; {small.batch_size} windows", small.num_events),
        *(Reading(f"a window; {size:,} of them, of the wish list", size) for size in (512, 1024, 2048)),
    ]


def select(rows: Rows, **wanted: Any) -> list[dict[str, Any]]:
    """The measured rows with the given entries."""
    return [
        row for row in rows if row["status"] == "measured" and all(row[key] == value for key, value in wanted.items())
    ]


def sweep_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows of the sweep, with rates and the share of the measured roof."""
    rows = []
    for name, part in found.items():
        for row in part if name.startswith("sweep ") else ():
            if row["status"] == "measured":
                roof = found.get(f"roof {row['device']} {row['precision']}")
                row = row | {
                    "tokens_per_s": row["tokens"] / row["seconds"],
                    "mfu": row["operations"] / row["seconds"] / roof if roof else math.nan,
                }
            rows.append(row)
    return rows


def own_batch(rows: Rows, config: str) -> int:
    """The batch size of a configuration: that of its file."""
    return next(row["batch"] for row in rows if row["config"] == config and row["is_own_batch"])


def label(row: dict[str, Any]) -> str:
    return f"{row['precision']}, {row['ops']} ops, {row['mode']}"


def machine_text(rows: Rows, device: str) -> str:
    """What this machine does with the shapes of the notes."""
    words = []
    for config in dict.fromkeys(row["config"] for row in select(rows, device=device)):
        batch = own_batch(rows, config)
        chosen = select(rows, device=device, config=config, batch=batch)
        slow, fast = (pick(chosen, key=lambda row: row["events_per_s"]) for pick in (min, max))
        words.append(
            f"{config} (batch {batch}, {fast['labels']:,.0f} labelled events a step): {seconds_text(slow['seconds'])} "
            f"and {slow['events_per_s']:,.0f} events/s at the slowest ({label(slow)}), "
            f"{seconds_text(fast['seconds'])} and {fast['events_per_s']:,.0f} events/s at the fastest ({label(fast)})"
        )
    return f"On this machine's {device}, {'; '.join(words)}." if words else ""


def readings_text(rows: Rows, device: str) -> str:
    """What 2 to 3 s a batch and 490 to 520 events/s can mean together."""
    told = readings()
    low, high = NOTED_BATCH_S[0] * NOTED_EVENTS_PER_S[0], NOTED_BATCH_S[1] * NOTED_EVENTS_PER_S[1]
    first = told[0]
    fitting = [reading.words for reading in told if reading.is_consistent]
    large = Shapes.load("gpu_optimized")
    per_window = low / large.batch_size, high / large.batch_size
    text = (
        f"The units: {NOTED_EVENTS_PER_S[0]:.0f} to {NOTED_EVENTS_PER_S[1]:.0f} events/s and {NOTED_BATCH_S[0]:g} to "
        f"{NOTED_BATCH_S[1]:g} s a batch are both true of one run only if a batch holds {low:,.0f} to {high:,.0f} "
        f"events. A batch of gpu_optimized has {first.events:,.0f} labelled events, which at that rate take "
        f"{first.batch_s[0]:.1f} to {first.batch_s[1]:.1f} s; in {NOTED_BATCH_S[0]:g} to {NOTED_BATCH_S[1]:g} s they "
        f"would be {first.rate[0]:,.0f} to {first.rate[1]:,.0f} events/s. "
    )
    text += f"Of the readings in the table these fit both: {'; '.join(fitting) if fitting else 'none'}. "
    text += (
        f"With {large.batch_size} windows a batch both fit if {per_window[0]:.0f} to {per_window[1]:.0f} of the "
        f"{large.model.tgt_seq_len} labels of a window were counted, the rest being padding; or the figures are of two "
        "different runs. The notes do not tell which."
    )
    windows = select(rows, device=device, config="gpu_optimized", batch=large.batch_size)
    if windows:
        text += (
            f" In the synthetic stream {windows[0]['labels'] / large.batch_size:.0f} labels of a window count, so its "
            "padding does not explain it."
        )
    return text


def gap_text(rows: Rows, device: str) -> str:
    """The notes' figures against this machine's, at the same shapes."""
    large = Shapes.load("gpu_optimized")
    chosen = select(rows, device=device, config="gpu_optimized", batch=large.batch_size)
    if not chosen:
        return ""
    slow, fast = (pick(chosen, key=lambda row: row["events_per_s"]) for pick in (min, max))
    noted = statistics.fmean(NOTED_EVENTS_PER_S)
    batch_s = slow["labels"] / NOTED_EVENTS_PER_S[1], slow["labels"] / NOTED_EVENTS_PER_S[0]
    flops = [slow["operations"] / seconds / 1e9 for seconds in reversed(batch_s)]
    optimizer_s = [NOTED_ACCUMULATION * row["seconds"] for row in (fast, slow)]
    verdict = "faster" if slow["events_per_s"] > noted else "slower"
    times = slow["events_per_s"] / noted
    text = (
        f"Against the notes, counting labelled events: the slowest way measured here is "
        f"{times if times >= 1 else 1 / times:.2g} times {verdict} than {noted:.0f} events/s, the fastest "
        f"{fast['events_per_s'] / noted:.2g} times as fast. A step of these shapes is {slow['operations'] / 1e9:,.0f} "
        f"GFLOP; in {batch_s[0]:.1f} to {batch_s[1]:.1f} s that is {flops[0]:.1f} to {flops[1]:.1f} GFLOP/s, where "
        f"this {device} reaches {fast['operations'] / fast['seconds'] / 1e9:,.0f}"
    )
    if device == "cpu" and times > 1:
        text += (
            f" on {slow['threads']} threads. So unless their GPU was slower than these cores, neither the arithmetic "
            "of the model nor plain operators held it at the notes' rate: the time was lost outside the mathematics, "
            "in what keeps a GPU waiting (the utilisation study takes that apart; the shuffle study times files)"
        )
    return (
        f"{text}. An optimizer step of {NOTED_ACCUMULATION} such batches takes {seconds_text(optimizer_s[0])} to "
        f"{seconds_text(optimizer_s[1])} here; the notes have {NOTED_BATCH_S[0]:g} to {NOTED_BATCH_S[1]:g} s a batch."
    )


FACTORS = (
    ("fused instead of reference ops (fp32, eager)", ("fp32", "reference", "eager"), ("fp32", "fused", "eager")),
    ("bf16 instead of fp32 (fused, eager)", ("fp32", "fused", "eager"), ("bf16", "fused", "eager")),
    ("compiled instead of eager (fp32, fused)", ("fp32", "fused", "eager"), ("fp32", "fused", "compiled")),
    ("compiled instead of eager (bf16, fused)", ("bf16", "fused", "eager"), ("bf16", "fused", "compiled")),
    ("tf32 instead of fp32 (fused, eager)", ("fp32", "fused", "eager"), ("tf32", "fused", "eager")),
)


def factors(rows: Rows, device: str, config: str) -> dict[str, float]:
    """How many times the events/s each change brings, everything else alike, at the configuration's batch."""
    batch = own_batch(rows, config)
    bought = {}
    for words, before, after in FACTORS:
        pair = [
            select(rows, device=device, config=config, batch=batch, **dict(zip(("precision", "ops", "mode"), how)))  # noqa: B905
            for how in (before, after)
        ]
        if all(pair):
            bought[words] = pair[1][0]["events_per_s"] / pair[0][0]["events_per_s"]
    eager = sorted(
        select(rows, device=device, config=config, precision="fp32", ops="fused", mode="eager"),
        key=lambda row: row["batch"],
    )
    if len(eager) > 1:
        words = f"batch {eager[-1]['batch']} instead of {eager[0]['batch']} (fp32, fused, eager)"
        bought[words] = eager[-1]["events_per_s"] / eager[0]["events_per_s"]
    return bought


def factors_text(rows: Rows, device: str) -> str:
    """Which factor buys what."""
    words = []
    for config in dict.fromkeys(row["config"] for row in select(rows, device=device)):
        bought = factors(rows, device, config)
        if bought:
            listed = ", ".join(f"{name} {value:.2f}x" for name, value in bought.items())
            words.append(f"for {config}: {listed}")
    return f"What each factor buys on the {device}, in events/s: {'; '.join(words)}." if words else ""


def phases_text(rows: Rows, device: str) -> str:
    """Where the time of the fastest step goes."""
    words = []
    for config in dict.fromkeys(row["config"] for row in select(rows, device=device)):
        chosen = select(rows, device=device, config=config, batch=own_batch(rows, config))
        fast = max(chosen, key=lambda row: row["events_per_s"])
        shares = ", ".join(f"{name} {100 * fast['phases'][name] / fast['seconds']:.2g}%" for name in PHASES)
        words.append(
            f"{config} ({label(fast)}): {shares}; {100 * fast['mfu']:.0f}% of the measured rate of matrix products"
        )
    return f"The fastest step's time: {'. '.join(words)}." if words else ""


def curve_lines(found: dict[str, Any], device: str) -> dict[str, list[tuple[float, float]]]:
    """The measured curves of a device by configuration and name."""
    prefix = f"curve {device} "
    lines = {
        ": ".join(name.removeprefix(prefix).split(" ", 1)): scaling.points(part)
        for name, part in found.items()
        if name.startswith(prefix)
    }
    return {name: line for name, line in lines.items() if len(line) > 1}


def curves_text(found: dict[str, Any], device: str) -> str:
    """The exponents in words."""
    words = []
    for name, line in curve_lines(found, device).items():
        fit, tail = scaling.fit_exponent(line), scaling.fit_exponent(line[-scaling.TAIL :])
        words.append(
            f"{name} {fit.exponent:.2f} from {fit.least:g} to {fit.most:g} ({tail.exponent:.2f} over the largest sizes)"
        )
    if not words:
        return ""
    return (
        f"A step's cost grows with a power of each size, everything else fixed: {', '.join(words)}. Below 1 a part of "
        "the step does not grow with the size; 1 means that larger steps neither gain nor lose events/s on this "
        f"{device}."
    )


def wishes_text(found: dict[str, Any], device: str) -> str:
    """The wish list in words."""
    rows = [part for name, part in found.items() if name.startswith(f"wish {device} ")]
    run = [row for row in rows if row["status"] == "measured"]
    if not any("counted" in row or "operations" in row for row in rows):
        return ""
    text = [
        f"{row['config']} with {row['wish']}: {seconds_text(row['seconds'])} a step, "
        f"{row['events_per_s']:,.0f} events/s"
        for row in run
    ]
    waiting = [
        f"{row['config']} with {row['wish']}: {seconds_text(row['predicted_s'])} predicted, not run"
        for row in rows
        if row["status"] != "measured" and "predicted_s" in row
    ]
    return f"The wish list ({rows[0]['precision']}, our ops, eager): {'; '.join([*text, *waiting])}."


def waiting_text(found: dict[str, Any]) -> str:
    """What was not run, and why."""
    rows = [row for name, part in found.items() if name.startswith("sweep ") for row in part]
    reasons: dict[str, int] = {}
    for row in rows:
        if row["status"] != "measured":
            reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    listed = "; ".join(f"{count} rows of the sweep: {reason}" for reason, count in reasons.items())
    return f"Not run: {listed}. No figure stands in for them." if reasons else ""


def conclusion(found: dict[str, Any]) -> list[str]:
    """The study's paragraphs."""
    rows = sweep_rows(found)
    paragraphs = []
    for device in dict.fromkeys(row["device"] for row in select(rows)):
        paragraphs += [
            machine_text(rows, device),
            readings_text(rows, device),
            gap_text(rows, device),
            factors_text(rows, device),
            phases_text(rows, device),
            curves_text(found, device),
            wishes_text(found, device),
        ]
    return [paragraph for paragraph in [*paragraphs, waiting_text(found)] if paragraph]
