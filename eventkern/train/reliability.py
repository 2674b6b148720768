"""The picture of an evaluation: what is explained of each category, and how far its probabilities can be trusted."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eventkern.train.boards import has
from eventkern.train.ledger import Ledger
from eventkern.train.scorecard import Scorecard
from eventkern.train.whole_files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 6


def plot_evaluation(path: Path, ledger: Ledger, scorecard: Scorecard) -> bool:
    """Draws a PNG: a bar per category of the share of the marginal that the model explains, beside what first-order
    counting explains, and below it a reliability diagram of each category, on one scale.

    Returns:
        Whether it was drawn: not without matplotlib.
    """
    if not has("matplotlib"):
        return False
    from matplotlib.figure import Figure

    count = len(ledger.names)
    num_rows = -(-count // COLUMNS)
    figure = Figure(figsize=(12, 3.6 + 2.3 * num_rows), layout="constrained")  # without pyplot: no global state
    grid = figure.add_gridspec(1 + num_rows, COLUMNS, height_ratios=[3.6 / 2.3] + [1] * num_rows)
    axes = figure.add_subplot(grid[0, :])
    with np.errstate(divide="ignore", invalid="ignore"):
        first_order = (ledger.marginal - ledger.first_order) / ledger.marginal
    places = np.arange(count)
    axes.bar(places, ledger.explained(), width=0.7, label="model")
    axes.plot(places, first_order, "_", color="black", markersize=14, label="first-order counting")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xticks(places, ledger.names, rotation=30, ha="right", fontsize=8)
    axes.set(ylabel="share of the marginal explained", title=ledger.verdict())
    axes.title.set_fontsize(9)
    axes.legend(loc="upper right")
    for row, name in enumerate(scorecard.names):
        axes = figure.add_subplot(grid[1 + row // COLUMNS, row % COLUMNS])
        _draw(axes, scorecard, row)
        axes.set_title(f"{name}: ECE {100 * scorecard.calibration_error[row]:.1f} %", fontsize=8)
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.tick_params(labelsize=6)
        axes.label_outer()
    figure.supxlabel("confidence (blue: share of right first guesses in each bin; grey: share of labels)", fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_file(path, picture.getvalue())
    return True


def _draw(axes: Axes, scorecard: Scorecard, row: int) -> None:
    """One reliability diagram: bins that hold labels, against the diagonal of a calibrated model."""
    confidence, accuracy = scorecard.reliability(row)
    counts = scorecard.bin_counts[row]
    width = 1 / len(counts)
    edges = np.arange(len(counts)) * width
    axes.bar(edges, counts / max(counts.sum(), 1), width, align="edge", color="lightgrey")
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--")
    drawn = counts > 0
    axes.plot(confidence[drawn], accuracy[drawn], marker="o", markersize=3, linewidth=1)
