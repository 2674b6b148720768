"""The ledger's arithmetic, its words, and its three forms."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from eventkern.train import Ledger
from eventkern.train.tables import percent

NAMES = ("Kind", "[bold]Place[/bold]", "Day")


def make_ledger(losses: tuple[float, ...] | None = (1.0, 2.0, 0.5), floor: bool = True) -> Ledger:
    floors = [0.5, 1.5, math.nan] if floor else None
    ledger = Ledger(NAMES, (10, 100, 7), [2.0, 4.0, 1.0], [1.5, 1.9, 0.9], floors)
    if losses is not None:
        ledger.update(123, losses, [0.5, 0.25, 0.75])
    return ledger


def test_its_numbers() -> None:
    told = make_ledger().to_dict()
    kind, place, day = told["categories"]
    assert kind == {
        "name": "Kind",
        "classes": 10,
        "ln_classes": pytest.approx(math.log(10)),
        "marginal": 2.0,
        "first_order": 1.5,
        "floor": 0.5,
        "model": 1.0,
        "explained": 0.5,
        "top1": 0.5,
    }
    assert place["explained"] == 0.5
    assert day["floor"] is None
    assert told["sum"]["model"] == 3.5
    assert told["sum"]["floor"] is None  # not known for all categories
    assert told["mean"]["marginal"] == pytest.approx(7 / 3)
    assert told["mean"]["top1"] == 0.5
    assert told["explained"] == pytest.approx(3.5 / 7)
    # Kind and Place have a floor: (2 + 4 - 1 - 2) / (2 + 4 - 0.5 - 1.5)
    assert told["learned_of_learnable"] == pytest.approx(3 / 4)
    assert (told["step"], told["unit"]) == (123, "nats")


def test_a_note_stands_below_the_title() -> None:
    ledger = Ledger(("Kind",), (10,), [2.0], [1.5], note="fold 1 of 5 by Actor")
    assert ledger.to_dict()["note"] == "fold 1 of 5 by Actor"
    assert ledger.text().splitlines()[1] == "fold 1 of 5 by Actor"
    console = Console(width=80, file=io.StringIO())
    console.print(ledger.table())
    assert "fold 1 of 5 by Actor" in console.file.getvalue()  # type: ignore[attr-defined]
    assert make_ledger().to_dict()["note"] is None
    assert len(make_ledger().text().splitlines()) == len(make_ledger().rows()) + 3


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ((1.0, 2.0, 0.5), "Learning: 50.0 % of the marginal explained."),
        ((1.0, 2.0, 0.5), "Ahead of the marginal in 3 of 3 categories, of first-order in 2 of 3."),
        ((1.0, 2.0, 0.5), "Of what can be learned at all, 75.0 % is learned."),
        ((1.5, 2.5, 0.5), "Behind first-order counting: the loss 4.500 is above its 4.300, 35.7 % of the marginal"),
        ((1.5, 2.3, 0.5), "Learning: 38.6 % of the marginal explained."),
        ((2.0, 3.9, 1.0), "Stuck at the marginal: the loss 6.90 is about the training frequencies' 7.00."),
        ((2.0, 4.2, 1.5), "Worse than the marginal: the loss 7.70 is above the training frequencies' 7.00."),
        ((2.4, 4.7, 2.0), "Worse than guessing: the loss 9.10 is above the 8.85 of a uniform guess."),
        ((2.4, 2.0, 0.5), "Worse than guessing in Kind."),
        ((1.0, math.nan, 0.5), "The validation loss is not finite in [bold]Place[/bold]."),
        (None, "No evaluation yet."),
    ],
)
def test_its_words(losses: tuple[float, ...] | None, words: str) -> None:
    assert words in make_ledger(losses).verdict()


def test_a_good_run_is_not_scolded() -> None:
    verdict = make_ledger().verdict()
    assert "Stuck" not in verdict
    assert "Worse" not in verdict


def test_without_floors_it_says_nothing_of_them() -> None:
    ledger = make_ledger(floor=False)
    assert "learned at all" not in ledger.verdict()
    assert ledger.to_dict()["learned_of_learnable"] is None


def test_a_category_of_one_value_has_no_share() -> None:
    ledger = Ledger(("Constant",), (3,), [0.0], [0.0])
    ledger.update(1, [0.0], [1.0])
    assert ledger.to_dict()["categories"][0]["explained"] is None
    assert "Constant" in ledger.text()


def test_the_table_shows_every_name_and_number_as_it_is() -> None:
    out = io.StringIO()
    Console(file=out, width=160).print(make_ledger().table())
    for shown in (out.getvalue(), make_ledger().text()):
        lines = {name: line for line in shown.splitlines() for name in (*NAMES, "sum", "mean") if f"{name} " in line}
        assert lines.keys() >= {*NAMES, "sum", "mean"}
        for cell in ("10", "2.303", "2.000", "1.500", "0.500", "1.000", "50.0 %"):
            assert cell in lines["Kind"]
        assert "3.500" in lines["sum"]
        assert "Ahead of the marginal" in shown
        assert "step 123" in shown


def test_a_floor_that_is_known_nowhere_has_no_column() -> None:
    assert "floor" in make_ledger().text()
    bare = make_ledger(floor=False)
    assert "floor" not in bare.text()
    assert {len(row) for row in bare.rows()} == {len(bare.columns())} == {8}
    assert bare.rows()[0] == (NAMES[0], "10", "2.303", "2.000", "1.500", "1.000", "50.0 %", "50.0 %")


def test_before_the_first_evaluation_it_says_so(tmp_path: Path) -> None:
    ledger = make_ledger(None)
    assert "before the first evaluation" in ledger.text()
    ledger.save(tmp_path / "ledger.json")
    told = json.loads((tmp_path / "ledger.json").read_text())
    assert (told["step"], told["sum"]["model"], told["sum"]["marginal"]) == (None, None, 7.0)


def test_zero_has_no_sign() -> None:
    ledger = Ledger(("Year",), (4,), [0.3], [0.0001], [-0.0001])
    ledger.update(1, [-0.0], [1.0])
    assert "-0.000" not in ledger.text()


def test_the_text_is_aligned() -> None:
    lines = make_ledger().text().splitlines()[1:-1]
    assert len(lines) == 1 + 3 + 2
    assert len({len(line) for line in lines}) == 1


def test_the_file_is_json_without_nan(tmp_path: Path) -> None:
    make_ledger((1.0, math.nan, 0.5)).save(tmp_path / "ledger.json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    told = json.loads((tmp_path / "ledger.json").read_text(), parse_constant=refuse)
    assert told["categories"][1]["model"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.json"]


def test_unequal_lengths_are_named() -> None:
    with pytest.raises(ValueError, match=r"first_order has shape \(2,\), but there are 3 categories"):
        Ledger(NAMES, (10, 100, 7), [2.0, 4.0, 1.0], [1.5, 1.9])
    with pytest.raises(ValueError, match=r"losses has shape \(1,\)"):
        make_ledger((1.0,))


@pytest.mark.parametrize(
    ("share", "told"),
    [
        (-2081.796, "<-999 %"),
        (-9.9904, "-999.0 %"),
        (-9.991, "<-999 %"),
        (9.99, "999.0 %"),
        (1e9, ">999 %"),
        (0.317, "31.7 %"),
        (-math.inf, "-"),
    ],
)
def test_a_percentage_beyond_all_reason_says_that_alone(share: float, told: str) -> None:
    assert percent(share) == told


def test_no_share_of_a_ledger_goes_beyond_999() -> None:
    ledger = Ledger(("Wind",), (38,), [0.001], [0.001], [0.0009])
    ledger.update(1, [3.6], [0.0])
    assert ledger.to_dict()["explained"] == pytest.approx(-3599.0)  # the file holds the number
    shown = ledger.text()
    assert shown.count("<-999 %") == 4  # the row, sum, mean, and what is learned at all
    assert "-359" not in shown
