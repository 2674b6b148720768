"""Prepare: a table of events becomes a store, in bounded memory and in one step that happens wholly or not at all.

The first pass spills every column as numbers to files (`ingest`); classes are fitted on the training period alone
(`vocabulary`); the second pass writes the rows in time order (`encode`). Memory: at most 32 bytes an event (the sort of
the timestamps takes them), the distinct values of `id` columns, and one batch.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from eventkern.data.checksums import info_checksum
from eventkern.data.encode import write_binary
from eventkern.data.ingest import Spill, ingest
from eventkern.data.report import PrepareReport, progress_bar
from eventkern.data.schema import DataError, Schema
from eventkern.data.source import source_files
from eventkern.data.store import FORMAT, IDENTIFIER_FORM, EventStore, floor_key
from eventkern.disk import NO_SPACE, NoSpaceError, flush, no_space

Floor = Mapping[int, Sequence[float]] | Callable[[EventStore], Mapping[int, Sequence[float]]]


def prepare(
    source: str | Path,
    schema: Schema,
    out: str | Path,
    *,
    on_error: Literal["raise", "skip"] = "raise",
    progress: bool = True,
    floor: Floor | None = None,
    overwrite: bool = False,
    name: str | None = None,
    like: EventStore | None = None,
) -> PrepareReport:
    """Convert a table of events into a store.

    Rows are ordered by (timestamp, source row). Vocabularies and bin edges see the rows before the split only; the
    years of a `year` category are those of the whole table. A value is missing where it is null or an empty text; for
    numbers, flags and times also where the text is NA, NaN or null, which an `id` may really be called. Identifiers
    have one form, whatever wrote them: 310 is "310" of integers, of floats, and of the text "310.0".

    Args:
        source: a CSV file, a Parquet file, or a folder of either.
        schema: what the columns mean.
        out: folder of the store to write; absent, empty, or with `overwrite` a store.
        on_error: what to do with rows that cannot be read: "raise" stops at the first that it meets, which need not be
            the first of the file; "skip" leaves them out, counts them and lists the first.
        progress: draw a progress bar on a terminal.
        floor: known entropy of each category in nats by id_category_size, in the order of the categories; or a function
            that computes it from the finished store, before that appears at `out`.
        overwrite: replace a store that is already there.
        name: what store.json calls the source; its path unless given.
        like: take the classes of this store (values, bin edges, years) instead of fitting them, so that a model of it
            reads the new one: values that it does not know are out of vocabulary, and no row need lie before the split.
            Identifiers are written as that store has them, which may be older than the one form.

    Returns:
        What was done.

    Raises:
        DataError: a file, column, row or split that does not fit, in one line with its place and mend. Nothing is left
            then, nor after an interruption; a process that is killed leaves a hidden `.NAME.preparing-*` beside `out`,
            which the next prepare of the same `out` on that machine removes.
        OSError: a full disk, with the bytes wanted (foreseen from what was read so far) and free; nothing is left.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}; give 'raise' or 'skip'")
    if like is not None and (schema.categories, schema.timezone) != (like.schema.categories, like.schema.timezone):
        raise DataError(
            f"{like.path}: its categories or time zone are not those of schema {schema.name!r}; give a store of those"
        )
    form = IDENTIFIER_FORM if like is None else like.info.get("identifier_form", 0)
    if form not in range(IDENTIFIER_FORM + 1):
        raise DataError(
            f"{like.path if like else out}: key 'identifier_form' is {form!r}, and this eventkern writes forms up to "
            f"{IDENTIFIER_FORM}: take the eventkern that the store was prepared with"
        )
    started = time.perf_counter()
    files = source_files(source, schema.columns)
    with on_a_disk_with_room(Path(out)), _published(Path(out), overwrite) as folder, progress_bar(progress) as watch:
        spill = Spill(folder / "spill")
        try:
            ingested = ingest(files, schema, spill, on_error, partial(watch, "reading"), form)
            info, warnings = write_binary(ingested, schema, folder / "store.bin", watch, like)
        finally:
            spill.close()
        shutil.rmtree(folder / "spill")
        flush(folder / "store.bin")
        skipped = ingested.skipped.count
        info["counts"] = {"rows_read": ingested.num_events + skipped, "rows_skipped": skipped, **info["counts"]}
        info = {
            "format": FORMAT,
            "eventkern_version": metadata.version("eventkern"),
            "source": name or str(source),
            "identifier_form": form,
            **info,
        }
        _write_info(folder, info)
        if floor is not None:
            floors = floor(EventStore.open(folder)) if callable(floor) else floor
            info["floor"] = _checked_floor(floors, info)
            _write_info(folder, info)
    seconds = time.perf_counter() - started
    return PrepareReport(Path(out), info, tuple(ingested.skipped.listed), seconds, tuple(warnings))


@contextmanager
def on_a_disk_with_room(out: Path) -> Iterator[None]:
    """Tells in one line that the disk of a store was full, once what was written there is gone."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        wanted_bytes = error.wanted_bytes if isinstance(error, NoSpaceError) else None
        folder = next(place for place in out.absolute().parents if place.is_dir())
        mend = "nothing was written; make room, or give an --out on another disk"
        raise no_space(error, str(out), wanted_bytes, folder, mend) from error


@contextmanager
def _published(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well, and vanishes when it does not."""
    _sweep(out)
    is_empty = out.is_dir() and not any(out.iterdir())
    if (out.exists() or out.is_symlink()) and not is_empty:
        if not (out / "store.json").is_file():
            raise DataError(f"{out}: exists and is no event store; choose another folder, or move it away")
        if not overwrite:
            raise DataError(f"{out}: a store is already there; choose another folder, or overwrite it (--overwrite)")
    with made_parents(out):
        folder = Path(tempfile.mkdtemp(prefix=f"{_own_prefix(out)}{os.getpid()}-", dir=out.parent))
        replaced = folder / "replaced"
        try:
            made = folder / "store"
            made.mkdir()
            yield made
            flush(made)
            if out.exists():
                out.rename(replaced)
            try:
                made.rename(out)
            except BaseException:
                if replaced.exists():
                    replaced.rename(out)
                raise
            flush(out.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def made_parents(out: Path) -> Iterator[None]:
    """The folders above `out`, made where they lack; those made here vanish when the block fails, unless in use."""
    lacking = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in lacking:
            with suppress(OSError):  # another process has put something there
                folder.rmdir()
        raise


def _own_prefix(out: Path) -> str:
    """How the temporary folders of this machine are called; a number of process follows, which only it can look up."""
    return f".{out.name}.preparing-{platform.node()}-"


def _sweep(out: Path) -> None:
    """Remove what killed processes of this machine left beside `out`; a store that was about to be replaced returns."""
    prefix = _own_prefix(out)
    siblings = out.parent.iterdir() if out.parent.is_dir() else ()
    for folder in [sibling for sibling in siblings if sibling.name.startswith(prefix)]:
        process = folder.name.removeprefix(prefix).partition("-")[0]
        if not process.isdecimal() or _is_running(int(process)):
            continue
        if (folder / "replaced").exists() and not out.exists():
            (folder / "replaced").rename(out)
        shutil.rmtree(folder, ignore_errors=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":  # elsewhere os.kill ends the process that it is to ask for
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _write_info(folder: Path, info: dict[str, Any]) -> None:
    file = folder / "store.json"
    info["checksum"]["store.json"] = info_checksum(info)
    file.write_text(json.dumps(info, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    flush(file)


def _checked_floor(floors: Mapping[int, Sequence[float]], info: dict[str, Any]) -> dict[str, list[float]]:
    for size, values in floors.items():
        if len(values) != len(info["categories"]):
            raise ValueError(f"floor[{size}] holds {len(values)} values for {len(info['categories'])} categories")
    return {str(floor_key(info, size)): [float(value) for value in values] for size, values in floors.items()}
