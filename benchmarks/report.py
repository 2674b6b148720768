"""Tables of a benchmark run: printed at its end, and kept as a dated file where asked for."""

import dataclasses
import datetime
import json
import math
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import hardware_slug
from benchmarks.measure import Row
from profiling.roofline import Work

HEADINGS = ("case", "contender", "ms", "IQR ms", "events/s", "GB/s", "x best peer", "% of ceiling", "bound", "peak MiB")


@dataclass(frozen=True)
class Case:
    """One comparison: the same work done by every contender, timed in turn."""

    subject: str
    name: str
    device: str
    dtype: str
    work: Work
    rows: tuple[Row, ...]


def cells(case: Case, row: Row) -> tuple[str, ...]:
    """A row as the table shows it; of a part of the work, rates and shares of the whole would say nothing."""
    counts = not row.is_part
    return (
        case.name,
        f"**{row.contender}**" if row.is_ours else row.contender,
        f"{row.median_s * 1e3:.3g}" if row.median_s < 1 else f"{row.median_s * 1e3:.0f}",
        f"{row.spread_s * 1e3:.2g}",
        f"{case.work.events / row.median_s:,.0f}" if case.work.events and counts else "",
        f"{(case.work.bytes + case.work.cache_bytes) / row.median_s / 1e9:.1f}" if counts else "",
        f"{row.ratio:.2f}" if row.ratio is not None and counts else "",
        f"{100 * row.ceiling_share:.0f}" if counts else "",
        row.bound if counts else "a part",
        f"{row.peak_bytes / 2**20:.1f}" if math.isfinite(row.peak_bytes) else "",
    )


def markdown(cases: list[Case]) -> str:
    """All cases as one aligned Markdown table: names to the left, numbers to the right."""
    lines = [HEADINGS, *(cells(case, row) for case in cases for row in case.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    is_name = [heading in {"case", "contender", "bound"} for heading in HEADINGS]

    def joined(line: tuple[str, ...]) -> str:
        padded = (
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, is_name, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = (f"{'-' * (width - 1)}{'-' if left else ':'}" for width, left in zip(widths, is_name, strict=True))
    return "\n".join([joined(lines[0]), f"| {' | '.join(rule)} |", *map(joined, lines[1:])])


def write(
    folder: Path,
    cases: list[Case],
    environments: dict[str, dict[str, object]],
    ceilings: dict[str, dict[str, object]],
    command: str,
) -> list[Path]:
    """Write <subject>_<hardware>_<yyyymmdd>.json and .md for each subject and device among the cases.

    A file of the same day is replaced: the newest run of a subject stands for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d")
    written = []
    for subject, device in sorted({(case.subject, case.device) for case in cases}):
        chosen = [case for case in cases if (case.subject, case.device) == (subject, device)]
        path = folder / f"{subject}_{hardware_slug(device)}_{date}.json"
        record = {
            "subject": subject,
            "command": command,
            "environment": environments[device],
            "ceilings": ceilings[device],
            "cases": [dataclasses.asdict(case) for case in chosen],
        }
        path.write_text(json.dumps(finite(record), indent=1) + "\n")
        facts = "\n".join(f"- {name}: {value}" for name, value in environments[device].items())
        text = f"# {subject}\n\n`{command}`\n\n{markdown(chosen)}\n\n{facts}\n"
        path.with_suffix(".md").write_text(text)
        written += [path, path.with_suffix(".md")]
    return written


def finite(value: object) -> object:
    """The same record with null where a number is not finite, which JSON cannot say."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
