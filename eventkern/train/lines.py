"""The line of a logged step: columns that fit a page of 80, under a heading of two lines."""

from __future__ import annotations

import math
from collections.abc import Mapping

UNITS = ("", "k", "M", "G", "T", "P")
HEADINGS = (
    ("", "step", 5),
    ("ep-", "och", 3),
    ("loss", "sum", 6),
    ("loss", "mean", 5),
    ("", "lr", 6),
    ("grad", "norm", 5),
    ("ms/", "step", 5),
    ("event", "/s", 5),
    ("token", "/s", 5),
    ("MFU", "%", 3),
    ("wait", "%", 4),
    ("mem-", "ory", 5),
    ("skip", "ped", 4),
    ("time", "left", 5),
)


def heading(total_steps: int) -> str:
    """Two lines above the columns; steps of more than 5 digits widen theirs."""
    upper, lower = [], []
    for top, bottom, width in HEADINGS:
        width = _step_width(total_steps) if bottom == "step" and not top else width
        upper.append(top.rjust(width))
        lower.append(bottom.rjust(width))
    return " ".join(upper) + "\n" + " ".join(lower)


def line(row: Mapping[str, float], total_steps: int) -> str:
    """The numbers of a row of metrics.jsonl below that heading; "-" for what it lacks.

    Units are powers of 1000 (k, M, G), of 1024 for memory; skipped steps are those of the run so far.
    """
    left_s = max(0, total_steps - row["step"]) * row["step_ms"] / 1e3
    cells = (
        str(int(row["step"])).rjust(_step_width(total_steps)),
        str(int(row["epoch"])),
        short(row["loss_sum"], 6),
        short(row["loss_mean"], 5),
        f"{row['lr']:.1e}".replace("e-0", "e-").replace("e+0", "e+"),
        short(row["grad_norm"], 5),
        short(row["step_ms"], 5),
        short(row["events_per_s"], 5),
        short(row["tokens_per_s"], 5) if "tokens_per_s" in row else "-",
        short(100 * row["mfu"], 3) if "mfu" in row else "-",
        short(100 * row["data_wait_share"], 3),
        short(row["memory_bytes"], 5, base=1024) if "memory_bytes" in row else "-",
        short(row.get("skipped_steps", 0), 4, decimals=0),
        time_left(left_s),
    )
    return " ".join(cell.rjust(width) for cell, (_, _, width) in zip(cells, HEADINGS, strict=True))


def short(value: float, width: int, *, decimals: int = 3, base: int = 1000) -> str:
    """A number in at most `width` places: its leading digits, and k, M, G, T or P where it is large.

    Small numbers that would lose all their digits are written as powers of ten, where there is room.
    """
    if not math.isfinite(value):
        return str(value)
    if 0 < abs(value) < 10.0**-decimals and width >= 5:
        return f"{value:.0e}".replace("e-0", "e-")
    power = 0
    while len(f"{value / base**power:.0f}") + (power > 0) > min(width, 4) and power < len(UNITS) - 1:
        power += 1
    scaled, room = value / base**power, width - (power > 0)
    places = max(0, min(decimals, room - len(f"{scaled:.0f}") - 1))
    return f"{scaled:.{places}f}{UNITS[power]}"


def time_left(seconds: float) -> str:
    """Minutes and seconds, hours and minutes, days and hours, or days: 5 places."""
    if not math.isfinite(seconds):
        return "-"
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if hours == 0:
        return f"{minutes}:{int(seconds % 60):02d}"
    if hours < 100:
        return f"{hours}h{minutes % 60:02d}"
    return f"{days}d{hours % 24:02d}" if days < 100 else f"{days}d"


def _step_width(total_steps: int) -> int:
    return max(HEADINGS[0][2], len(str(total_steps)))
