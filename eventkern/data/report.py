"""What a prepare did, and how far it is. (rich loads where something is drawn.)"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class PrepareReport:
    """What a prepare did; `rich.print(report)` draws it as a table.

    Attributes:
        path: the store's folder.
        info: the content of its store.json.
        skipped: the first rows left out, each with its place and why.
        seconds: time taken.
        warnings: categories of which most values are out of vocabulary, with the commonest of those.
    """

    path: Path
    info: dict[str, Any]
    skipped: tuple[str, ...]
    seconds: float
    warnings: tuple[str, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        counts, info = self.info["counts"], self.info
        rates = [category["oov"] for category in info["categories"]]
        sizes = [size for size in rates[0] if size == "full" or any(rate[size] != rate["full"] for rate in rates)]
        # 80 columns hold it: the usual width, and what rich takes where there is no terminal. A longer name folds.
        table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, padding=0)
        table.title, table.title_justify = f"{info['schema']['name']}: classes by category", "left"
        table.add_column("category", overflow="fold")
        table.add_column("kind", no_wrap=True)
        for heading in ("classes", "missing", *(f"OOV\nat {size}" for size in sizes)):
            table.add_column(heading, justify="right", no_wrap=True)
        for category in info["categories"]:
            shares = (f"{share:.1%}" for share in (category["missing"], *(category["oov"][size] for size in sizes)))
            table.add_row(category["name"], category["kind"], f"{category['size']:,}", *shares)
        yield table
        yield Text(
            "missing: of all events; OOV: of the validation values, those without a class "
            "of their own at this id_category_size (full: where it cuts none)"
        )
        yield Text(
            f"{counts['rows_read']:,} rows read, {counts['rows_skipped']:,} skipped; "
            f"{counts['training']:,} events before {info['split']['time']} train, {counts['validation']:,} validate; "
            f"{counts['keys']:,} keys ({info['schema']['key']}), {counts['keyless_rows']:,} events without one"
        )
        for line in self.warnings:
            yield Text(f"warning: {line}", style="yellow")
        for line in self.skipped:
            yield Text(f"skipped: {line}")
        if counts["rows_skipped"] > len(self.skipped):
            yield Text(f"skipped: {counts['rows_skipped'] - len(self.skipped):,} more")
        yield Text(f"wrote {self.path} ({info['file_bytes'] / 1e6:.1f} MB) in {self.seconds:.1f} s")


class Watch(Protocol):
    """Names the step at hand and tells how much of it is done."""

    def __call__(self, step: str, done: float, total: float) -> None: ...


@contextmanager
def progress_bar(wanted: bool) -> Iterator[Watch]:
    """A bar for each step on the terminal; nothing where stderr is no terminal."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda step, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:>9}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, Any] = {}

        def watch(step: str, done: float, total: float) -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(step)
            progress.update(tasks[step], completed=done, total=total)

        yield watch
