"""What the picture of an evaluation shows."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from eventkern.train import Ledger, Scorecard
from eventkern.train.reliability import plot_evaluation


def made() -> tuple[Ledger, Scorecard]:
    sums = {
        "num_targets": [10, 10],
        "loss": [10.0, 20.0],
        "hits": [[6], [5]],
        "squared_error": [4, 5],
        "bin_counts": [[0, 0, 4, 6], [0, 10, 0, 0]],
        "bin_confidences": [[0, 0, 3, 4.5], [0, 5, 0, 0]],
        "bin_hits": [[0, 0, 3, 3], [0, 5, 0, 0]],
    }
    tensors = {name: torch.tensor(each, dtype=torch.float64) for name, each in sums.items()}
    ledger = Ledger(("Kind", "Place"), (5, 7), [2.0, 4.0], [1.0, 5.0])
    scorecard = Scorecard(("Kind", "Place"), (5, 7), (1,), tensors)
    ledger.update(3, scorecard.loss, scorecard.top1)
    return ledger, scorecard


def test_bars_of_what_is_explained_and_a_reliability_diagram_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **o: (figures.append(self), save(self, *a, **o)))
    assert plot_evaluation(tmp_path / "evaluation.png", *made())
    bars, kind, place = figures[0].axes
    assert [bar.get_height() for bar in bars.patches] == [0.5, 0.5]
    assert bars.lines[0].get_ydata().tolist() == [0.5, -0.25]
    assert [text.get_text() for text in bars.get_xticklabels()] == ["Kind", "Place"]
    assert kind.get_title() == "Kind: ECE 15.0 %"
    assert [list(each) for each in kind.lines[1].get_xydata()] == [[0.75, 0.75], [0.75, 0.5]]
    assert [bar.get_height() for bar in kind.patches] == [0, 0, 0.4, 0.6]
    assert [list(each) for each in place.lines[1].get_xydata()] == [[0.5, 0.5]]
    picture = (tmp_path / "evaluation.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n")
    assert struct.unpack(">II", picture[16:24]) > (1000, 300)
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.png"]


def test_nothing_is_drawn_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eventkern.train.reliability.has", lambda package: False)
    assert not plot_evaluation(tmp_path / "evaluation.png", *made())
    assert not list(tmp_path.iterdir())
