"""A checkpoint is refused where the classes it learned stand for something else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from eventkern.train import CheckpointError
from eventkern.train.lineage import digest, refuse_other_lineage

THERE: dict[str, Any] = {
    "categories": {"person": {"classes": 8, "meaning": "a1"}, "place": {"classes": 7, "meaning": "b2"}},
    "streams": {"person": "person", "time": "all"},
    "key": "person",
}


def test_a_digest_names_a_meaning() -> None:
    assert digest(["id", ["a", "b"], None]) == digest(["id", ["a", "b"], None])
    others = (["id", ["b", "a"], None], ["id", ["ab"], None], ["flag", ["a", "b"], None], ["id", ["a", "b"], [0.5]])
    assert len({digest(meaning) for meaning in (*others, ["id", ["a", "b"], None])}) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("categories", "other", {"classes": 3, "meaning": "c3"}), r"the categories differ \(other\)"),
        (("categories", "place", {"classes": 9, "meaning": "b2"}), "category 'place' has 7 classes in the checkpoint"),
        (("categories", "place", {"classes": 7, "meaning": "zz"}), "the classes of place stand for other values"),
        (("streams", "place", "place"), "streams person of person, time of all in the checkpoint and person of"),
        (("streams", "person", "place"), "time of all in the checkpoint and person of place, time of all in the store"),
        (("key", "", "place"), "key person in the checkpoint and place in the store"),
    ],
)
def test_what_differs_is_named_with_the_mend(change: tuple[str, str, Any], message: str) -> None:
    here = copy.deepcopy(THERE)
    part, name, value = change
    if name:
        here[part][name] = value
    else:
        here[part] = value
    with pytest.raises(
        CheckpointError, match=rf"old\.pt: is of another schema than new: .*{message}.*; give the store"
    ):
        refuse_other_lineage(THERE, here, Path("old.pt"), Path("new"))


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (
            (2, 5),
            (3, 5),
            "is of fold 2 of 5, and this run of fold 3 of 5; give --folds 5 --fold 2, or start a fresh run",
        ),
        ((2, 5), (2, 6), "is of fold 2 of 5, and this run of fold 2 of 6; give --folds 5 --fold 2"),
        ((2, 5), None, "is of fold 2 of 5, and this run of the store's split in time; give --folds 5 --fold 2"),
        (None, (0, 2), "is of the store's split in time, and this run of fold 0 of 2; leave out --folds and --fold"),
    ],
)
def test_another_fold_is_named(before: tuple[int, int] | None, now: tuple[int, int] | None, message: str) -> None:
    there, here = ({**THERE, "fold": {"number": fold[0], "of": fold[1]} if fold else None} for fold in (before, now))
    with pytest.raises(CheckpointError) as error:
        refuse_other_lineage(there, here, Path("old.pt"), Path("new"))
    assert str(error.value).startswith(f"old.pt: {message}")
    refuse_other_lineage(there, copy.deepcopy(there), Path("old.pt"), Path("new"))


def test_a_checkpoint_that_knows_no_folds_is_of_the_split() -> None:
    refuse_other_lineage(THERE, {**THERE, "fold": None}, Path("old.pt"), Path("new"))


def test_the_order_counts() -> None:
    refuse_other_lineage(THERE, copy.deepcopy(THERE), Path("old.pt"), Path("new"))
    for part, message in (("categories", r"differ \(their order\)"), ("streams", "streams person of person, time of")):
        here = {**THERE, part: dict(reversed(THERE[part].items()))}
        with pytest.raises(CheckpointError, match=message):
            refuse_other_lineage(THERE, here, Path("old.pt"), Path("new"))
