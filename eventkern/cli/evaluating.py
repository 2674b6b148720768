"""`eventkern evaluate`: what a checkpoint is worth on a store, as tables, JSON and a picture. torch loads inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eventkern.cli.arguments import Evaluate, RunConfig
from eventkern.cli.commands import build_ledger, open_run, quantize

if TYPE_CHECKING:
    from torch import Tensor

    from eventkern.data import EventStore
    from eventkern.train import Ledger, Scorecard


def evaluate(command: Evaluate) -> None:
    """`eventkern evaluate`."""
    from eventkern.train.failures import explained

    with explained(f"at --batch-size {command.batch_size}: lower it"):
        evaluate_checkpoint(command)


def evaluate_checkpoint(command: Evaluate) -> None:
    """Prints the ledger and the scorecard of a checkpoint, and writes both where a folder is given."""
    from torch.nn.utils import parametrize

    from eventkern.data.loader import EventLoader
    from eventkern.nn.quantization import weight_bytes
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
    measure = partial(score, run.model, loader, top_k=command.top_k, precision=run.precision, device=run.device)
    sums = measure()
    quantization = None
    if command.quantize == "int8":
        plain = {"bytes_before": weight_bytes(run.model), "loss_sum_before": loss_sum(sums)}
        quantize(run.model, command.quantize, run.path)
        with parametrize.cached():
            sums = measure()
        quantization = {"weights": "int8", **plain, "bytes": weight_bytes(run.model), "loss_sum": loss_sum(sums)}
    scorecard = Scorecard(run.model.head_names, run.model.config.category_sizes, command.top_k, sums)
    ledger = build_ledger(run.store, run.config.id_category_size, run.fold, counted_on)
    ledger.update(run.step, scorecard.loss, scorecard.top1)
    print_shown(ledger)
    print()
    print_shown(scorecard)
    if quantization is not None:
        print(f"\n{cost(quantization)}")
    if command.out is not None:
        told: dict[str, Any] = {"checkpoint": str(run.path), "store": str(run.store.path), "precision": run.precision}
        told |= {"quantization": quantization}
        write_evaluation(command.out, told, ledger, scorecard)


def loss_sum(sums: Mapping[str, Tensor]) -> float:
    """The loss summed over the categories, in nats."""
    return float((sums["loss"] / sums["num_targets"]).sum())


def cost(quantization: Mapping[str, Any]) -> str:
    """What quantised weights save and cost, in a line."""
    size, before = quantization["bytes"], quantization["bytes_before"]
    loss, loss_before = quantization["loss_sum"], quantization["loss_sum_before"]
    return (
        f"{quantization['weights']} weights: {size / 1e6:.2f} MB of {before / 1e6:.2f}, loss {loss:.4f} against "
        f"{loss_before:.4f} nats, {loss - loss_before:+.4f}"
    )


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


def write_evaluation(out: Path, told: Mapping[str, Any], ledger: Ledger, scorecard: Scorecard) -> None:
    """Writes evaluation.json and evaluation.png into a folder, and says so."""
    from eventkern.train.reliability import plot_evaluation
    from eventkern.train.tables import for_json
    from eventkern.train.whole_files import write_file

    out.mkdir(parents=True, exist_ok=True)
    if told["quantization"] is not None:
        losses = {name: for_json(told["quantization"][name]) for name in ("loss_sum_before", "loss_sum")}
        told = {**told, "quantization": {**told["quantization"], **losses}}
    told = {**told, "ledger": ledger.to_dict(), "scorecard": scorecard.to_dict()}
    write_file(out / "evaluation.json", json.dumps(told, indent=2, allow_nan=False) + "\n")
    is_drawn = plot_evaluation(out / "evaluation.png", ledger, scorecard)
    picture = (
        " and evaluation.png" if is_drawn else "; no picture, for want of matplotlib: pip install 'eventkern[train]'"
    )
    print(f"\nwrote {out / 'evaluation.json'}{picture}")
