"""`eventkern generate`: from a checkpoint and keys of a store to a table of their next events. torch loads inside."""

from __future__ import annotations

import difflib
import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eventkern.cli.arguments import Generate
from eventkern.cli.commands import OpenedRun, open_run, quantize, require_parent
from eventkern.train.config import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from eventkern.data import EventStore

PRINTED_ROWS = 60
"""Most rows that a terminal is shown."""


def generate(command: Generate) -> None:
    """`eventkern generate`."""
    from eventkern.train.failures import explained

    with explained(f"at --batch-size {command.batch_size}: lower it"):
        generate_from_checkpoint(command)


def generate_from_checkpoint(command: Generate) -> None:
    """Prints or writes the next events of the keys."""
    if command.out is not None:
        require_parent(command.out)
    run = open_run(command.checkpoint, command.store, command.device)
    quantize(run.model, command.quantize, run.path)
    anchors, names = choose_keys(run.store, command.key)
    codes = generate_events(
        run,
        anchors,
        command.events,
        seeds=[seed_of(command.seed, name) for name in names],
        batch_size=command.batch_size,
        temperature=command.temperature,
        top_k=command.top_k,
        allow_missing=command.missing,
    )
    table = table_of(run.store, anchors, names, codes)
    if command.out is None:
        print_table(table)
    else:
        write_table(command.out, table)
        print(f"wrote {table.num_rows:,} events to {command.out}")


def generate_events(
    run: OpenedRun, anchors: NDArray[np.int64], num_events: int, *, seeds: list[int], batch_size: int, **options: Any
) -> NDArray[np.int32]:
    """(keys, num_events, C) classes of the next events after each anchor, a position in the key's index.

    Args:
        run: the model, and the store that the anchors are of.
        anchors: the newest known event of each key.
        num_events: of each key.
        seeds: one a key.
        batch_size: keys that are generated together.
        **options: of eventkern.models.generate.
    """
    import numpy as np
    from torch.nn.utils import parametrize

    from eventkern.data import History
    from eventkern.models import generate
    from eventkern.train.device import autocast, float32_products

    lengths = {"src_seq_len": run.config.src_seq_len, "id_category_size": run.config.id_category_size}
    given = [run.store.schema.category_names.index(run.store.schema.key)]
    made = []
    with float32_products(run.precision), autocast(run.precision, run.device), parametrize.cached():
        for start in progress(range(0, len(anchors), batch_size)):
            batch = slice(start, start + batch_size)
            history = History(run.store, anchors[batch], **lengths)
            events = generate(run.model, history, num_events, seeds=seeds[batch], given=given, **options)
            made.append(events.cpu().numpy())
    return np.concatenate(made)


def progress(steps: range) -> Iterable[int]:
    """The steps; on a terminal with a bar, where there is more than one."""
    if len(steps) < 2 or not sys.stderr.isatty():
        return steps
    from rich.console import Console
    from rich.progress import track

    return track(steps, "generating", console=Console(stderr=True), transient=True)


def seed_of(seed: int, key: str) -> int:
    """A key's own seed, so that its events are the same in any company."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest(), "little")


def table_of(store: EventStore, anchors: NDArray[np.int64], names: list[str], codes: NDArray[np.int32]) -> pa.Table:
    """The generated events of each key in turn: its value, the number of the event from 1, its time, its categories."""
    import numpy as np
    import pyarrow as pa

    from eventkern.data.decode import decode_events, decode_times

    num_keys, num_events, num_categories = codes.shape
    events = decode_events(store, codes.reshape(-1, num_categories))
    newest = store.timestamps[store.index(store.schema.key).rows[anchors]]
    leading = {
        "key": pa.array(names, pa.string()).take(pa.array(np.repeat(np.arange(num_keys), num_events))),
        "step": pa.array(np.tile(np.arange(1, num_events + 1, dtype=np.int32), num_keys)),
        "timestamp": decode_times(store, newest, events),
    }
    taken = set(events.column_names)
    columns = {f"generated_{name}" if name in taken else name: column for name, column in leading.items()}
    return pa.table({**columns, **dict(zip(events.column_names, events.columns, strict=True))})


def write_table(path: Path, table: pa.Table) -> None:
    """Writes CSV or Parquet, as the suffix says, whole or not at all."""
    import pyarrow.csv
    import pyarrow.parquet

    from eventkern.train.whole_files import write_whole

    write = pyarrow.csv.write_csv if path.suffix == ".csv" else pyarrow.parquet.write_table
    write_whole({path: lambda file: write(table, file)})


def print_table(table: pa.Table) -> None:
    """Prints the first rows, each column as wide as its values."""
    shown = table.slice(0, PRINTED_ROWS)
    cells = [
        [name, *("" if value is None else str(value) for value in shown[name].to_pylist())]
        for name in shown.column_names
    ]
    widths = [max(map(len, column)) for column in cells]
    for line in zip(*cells, strict=True):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if table.num_rows > PRINTED_ROWS:
        print(f"and {table.num_rows - PRINTED_ROWS:,} more; give --out FILE.csv or FILE.parquet for all")


def choose_keys(store: EventStore, wanted: tuple[str, ...]) -> tuple[NDArray[np.int64], list[str]]:
    """Positions in the key's index of the last events of the wanted keys, and the keys; by default of all that have a
    value in the store.

    Raises:
        ConfigError: a key that the store does not know (names it and the nearest that it does), or no key at all.
    """
    from eventkern.data.history import key_values, newest_events

    newest = newest_events(store)
    of_key = {value: number for number, value in enumerate(key_values(store, newest)) if value is not None}
    for key in wanted:
        if key not in of_key:
            closest = difflib.get_close_matches(key, of_key, n=1, cutoff=0.0)
            nearest = f"; the nearest is {closest[0]!r}" if closest else ""
            raise ConfigError(f"--key {key}: {store.path} has no {store.schema.key} {key!r}{nearest}")
    if not of_key:
        raise ConfigError(f"{store.path} has no {store.schema.key} that the store of the training knew")
    names = list(wanted or of_key)
    return newest[[of_key[name] for name in names]], names
