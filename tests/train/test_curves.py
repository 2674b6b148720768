"""What the picture at the end shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eventkern.train import Ledger
from eventkern.train.curves import plot_curves


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], list[float]]:
    """What is drawn, by the panel's title and the line's label."""
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    lines: dict[tuple[str, str], list[float]] = {}
    save = Figure.savefig

    def look(figure: Figure, *args: object, **options: object) -> None:
        for axes in figure.axes:
            assert isinstance(axes, Axes)
            for each in axes.lines:
                lines[axes.get_title(), str(each.get_label())] = [float(loss) for loss in each.get_ydata()]
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", look)
    return lines


def write_rows(run_dir: Path, *rows: dict[str, float | None]) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_training_validation_and_baselines_of_the_mean_and_of_every_category(
    tmp_path: Path, drawn: dict[tuple[str, str], list[float]]
) -> None:
    write_rows(
        tmp_path,
        {"step": 1, "loss_mean": 1.5, "loss/kind": 1.0, "loss/place": 2.0},
        {
            "step": 2, "loss_mean": 0.75, "loss/kind": 0.5, "loss/place": 1.0,
            "validation_loss_mean": 0.875, "validation_loss/kind": 0.75, "validation_loss/place": 1.0,
        },
        {"step": 3, "loss_mean": None, "loss/kind": None, "loss/place": 0.5},
    )  # fmt: skip
    plot_curves(tmp_path, Ledger(("kind", "place"), (5, 7), [1.5, 2.5], [1.25, 1.75], [float("nan"), 0.25]))
    assert drawn == {
        ("", "training"): [1.5, 0.75],
        ("", "validation"): [0.875],
        ("", "marginal"): [2.0, 2.0],
        ("", "first-order"): [1.5, 1.5],
        ("kind", "training"): [1.0, 0.5],
        ("kind", "validation"): [0.75],
        ("kind", "marginal"): [1.5, 1.5],
        ("kind", "first-order"): [1.25, 1.25],
        ("place", "training"): [2.0, 1.0, 0.5],
        ("place", "validation"): [1.0],
        ("place", "marginal"): [2.5, 2.5],
        ("place", "first-order"): [1.75, 1.75],
        ("place", "floor"): [0.25, 0.25],
    }
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_rows_without_categories_and_no_rows_make_one_panel(
    tmp_path: Path, drawn: dict[tuple[str, str], list[float]]
) -> None:
    write_rows(tmp_path)
    plot_curves(tmp_path, None)
    assert drawn == {("", "training"): [], ("", "validation"): []}
    write_rows(tmp_path, {"step": 1, "loss_mean": 1.5})
    plot_curves(tmp_path, None)
    assert drawn == {("", "training"): [1.5], ("", "validation"): []}
