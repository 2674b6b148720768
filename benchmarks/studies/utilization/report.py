"""The utilisation study in words, tables and pictures; every number is worked out from the figures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from benchmarks.studies.results import aligned, seconds_text
from benchmarks.studies.study_run import Report
from benchmarks.studies.throughput.report import NOTED_EVENTS_PER_S
from benchmarks.studies.utilization.trace import CAUSES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEATURES = (
    "plain model, windows row by row from Parquet files",
    "windows in memory, torch's sampler and DataLoader",
    "order by IndexSampler",
    "batches from EventLoader",
    "EventTransformer on reference ops",
    "fused ops",
    "torch.compile",
    "CUDA graphs (reduce-overhead)",
)
"""From plain code to all of the library; each has what those before it have."""
FILES, MEMORY, ORDER, LOADER, MODEL, OPS, COMPILED, GRAPHS = FEATURES
LOADERS = (FILES, MEMORY, ORDER, LOADER)
NOTED_BUSY = (0.10, 0.60)
NOTED_CONFIG = "gpu_optimized"
HEADINGS = {
    "sync": "value read",
    "allocator": "allocator",
    "data": "data",
    "optimizer": "optimizer",
    "forward": "forward",
    "backward": "backward",
    "other": "between phases",
}
"""Of the gaps, in a table."""
COLOURS = ("#bab0ac", "#4c78a8", "#9ecae9", "#72b7b2", "#eeca3b", "#f58518", "#e45756", "#b279a2")

Rows = Sequence[dict[str, Any]]


def ladders(found: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The ladders by device and configuration, those with a figure alone."""
    told = {}
    for name, part in found.items():
        kind, device, config = name.split(" ", 2) if name.count(" ") >= 2 else (name, "", "")
        if kind == "ladder" and any(row["status"] == "measured" for row in part):
            told[device, config] = part
    return told


def measured(rows: Rows) -> list[dict[str, Any]]:
    return [row for row in rows if row["status"] == "measured"]


def by_feature(rows: Rows, key: str = "feature") -> dict[str, dict[str, Any]]:
    return {row[key]: row for row in measured(rows)}


def ratios(rows: Rows) -> dict[str, float]:
    """How many times the events/s of the step before, for each step that was run."""
    return {
        after["feature"]: after["events_per_s"] / before["events_per_s"] for before, after in pairwise(measured(rows))
    }


def within_spread(rows: Rows) -> set[str]:
    """The steps whose time differs from the step before by less than the rounds of either differ."""
    return {
        after["feature"]
        for before, after in pairwise(measured(rows))
        if abs(after["seconds"] - before["seconds"]) < max(after["spread_s"], before["spread_s"])
    }


def bought_text(device: str, config: str, rows: Rows) -> str:
    """What each step bought."""
    run = measured(rows)
    steps = ratios(rows)
    unsure = within_spread(rows)
    listed = "; ".join(
        f"{name} {value:.2f}x{' (within the spread)' * (name in unsure)}" for name, value in steps.items()
    )
    most = max(steps, key=lambda name: steps[name]) if steps else ""
    total = run[-1]["events_per_s"] / run[0]["events_per_s"]
    return (
        f"{config} on the {device}: from {run[0]['events_per_s']:,.0f} events/s ({run[0]['feature']}) to "
        f"{run[-1]['events_per_s']:,.0f}, {total:.1f} times as many. Each step's events/s over the step before: "
        f"{listed}. Most came with: {most}.{waits_text(rows)}"
    )


def waits_text(rows: Rows) -> str:
    """What the order and the loader can have bought at the most: the wait that they took off the step."""
    told = by_feature(rows)
    if not {FILES, MEMORY, ORDER, LOADER} <= told.keys():
        return ""
    waits = " and ".join(
        f"{seconds_text(told[name]['phases']['data'])} with {name}" for name in (FILES, MEMORY, ORDER, LOADER)
    )
    return (
        f" A step waits for data {waits}: order and loader buy at most what they take off that wait, and what their "
        "ratios show beyond it is the machine's drift."
    )


def busy_text(device: str, config: str, rows: Rows) -> str:
    """How busy the device was in a step, and what it waited for."""
    words = []
    for row in measured(rows):
        if row["feature"] not in (FILES, LOADER, OPS, COMPILED, GRAPHS):
            continue
        seen = row["profile"]
        gaps = sorted(seen["gaps_ms"].items(), key=lambda each: -each[1])[:2]
        listed = ", ".join(f"{CAUSES[name]} {value / seen['span_ms']:.1%}" for name, value in gaps)
        words.append(
            f"{row['feature']}: busy {seen['busy_share']:.0%} of the step with {seen['kernels']:,.0f} "
            f"{'kernels' if device == 'cuda' else 'outermost operators'}; the largest gaps: {listed}"
        )
    return f"Busy, by the profiler's intervals, {config} on the {device}. {'. '.join(words)}."


def dispatch_text(device: str, config: str, found: dict[str, Any]) -> str:
    """What the host needs to start a step's operators, whatever the device does."""
    rows = by_feature(found.get(f"dispatch {device} {config}", []))
    ladder = by_feature(found.get(f"ladder {device} {config}", []))
    if not {MEMORY, OPS} <= rows.keys() or OPS not in ladder:
        return ""
    labels = ladder[OPS]["labels"]
    plain_s, ours_s = rows[MEMORY]["seconds"], rows[OPS]["seconds"]
    noted_s = labels / NOTED_EVENTS_PER_S[1]
    share = plain_s / noted_s
    verdict = "cannot be what held the notes' run" if share < 0.5 else "can by itself explain the notes' rate"
    return (
        f"Dispatch alone, {config}: the same layers and categories on next to nothing (one window of 2 events) take "
        f"the host {seconds_text(plain_s)} a step in plain code and {seconds_text(ours_s)} in ours. A device "
        f"that computed in no time could not pass {labels / plain_s:,.0f} and {labels / ours_s:,.0f} events/s. "
        f"At the notes' rate a step of {labels:,.0f} labels takes {seconds_text(noted_s)} or more, of which plain "
        f"dispatch on this host is {share:.1%}: launching operators {verdict}."
    )


def notes_text(device: str, config: str, found: dict[str, Any]) -> str:
    """What the notes' busy shares leave for waiting, against what loaders cost here."""
    rows = by_feature(found.get(f"loaders {device} {config}", []), "loader")
    ladder = by_feature(found.get(f"ladder {device} {config}", []))
    if not {FILES, MEMORY, LOADER} <= rows.keys() or OPS not in ladder:
        return ""
    labels, windows = ladder[OPS]["labels"], rows[FILES]["windows_per_batch"]
    step_s = [labels / rate for rate in NOTED_EVENTS_PER_S]
    waits = (1 - NOTED_BUSY[1]) * min(step_s), (1 - NOTED_BUSY[0]) * max(step_s)
    files_s, memory_s, ours_s = (rows[name]["window_s"] for name in (FILES, MEMORY, LOADER))
    low, high = (wait / windows for wait in waits)
    within = "inside that range" if low <= files_s <= high else "above that range"
    if files_s < low:
        within = f"below that range, which is {low / files_s:.0f} to {high / files_s:.0f} times as much"
    return (
        f"What the notes' figures leave for waiting, if an event is a label: {NOTED_EVENTS_PER_S[0]:.0f} to "
        f"{NOTED_EVENTS_PER_S[1]:.0f} events/s are {min(step_s):.2f} to {max(step_s):.2f} s a step of {config}; a GPU "
        f"that is {NOTED_BUSY[0]:.0%} to {NOTED_BUSY[1]:.0%} busy waits {waits[0]:.1f} to {waits[1]:.1f} s of it, "
        f"{seconds_text(low)} to {seconds_text(high)} for each of its {windows} windows. Here a window costs "
        f"{seconds_text(files_s)} row by row from Parquet files ({within}), {seconds_text(memory_s)} cut "
        f"from memory in Python, {seconds_text(ours_s)} from EventLoader. What the notes' windows were read from is "
        "not published, so this shows what a loader of that kind leaves idle, not that theirs was one."
    )


def waiting_text(found: dict[str, Any]) -> str:
    """What is shown here and what waits for a GPU."""
    missing: dict[str, list[str]] = {}
    for name, part in found.items():
        if name.startswith("ladder "):
            device, config = name.split(" ", 2)[1:]
            for row in part:
                if row["status"] != "measured":
                    missing.setdefault(row["reason"], []).append(f"{config} on {device}, {row['feature']}")
    if not missing:
        return ""
    listed = "; ".join(f"{reason} ({len(names)} steps)" for reason, names in missing.items())
    shown = not any(device == "cuda" for device, _ in ladders(found))
    text = f"Not run: {listed}."
    if shown:
        text += (
            " Shown on a CPU: what loaders, dispatch and operators cost, and what each part of the library takes "
            "off. Waiting for a GPU: its busy share, launches and kernels a step, gaps by host syncs and by the "
            "allocator, and what CUDA graphs buy."
        )
    return text


def conclusion(found: dict[str, Any]) -> list[str]:
    """The study's paragraphs."""
    paragraphs = []
    for (device, config), rows in ladders(found).items():
        paragraphs += [
            bought_text(device, config, rows),
            busy_text(device, config, rows),
        ]
        if config == NOTED_CONFIG:
            paragraphs += [dispatch_text(device, config, found), notes_text(device, config, found)]
    return [paragraph for paragraph in [*paragraphs, waiting_text(found)] if paragraph]


def ladder_table(rows: Rows) -> str:
    """Before and after, step by step."""
    lines: list[tuple[str, ...]] = [
        (
            "each with all before it",
            "events/s",
            "x the step before",
            "step",
            "IQR",
            "data wait, ms",
            "threads busy",
            "first step",
        )
    ]
    steps, unsure = ratios(rows), within_spread(rows)
    for row in rows:
        if row["status"] != "measured":
            lines.append((row["feature"], f"not run: {row['reason']}", *("",) * 6))
            continue
        ratio = steps.get(row["feature"])
        lines.append(
            (
                row["feature"],
                f"{row['events_per_s']:,.0f}",
                f"{ratio:.2f}{' (within the spread)' * (row['feature'] in unsure)}" if ratio else "",
                seconds_text(row["seconds"]),
                seconds_text(row["spread_s"]),
                f"{1e3 * row['phases']['data']:.3g}",
                f"{row['busy_threads']:.2f} of {row['threads']}",
                seconds_text(row["first_s"]),
            )
        )
    return aligned(lines)


def busy_table(device: str, rows: Rows) -> str:
    """What the profiler saw."""
    kinds = ("kernels", "launches") if device == "cuda" else ("outermost operators", "all operators")
    lines: list[tuple[str, ...]] = [
        ("each with all before it", *kinds, "busy", "values read", *HEADINGS.values(), "profiled step", "x unprofiled")
    ]
    for row in measured(rows):
        seen = row["profile"]
        second = seen["launches"] if device == "cuda" else seen["operators"]
        lines.append(
            (
                row["feature"],
                f"{seen['kernels']:,.0f}",
                f"{second:,.0f}",
                f"{seen['busy_share']:.1%}",
                f"{seen['syncs']:,.0f}",
                *(f"{seen['gaps_ms'][name]:.3g}" for name in CAUSES),
                seconds_text(seen["span_ms"] / 1e3),
                f"{seen['span_ms'] / 1e3 / row['seconds']:.2f}",
            )
        )
    return aligned(lines)


def loader_table(found: dict[str, Any]) -> str:
    """Loaders with no model beside them."""
    lines: list[tuple[str, ...]] = [("loader alone", "configuration, device", "first batch", "a batch", "a window")]
    for name, part in found.items():
        if not name.startswith("loaders "):
            continue
        device, config = name.split(" ", 2)[1:]
        for row in part:
            where = f"{config}, {device}"
            if row["status"] != "measured":
                lines.append((row["loader"], where, f"not run: {row['reason']}", "", ""))
                continue
            times = (seconds_text(row[key]) for key in ("first_s", "batch_s", "window_s"))
            lines.append((row["loader"], where, *times))
    return aligned(lines)


def dispatch_table(found: dict[str, Any]) -> str:
    """The step that is nothing but dispatch."""
    lines: list[tuple[str, ...]] = [("dispatch alone", "configuration, device", "step", "IQR")]
    for name, part in found.items():
        if name.startswith("dispatch "):
            device, config = name.split(" ", 2)[1:]
            for row in measured(part):
                words = "plain model" if row["feature"] == MEMORY else row["feature"]
                lines.append(
                    (words, f"{config}, {device}", seconds_text(row["seconds"]), seconds_text(row["spread_s"]))
                )
    return aligned(lines)


def draw_ladder(found: dict[str, Any]) -> Figure:
    """Events/s of every step, with what it bought."""
    from matplotlib.figure import Figure

    told = ladders(found)
    heights = [len(rows) + 1.2 for rows in told.values()]
    canvas = Figure(figsize=(9.5, 0.4 * sum(heights) + 0.8), layout="constrained")
    axes = canvas.subplots(len(told), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axis, ((device, config), rows) in zip(axes, told.items(), strict=True):
        steps = ratios(rows)
        rates = [row["events_per_s"] for row in measured(rows)]
        for place, row in enumerate(rows):
            if row["status"] != "measured":
                axis.text(
                    0.04 * max(rates), place, f"not run: {row['reason']}", va="center", fontsize=8, color="#555555"
                )
                continue
            axis.barh(place, row["events_per_s"], 0.7, color=COLOURS[place])
            ratio = f"  {steps[row['feature']]:.2f}x" if row["feature"] in steps else ""
            axis.text(row["events_per_s"], place, f" {row['events_per_s']:,.0f}{ratio}", va="center", fontsize=8)
        axis.axvspan(*NOTED_EVENTS_PER_S, color="#e45756", alpha=0.5)
        axis.set_yticks(
            range(len(rows)), [f"+ {row['feature']}" if n else row["feature"] for n, row in enumerate(rows)]
        )
        axis.tick_params(axis="y", labelsize=8)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xlim(0, 1.2 * max(rates))
        axis.set_title(f"{config}, {device}, fp32", loc="left", fontsize=10)
        axis.set_xlabel("labelled events/s (red: the notes' 490 to 520)", fontsize=8)
    canvas.suptitle("What each part of the library buys, one after the other", fontsize=11)
    return canvas


def draw_gaps(found: dict[str, Any]) -> Figure:
    """A profiled step of every contender: work, and what the device waited for."""
    from matplotlib.figure import Figure

    told = ladders(found)
    heights = [len(measured(rows)) + 1.2 for rows in told.values()]
    canvas = Figure(figsize=(9.5, 0.42 * sum(heights) + 1.6), layout="constrained")
    axes = canvas.subplots(len(told), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axis, ((device, config), rows) in zip(axes, told.items(), strict=True):
        run = measured(rows)
        for place, row in enumerate(run):
            seen = row["profile"]
            shares = {"work": seen["busy_ms"], **{CAUSES[name]: value for name, value in seen["gaps_ms"].items()}}
            left = 0.0
            for number, (name, value) in enumerate(shares.items()):
                width = 100 * value / seen["span_ms"]
                axis.barh(place, width, 0.7, left=left, color=COLOURS[number], label=name if place == 0 else None)
                left += width
        axis.set_yticks(range(len(run)), [row["feature"] for row in run], fontsize=8)
        axis.set_ylim(len(run) - 0.5, -0.5)
        axis.set_xlim(0, 100)
        axis.set_title(f"{config}, {device}", loc="left", fontsize=10)
        axis.set_xlabel("% of the step", fontsize=8)
    handles, words = axes[0].get_legend_handles_labels()
    canvas.legend(handles, words, loc="outside lower center", ncols=2, fontsize=8)
    canvas.suptitle("Where a step is busy, and what it waits for", fontsize=11)
    return canvas


def finish(found: dict[str, Any]) -> Report:
    """The whole report."""
    told = ladders(found)
    parts = [
        "Medians over the rounds, contenders in turn; events/s counts labelled events. Busy is the union of the "
        "profiler's intervals of kernels (on a CPU: of the outermost operators, without those that only allocate or "
        "read a value) over the profiled steps; gaps are in ms a step, each idle moment put down to the first cause "
        "that fits: a value read by the host (item, nonzero: on a GPU a wait for the device), the allocator, the wait "
        "for data, then what passes between operators of the optimizer, the forward (Python) and the backward "
        "(autograd). The profiler's own cost lies in the gaps, so they are upper bounds (last column).",
        "## Loaders alone",
        loader_table(found),
        "## Dispatch alone",
        "The same layers and categories on one window of 2 events: what the host needs to start a step's operators, "
        "and on a CPU the smallest work of each, so an upper bound.",
        dispatch_table(found),
    ]
    for (device, config), rows in told.items():
        parts += [f"## {config} on the {device}, fp32", ladder_table(rows), busy_table(device, rows)]
    missing = [name for name, part in found.items() if name.startswith("ladder ") and not measured(part)]
    parts += [f"{name.removeprefix('ladder ')}: not run, {found[name][0]['reason']}." for name in missing]
    pictures = {}
    if told:
        pictures["features"] = "What each part of the library buys", draw_ladder(found)
        pictures["busy"] = "Where a step is busy and what it waits for", draw_gaps(found)
    record = {
        "loaders": {name.removeprefix("loaders "): part for name, part in found.items() if name.startswith("loaders ")},
        "dispatch": {
            name.removeprefix("dispatch "): part for name, part in found.items() if name.startswith("dispatch ")
        },
        "ladders": {name.removeprefix("ladder "): part for name, part in found.items() if name.startswith("ladder ")},
        "ratios": {f"{device} {config}": ratios(rows) for (device, config), rows in told.items()},
    }
    return Report("Where did the utilisation go?", conclusion(found), parts, record, pictures)
