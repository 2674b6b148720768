"""Tables of numbers for people: on a terminal, and as plain text; and numbers for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table

MOST_PERCENT = 999
"""Beyond it a percentage says nothing: the loss that it is of is far beyond what it is held against."""


class Shown(Protocol):
    """What is printed in either form."""

    def table(self) -> Table: ...

    def text(self) -> str: ...


def rich_table(
    title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str, narrow: Mapping[str, str]
) -> Table:
    """A rich table, whose first column is of names; `narrow` has headings that are written in two lines."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, caption=Text(caption), caption_justify="left", box=None)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    for place, heading in enumerate(headings):
        table.add_column(narrow.get(heading, heading), justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def plain_text(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """The same as aligned lines."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells))
        for cells in (zip(row, widths, strict=True) for row in (headings, *rows))
    ]
    return "\n".join([title, *lines, caption])


def percent(share: float) -> str:
    """A share as a percentage; "-" where it is not known. Beyond 999 % it says that alone, as in "<-999 %"."""
    if not math.isfinite(share):
        return "-"
    if round(abs(100 * share), 1) > MOST_PERCENT:
        return f"{'<-' if share < 0 else '>'}{MOST_PERCENT} %"
    return f"{100 * share:.1f} %"


def for_json(value: Any) -> int | float | None:
    """A plain number; JSON knows no infinity, so what is not finite is None."""
    number = value.item() if isinstance(value, np.generic) else value
    return number if math.isfinite(number) else None
