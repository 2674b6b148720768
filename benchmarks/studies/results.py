"""What every study leaves: a record, a text with tables, and pictures, dated and named after the hardware."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.environment import hardware_slug
from benchmarks.report import finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 130


def seconds_text(seconds: float) -> str:
    """Three digits, in the unit that suits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            value = seconds * factor
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    raise AssertionError


def aligned(lines: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table, headings first: the first column to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rule = tuple("-" * width if column == 0 else "-" * (width - 1) + ":" for column, width in enumerate(widths))

    def joined(line: tuple[str, ...]) -> str:
        cells = (
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        return f"| {' | '.join(cells)} |"

    return "\n".join(map(joined, [lines[0], rule, *lines[1:]]))


def markdown(title: str, command: str, parts: Sequence[str], environment: Mapping[str, object]) -> str:
    """A study to read: its title, the command that ran it, its paragraphs, headings and tables, and what it ran on."""
    facts = "\n".join(f"- {name}: {value}" for name, value in environment.items())
    return "\n\n".join([f"# {title}", f"`{command}`", *parts, "## Environment", facts]) + "\n"


def write(
    folder: Path,
    subject: str,
    record: Mapping[str, Any],
    text: str,
    pictures: Mapping[str, tuple[str, Figure]],
    *,
    device: str = "cpu",
) -> list[Path]:
    """Write <subject>_<hardware>_<yyyymmdd>.json, .md and a -<name>.png for each picture; those of today are replaced.

    Args:
        folder: of the results, made where it is missing.
        subject: the study's name.
        record: everything found, with "command", "environment" and "conclusion" (paragraphs); numbers that are not
            finite become null.
        text: from `markdown`; the pictures are linked before its first "## ".
        pictures: by name, what they show in words and the canvas.
        device: whose name the files carry.
    """
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d")
    stem = f"{subject}_{hardware_slug(device)}_{date}"
    record_path, text_path = folder / f"{stem}.json", folder / f"{stem}.md"
    paths = [record_path, text_path, *(folder / f"{stem}-{name}.png" for name in pictures)]
    record_path.write_text(json.dumps(finite({"subject": subject, **record}), indent=1) + "\n")
    links = "".join(f"![{words}]({stem}-{name}.png)\n\n" for name, (words, _) in pictures.items())
    opening, heading, rest = text.partition("\n## ")
    text_path.write_text(f"{opening.rstrip()}\n\n{links}{heading.lstrip()}{rest}")
    for path, (_, canvas) in zip(paths[2:], pictures.values(), strict=True):
        canvas.savefig(path, dpi=DPI)
    return paths
