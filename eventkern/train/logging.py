"""The log of a run: lines or a progress bar, metrics.jsonl, TensorBoard, and a picture of the loss at the end."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eventkern.train.ledger import Ledger

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
INSTALL = "pip install 'eventkern[train]'"
UNBOUNDED = 10_000
"""Wider than any table."""


class RunLog:
    """Where a run's numbers go; use it as a context manager.

    On a terminal there is a progress bar, elsewhere a line per logged step. What needs a package that is missing (rich,
    tensorboard, matplotlib) is left out; event files and curves that will be missing are said once.

    Args:
        run_dir: folder of metrics.jsonl and the TensorBoard events; made if absent.
        names: names of the losses.
        total_steps: steps of the whole run.
        first_step: steps already taken: later rows of an earlier attempt are cut off.
    """

    def __init__(self, run_dir: Path, names: Sequence[str], total_steps: int, first_step: int = 0) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._names = tuple(names)
        self._total_steps = total_steps
        self._step = first_step
        cut_metrics(run_dir / METRICS_FILE, first_step)
        self._metrics = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._board = _open_board(run_dir, first_step)
        self._progress: Progress | None = _progress_bar() if sys.stdout.isatty() and _has("rich") else None
        if self._board is None:
            self.say(f"tensorboard is not installed: no event files ({INSTALL})")
        if not _has("matplotlib"):
            self.say(f"matplotlib is not installed: no {CURVES_FILE} ({INSTALL})")

    def __enter__(self) -> RunLog:
        if self._progress is not None:
            self._progress.start()
            self._bar = self._progress.add_task("training", total=self._total_steps, completed=self._step, loss="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._board is not None:
            self._board.close()
        self._metrics.close()

    def say(self, text: str) -> None:
        """Prints a line, above the progress bar where there is one."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def advance(self, step: int) -> None:
        """Moves the progress bar; costs nothing where there is none."""
        if self._progress is not None:
            self._progress.update(self._bar, completed=step)

    def write(
        self,
        row: Mapping[str, float],
        losses: Sequence[float],
        validation: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Logs a step.

        Args:
            row: at least step, epoch, loss_sum, loss_mean, lr, grad_norm, events_per_s, step_ms, data_wait_share.
            losses: (H,) the step's training loss of every category.
            validation: where the step was evaluated: "loss" and "top1", (H,) each.
        """
        step = int(row["step"])
        if validation is not None:
            total = math.fsum(validation["loss"])
            row = {**row, "validation_loss_sum": total, "validation_loss_mean": total / len(self._names)}
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        if self._board is not None:
            self._write_board(step, row, losses, validation)
        if self._progress is not None:
            self._progress.update(self._bar, completed=step, loss=f"loss {row['loss_sum']:.3f}")
        else:
            self.say(self._line(row))

    def show_ledger(self, ledger: Ledger) -> None:
        """Prints the ledger, above the progress bar where there is one."""
        if self._progress is not None:
            print_table(self._progress.console, ledger)
        else:
            print_ledger(ledger)

    def _line(self, row: Mapping[str, float]) -> str:
        left_s = max(0, self._total_steps - row["step"]) * row["step_ms"] / 1e3
        parts = [
            f"step {row['step']}/{self._total_steps}",
            f"epoch {row['epoch']}",
            f"loss {row['loss_sum']:.3f} (mean {row['loss_mean']:.4f})",
        ]
        if "validation_loss_sum" in row:
            parts.append(f"validation {row['validation_loss_sum']:.3f} (mean {row['validation_loss_mean']:.4f})")
        parts += [
            f"lr {row['lr']:.2e}",
            f"grad norm {row['grad_norm']:.3f}",
            f"{row['step_ms']:.1f} ms/step",
            f"{row['events_per_s']:,.0f} events/s",
            f"data wait {100 * row['data_wait_share']:.1f} %",
            f"left {int(left_s // 60)}:{int(left_s % 60):02d}",
        ]
        return "  ".join(parts)

    def _write_board(
        self,
        step: int,
        row: Mapping[str, float],
        losses: Sequence[float],
        validation: Mapping[str, Sequence[float]] | None,
    ) -> None:
        scalars = {
            "train/total": row["loss_sum"],
            "train/mean": row["loss_mean"],
            **{f"train/{name}": loss for name, loss in zip(self._names, losses, strict=True)},
            **{f"train/{key}": row[key] for key in ("grad_norm", "lr", "events_per_s", "step_ms", "data_wait_share")},
        }
        if validation is not None:
            scalars["validation/total"] = row["validation_loss_sum"]
            scalars["validation/mean"] = row["validation_loss_mean"]
            for name, loss, top1 in zip(self._names, validation["loss"], validation["top1"], strict=True):
                scalars[f"validation/{name}"] = loss
                scalars[f"validation_top1/{name}"] = top1
        for tag, value in scalars.items():
            self._board.add_scalar(tag, value, step)


class Meter:
    """Counts steps, labels and time between two logged steps."""

    def __init__(self) -> None:
        self._waited_s = 0.0
        self.start()

    def start(self) -> None:
        """Begins a new interval, so that evaluations and checkpoints are in none."""
        self._start_s = time.perf_counter()
        self._waited_s = 0.0
        self._steps = 0
        self.num_targets = torch.zeros((), dtype=torch.int64)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in here is spent waiting for data."""
        before = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - before

    def count(self, num_targets: Tensor) -> None:
        """Counts a step; its labels stay on the device."""
        self._steps += 1
        self.num_targets = num_targets if self._steps == 1 else self.num_targets + num_targets

    def read(self, num_targets: float) -> dict[str, float]:
        """The interval's throughput, given its labels as a number."""
        elapsed_s = time.perf_counter() - self._start_s
        return {
            "events_per_s": num_targets / elapsed_s,
            "step_ms": 1e3 * elapsed_s / self._steps,
            "data_wait_ms": 1e3 * self._waited_s / self._steps,
            "data_wait_share": self._waited_s / elapsed_s,
        }


def print_ledger(ledger: Ledger) -> None:
    """Prints the ledger: a rich table on a terminal, else plain text."""
    if sys.stdout.isatty() and _has("rich"):
        from rich.console import Console

        print_table(Console(), ledger)
    else:
        print(ledger.text(), flush=True)


def print_table(console: Console, ledger: Ledger) -> None:
    """Prints the table; where the console is narrower, the plain text, which it may wrap but not cut."""
    table = ledger.table()
    if console.measure(table, options=console.options.update(max_width=UNBOUNDED)).maximum <= console.width:
        console.print(table)
    else:
        console.print(ledger.text(), markup=False, highlight=False, soft_wrap=True)


def cut_metrics(path: Path, last_step: int) -> None:
    """Drops the rows of metrics.jsonl after last_step, and a last line that a crash left unfinished."""
    if path.exists():
        kept = [json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= last_step]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl, without a last line that a crash left unfinished."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def plot_curves(run_dir: Path, ledger: Ledger | None) -> None:
    """Draws curves.png from metrics.jsonl: the mean loss of training and validation, and the ledger's baselines.

    Without matplotlib nothing is drawn.
    """
    if not _has("matplotlib"):
        return
    from matplotlib.figure import Figure

    rows = read_metrics(run_dir / METRICS_FILE)
    evaluated = [row for row in rows if "validation_loss_mean" in row]
    figure = Figure(figsize=(8, 5), layout="constrained")  # without pyplot: no window, no global state
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [row["loss_mean"] for row in rows], label="training", linewidth=0.8)
    axes.plot(
        [row["step"] for row in evaluated],
        [row["validation_loss_mean"] for row in evaluated],
        label="validation",
        marker="o",
        markersize=3,
    )
    if ledger is not None:
        baselines = {"marginal": ledger.marginal, "first-order": ledger.first_order, "floor": ledger.floor}
        for (name, losses), style in zip(baselines.items(), ("--", "-.", ":"), strict=True):
            if math.isfinite(losses.mean()):
                axes.axhline(float(losses.mean()), label=name, linestyle=style, color="grey", linewidth=1)
    axes.set(xlabel="optimizer step", ylabel="mean loss of a category (nats)")
    axes.legend()
    figure.savefig(run_dir / CURVES_FILE, dpi=120)


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _open_board(run_dir: Path, first_step: int) -> Any:
    if not _has("tensorboard"):
        return None
    from torch.utils.tensorboard import SummaryWriter

    # what an earlier attempt wrote after the checkpoint is hidden by the purge
    return SummaryWriter(str(run_dir), purge_step=first_step + 1 if first_step else None)


def _progress_bar() -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
