"""What the shuffle study writes: tables, a picture, and a text that says what the figures say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.studies import results
from benchmarks.studies.results import aligned, seconds_text
from benchmarks.studies.shuffle import ladder as steps
from benchmarks.studies.shuffle.ladder import Layout, Verdict
from benchmarks.studies.shuffle.layers import (
    COLD,
    IN_ORDER,
    NUM_WORKERS,
    OURS,
    PARQUET,
    SHUFFLED,
    WARM,
    WINDOWED,
    worker_name,
)
from benchmarks.studies.shuffle.timing import Figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

TITLES = {
    "order": "Order generation (nothing is fetched)",
    "fetch": "Fetch and collate (all in memory)",
    "storage": "Storage (items one by one, not collated)",
    "workers": "Worker processes on top",
    "layout": "The notes' pipeline: Parquet files, one kept in an LRU cache, DataLoader item by item",
    "ladder": "In sequence: the notes' pipeline, each layer alone and one after the other replaced by ours",
    "cold": "Page cache cold and warm (EventStore.rows)",
}


def cell(figure: Figure | None) -> str:
    """Seconds of an epoch, with ~ where most of it was not run."""
    return "" if figure is None else f"{'~' if figure.is_extrapolated else ''}{seconds_text(figure.seconds)}"


def by_contender(figures: list[Figure], layer: str) -> dict[tuple[str, int], dict[str, Figure]]:
    """A layer's figures: contender and events, then order."""
    lines: dict[tuple[str, int], dict[str, Figure]] = {}
    for figure in figures:
        if figure.layer == layer:
            lines.setdefault((figure.contender, figure.num_events), {})[figure.order] = figure
    return dict(sorted(lines.items(), key=lambda line: line[0][1]))


def layer_table(figures: list[Figure], layer: str) -> str:
    """Every contender of a layer at every size, shuffled beside in order."""
    lines = by_contender(figures, layer)
    has_window = any(WINDOWED in orders for orders in lines.values())
    head = ("contender", "events", "batch", "in order", "shuffled", *((WINDOWED,) if has_window else ()))
    table: list[tuple[str, ...]] = [
        (*head, "shuffled / in order", "first batch, shuffled", "timed, shuffled", "repeats")
    ]
    for (name, num_events), orders in lines.items():
        in_order, shuffled = orders[IN_ORDER], orders[SHUFFLED]
        table.append(
            (
                f"**{name}**" if shuffled.is_ours else name,
                f"{num_events:,}",
                f"{shuffled.batch_size:,}",
                cell(in_order),
                cell(shuffled),
                *((cell(orders.get(WINDOWED)),) if has_window else ()),
                ratio_text(orders),
                seconds_text(shuffled.first_s),
                f"{shuffled.num_timed:,} of {shuffled.num_samples:,}" if shuffled.is_extrapolated else "all",
                f"{len(shuffled.timings)}",
            )
        )
    return aligned(table)


def layout_table(layouts: list[Layout]) -> str:
    """What a layout's ratio is made of."""
    head = ("parser and item", "files", "rows a file", "read of a file", "item in order, reads aside", "ratio")
    table: list[tuple[str, ...]] = [(*head, "item cost that would give 140")]
    table += [
        (
            layout.parser,
            f"{layout.num_files:,}",
            f"{layout.rows_per_file:,}",
            seconds_text(layout.load_s),
            seconds_text(layout.item_s),
            f"{layout.ratio:,.0f}",
            seconds_text(layout.noted_item_s) if layout.noted_item_s > 0 else "none",
        )
        for layout in layouts
    ]
    return aligned(table)


def ratio_text(orders: dict[str, Figure]) -> str:
    """Shuffled over in order."""
    ratio = orders[SHUFFLED].seconds / orders[IN_ORDER].seconds
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"


def conclusion(
    figures: list[Figure], layouts: list[Layout], base: Layout, verdicts: dict[int, Verdict], cold: dict[int, str]
) -> list[str]:
    """Paragraphs in plain words; every number and every name of a culprit in them comes from the figures."""
    n = base.num_events
    text = [
        culprit_text(figures, base, verdicts[n]),
        order_text(figures, n, verdicts[n]),
        ours_text(figures, n),
        unknown_text(layouts),
    ]
    others = [f"{size:,} events {verdicts[size].base_ratio:,.3g}" for size in sorted(verdicts) if size != n]
    if others:
        text.insert(
            3,
            f"With the same {base.rows_per_file:,} rows a file, shuffled over in order is for the notes' pipeline at "
            f"{', at '.join(others)}. A single file that holds all rows is never read again, whatever the order.",
        )
    return text + [f"EventStore.rows at {size:,} events, {words}." for size, words in sorted(cold.items())]


def culprit_text(figures: list[Figure], base: Layout, verdict: Verdict) -> str:
    """Which layer took the ratio with it."""
    n = base.num_events
    ladder, workers = by_contender(figures, "ladder"), by_contender(figures, "workers")
    found, large = ladder[steps.BASE, n], ladder[steps.LARGE_FETCH, n]
    left = "; ".join(
        f"{layer}: {verdict.removed[layer]:.1%} of the added time gone{range_text(*verdict.removed_range[layer])}, "
        f"{ratio_text(ladder[name, n])} times left"
        for layer, name in steps.ALONE.items()
    )
    if verdict.base_ratio <= steps.NO_COST_RATIO:
        judgement = "So shuffling costs next to nothing here, and no layer is to blame."
    elif verdict.culprit is None:
        judgement = "So no layer alone takes away more than half: several of them carry the ratio together."
    else:
        judgement = f"So the layer that carries the ratio is **{verdict.culprit}**."
    return (
        f"At {n:,} events the pipeline of the notes, here over {base.num_files} Parquet files ({base.parser}), the "
        f"layout whose ratio came nearest to {steps.NOTED_RATIO:.0f}, takes {cell(found[IN_ORDER])} an epoch in order "
        f"and {cell(found[SHUFFLED])} shuffled: {ratio_text(found)} times as long (~ marks what was extrapolated from "
        f"a timed part). With one layer at a time replaced by ours (what two layers share counts with both): {left}. "
        f"{judgement} Timed inside the passes, reading files again made {verdict.read_share:.1%} of the added time, "
        f"{seconds_text(steps.read_s(found[SHUFFLED]))} a read. Batches of "
        f"{large[SHUFFLED].batch_size:,} read file by file leave {ratio_text(large)} times; {NUM_WORKERS} worker "
        f"processes on the notes' pipeline {ratio_text(workers[worker_name(PARQUET, NUM_WORKERS), n])}."
    )


def range_text(least: float, most: float) -> str:
    """The spread of a share over the rounds, where there were several."""
    return f" ({least:.1%} to {most:.1%} in its rounds)" if least != most else ""


def order_text(figures: list[Figure], n: int, verdict: Verdict) -> str:
    """What the order by itself costs."""
    orders = by_contender(figures, "order")
    sampler, ours = orders["torch BatchSampler(RandomSampler)", n], orders["eventkern IndexSampler", n]
    added_s = sampler[SHUFFLED].seconds - sampler[IN_ORDER].seconds
    share = f", {100 * added_s / verdict.extra_s:.2g}% of what shuffling adds to the notes' pipeline" * (
        verdict.extra_s > 0
    )
    return (
        f"The order alone: torch's BatchSampler(RandomSampler) needs {cell(sampler[SHUFFLED])} for it, "
        f"{seconds_text(added_s)} more than in order{share}; eventkern's IndexSampler {cell(ours[SHUFFLED])}. To the "
        f"first batch of indices: {seconds_text(sampler[SHUFFLED].first_s)} against "
        f"{seconds_text(ours[SHUFFLED].first_s)}."
    )


def ours_text(figures: list[Figure], n: int) -> str:
    """What shuffling costs once every layer is ours."""
    small, large = by_contender(figures, "ladder")[steps.STEPS[-1], n], by_contender(figures, "fetch")[OURS, n]
    plain = by_contender(figures, "fetch")["DataLoader(TensorDataset)", n]
    parts = [
        f"{cell(orders[IN_ORDER])} in order and {cell(orders[SHUFFLED])} shuffled at batches of "
        f"{orders[SHUFFLED].batch_size:,} ({ratio_text(orders)} times)"
        for orders in (small, large)
    ]
    return (
        f"With every layer ours an epoch takes {' and '.join(parts)}; torch's DataLoader(TensorDataset, shuffle=True) "
        f"over the same rows in memory takes {cell(plain[SHUFFLED])} at batches of {plain[SHUFFLED].batch_size:,}."
    )


def unknown_text(layouts: list[Layout]) -> str:
    """What the notes do not tell, and how the ratio depends on it."""
    crossings = steps.crossings(layouts)
    passed = [f"with '{parser}' at about {count:,.0f} files" for parser, count in crossings.items() if count]
    missed = [f"'{parser}'" for parser, count in crossings.items() if not count]
    passes = ", ".join([*passed, *([f"not with {' or '.join(missed)}"] if missed else [])]) if passed else "with none"
    ratios = [layout.ratio for layout in layouts]
    counts = [layout.num_files for layout in layouts]
    return (
        "What cannot be known without the notes' data: for F files of r rows, L seconds to read one and p seconds for "
        "the rest of an item, the ratio is (p + L (1 - 1/F)) / (p + L / r). So it depends on the rows of a file, on "
        f"the parser, and on what an item costs in order: {min(ratios):,.0f} to {max(ratios):,.0f} over the layouts "
        f"measured here. Between {min(counts):,} and {max(counts):,} files it passes {steps.NOTED_RATIO:.0f} "
        f"{passes}; what p would give {steps.NOTED_RATIO:.0f} with other items the table of layouts tells. "
        "The files, the parser and the items of the notes are not published, so this shows a cause that suffices and "
        "what the other layers can add, not their very files."
    )


def cold_text(figures: list[Figure], n: int, seen: str) -> str:
    """One size's epochs from a cold and from a warm page cache in words."""
    lines = by_contender(figures, "cold")
    if (COLD, n) not in lines:
        return seen
    parts = []
    for name in (COLD, WARM):
        orders = lines[name, n]
        in_order_s = orders[IN_ORDER].seconds
        times = ", ".join(
            f"{order} {seconds_text(figure.seconds)} ({figure.seconds / in_order_s:.3g} times)"
            for order, figure in orders.items()
            if order != IN_ORDER
        )
        parts.append(f"{name}: in order {seconds_text(in_order_s)}, {times}")
    return "; ".join([*parts, seen])


def markdown(
    paragraphs: list[str], figures: list[Figure], layouts: list[Layout], environment: dict[str, Any], command: str
) -> str:
    """The whole of the study to read."""
    parts = [
        *paragraphs,
        "Times are of one epoch, medians over the repeats; **ours** in bold; ~ extrapolated from the samples that were "
        "timed. In order, Parquet files are timed over as many whole files as the time allowed.",
    ]
    for layer, title in TITLES.items():
        if any(figure.layer == layer for figure in figures):
            parts += [f"## {title}", layer_table(figures, layer)]
        if layer == "layout":
            parts.append(layout_table(layouts))
    return results.markdown("What did shuffling cost?", command, parts, environment)


def draw(figures: list[Figure], n: int) -> Canvas:
    """Bars of every layer at n events on a logarithmic scale, and the ladder with its ratios."""
    from matplotlib.figure import Figure as Canvas

    panels = [layer for layer in ("order", "fetch", "storage", "workers", "ladder") if by_contender(figures, layer)]
    lines = {
        layer: {name: orders for (name, size), orders in by_contender(figures, layer).items() if size == n}
        for layer in panels
    }
    heights = [len(lines[layer]) + 1.5 for layer in panels]
    canvas = Canvas(figsize=(11, 0.34 * sum(heights) + 1), layout="constrained")
    axes = canvas.subplots(len(panels), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for axis, layer in zip(axes, panels, strict=True):
        for place, (_name, orders) in enumerate(lines[layer].items()):
            in_order, shuffled = orders[IN_ORDER], orders[SHUFFLED]
            for figure, offset, colour in ((in_order, -0.2, "#4c78a8"), (shuffled, 0.2, "#f58518")):
                hatch = "//" if figure.is_extrapolated else None
                label = figure.order if place == 0 else None
                bar = {"color": colour, "hatch": hatch, "edgecolor": "white", "label": label}
                axis.barh(place + offset, figure.seconds, 0.38, **bar)
            axis.annotate(
                f"{ratio_text(orders)}x",
                (max(shuffled.seconds, in_order.seconds), place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axis.set_yticks(range(len(lines[layer])), list(lines[layer]), fontsize=8)
        axis.set_ylim(len(lines[layer]) - 0.4, -0.6)
        axis.set_xscale("log")
        axis.set_title(TITLES[layer], loc="left", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    axes[0].legend(loc="lower right", fontsize=8)
    axes[-1].set_xlabel("seconds of an epoch (hatched: extrapolated from a timed part)")
    canvas.suptitle(f"Shuffled against in order, {n:,} events", fontsize=11)
    return canvas
