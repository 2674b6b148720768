"""The throughput study's tables and pictures, and the whole of its report."""

from __future__ import annotations

import math
from itertools import groupby
from typing import TYPE_CHECKING, Any

from benchmarks.studies.results import aligned, seconds_text
from benchmarks.studies.step_timing import PHASES
from benchmarks.studies.study_run import Report
from benchmarks.studies.throughput import scaling
from benchmarks.studies.throughput.report import (
    NOTED_EVENTS_PER_S,
    Rows,
    conclusion,
    curve_lines,
    label,
    own_batch,
    readings,
    select,
    sweep_rows,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"data": "#e45756", "forward": "#4c78a8", "backward": "#72b7b2", "optimizer": "#f58518"}


def memory_text(num_bytes: float | None) -> str:
    return f"{num_bytes / 2**20:,.0f}" if num_bytes is not None and math.isfinite(num_bytes) else ""


def energy_text(row: dict[str, Any]) -> str:
    joules = row["joules"]
    return f"{joules:.3g} J" if joules is not None and math.isfinite(joules) else row["energy_note"]


def measured_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The figures of a row of the sweep."""
    return (
        f"{row['events_per_s']:,.0f}",
        f"{row['tokens_per_s']:,.0f}",
        seconds_text(row["seconds"]),
        seconds_text(row["spread_s"]),
        *(f"{1e3 * row['phases'][name]:.3g}" for name in PHASES),
        memory_text(row["peak_bytes"]),
        f"{100 * row['mfu']:.1f}",
        f"{row['busy_threads']:.1f}",
        energy_text(row),
    )


def sweep_table(rows: Rows) -> str:
    """The sweep, every measured row."""
    headings = (
        "configuration, device",
        "batch",
        "precision, ops, mode",
        "events/s",
        "tokens/s",
        "step",
        "IQR",
        *(f"{'data wait' if name == 'data' else name}, ms" for name in PHASES),
        "peak MiB",
        "% of roof",
        "threads busy",
        "energy",
    )
    lines: list[tuple[str, ...]] = [headings]
    for row in select(rows):
        where = f"{row['config']}, {row['device']}"
        lines.append((where, f"{row['batch']:,}", label(row), *measured_cells(row)))

    return aligned(lines)


def missing_table(rows: Rows) -> str:
    """What of the sweep was not run, in one line for each reason; empty where all was."""

    def kind(row: dict[str, Any]) -> tuple[str, ...]:
        return row["config"], row["device"], row["precision"], row["reason"]

    lines: list[tuple[str, ...]] = [("not run", "batch", "precision, ops, mode", "why")]
    missing = sorted((row for row in rows if row["status"] != "measured"), key=kind)
    for (config, device, precision, reason), group in groupby(missing, key=kind):
        ways = list(group)
        batches = ", ".join(f"{size:,}" for size in sorted({row["batch"] for row in ways}))
        ops, modes = (" and ".join(dict.fromkeys(row[key] for row in ways)) for key in ("ops", "mode"))
        lines.append((f"{config}, {device}", batches, f"{precision}, {ops} ops, {modes}", reason))
    return aligned(lines) if missing else ""


def curve_table(found: dict[str, Any], device: str) -> str:
    """The exponents with their intervals."""
    lines: list[tuple[str, ...]] = [
        (
            "size varied",
            "from",
            "to",
            "step, from",
            "step, to",
            "exponent",
            "95% interval",
            "of the largest",
            "residual",
        )
    ]
    for name, line in curve_lines(found, device).items():
        fit, tail = scaling.fit_exponent(line), scaling.fit_exponent(line[-scaling.TAIL :])
        interval = f"{fit.low:.2f} to {fit.high:.2f}" if math.isfinite(fit.low) else "two sizes: none"
        lines.append(
            (
                name,
                f"{fit.least:,g}",
                f"{fit.most:,g}",
                seconds_text(line[0][1]),
                seconds_text(line[-1][1]),
                f"{fit.exponent:.2f}",
                interval,
                f"{tail.exponent:.2f}",
                f"{100 * fit.residual:.0f}%",
            )
        )
    return aligned(lines)


def predicted_cell(row: dict[str, Any]) -> str:
    """What the curves say of a row; what lies on them is no prediction."""
    if "predicted_s" not in row:
        return ""
    if row["is_on_curve"]:
        return "on a curve"
    least, most = (seconds_text(row[key]) for key in ("predicted_low_s", "predicted_high_s"))
    return f"{seconds_text(row['predicted_s'])} ({least} to {most})"


def wish_table(found: dict[str, Any]) -> str:
    """The wish list, run or predicted."""
    lines: list[tuple[str, ...]] = [
        ("wish", "configuration, device", "step", "events/s", "peak MiB", "predicted from the curves", "note")
    ]
    for name, row in found.items():
        if not name.startswith("wish "):
            continue
        where = f"{row['config']}, {row['device']} {row['precision']}"
        if row["status"] == "measured":
            rounds = f"{row['rounds']} round{'s' if row['rounds'] > 1 else ''}"
            cells = (seconds_text(row["seconds"]), f"{row['events_per_s']:,.0f}", memory_text(row["peak_bytes"]))
            lines.append((row["wish"], where, *cells, predicted_cell(row), rounds))
        else:
            words = "predicted, not run" if "predicted_s" in row else "not run"
            memory = f"{memory_text(row.get('predicted_bytes'))} (predicted)" if "predicted_bytes" in row else ""
            lines.append((row["wish"], where, words, "", memory, predicted_cell(row), row["reason"]))
    return aligned(lines)


def reading_table() -> str:
    """What an event and a batch may mean."""
    low, high = NOTED_EVENTS_PER_S
    lines: list[tuple[str, ...]] = [
        (
            "an event is",
            "events a batch",
            f"s a batch at {low:.0f} to {high:.0f}/s",
            "events/s at 2 to 3 s",
            "fits both",
        )
    ]
    lines += [
        (
            reading.words,
            f"{reading.events:,.0f}",
            f"{reading.batch_s[0]:.3g} to {reading.batch_s[1]:.3g}",
            f"{reading.rate[0]:,.0f} to {reading.rate[1]:,.0f}",
            "yes" if reading.is_consistent else "no",
        )
        for reading in readings()
    ]
    return aligned(lines)


def draw_sweep(rows: Rows, device: str) -> Figure:
    """A step of every contender at the configuration's batch, its phases stacked."""
    from matplotlib.figure import Figure

    configs = list(dict.fromkeys(row["config"] for row in select(rows, device=device)))
    chosen = {config: select(rows, device=device, config=config, batch=own_batch(rows, config)) for config in configs}
    heights = [len(chosen[config]) + 1.5 for config in configs]
    canvas = Figure(figsize=(9, 0.36 * sum(heights) + 1.4), layout="constrained")
    axes = canvas.subplots(len(configs), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axis, config in zip(axes, configs, strict=True):
        for place, row in enumerate(chosen[config]):
            left = 0.0
            for name in PHASES:
                width = 1e3 * row["phases"][name]
                axis.barh(place, width, 0.7, left=left, color=COLOURS[name], label=name if place == 0 else None)
                left += width
            axis.text(left, place, f" {row['events_per_s']:,.0f} events/s", va="center", fontsize=8)
        axis.set_yticks(range(len(chosen[config])), [label(row) for row in chosen[config]], fontsize=8)
        axis.set_ylim(len(chosen[config]) - 0.5, -0.5)
        axis.set_xlim(0, 1.25 * max(1e3 * sum(row["phases"].values()) for row in chosen[config]))
        axis.set_title(f"{config}, batch {chosen[config][0]['batch']}", loc="left", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        axis.set_xlabel("ms a step", fontsize=8)
    handles, _ = axes[0].get_legend_handles_labels()
    canvas.legend(handles, ["wait for data", *PHASES[1:]], loc="outside lower center", ncols=4, fontsize=8)
    canvas.suptitle(f"A training step on the {device}", fontsize=11)
    return canvas


def draw_curves(found: dict[str, Any], device: str) -> Figure:
    """A step's cost against each size, both axes logarithmic, with the fitted power."""
    from matplotlib.figure import Figure

    lines = curve_lines(found, device)
    columns = 3
    canvas = Figure(figsize=(10, 3 * math.ceil(len(lines) / columns) + 0.4), layout="constrained")
    axes = canvas.subplots(math.ceil(len(lines) / columns), columns, squeeze=False).flatten()
    for axis, (name, line) in zip(axes, lines.items(), strict=False):
        draw_curve(axis, name, line)
    for axis in axes[len(lines) :]:
        axis.set_axis_off()
    canvas.suptitle(
        f"Milliseconds of a step against one size at a time, {device}, and the fitted exponent", fontsize=11
    )
    return canvas


def draw_curve(axis: Axes, name: str, line: list[tuple[float, float]]) -> None:
    fit = scaling.fit_exponent(line)
    sizes, values = [size for size, _ in line], [1e3 * seconds for _, seconds in line]
    margin = f" ± {fit.high - fit.exponent:.2f}" if math.isfinite(fit.high) else ""
    axis.plot(sizes, [1e3 * fit(size) for size in sizes], color="#f58518", label=f"{fit.exponent:.2f}{margin}")
    axis.plot(sizes, values, "o", color="#4c78a8")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(sizes, [f"{size:,g}" for size in sizes], fontsize=7, rotation=30)
    axis.minorticks_off()
    axis.set_yticks(values, [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values], fontsize=7)
    axis.set_title(name, fontsize=10)
    axis.set_ylabel("ms", fontsize=8)
    axis.grid(alpha=0.3)
    axis.legend(title="exponent", loc="upper left", fontsize=8, title_fontsize=8)


def finish(found: dict[str, Any]) -> Report:
    """The whole report."""
    rows = sweep_rows(found)
    measured = list(dict.fromkeys(row["device"] for row in select(rows)))
    parts = [
        "Medians over the rounds, contenders in turn; the batches come from a real loader on the synthetic stream. "
        "events/s counts labelled events, tokens/s all that go through the network; data wait is what the step waits "
        "for the loader; where the IQR passes the step, something else held the machine in a round; the roof is this "
        "machine's own rate of large matrix products in the same precision; threads busy counts those that spin while "
        "they wait for others, too. fp16 is timed without a loss scaler.",
        "## What the notes' figures can mean",
        reading_table(),
        "## Every way to run a step",
        sweep_table(rows),
        missing_table(rows),
    ]
    pictures = {}
    for device in measured:
        pictures[f"step-{device}"] = f"A training step on the {device}, by its phases", draw_sweep(rows, device)
        if curve_lines(found, device):
            parts += [f"## How the cost of a step grows, {device}", curve_table(found, device)]
            words = f"A step's cost against each size on the {device}"
            pictures[f"scaling-{device}"] = words, draw_curves(found, device)
    parts += ["## The notes' wish list", wish_table(found)]
    record = {
        "roofs_flops_per_s": {name.removeprefix("roof "): roof for name, roof in found.items() if "roof " in name},
        "readings": [
            {**vars(each), "batch_s": each.batch_s, "rate": each.rate, "fits": each.is_consistent}
            for each in readings()
        ],
        "sweep": rows,
        "curves": {name.removeprefix("curve "): part for name, part in found.items() if name.startswith("curve ")},
        "fits": {
            f"{device} {name}": vars(scaling.fit_exponent(line))
            for device in measured
            for name, line in curve_lines(found, device).items()
        },
        "wishes": [part for name, part in found.items() if name.startswith("wish ")],
    }
    told = [part for part in parts if part]
    return Report("Where did the throughput go?", conclusion(found), told, record, pictures)
