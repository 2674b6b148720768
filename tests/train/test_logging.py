"""The log's files, lines and bar."""

from __future__ import annotations

import io
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eventkern.data import Schema
from eventkern.train import Ledger
from eventkern.train.curves import plot_curves
from eventkern.train.lines import heading, line
from eventkern.train.logging import RunLog, cut_metrics, print_shown, print_table, read_metrics

FLIGHTS = Schema.load("flights").category_names


def row(step: int, **more: float) -> dict[str, float]:
    numbers = {"loss_sum": 3.0 / step, "loss_mean": 1.5 / step, "lr": 0.001, "grad_norm": 0.75}
    speed = {"events_per_s": 1234.5, "step_ms": 20.0, "data_wait_ms": 1.0, "data_wait_share": 0.05}
    return {"step": step, "epoch": 1, **numbers, **speed, **more}


def scalars_of(run_dir: Path) -> dict[str, dict[int, float]]:
    board = EventAccumulator(str(run_dir)).Reload()
    return {tag: {event.step: event.value for event in board.Scalars(tag)} for tag in board.Tags()["scalars"]}


def test_rows_and_scalars_have_the_same_names(tmp_path: Path) -> None:
    with RunLog(tmp_path, ("kind", "place"), total_steps=100) as log:
        log.write(row(10, skipped_steps=3), [0.1, 0.2])
        log.write(row(20), [0.05, 0.1], {"loss": [0.4, 0.6], "top1": [0.5, 0.25]})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    training = ({"loss/kind": 0.1, "loss/place": 0.2}, {"loss/kind": 0.05, "loss/place": 0.1})
    validation = {
        "validation_loss_sum": 1.0,
        "validation_loss_mean": 0.5,
        "validation_loss/kind": 0.4,
        "validation_loss/place": 0.6,
        "validation_top1/kind": 0.5,
        "validation_top1/place": 0.25,
    }
    assert rows == [row(10, skipped_steps=3) | training[0], row(20, skipped_steps=0) | training[1] | validation]
    scalars = scalars_of(tmp_path)
    assert scalars.keys() == rows[1].keys() - {"step"}
    for name, values in scalars.items():
        assert values == pytest.approx({each["step"]: each[name] for each in rows if name in each}), name


def test_lines_come_under_a_heading_that_returns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger(("kind",), (5,), [1.5], [1.4])
    top = heading(100).splitlines()
    with RunLog(tmp_path, ("kind",), total_steps=100) as log:
        for step in range(1, 23):
            log.write(row(step), [0.1])
        assert capsys.readouterr().out.splitlines() == [
            *top, *(line(row(step), 100) for step in range(1, 21)), *top, line(row(21), 100), line(row(22), 100)
        ]  # fmt: skip
        log.write(row(23), [0.1], {"loss": [0.5], "top1": [0.5]})
        log.write(row(24), [0.1])
        log.show_ledger(ledger)
        log.write(row(25), [0.1])
        lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        line(row(23), 100), "step 23: validation loss 0.500 (mean 0.5000)", *top, line(row(24), 100)
    ]  # fmt: skip
    assert lines[-3:] == [*top, line(row(25), 100)]


def test_what_is_not_finite_is_null_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    with RunLog(tmp_path, ("kind",), total_steps=100) as log:
        log.write(row(1, grad_norm=math.inf), [math.nan])
    (told,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(told, parse_constant=refuse) == row(1, skipped_steps=0, grad_norm=None) | {"loss/kind": None}
    assert " inf " in capsys.readouterr().out


def test_histograms_of_weights_and_gradients(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    model.weight.grad = torch.full((2, 2), -7.0)
    with RunLog(tmp_path, ("kind",), total_steps=100) as log:
        log.write_histograms(10, model)
        model.weight.grad.fill_(torch.nan)  # of a step that was skipped
        log.write_histograms(20, model)
    board = EventAccumulator(str(tmp_path)).Reload()
    assert set(board.Tags()["histograms"]) == {"weights/weight", "weights/bias", "gradients/weight"}
    (weights,), (gradients,) = board.Histograms("weights/weight"), board.Histograms("gradients/weight")
    assert (weights.step, weights.histogram_value.min, weights.histogram_value.max) == (20, 1.0, 5.0)
    assert (weights.histogram_value.num, weights.histogram_value.sum) == (4, 11.0)
    assert gradients.step == 10  # none of the second
    assert (gradients.histogram_value.min, gradients.histogram_value.max) == (-7.0, -7.0)


@pytest.mark.parametrize("first_step", [0, 20])  # 0: the attempt before died without a checkpoint
def test_a_resumed_log_hides_what_came_after_the_checkpoint(tmp_path: Path, first_step: int) -> None:
    attempts = (0, (10, 20, 30), 1.0), (first_step, (30, 40), 2.0)
    for attempt, (first, steps, loss) in enumerate(attempts):
        with RunLog(tmp_path, ("kind",), total_steps=40, first_step=first) as log:
            for step in steps:
                log.write(row(step), [loss])
        time.sleep(0 if attempt else 1.1)  # TensorBoard names and orders its files by the second
    wanted = [(10, 1.0), (20, 1.0)] if first_step else []
    wanted += [(30, 2.0), (40, 2.0)]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(entry["step"], entry["loss/kind"]) for entry in rows] == wanted
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss/kind")
    assert [(event.step, event.value) for event in events] == wanted


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
    print_shown(ledger)
    out = capsys.readouterr().out
    assert "10/40" in out
    for words in (*heading(40).splitlines(), line(row(10), 40)):
        assert words in out
    assert "[odd] words" in out
    assert out.count("[red]kind[/red]") == 2
    assert out.index("[odd] words") < out.rindex(line(row(10), 40))  # the numbers stay below


def test_without_tensorboard_it_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("eventkern.train.logging.has", lambda package: False)
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
