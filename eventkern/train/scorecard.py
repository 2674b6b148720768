"""The scorecard: how good a model's probabilities are, category by category, beside the loss that the ledger tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eventkern.train.tables import for_json, percent, plain_text, rich_table

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

NARROW = {"perplexity": "per-\nplexity", "confidence": "confi-\ndence"}
CAPTION = """\
perplexity: exp(loss); of the sum, that of whole events. Brier: squared error, 0 to 2.
top-k: the label is among the k likeliest classes. confidence: mean probability of
the likeliest class. ECE: mean distance of confidence and top-1 over bins of it."""


class Scorecard:
    """Perplexity, top-k accuracy and calibration of each category, over validation labels.

    With n labels in a bin of confidence, h of them right first guesses, and c the sum of their confidences, the
    expected calibration error is sum |h - c| / sum n over bins.

    Args:
        names: (C,) category names.
        classes: (C,) classes of each head, padding and missing included.
        top_k: (K,) numbers of classes that a guess may name.
        sums: over the labels, per category: "num_targets", "loss" (nats) and "squared_error" (C,); "hits" (C, K);
            "bin_counts", "bin_confidences" and "bin_hits" (C, M), bin m holding confidences in (m / M, (m + 1) / M].

    Attributes:
        loss: (C,) nats.
        perplexity: (C,).
        accuracy: (C, K) shares.
        top1: (C,) share of labels that are the top class.
        confidence: (C,) mean probability of the top class.
        calibration_error: (C,) shares.
        brier: (C,).

    Source:
        Naeini et al., 2015; Guo et al., 2017, equations 2 to 5 (expected calibration error); Brier, 1950.
    """

    def __init__(
        self, names: Sequence[str], classes: Sequence[int], top_k: Sequence[int], sums: Mapping[str, Tensor]
    ) -> None:
        self.names = tuple(names)
        self.classes = tuple(classes)
        self.top_k = tuple(top_k)
        numbers = {name: np.asarray(values, dtype=np.float64) for name, values in sums.items()}
        self.num_targets = numbers["num_targets"]
        self.bin_counts, self.bin_hits = numbers["bin_counts"], numbers["bin_hits"]
        self.bin_confidences = numbers["bin_confidences"]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            self.loss = numbers["loss"] / self.num_targets
            self.perplexity = np.exp(self.loss)
            self.accuracy = numbers["hits"] / self.num_targets[:, None]
            self.top1 = self.bin_hits.sum(1) / self.num_targets
            self.brier = numbers["squared_error"] / self.num_targets
            self.confidence = self.bin_confidences.sum(1) / self.num_targets
            self.calibration_error = np.abs(self.bin_hits - self.bin_confidences).sum(1) / self.num_targets

    def to_dict(self) -> dict[str, Any]:
        """Everything the scorecard holds, with None for what is not known."""
        columns = {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "confidence": self.confidence,
            "calibration_error": self.calibration_error,
            "brier": self.brier,
        }
        categories = [
            {
                "name": name,
                "classes": self.classes[row],
                "num_labels": int(self.num_targets[row]),
                **{column: for_json(values[row]) for column, values in columns.items()},
                "top_k": self._named(self.accuracy[row]),
                "reliability": [
                    {"confidence": for_json(confidence), "accuracy": for_json(accuracy), "num_labels": int(count)}
                    for confidence, accuracy, count in zip(*self.reliability(row), self.bin_counts[row], strict=True)
                ],
            }
            for row, name in enumerate(self.names)
        ]
        mean = {column: for_json(values.mean()) for column, values in columns.items() if column != "perplexity"}
        return {
            "num_bins": self.bin_counts.shape[1],
            "categories": categories,
            "sum": {"loss": for_json(self.loss.sum()), "perplexity": for_json(_exp(self.loss.sum()))},
            "mean": {
                **mean,
                "perplexity": for_json(_exp(self.loss.mean())),
                "top_k": self._named(self.accuracy.mean(0)),
            },
        }

    def reliability(self, row: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(M,) mean confidence and (M,) share of right first guesses in each bin of a category; nan in empty ones."""
        with np.errstate(invalid="ignore"):
            counts = self.bin_counts[row]
            return self.bin_confidences[row] / counts, self.bin_hits[row] / counts

    def columns(self) -> tuple[str, ...]:
        """The headings of the table."""
        return ("category", "perplexity", *(f"top-{k}" for k in self.top_k), "confidence", "ECE", "Brier")

    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells as text: a row per category, then the sum and the mean."""
        shares = np.column_stack([self.accuracy, self.confidence, self.calibration_error])
        cells = [
            (name, _perplexity(self.perplexity[row]), *map(percent, shares[row]), _brier(self.brier[row]))
            for row, name in enumerate(self.names)
        ]
        cells.append(("sum", _perplexity(_exp(self.loss.sum())), *[""] * (len(self.columns()) - 2)))
        mean = _perplexity(_exp(self.loss.mean()))
        cells.append(("mean", mean, *map(percent, shares.mean(0)), _brier(self.brier.mean())))
        return cells

    def table(self) -> Table:
        """The scorecard as a rich table, of at most 80 columns where names have 17 letters and k three values."""
        return rich_table(self._title(), self.columns(), self.rows(), CAPTION, NARROW)

    def text(self) -> str:
        """The scorecard as plain text."""
        return plain_text(self._title(), self.columns(), self.rows(), CAPTION)

    def _title(self) -> str:
        return f"Scorecard ({int(self.num_targets.max(initial=0)):,} validation labels a category)"

    def _named(self, accuracies: NDArray[np.float64]) -> dict[str, int | float | None]:
        return {str(k): for_json(accuracy) for k, accuracy in zip(self.top_k, accuracies, strict=True)}


def _exp(loss: Any) -> Any:
    with np.errstate(over="ignore"):
        return np.exp(loss)


def _brier(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "-"


def _perplexity(value: float) -> str:
    if not np.isfinite(value):
        return "-"
    return f"{value:.3f}" if value < 100 else f"{value:.1f}" if value < 100_000 else f"{value:.1e}"
