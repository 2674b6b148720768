"""The loss ledger: what a model learned, category by category, against what simple tables of counts know."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eventkern.train.tables import for_json, percent, plain_text, rich_table
from eventkern.train.whole_files import write_file

if TYPE_CHECKING:
    from rich.table import Table

Nats = NDArray[np.float64]

STUCK_SHARE = 0.02
"""A model that explains less than this share of the summed marginal has learned nothing but frequencies."""
COLUMNS = ("category", "classes", "ln(classes)", "marginal", "first-order", "floor", "model", "explained", "top-1")
NARROW = {"ln(classes)": "ln\n(classes)", "first-order": "first-\norder", "explained": "ex-\nplained"}
"""Headings in two lines, so that the table of long category names fits a terminal of 80 columns."""


class Ledger:
    """Validation losses beside their baselines. All losses are cross-entropies in nats over the same labels.

    A category's explained share is (marginal - model) / marginal. Where floors are known, the learnable part that was
    learned is (marginal - model) / (marginal - floor), both summed over the categories with a floor.

    Args:
        names: (C,) category names.
        classes: (C,) classes of each head, padding and missing included.
        marginal: (C,) loss of predicting the training distribution.
        first_order: (C,) loss of predicting from the category's own value in the key's previous event.
        floor: (C,) entropy given the past where it is known, nan elsewhere; None: known nowhere.
        note: what the labels are, in one line below the title; None: those after the store's split.

    Raises:
        ValueError: arguments of unequal lengths.
    """

    def __init__(
        self,
        names: Sequence[str],
        classes: Sequence[int] | NDArray[np.int64],
        marginal: Sequence[float] | Nats,
        first_order: Sequence[float] | Nats,
        floor: Sequence[float] | Nats | None = None,
        *,
        note: str | None = None,
    ) -> None:
        self.names = tuple(names)
        self.classes = np.asarray(classes, dtype=np.int64)
        self.ln_classes = np.log(self.classes)
        self.marginal = self._column("marginal", marginal)
        self.first_order = self._column("first_order", first_order)
        self.floor = self._column("floor", np.full(len(names), np.nan) if floor is None else floor)
        self.note = note
        self.step: int | None = None
        self.model = np.full(len(names), np.nan)
        self.top1 = np.full(len(names), np.nan)

    def _column(self, name: str, values: Sequence[float] | Nats) -> Nats:
        column: Nats = np.asarray(values, dtype=np.float64)
        if column.shape != (len(self.names),):
            raise ValueError(f"{name} has shape {column.shape}, but there are {len(self.names)} categories")
        return column

    def update(self, step: int, losses: Sequence[float] | Nats, top1: Sequence[float] | Nats) -> None:
        """Takes the validation loss and the share of right first guesses of each category at an optimizer step."""
        self.step = step
        self.model = self._column("losses", losses)
        self.top1 = self._column("top1", top1)

    def explained(self) -> Nats:
        """(C,) share of the marginal that the model explains; nan where the marginal is 0."""
        shares: Nats = _ratio(self.marginal - self.model, self.marginal)
        return shares

    def explained_of_sum(self) -> float:
        """Share of the summed marginal that the model explains."""
        return float(_ratio(self.marginal.sum() - self.model.sum(), self.marginal.sum()))

    def learned_of_learnable(self) -> float:
        """(marginal - model) / (marginal - floor), summed over the categories with a known floor; nan without one."""
        known = np.isfinite(self.floor)
        learnable = (self.marginal - self.floor)[known].sum()
        return float(_ratio((self.marginal - self.model)[known].sum(), learnable))

    def verdict(self) -> str:
        """What the numbers say, in words."""
        if self.step is None:
            return "No evaluation yet."
        if not np.isfinite(self.model).all():
            lost = [name for name, loss in zip(self.names, self.model, strict=True) if not np.isfinite(loss)]
            return f"The validation loss is not finite in {_listed(lost)}."
        return " ".join([self._headline(), *self._remarks()])

    def _headline(self) -> str:
        total, guess, marginal = self.model.sum(), self.ln_classes.sum(), self.marginal.sum()
        first_order = self.first_order.sum()
        if total > guess:
            return f"Worse than guessing: the loss {total:.2f} is above the {guess:.2f} of a uniform guess."
        if total > (1 + STUCK_SHARE) * marginal:
            return f"Worse than the marginal: the loss {total:.2f} is above the training frequencies' {marginal:.2f}."
        if total > (1 - STUCK_SHARE) * marginal:
            return f"Stuck at the marginal: the loss {total:.2f} is about the training frequencies' {marginal:.2f}."
        share = f"{percent(self.explained_of_sum())} of the marginal explained"
        if total > first_order:
            return f"Behind first-order counting: the loss {_loss(total)} is above its {_loss(first_order)}, {share}."
        return f"Learning: {share}."

    def _remarks(self) -> list[str]:
        count = len(self.names)
        remarks = [
            f"Ahead of the marginal in {(self.model < self.marginal).sum()} of {count} categories, "
            f"of first-order in {(self.model < self.first_order).sum()} of {count}."
        ]
        guessed = [name for name, bad in zip(self.names, self.model > self.ln_classes, strict=True) if bad]
        if guessed:
            remarks.append(f"Worse than guessing in {_listed(guessed)}.")
        if np.isfinite(self.floor).any():
            remarks.append(f"Of what can be learned at all, {percent(self.learned_of_learnable())} is learned.")
        return remarks

    def to_dict(self) -> dict[str, Any]:
        """Everything the ledger holds, with None for what is not known."""
        columns = {
            "classes": self.classes,
            "ln_classes": self.ln_classes,
            "marginal": self.marginal,
            "first_order": self.first_order,
            "floor": self.floor,
            "model": self.model,
            "explained": self.explained(),
            "top1": self.top1,
        }
        losses = ("ln_classes", "marginal", "first_order", "floor", "model")
        categories = [
            {"name": name, **{column: for_json(values[row]) for column, values in columns.items()}}
            for row, name in enumerate(self.names)
        ]
        return {
            "unit": "nats",
            "note": self.note,
            "step": self.step,
            "categories": categories,
            "sum": {name: for_json(columns[name].sum()) for name in losses},
            "mean": {name: for_json(columns[name].mean()) for name in (*losses, "top1")},
            "explained": for_json(self.explained_of_sum()),
            "learned_of_learnable": for_json(self.learned_of_learnable()),
            "verdict": self.verdict(),
        }

    def save(self, path: Path) -> None:
        """Writes ledger.json, whole or not at all."""
        write_file(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    def columns(self) -> tuple[str, ...]:
        """The headings of the table; a floor that is known nowhere has no column."""
        return COLUMNS if np.isfinite(self.floor).any() else tuple(name for name in COLUMNS if name != "floor")

    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells as text: a row per category, then the sum and the mean."""
        losses = np.stack([self.ln_classes, self.marginal, self.first_order, self.floor, self.model])
        cells = [
            (name, str(classes), *map(_loss, losses[:, row]), percent(explained), percent(top1))
            for row, (name, classes, explained, top1) in enumerate(
                zip(self.names, self.classes, self.explained(), self.top1, strict=True)
            )
        ]
        explained = percent(self.explained_of_sum())
        cells.append(("sum", "", *map(_loss, losses.sum(axis=1)), explained, ""))
        cells.append(("mean", "", *map(_loss, losses.mean(axis=1)), explained, percent(float(self.top1.mean()))))
        if "floor" not in self.columns():
            cells = [(*row[: COLUMNS.index("floor")], *row[COLUMNS.index("floor") + 1 :]) for row in cells]
        return cells

    def table(self) -> Table:
        """The ledger as a rich table, of at most 80 columns where names have 17 letters and sums 4 digits."""
        return rich_table(self._title(), self.columns(), self.rows(), self.verdict(), NARROW)

    def text(self) -> str:
        """The ledger as plain text."""
        return plain_text(self._title(), self.columns(), self.rows(), self.verdict())

    def _title(self) -> str:
        when = "before the first evaluation" if self.step is None else f"at step {self.step}"
        title = f"Loss ledger {when} (validation, nats)"
        return title if self.note is None else f"{title}\n{self.note}"


def _ratio(part: Any, whole: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(whole) > 0, np.divide(part, whole), np.nan)


def _loss(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.2f}" if value >= 100 else f"{round(value, 3) + 0.0:.3f}"  # + 0.0: no "-0.000"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
