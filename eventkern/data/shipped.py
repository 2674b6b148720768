"""The tables that eventkern makes itself, and stores of them in a cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from eventkern.data.report import PrepareReport
from eventkern.data.schema import DataError, Schema, did_you_mean
from eventkern.data.store import FORMAT_VERSION, EventStore

TABLES = {"flights": "flights", "synthetic": "workforce"}
"""Name of each table, and of its schema."""


def open_store(name: str | Path) -> EventStore:
    """Open a store by its folder; or `flights` or `synthetic`, prepared first where the cache lacks it.

    Raises:
        DataError: no store there, or a damaged one.
    """
    if name not in TABLES:
        meant = did_you_mean(str(name), TABLES)
        if meant and not Path(name).exists():
            raise DataError(f"{name}: no such folder of a store{meant}")
        return EventStore.open(name)
    schema = Schema.load(TABLES[str(name)])
    made_of = json.dumps(schema.to_dict(), sort_keys=True)
    if name == "synthetic":
        from eventkern.data.synthetic import WorkforceProcess

        made_of += repr(WorkforceProcess())
    digest = hashlib.sha256(made_of.encode()).hexdigest()[:12]
    path = cache_folder() / f"{name}-format{FORMAT_VERSION}-{digest}"
    if not path.exists():
        print(f"preparing {name} in {path}, once", flush=True)
        prepare_source(str(name), schema, path, overwrite=True)  # another process may have been faster
    return EventStore.open(path)


def cache_folder() -> Path:
    """$EVENTKERN_CACHE, else eventkern in $XDG_CACHE_HOME, else ~/.cache/eventkern."""
    if folder := os.environ.get("EVENTKERN_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eventkern"


def prepare_source(
    source: str, schema: Schema | str | None, out: Path, *, like: EventStore | None = None, **options: Any
) -> PrepareReport:
    """Prepare a file, a folder, or a table that eventkern makes itself, which has a schema of its own.

    Args:
        source: what `prepare` reads, or `flights` or `synthetic`.
        schema: a schema, the path of one, or the name of one that ships; None: that of `like`, else the table's own.
        out: folder of the store.
        like: of `prepare`.
        options: of `prepare`.

    Raises:
        DataError: as `prepare`; or a source without a schema.
    """
    from eventkern.data.prepare import made_parents, on_a_disk_with_room, prepare

    options["like"] = like
    if schema is None and like is not None:
        schema = like.schema
    meant = did_you_mean(source, TABLES)
    if source not in TABLES and meant and not Path(source).exists():
        raise DataError(f"{source}: no such file or folder{meant}")
    if schema is None and source not in TABLES:
        raise DataError(f"{source}: has no schema of its own; give one: --schema FILE, or the name of one that ships")
    if not isinstance(schema, Schema):
        schema = Schema.load(TABLES[source] if schema is None else schema)
    if source not in TABLES:
        return prepare(source, schema, out, **options)
    options = {"name": source, **options}
    with made_parents(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{source}-") as folder:
        table = Path(folder) / f"{source}.parquet"
        if source == "flights":
            from eventkern.data import flights

            with on_a_disk_with_room(out):
                flights.write_table(table)
            return prepare(table, schema, out, **options)
        from eventkern.data import synthetic, synthetic_floor

        def floor(store: EventStore) -> dict[int, list[float]]:
            return {size: floors.tolist() for size, floors in synthetic_floor.known_floor(store).items()}

        with on_a_disk_with_room(out):
            synthetic.write_table(table)
        return prepare(table, schema, out, floor=floor, **options)
