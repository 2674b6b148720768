"""The seeded streams that the loss study trains on, under the schema `notes17`, and what is known of each."""

from __future__ import annotations

import hashlib
import math
import tempfile
from pathlib import Path

from eventkern.data import EventStore, Schema
from eventkern.data.prepare import prepare
from eventkern.data.store import FORMAT_VERSION
from eventkern.data.synthetic import WorkforceProcess, write_table
from eventkern.data.synthetic_floor import known_floor

SCHEMA = "notes17"
TOWN = WorkforceProcess(num_actors=950, num_locations=950, num_residents=6, start="2024-10-01", num_days=50, strays=0.5)
STREAMS = {
    "workforce": WorkforceProcess(),
    "many_ids": TOWN,
    "natural_sizes": TOWN,
}
"""The workforce stream, whose identifiers have 10 to 117 classes; a town of 950 employees and sites; and that town with
as many classes of each category as it has values, a month's twelve and not id_category_size."""

SCHEMAS = {"natural_sizes": "workforce"}
"""Of streams that have another one than SCHEMA."""

CALENDAR = {"year": 50, "month": 12, "day": 31, "weekday": 7, "hour": 24, "minute": 60}
"""Most values of a calendar field; of the year, more than any record of work spans."""


def stream_name(name: str) -> str:
    """Of the store of a stream: another process, schema or format has another name."""
    made_of = f"{STREAMS[name]!r} {Schema.load(SCHEMAS.get(name, SCHEMA)).to_dict()}"
    return f"{name}-format{FORMAT_VERSION}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"


def open_stream(name: str, folder: Path) -> EventStore:
    """The store of a stream, made in `folder` where it is not there yet."""
    process, schema = STREAMS[name], Schema.load(SCHEMAS.get(name, SCHEMA))
    path = folder / stream_name(name)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            table = write_table(Path(scratch) / "table.parquet", process)

            def floor(store: EventStore) -> dict[int, list[float]]:
                return {size: floors.tolist() for size, floors in known_floor(store, process).items()}

            # The floor of many identifiers would take a probability for each of them and each label at once.
            known = floor if name == "workforce" else None
            prepare(table, schema, path, name=name, floor=known, progress=False, overwrite=True)
    return EventStore.open(path)


def most_marginal(id_category_size: int) -> float:
    """Most nats that the marginal entropies of the schema's categories can add up to, whatever the data.

    A flag has two values, a calendar field those of the calendar, an identifier or a binned number all classes of its
    category but padding; each may be missing, too.
    """
    total = 0.0
    for category in Schema.load(SCHEMA).categories:
        values = {"flag": 2, "time": CALENDAR.get(category.field or "", 0)}.get(category.kind, id_category_size - 2)
        total += math.log(min(values + 1, id_category_size - 1))
    return total
