"""What the classes of a checkpoint mean, and whether a store means the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eventkern.train.checkpoint import CheckpointError

MEND = "give the store it was trained on (--store / --data.store)"

LIKE = ", or one prepared with its classes (prepare --like)"


def digest(meaning: Any) -> str:
    """A short name for plain values: equal for equal ones, and on every machine."""
    text = json.dumps(meaning, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def refuse_other_lineage(there: Mapping[str, Any], here: Mapping[str, Any], checkpoint: Path, store: Path) -> None:
    """Raises a CheckpointError that names what differs, unless a checkpoint's data mean what a run's do.

    Args:
        there: the checkpoint's lineage: `categories` (name: {classes, meaning}, in order), `streams` (name: entity, in
            order), `key` and `fold` ({number, of}, or None or absent where the store's split decides).
        here: that of the run, of a store.
        checkpoint: named in the message.
        store: named in the message.
    """
    other = f"{checkpoint}: is of another schema than {store}:"
    old, new = there["categories"], here["categories"]
    if list(old) != list(new):
        differing = sorted(set(old) ^ set(new)) or ["their order"]
        raise CheckpointError(f"{other} the categories differ ({', '.join(differing)}); {MEND}")
    for name in new:
        if old[name]["classes"] != new[name]["classes"]:
            raise CheckpointError(
                f"{other} category {name!r} has {old[name]['classes']} classes in the checkpoint and "
                f"{new[name]['classes']} in the store; {MEND}{LIKE}, and its id_category_size"
            )
    renamed = [name for name in new if old[name]["meaning"] != new[name]["meaning"]]
    if renamed:
        raise CheckpointError(f"{other} the classes of {', '.join(renamed)} stand for other values; {MEND}{LIKE}")
    for part in ("streams", "key"):
        before, now = _shown(there[part]), _shown(here[part])
        if before != now:
            raise CheckpointError(f"{other} {part} {before} in the checkpoint and {now} in the store; {MEND}")
    old_fold, new_fold = there.get("fold"), here.get("fold")
    if old_fold != new_fold:
        mend = (
            f"give --folds {old_fold['of']} --fold {old_fold['number']}" if old_fold else "leave out --folds and --fold"
        )
        folds = f"is of {_shown_fold(old_fold)}, and this run of {_shown_fold(new_fold)}"
        raise CheckpointError(f"{checkpoint}: {folds}; {mend}, or start a fresh run")


def _shown_fold(fold: Mapping[str, int] | None) -> str:
    return f"fold {fold['number']} of {fold['of']}" if fold else "the store's split in time"


def _shown(part: Any) -> str:
    """A key; or streams in their order."""
    return part if isinstance(part, str) else ", ".join(f"{name} of {entity}" for name, entity in part.items())
