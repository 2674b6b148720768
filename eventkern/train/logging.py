"""The log of a run: lines or a progress bar, metrics.jsonl, and the boards that show the same numbers."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from eventkern.train.boards import Board, TensorBoard, WeightsAndBiases, has
from eventkern.train.ledger import Ledger
from eventkern.train.lines import heading, line
from eventkern.train.protocols import TrainableModel
from eventkern.train.tables import Shown
from eventkern.train.whole_files import write_file

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
INSTALL = "pip install 'eventkern[train]'"
UNBOUNDED = 10_000
"""Wider than any table."""
LINES_PER_HEADING = 20


class RunLog:
    """Where a run's numbers go; use it as a context manager.

    On a terminal there is a progress bar with the newest numbers below it, elsewhere a line per logged step. What needs
    a package that is missing (rich, tensorboard, matplotlib) is left out; event files and curves that will be missing
    are said once.

    Args:
        run_dir: folder of metrics.jsonl and the TensorBoard events; made if absent.
        names: names of the losses.
        total_steps: steps of the whole run.
        first_step: steps already taken: later rows of an earlier attempt are cut off.
        logger: "wandb" shows the run on Weights & Biases too.
        settings: the run's configuration, for those who see it there.

    Raises:
        ConfigError: Weights & Biases was asked for and is not installed, or does not start.
    """

    def __init__(
        self,
        run_dir: Path,
        names: Sequence[str],
        total_steps: int,
        first_step: int = 0,
        *,
        logger: str = "none",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._names = tuple(names)
        self._total_steps = total_steps
        self._step = first_step
        self._lines = 0
        self._boards: list[Board] = []
        if logger == "wandb":
            self._boards.append(WeightsAndBiases(run_dir, settings or {}))
        if has("tensorboard"):
            self._boards.append(TensorBoard(run_dir, first_step))
        cut_metrics(run_dir / METRICS_FILE, first_step)
        self._metrics = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._progress: Progress | None = _progress_bar() if sys.stdout.isatty() and has("rich") else None
        if not has("tensorboard"):
            self.say(f"tensorboard is not installed: no event files ({INSTALL})")
        if not has("matplotlib"):
            self.say(f"matplotlib is not installed: no {CURVES_FILE} ({INSTALL})")

    def __enter__(self) -> RunLog:
        if self._progress is not None:
            self._progress.start()
            self._bar = self._progress.add_task("training", total=self._total_steps, completed=self._step, numbers="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._metrics.close()
        for board in self._boards:
            board.close(failed=error is not None)

    def say(self, text: str) -> None:
        """Prints a line, above the progress bar where there is one."""
        self._lines = 0  # the heading scrolls away from its columns
        self._print(text)

    def _print(self, text: str) -> None:
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
        """Logs a step, under the same names everywhere: those of `row`, and ``loss/<category>`` for each category;
        of an evaluation validation_loss_sum, validation_loss_mean and ``validation_<metric>/<category>``.

        Args:
            row: at least step, epoch, loss_sum, loss_mean, lr, grad_norm, and what a Meter reads; skipped_steps is 0
                where it is absent.
            losses: (H,) the step's training loss of every category.
            validation: where the step was evaluated: "loss" and "top1", (H,) each.
        """
        row = {**row, "skipped_steps": row.get("skipped_steps", 0), **self._named("loss", losses)}
        if validation is not None:
            total = math.fsum(validation["loss"])
            row |= {"validation_loss_sum": total, "validation_loss_mean": total / len(self._names)}
            for metric, values in validation.items():
                row |= self._named(f"validation_{metric}", values)
        # JSON knows no infinity: what is not finite is null
        plain = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._metrics.write(json.dumps(plain, allow_nan=False) + "\n")
        self._metrics.flush()
        for board in self._boards:
            board.write(int(row["step"]), row)
        self._show(row)

    def write_histograms(self, step: int, model: TrainableModel) -> None:
        """Shows the distribution of every parameter, and of its gradient where it has one, on the boards."""
        tensors = {}
        for name, parameter in model.named_parameters():
            tensors[f"weights/{name}"] = parameter.detach().float().cpu()
            if parameter.grad is not None:
                tensors[f"gradients/{name}"] = parameter.grad.detach().float().cpu()
        finite = {name: values[values.isfinite()] for name, values in tensors.items()}
        shown = {name: values for name, values in finite.items() if len(values)}  # none of a step that was skipped
        for board in self._boards:
            board.write_histograms(step, shown)

    def _named(self, group: str, values: Sequence[float]) -> dict[str, float]:
        return {f"{group}/{name}": value for name, value in zip(self._names, values, strict=True)}

    def _show(self, row: Mapping[str, float]) -> None:
        numbers = line(row, self._total_steps)
        if self._progress is not None:
            numbers = f"{heading(self._total_steps)}\n{numbers}"
            self._progress.update(self._bar, completed=row["step"], numbers=numbers)
            return
        if self._lines % LINES_PER_HEADING == 0:
            self._print(heading(self._total_steps))
        self._print(numbers)
        self._lines += 1
        if "validation_loss_sum" in row:
            total, mean = row["validation_loss_sum"], row["validation_loss_mean"]
            self.say(f"step {row['step']}: validation loss {total:.3f} (mean {mean:.4f})")

    def show_ledger(self, ledger: Ledger) -> None:
        """Prints the ledger, above the progress bar where there is one."""
        self._lines = 0
        if self._progress is not None:
            print_table(self._progress.console, ledger)
        else:
            print_shown(ledger)


def print_shown(shown: Shown) -> None:
    """Prints a ledger or a scorecard: a rich table on a terminal, else plain text."""
    if sys.stdout.isatty() and has("rich"):
        from rich.console import Console

        print_table(Console(), shown)
    else:
        print(shown.text(), flush=True)


def print_table(console: Console, shown: Shown) -> None:
    """Prints the table; where the console is narrower, the plain text, which it may wrap but not cut."""
    table = shown.table()
    if console.measure(table, options=console.options.update(max_width=UNBOUNDED)).maximum <= console.width:
        console.print(table)
    else:
        console.print(shown.text(), markup=False, highlight=False, soft_wrap=True)


def cut_metrics(path: Path, last_step: int) -> None:
    """Drops the rows of metrics.jsonl after last_step, and a last line that a crash left unfinished."""
    if path.exists():
        kept = [json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= last_step]
        write_file(path, "".join(kept))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl, without a last line that a crash left unfinished."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _progress_bar() -> Progress:
    from rich.console import RenderableType
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class NumbersBelow(Progress):
        """A bar with the newest numbers in lines of their own."""

        def get_renderables(self) -> Iterable[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            for task in self.tasks:
                if task.fields["numbers"]:
                    yield Text(task.fields["numbers"], no_wrap=True)

    return NumbersBelow(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
