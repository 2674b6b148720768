"""The second pass: classes fitted on the training period, rows written in time order, entities indexed."""

from __future__ import annotations

from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eventkern.data.checksums import file_checksum, sizes_checksum
from eventkern.data.ingest import TIMESTAMP, Ingested, blocks
from eventkern.data.report import Watch
from eventkern.data.schema import DataError, Schema
from eventkern.data.sections import code_dtype, lay_out
from eventkern.data.source import Advance
from eventkern.data.store import FORMAT_VERSION, EventStore
from eventkern.data.vocabulary import MISSING_CLASS, Classes, fit_bins, fit_fixed, fit_id, told_classes
from eventkern.disk import wanting, write_all

OOV_SIZES = (100, 1000, 4096)
UNKNOWN_SHARE = 0.5
"""A category is warned of when more of its values are out of vocabulary."""
MOST_UNKNOWN = 5

NEVER, MOST = np.iinfo(np.int64).min, np.iinfo(np.int64).max


def write_binary(
    ingested: Ingested, schema: Schema, file: Path, watch: Watch, like: EventStore | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Write store.bin, and return what store.json tells of it, and the categories of which little is known, in words.

    The classes are those of the store `like`, else fitted.

    Raises:
        DataError: no row lies after the split, or, where classes are to be fitted, none before it.
    """
    is_training = _training_rows(ingested, schema, needs_training=like is None)
    if like is None:
        classes = _fit(ingested, schema, is_training, partial(watch, "fitting"))
    else:
        classes = [
            told_classes(category, told, ingested.values[category.name].numbers if category.kind == "id" else {})
            for category, told in zip(schema.categories, like.info["categories"], strict=True)
        ]
    split_row = int(np.count_nonzero(is_training))
    del is_training

    num_events = ingested.num_events
    entity_counts = {entity: _entity_counts(ingested, entity) for entity in schema.entities}
    arrays: list[tuple[str, str, tuple[int, ...]]] = [
        ("codes", code_dtype(tuple(c.size for c in classes)), (num_events, len(classes))),
        ("timestamps", "int64", (num_events,)),
    ]
    for entity, counts in entity_counts.items():
        arrays += [
            (f"entity_of_row:{entity}", "int32", (num_events,)),
            (f"offsets:{entity}", "int64", (len(counts) + 1,)),
            (f"rows:{entity}", "int64", (int(counts.sum()),)),
        ]
    sections, num_bytes = lay_out(arrays)
    watch("sorting", 0, 1)
    _sort(ingested)
    watch("sorting", 1, 1)
    at = {section.name: section.offset for section in sections}
    foreseen = partial(int, ingested.spill.num_bytes + num_bytes)
    with wanting(foreseen), file.open("wb", buffering=0) as binary:
        rates, unknown = _write_rows(ingested, schema, classes, binary, at, split_row, partial(watch, "encoding"))
        for entity, counts in entity_counts.items():
            _write_index(ingested, entity, counts, binary, at)
        binary.truncate(num_bytes)

    info: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "schema": schema.to_dict(),
        "num_events": num_events,
        "split": {"time": schema.split, "utc_ns": schema.split_ns},
        "split_row": split_row,
        "timestamps": "nanoseconds since 1970, UTC",
        "counts": {
            "training": split_row,
            "validation": num_events - split_row,
            "keys": len(entity_counts[schema.key]),
            "keyless_rows": num_events - int(entity_counts[schema.key].sum()),
        },
        "sections": [vars(section) | {"shape": list(section.shape)} for section in sections],
        "file_bytes": num_bytes,
        "categories": [{**fitted.to_dict(), **rate} for fitted, rate in zip(classes, rates, strict=True)],
    }
    info["checksum"] = {"sizes": sizes_checksum(info), "store.bin": file_checksum(file)}
    shares = [(rate["oov"]["full"], share) for rate, share in zip(rates, unknown, strict=True)]
    return info, _warnings(ingested, classes, shares, split_row)


def _training_rows(ingested: Ingested, schema: Schema, needs_training: bool) -> NDArray[np.bool_]:
    """Whether each source row lies before the split."""
    is_training = np.empty(ingested.num_events, bool)
    extent = []
    for block in blocks(ingested.num_events):
        times = ingested.spill.read(TIMESTAMP, block)
        is_training[block] = times < schema.split_ns
        extent += [int(times.min()), int(times.max())]
    if is_training.all() or (needs_training and not is_training.any()):
        where = "before" if is_training.all() else "at or after"
        first, last = (np.datetime64(edge, "ns").astype("datetime64[s]") for edge in (min(extent), max(extent)))
        raise DataError(
            f"schema {schema.name!r}: every event lies {where} the split {schema.split} ({schema.timezone}); the table "
            f"reaches from {first} to {last} UTC: write a split between the two"
        )
    return is_training


def _fit(ingested: Ingested, schema: Schema, is_training: NDArray[np.bool_], advance: Advance) -> list[Classes]:
    fitted = []
    for done, category in enumerate(schema.categories):
        if category.kind == "id":
            values = list(ingested.values[category.name].numbers)
            counts = np.zeros(len(values), np.int64)
            for block in blocks(ingested.num_events):
                kept = ingested.spill.read(category.name, block)[is_training[block]]
                counts += np.bincount(kept[kept >= 0], minlength=len(values))
            fitted.append(fit_id(category, values, counts))
        elif category.kind == "bins":
            values_seen = np.empty(np.count_nonzero(is_training))
            end = 0
            for block in blocks(ingested.num_events):
                part = ingested.spill.read(category.name, block)[is_training[block]]
                part = part[~np.isnan(part)]
                values_seen[end : end + len(part)] = part
                end += len(part)
            fitted.append(fit_bins(category, values_seen[:end]))
        else:
            fitted.append(fit_fixed(category, ingested.years.get(category.name)))
        advance(done + 1, len(schema.categories))
    return fitted


def _entity_counts(ingested: Ingested, entity: str) -> NDArray[np.int64]:
    """Number of events of each entity."""
    counts = np.zeros(len(ingested.values[entity].numbers), np.int64)
    for block in blocks(ingested.num_events):
        kept = ingested.spill.read(entity, block)
        counts += np.bincount(kept[kept >= 0], minlength=len(counts))
    return counts


def _sort(ingested: Ingested) -> None:
    """Bring the spilled columns into the order of (timestamp, source row)."""
    times = ingested.spill.read(TIMESTAMP, slice(0, ingested.num_events))
    if (times[1:] >= times[:-1]).all():
        return
    order = np.argsort(times, kind="stable")
    del times
    for name in ingested.spill.names:
        ingested.spill.reorder(name, order)


def _write_at(binary: FileIO, offset: int, values: NDArray[Any]) -> None:
    binary.seek(offset)
    write_all(binary, values)


def _write_rows(
    ingested: Ingested,
    schema: Schema,
    classes: list[Classes],
    binary: FileIO,
    at: dict[str, int],
    split_row: int,
    advance: Advance,
) -> tuple[list[dict[str, Any]], list[float]]:
    """Write what each row has a value for, block by block.

    Returns:
        How often each category misses or knows no value, and of how many of the table's values it knows none.
    """
    spill, dtype = ingested.spill, np.dtype(code_dtype(tuple(fitted.size for fitted in classes)))
    last_seen = np.full(len(ingested.values[schema.key].numbers), NEVER)
    missing = np.zeros(len(classes), np.int64)
    missing_validation = np.zeros(len(classes), np.int64)
    without_class = np.zeros(len(classes), np.int64)
    histograms = [np.zeros(fitted.size, np.int64) for fitted in classes]

    for block in blocks(ingested.num_events):
        raw = {name: spill.read(name, block) for name in spill.names}
        for entity in schema.entities:
            _write_at(binary, at[f"entity_of_row:{entity}"] + block.start * 4, raw[entity])
        _write_at(binary, at["timestamps"] + block.start * 8, raw[TIMESTAMP])
        elapsed = _since_previous(raw[schema.key], raw[TIMESTAMP], last_seen)
        codes = np.empty((block.stop - block.start, len(classes)), dtype)
        validation = slice(max(split_row - block.start, 0), None)
        for number, fitted in enumerate(classes):
            values = raw.get(fitted.category.name, elapsed)
            codes[:, number] = fitted.encode(values)
            absent = np.isnan(values) if fitted.edges is not None else values < 0
            missing[number] += np.count_nonzero(absent)
            without_class[number] += np.count_nonzero(codes[:, number] == MISSING_CLASS)
            missing_validation[number] += np.count_nonzero(absent[validation])
            histograms[number] += np.bincount(codes[validation, number], minlength=fitted.size)
        _write_at(binary, at["codes"] + block.start * codes[:1].nbytes, codes)
        advance(block.stop, ingested.num_events)

    rates = []
    for number, fitted in enumerate(classes):
        histogram, is_cut = histograms[number], fitted.category.kind == "id" or schema.uniform_sizes
        present = max(int(histogram.sum() - missing_validation[number]), 1)
        unknown = histogram[MISSING_CLASS] - missing_validation[number]
        oov = {str(size): float(unknown + histogram[size:].sum() * is_cut) / present for size in OOV_SIZES}
        oov["full"] = float(unknown) / present
        rates.append({"missing": float(missing[number]) / ingested.num_events, "oov": oov})
    unknown_shares = (without_class - missing) / np.maximum(ingested.num_events - missing, 1)
    return rates, unknown_shares.tolist()


def _warnings(
    ingested: Ingested, classes: list[Classes], shares: list[tuple[float, float]], split_row: int
) -> list[str]:
    """A line for each category that knows less than half of the values after the split, or of the table."""
    lines = []
    for fitted, (after_split, of_all) in zip(classes, shares, strict=True):
        if max(after_split, of_all) <= UNKNOWN_SHARE:
            continue
        name, is_after = fitted.category.name, after_split > UNKNOWN_SHARE
        counts = np.zeros(1, np.int64)
        for block in blocks(ingested.num_events):
            raw = ingested.spill.read(name, block)[max(split_row - block.start, 0) if is_after else 0 :]
            seen = np.bincount(raw[(fitted.encode(raw) == MISSING_CLASS) & (raw >= 0)], minlength=len(counts))
            seen[: len(counts)] += counts
            counts = seen
        values = list(ingested.values[name].numbers) if name in ingested.values else range(len(counts))
        commonest = np.argsort(-counts, kind="stable")[: min(MOST_UNKNOWN, np.count_nonzero(counts))]
        told = ", ".join(f"{str(values[number])[:60]!r} ({counts[number]:,})" for number in commonest)
        known = ", ".join(repr(value[:60]) for value in fitted.values[:MOST_UNKNOWN]) or "none"
        lines.append(
            f"{name}: {100 * (after_split if is_after else of_all):.1f} % of its values "
            f"{'after the split' if is_after else 'in the table'} are out of vocabulary; the commonest of them are "
            f"{told}; it knows {known}{', ...' * (len(fitted.values) > MOST_UNKNOWN)}"
        )
    return lines


def _write_index(
    ingested: Ingested, entity: str, counts: NDArray[np.int64], binary: FileIO, at: dict[str, int]
) -> None:
    """Write which rows each entity has."""
    numbers = ingested.spill.read(entity, slice(0, ingested.num_events))
    rows = np.argsort(numbers, kind="stable")
    _write_at(binary, at[f"offsets:{entity}"], np.append(0, np.cumsum(counts)))
    _write_at(binary, at[f"rows:{entity}"], rows[len(rows) - int(counts.sum()) :])  # -1, no entity, comes first


def _since_previous(
    keys: NDArray[np.int32], timestamps: NDArray[np.int64], last_seen: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Nanoseconds since the previous event of each row's key, -1 where there is none; `last_seen` moves on.

    More than int64 holds (292 years) reads as the most that it holds.
    """
    rows = np.argsort(keys, kind="stable")
    rows = rows[np.count_nonzero(keys < 0) :]
    entities, times = keys[rows], timestamps[rows]
    is_first = np.diff(entities, prepend=np.int32(-1)) != 0
    previous = np.where(is_first, last_seen[entities], np.roll(times, 1))
    since = np.full(len(keys), -1, np.int64)
    seen_before = previous != NEVER
    passed = times[seen_before] - previous[seen_before]
    since[rows[seen_before]] = np.where(passed < 0, MOST, passed)  # rows are in time order, so what is negative wrapped
    last_seen[entities] = times  # of equal indices the last assignment, the latest, stays
    return since
