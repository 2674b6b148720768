"""The log's files, lines and bar."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eventkern.data import Schema
from eventkern.train import Ledger
from eventkern.train.logging import Meter, RunLog, cut_metrics, plot_curves, print_ledger, print_table, read_metrics

FLIGHTS = Schema.load("flights").category_names


def row(step: int, **more: float) -> dict[str, float]:
    numbers = {"loss_sum": 3.0 / step, "loss_mean": 1.5 / step, "lr": 0.001, "grad_norm": 0.75}
    speed = {"events_per_s": 1234.5, "step_ms": 20.0, "data_wait_ms": 1.0, "data_wait_share": 0.05}
    return {"step": step, "epoch": 1, **numbers, **speed, **more}


def test_rows_lines_and_scalars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, ("kind", "place"), total_steps=100) as log:
        log.write(row(10), [0.1, 0.2])
        log.write(row(20), [0.05, 0.1], {"loss": [0.4, 0.6], "top1": [0.5, 0.25]})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "step 10/100  epoch 1  loss 0.300 (mean 0.1500)  lr 1.00e-03  grad norm 0.750  20.0 ms/step  1,234 events/s  "
        "data wait 5.0 %  left 0:01"
    )
    assert "validation 1.000 (mean 0.5000)" in lines[1]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [row(10), row(20, validation_loss_sum=1.0, validation_loss_mean=0.5)]

    board = EventAccumulator(str(tmp_path)).Reload()
    scalars = {tag: {event.step: event.value for event in board.Scalars(tag)} for tag in board.Tags()["scalars"]}
    names = ("total", "mean", "kind", "place", "grad_norm", "lr", "events_per_s", "step_ms", "data_wait_share")
    assert {tag for tag in scalars if tag.startswith("train/")} == {f"train/{name}" for name in names}
    assert scalars["train/place"] == pytest.approx({10: 0.2, 20: 0.1})
    assert scalars["train/total"] == pytest.approx({10: 0.3, 20: 0.15})
    assert scalars["validation/kind"] == pytest.approx({20: 0.4})
    assert scalars["validation/total"] == pytest.approx({20: 1.0})
    assert scalars["validation_top1/place"] == pytest.approx({20: 0.25})


def test_a_resumed_log_hides_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    for first_step, steps, loss in ((0, (10, 20, 30), 1.0), (20, (30, 40), 2.0)):
        with RunLog(tmp_path, ("kind",), total_steps=40, first_step=first_step) as log:
            for step in steps:
                log.write(row(step), [loss])
        time.sleep(1.1 if first_step == 0 else 0)  # TensorBoard names and orders its files by the second
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20, 30, 40]
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/kind")
    assert [(event.step, event.value) for event in events] == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]


def test_cutting_drops_later_rows_and_an_unfinished_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    cut_metrics(path, 5)  # nothing there, nothing to do
    assert not path.exists()
    path.write_text('{"step": 1, "a": 0.1}\n{"step": 2}\n{"step": 3}\n{"step": 2, "lo')
    cut_metrics(path, 2)
    assert path.read_text() == '{"step": 1, "a": 0.1}\n{"step": 2}\n'


def test_a_terminal_gets_a_bar_with_loss_and_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "140")
    ledger = Ledger(("[red]kind[/red]",), (5,), [1.5], [1.4])
    ledger.update(10, [1.0], [0.5])
    with RunLog(tmp_path, ("kind",), total_steps=40) as log:
        log.advance(3)
        log.write(row(10), [0.125])
        log.say("[odd] words")
        log.show_ledger(ledger)
    print_ledger(ledger)
    out = capsys.readouterr().out
    assert "10/40" in out
    assert "loss 0.300" in out
    assert "[odd] words" in out
    assert out.count("[red]kind[/red]") == 2
    assert "step 10/40  epoch" not in out  # no plain lines


def test_without_tensorboard_it_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("eventkern.train.logging._has", lambda package: False)
    with RunLog(tmp_path, ("kind",), total_steps=40) as log:
        log.write(row(10), [0.1])
        log.write(row(20), [0.1])
    assert capsys.readouterr().out.count("tensorboard is not installed") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_without_matplotlib_it_says_so_once_and_draws_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    with RunLog(tmp_path, ("kind",), total_steps=40) as log:
        log.write(row(10), [0.1])
        plot_curves(tmp_path, None)
    assert capsys.readouterr().out.count("matplotlib is not installed: no curves.png") == 1
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize("has_floor", [False, True])
def test_no_figure_of_the_ledger_is_cut(width: int, has_floor: bool) -> None:
    count = len(FLIGHTS)
    floors = [1.25 + place / 1000 for place in range(count)] if has_floor else None
    ledger = Ledger(FLIGHTS, [1000 + place for place in range(count)], [6.5] * count, [4.75] * count, floors)
    ledger.update(1234, [5.5 + place / 1000 for place in range(count)], [0.99 - place / 100 for place in range(count)])
    out = io.StringIO()
    print_table(Console(file=out, width=width), ledger)
    assert "…" not in out.getvalue()
    lines = out.getvalue().splitlines()
    for cells in ledger.rows():
        (line,) = [line for line in lines if line.startswith(cells[0] + " ")]
        assert line.split() == " ".join(cells).split()
        assert width == 60 or len(line) <= 80
    assert "".join(out.getvalue().split()).endswith("".join(ledger.verdict().split()))


def test_curves_show_training_validation_and_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: dict[str, list[float]] = {}
    plot, line = Axes.plot, Axes.axhline
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **k: drawn.update({k["label"]: y}) or plot(self, x, y, **k))
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **k: drawn.update({k["label"]: [y]}) or line(self, y, **k))
    with RunLog(tmp_path, ("kind",), total_steps=2) as log:
        log.write(row(1), [0.1])
        log.write(row(2), [0.1], {"loss": [0.5], "top1": [0.5]})
    plot_curves(tmp_path, Ledger(("kind",), (5,), [1.5], [1.25]))
    assert drawn == {"training": [1.5, 0.75], "validation": [0.5], "marginal": [1.5], "first-order": [1.25]}
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_the_meter_counts_labels_steps_and_waiting() -> None:
    meter = Meter()
    meter.start()
    for _ in range(4):
        with meter.waiting():
            time.sleep(0.01)
        meter.count(torch.tensor(25))
    assert int(meter.num_targets) == 100
    numbers = meter.read(100.0)
    elapsed_s = numbers["step_ms"] * 4 / 1e3
    assert numbers["events_per_s"] == pytest.approx(100 / elapsed_s)
    assert 10 <= numbers["data_wait_ms"] <= numbers["step_ms"]
    assert numbers["data_wait_share"] == pytest.approx(numbers["data_wait_ms"] / numbers["step_ms"])
    meter.start()
    meter.count(torch.tensor(7))
    assert int(meter.num_targets) == 7
