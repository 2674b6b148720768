"""Columns that fit a page."""

from __future__ import annotations

import math

import pytest

from eventkern.train.lines import heading, line, short, time_left

ROW = {
    "step": 60,
    "epoch": 1,
    "loss_sum": 48.306123,
    "loss_mean": 2.8415,
    "lr": 1e-3,
    "grad_norm": 0.753,
    "step_ms": 105.2,
    "events_per_s": 12345.6,
    "tokens_per_s": 1.234e6,
    "mfu": 0.034,
    "data_wait_share": 0.021,
    "memory_bytes": 812 << 20,
    "skipped_steps": 2,
}


def test_the_line_as_it_is_printed() -> None:
    assert f"{heading(4000)}\n{line(ROW, 4000)}".splitlines() == [
        "      ep-   loss  loss         grad   ms/ event token MFU wait  mem- skip  time",
        " step och    sum  mean     lr  norm  step    /s    /s   %    %   ory  ped  left",
        "   60   1 48.306 2.841 1.0e-3 0.753 105.2 12.3k 1.23M 3.4  2.1  812M    2  6:54",
    ]


def test_what_a_row_lacks_is_a_dash() -> None:
    counted = ("tokens_per_s", "mfu", "memory_bytes", "skipped_steps")
    row = {name: value for name, value in ROW.items() if name not in counted}
    assert line(row, 4000) == "   60   1 48.306 2.841 1.0e-3 0.753 105.2 12.3k     -   -  2.1     -    0  6:54"


EXTREMES = (
    {},
    {"step": 99_999, "epoch": 999, "loss_sum": 123_456.7, "loss_mean": 7262.1, "grad_norm": 3.2e9},
    {"lr": 2.5e-8, "grad_norm": 1.2e-7, "step_ms": 123_456.7, "events_per_s": 9.87e9, "tokens_per_s": 1.2e12},
    {"step_ms": 0.0123, "mfu": 1.0, "data_wait_share": 1.0, "memory_bytes": 1 << 41, "skipped_steps": 12_345_678},
    {"loss_sum": math.nan, "loss_mean": math.inf, "grad_norm": math.inf},
)  # fmt: skip


@pytest.mark.parametrize("more", EXTREMES)
def test_every_line_fits_80_columns_below_its_heading(more: dict[str, float]) -> None:
    for total_steps in (60, 99_999, 999_999):
        upper, lower = heading(total_steps).splitlines()
        assert len(upper) == len(lower) == len(line(ROW | more, total_steps)) <= 80
        ends = [place for place in range(len(lower)) if lower[place] != " " and lower[place + 1 :][:1] in ("", " ")]
        shown = line(ROW | more, total_steps)
        assert len(shown.split()) == len(ends)
        assert all(shown[place] != " " and shown[place + 1 :][:1] in ("", " ") for place in ends)  # right-aligned


@pytest.mark.parametrize("width", [4, 5, 6])
def test_a_number_is_short_and_near(width: int) -> None:
    for value in (digits * 10.0**power for digits in (1, 1.2345, 4.9996, 9.94, 9.9996) for power in range(-9, 15)):
        text = short(value, width)
        assert len(text) <= width
        unit = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}.get(text[-1], 1.0)
        read = float(text.rstrip("kMGTP")) * unit
        if value >= 1:
            assert read == pytest.approx(value, rel=0.06)
        elif width > 4:
            assert read == pytest.approx(value, rel=0.5)  # of one digit, "5e-7", at worst half is left out
        else:
            assert read == pytest.approx(value, abs=0.005)


def test_memory_counts_in_powers_of_1024() -> None:
    assert short(1536 << 20, 5, base=1024) == "1.50G"
    assert short(812 << 20, 5, base=1024) == "812M"
    assert short(1023 << 20, 5, base=1024) == "1.00G"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0:00"),
        (59.9, "0:59"),
        (3599, "59:59"),
        (3600, "1h00"),
        (359_999, "99h59"),
        (360_000, "4d04"),
        (12_345_678, "142d"),
        (math.inf, "-"),
    ],
)
def test_the_time_left(seconds: float, shown: str) -> None:
    assert time_left(seconds) == shown
