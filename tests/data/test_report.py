import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from eventkern.data.report import PrepareReport
from eventkern.data.schema import Schema


def report(schema: Schema, rates: dict[str, float]) -> PrepareReport:
    category: dict[str, Any] = {"size": 4_000_000, "missing": 1.0, "oov": rates}
    categories = [category | {"name": c.name, "kind": c.kind} for c in schema.categories]
    counts = dict.fromkeys(("rows_read", "rows_skipped", "training", "validation", "keys", "keyless_rows"), 0)
    info = {"schema": schema.to_dict(), "categories": categories, "counts": counts, "file_bytes": 1}
    return PrepareReport(Path("store"), info | {"split": {"time": schema.split}}, (), 1.0)


def printed(report: PrepareReport, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(report)
    return str(console.file.getvalue()).splitlines()


@pytest.mark.parametrize("name", ["flights", "workforce"])
def test_nothing_is_cut_at_80_columns(name: str) -> None:
    schema = Schema.load(name)
    lines = printed(report(schema, {"100": 1.0, "1000": 0.9996, "4096": 0.25, "full": 0.0}), 80)
    assert not any("…" in line for line in lines)
    words = [line.split() for line in lines]
    for category in schema.categories:
        assert [category.name, category.kind, "4,000,000", "100.0%", "100.0%", "100.0%", "25.0%", "0.0%"] in words


def test_a_long_name_is_folded() -> None:
    lines = printed(report(Schema.load("workforce"), {"full": 0.5}), 40)
    assert not any("…" in line for line in lines)
    assert [line.split()[-3:] for line in lines].count(["4,000,000", "100.0%", "50.0%"]) == 17


def test_sizes_that_cut_no_more_than_the_vocabulary_are_left_out() -> None:
    lines = printed(report(Schema.load("flights"), {"100": 0.5, "1000": 0.125, "4096": 0.125, "full": 0.125}), 80)
    assert ["category", "kind", "classes", "missing", "at", "100", "at", "full"] in [line.split() for line in lines]
