"""The picture at the end of a run: losses over steps, all together and category by category."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eventkern.train.boards import has
from eventkern.train.ledger import Ledger
from eventkern.train.logging import CURVES_FILE, METRICS_FILE, read_metrics
from eventkern.train.whole_files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 6
BASELINES = {"marginal": "--", "first-order": "-.", "floor": ":"}


def plot_curves(run_dir: Path, ledger: Ledger | None) -> None:
    """Draws curves.png from metrics.jsonl: the mean loss of training and validation with the ledger's baselines, and
    below it the same for every category that the rows name.

    Without matplotlib nothing is drawn.
    """
    if not has("matplotlib"):
        return
    from matplotlib.figure import Figure

    rows = read_metrics(run_dir / METRICS_FILE)
    names = [name.removeprefix("loss/") for name in (rows[-1] if rows else ()) if name.startswith("loss/")]
    names = names if len(names) > 1 else []
    num_rows = -(-len(names) // COLUMNS)
    figure = Figure(
        figsize=(12, 5 + 1.8 * num_rows), layout="constrained"
    )  # without pyplot: no window, no global state
    grid = figure.add_gridspec(1 + num_rows, COLUMNS, height_ratios=[5 / 1.8] + [1] * num_rows)
    axes = figure.add_subplot(grid[0, :])
    _draw(axes, rows, "loss_mean", "validation_loss_mean", _baselines(ledger))
    axes.set(xlabel="optimizer step", ylabel="mean loss of a category (nats)")
    axes.legend(loc="upper right")  # "best" searches, and warns where that takes long
    for place, name in enumerate(names):
        axes = figure.add_subplot(grid[1 + place // COLUMNS, place % COLUMNS])
        _draw(axes, rows, f"loss/{name}", f"validation_loss/{name}", _baselines(ledger, name))
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=6)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    write_file(run_dir / CURVES_FILE, picture.getvalue())


def _draw(axes: Axes, rows: Sequence[dict[str, Any]], training: str, validation: str, lines: dict[str, float]) -> None:
    for name, label, style in (
        (training, "training", {"linewidth": 0.8}),
        (validation, "validation", {"marker": "o", "markersize": 3}),
    ):
        drawn = [row for row in rows if row.get(name) is not None]
        axes.plot([row["step"] for row in drawn], [row[name] for row in drawn], label=label, **style)
    for label, loss in lines.items():
        axes.axhline(loss, label=label, linestyle=BASELINES[label], color="grey", linewidth=1)


def _baselines(ledger: Ledger | None, name: str | None = None) -> dict[str, float]:
    """The baselines of a category, or their means over the categories; those that are known."""
    if ledger is None or (name is not None and name not in ledger.names):
        return {}
    every = zip(BASELINES, (ledger.marginal, ledger.first_order, ledger.floor), strict=True)
    known = {
        label: float(losses.mean() if name is None else losses[ledger.names.index(name)]) for label, losses in every
    }
    return {label: loss for label, loss in known.items() if math.isfinite(loss)}
