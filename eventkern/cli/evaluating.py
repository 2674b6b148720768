"""`eventkern evaluate`: what a checkpoint is worth on a store, as tables, JSON and a picture. torch loads inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eventkern.cli.arguments import Evaluate, RunConfig
from eventkern.cli.commands import build_ledger, open_run

if TYPE_CHECKING:
    from eventkern.data import EventStore
    from eventkern.train import Ledger, Scorecard


def evaluate(command: Evaluate) -> None:
    """`eventkern evaluate`."""
    from eventkern.train.failures import explained

    with explained(f"at --batch-size {command.batch_size}: lower it"):
        evaluate_checkpoint(command)


def evaluate_checkpoint(command: Evaluate) -> None:
    """Prints the ledger and the scorecard of a checkpoint, and writes both where a folder is given."""
    from eventkern.data.loader import EventLoader
    from eventkern.train import Scorecard, score
    from eventkern.train.logging import print_shown
    from eventkern.train.run_folder import require_folder

    if command.out is not None:
        require_folder(command.out, "--out")
    run = open_run(command.checkpoint, command.store, command.device)
    counted_on = None if run.store.split_row else training_store(run.config, run.store)
    keys = ("src_seq_len", "tgt_seq_len", "id_category_size")
    options: dict[str, Any] = {key: getattr(run.config, key) for key in keys}
    options |= {"batch_size": command.batch_size, "device": run.device, "fold": run.fold}
    loader = EventLoader(run.store, "validation", by_length=True, **options)
    sums = score(run.model, loader, top_k=command.top_k, precision=run.precision, device=run.device)
    scorecard = Scorecard(run.model.head_names, run.model.config.category_sizes, command.top_k, sums)
    ledger = build_ledger(run.store, run.config.id_category_size, run.fold, counted_on)
    ledger.update(run.step, scorecard.loss, scorecard.top1)
    print_shown(ledger)
    print()
    print_shown(scorecard)
    if command.out is not None:
        told = {"checkpoint": str(run.path), "store": str(run.store.path), "precision": run.precision}
        write_evaluation(command.out, told, ledger, scorecard)


def training_store(config: RunConfig, store: EventStore) -> EventStore:
    """The store that a run was trained on: what its baselines are counted on, where `store` has no training period."""
    from eventkern.data import DataError
    from eventkern.data.shipped import open_store

    try:
        return open_store(config.data.store)
    except DataError as error:
        raise DataError(
            f"{store.path}: has no event before its split, so baselines are counted on the run's own store, and {error}"
        ) from error


def write_evaluation(out: Path, told: dict[str, Any], ledger: Ledger, scorecard: Scorecard) -> None:
    """Writes evaluation.json and evaluation.png into a folder, and says so."""
    from eventkern.train.reliability import plot_evaluation
    from eventkern.train.whole_files import write_file

    out.mkdir(parents=True, exist_ok=True)
    told = {**told, "ledger": ledger.to_dict(), "scorecard": scorecard.to_dict()}
    write_file(out / "evaluation.json", json.dumps(told, indent=2, allow_nan=False) + "\n")
    is_drawn = plot_evaluation(out / "evaluation.png", ledger, scorecard)
    picture = (
        " and evaluation.png" if is_drawn else "; no picture, for want of matplotlib: pip install 'eventkern[train]'"
    )
    print(f"\nwrote {out / 'evaluation.json'}{picture}")
