"""The scorecard's arithmetic, against predictors whose calibration is known, and its three forms."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from eventkern.train import Scorecard
from eventkern.train.logging import print_table

NUM_BINS = 4


def make(num_labels: float = 10.0) -> Scorecard:
    """Two categories by hand; the first has labels in its two upper bins."""
    sums = {
        "num_targets": [10, num_labels],
        "loss": [10 * math.log(3), num_labels * 0.5],
        "hits": [[6, 9], [5, num_labels]],
        "squared_error": [4, 5],
        "bin_counts": [[0, 0, 4, 6], [0, num_labels, 0, 0]],
        "bin_confidences": [[0, 0, 2.8, 5.4], [0, 0.5 * num_labels, 0, 0]],
        "bin_hits": [[0, 0, 3, 3], [0, num_labels / 2, 0, 0]],
    }
    return Scorecard(("Kind", "Place"), (3, 7), (1, 5), {name: torch.tensor(each) for name, each in sums.items()})


def test_its_numbers() -> None:
    told = make().to_dict()
    kind, place = told["categories"]
    assert kind.pop("reliability") == [
        {"confidence": None, "accuracy": None, "num_labels": 0},
        {"confidence": None, "accuracy": None, "num_labels": 0},
        {"confidence": pytest.approx(0.7), "accuracy": 0.75, "num_labels": 4},
        {"confidence": pytest.approx(0.9), "accuracy": 0.5, "num_labels": 6},
    ]
    assert kind == {
        "name": "Kind",
        "classes": 3,
        "num_labels": 10,
        "loss": pytest.approx(math.log(3)),
        "perplexity": pytest.approx(3),
        "confidence": pytest.approx(0.82),
        "calibration_error": pytest.approx(0.4 * 0.05 + 0.6 * 0.4),
        "brier": 0.4,
        "top_k": {"1": 0.6, "5": 0.9},
    }
    assert place["calibration_error"] == 0
    assert told["num_bins"] == NUM_BINS
    assert told["sum"] == {"loss": pytest.approx(math.log(3) + 0.5), "perplexity": pytest.approx(3 * math.exp(0.5))}
    assert told["mean"]["perplexity"] == pytest.approx(math.sqrt(3 * math.exp(0.5)))
    assert told["mean"]["top_k"] == {"1": 0.55, "5": 0.95}
    assert told["mean"]["brier"] == pytest.approx(0.45)
    assert make().top1.tolist() == [0.6, 0.5]
    json.dumps(told, allow_nan=False)


def test_a_category_without_labels_is_not_known() -> None:
    card = make(num_labels=0)
    assert card.to_dict()["categories"][1]["perplexity"] is None
    json.dumps(card.to_dict(), allow_nan=False)
    (row,) = [line for line in card.text().splitlines() if line.startswith("Place")]
    assert row.split()[1:] == ["-"] * 6


def predicted(temperature: float, num_labels: int = 200_000) -> Any:
    """Labels drawn from softmax(logits), judged as if the logits were divided by a temperature; and the truth of it."""
    from eventkern.nn import MultiHeadCrossEntropy

    generator = torch.Generator().manual_seed(5)
    heads = MultiHeadCrossEntropy(6, (6,), bias=False)
    with torch.no_grad():
        heads.weight.copy_(torch.eye(6) / temperature)
    logits = torch.randn(num_labels, 6, generator=generator) * 1.5
    truth = logits.softmax(1)
    labels = torch.multinomial(truth, 1, generator=generator)
    card = Scorecard(("Kind",), (6,), (1,), heads.scores(logits, labels, (1,)))
    gap = (logits / temperature).softmax(1).amax(1) - truth.amax(1)
    return card, float(gap.abs().mean())


def test_a_calibrated_predictor_is_off_by_its_sampling_error_alone() -> None:
    card, gap = predicted(1.0)
    assert gap == 0
    # In a bin of n labels |h - c| has a mean of at most sqrt(n p (1 - p)), so the ECE of M bins one of sqrt(M / 4 N).
    assert card.calibration_error[0] < 2 * math.sqrt(15 / 4 / 200_000)


@pytest.mark.parametrize("temperature", [0.5, 0.25])
def test_an_overconfident_predictor_is_off_by_what_it_claims_too_much(temperature: float) -> None:
    card, gap = predicted(temperature)
    assert gap > 0.1
    assert card.calibration_error[0] == pytest.approx(gap, abs=0.003)
    assert card.confidence[0] - card.top1[0] == pytest.approx(gap, abs=0.003)


def test_the_tables_say_the_same_in_80_columns() -> None:
    lines = make().text().splitlines()
    assert lines[1].split() == ["category", "perplexity", "top-1", "top-5", "confidence", "ECE", "Brier"]
    assert lines[2].split() == ["Kind", "3.000", "60.0", "%", "90.0", "%", "82.0", "%", "26.0", "%", "0.400"]
    assert lines[4].split() == ["sum", "4.946"]
    sums = {name: torch.ones(17) for name in ("num_targets", "squared_error")}
    sums |= {name: torch.ones(17, 15) for name in ("bin_counts", "bin_confidences", "bin_hits")}
    sums |= {"loss": torch.full((17,), 40.0), "hits": torch.ones(17, 3)}
    wide = Scorecard(["DaysSincePrevious"] * 17, [9] * 17, (1, 5, 10), sums)
    out = io.StringIO()
    print_table(Console(file=out, width=80), wide)
    shown = out.getvalue()
    assert "…" not in shown
    assert " ".join(shown.split()).count("DaysSincePrevious 2.4e+17 100.0 % 100.0 % 100.0 %") == 17
    assert max(map(len, shown.splitlines())) <= 80
    assert np.isfinite(wide.perplexity).all()
