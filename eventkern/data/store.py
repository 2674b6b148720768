"""Events as fixed-width integer rows in one memory-mapped file, with an index of rows per entity.

A store is a folder of two files. `store.bin` holds page-aligned sections, listed in `store.json`:

    codes                 (N, C) uint8 | uint16 | int32   full class of every category, rows in time order
    timestamps            (N,) int64                      nanoseconds since 1970, UTC
    entity_of_row:<E>     (N,) int32                      number of the row's entity of category E, -1 where missing
    offsets:<E>           (entities + 1,) int64           entity e owns rows[offsets[e] : offsets[e + 1]]
    rows:<E>              (rows with an entity,) int64    rows grouped by entity, in time order within each

for each category E that is the key or owns a stream. An entity is an actual value, also one without a class of its own.
"""

from __future__ import annotations

import ctypes
import functools
import json
import weakref
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from eventkern import _C
from eventkern.data.checksums import file_checksum, info_checksum, sizes_checksum
from eventkern.data.entity_index import EntityIndex, index_fault
from eventkern.data.folds import Fold, folds_of_keys
from eventkern.data.schema import DataError, Schema
from eventkern.data.sections import Section
from eventkern.data.store_layout import classes_fault, layout_fault

FORMAT = "eventkern event store"
FORMAT_VERSION = 1
IDENTIFIER_FORM = 1
"""How the values of `id` categories are written: 1 as `columns.canonical` has them; 0, where store.json tells no form,
as each source has them. A store that is made like another has its form, else it would not know its values."""

BLOCK_ROWS = 1 << 14
CHECKED_AT_OPEN_BYTES = 1 << 28
"""A store.bin up to this size (256 MiB, a quarter of a second) is read whole when it opens; `verify=True` reads any."""

Split = Literal["train", "validation"]
PADDING, MISSING = "(padding)", "(missing)"
AGAIN = "prepare the store again"


class EventStore:
    """A prepared table of events; open it with `EventStore.open`.

    Attributes:
        path: the store's folder.
        schema: the schema that it was prepared with.
        info: the parsed store.json.
        num_events: N.
        codes: (N, C) memory map; class 0 padding, 1 missing or out-of-vocabulary, real classes from 2.
        timestamps: (N,) int64 memory map, nanoseconds since 1970 in UTC, never decreasing.
        class_sizes: classes of each category, 0 and 1 included, before any `id_category_size`.
        split_row: rows before it are the training period.
    """

    def __init__(self, path: Path, info: dict[str, Any]) -> None:
        self.path = path
        self.info = info
        self.schema = Schema.from_dict(info["schema"])
        if fault := layout_fault(info, self.schema):
            raise ValueError(fault)
        self.num_events: int = info["num_events"]
        self.split_row: int = info["split_row"]
        self.class_sizes = tuple(int(category["size"]) for category in info["categories"])
        self.sections = {
            section["name"]: Section(section["name"], section["dtype"], tuple(section["shape"]), section["offset"])
            for section in info["sections"]
        }
        self._opened: tuple[int, int, tuple[int, int]]
        self._file: NDArray[np.uint8]
        self._arrays: dict[str, NDArray[Any]] = {}
        self._indexes: dict[str, EntityIndex] = {}
        self._folds: dict[int, NDArray[np.int64]] = {}
        self._on_device: weakref.WeakValueDictionary[tuple[str, torch.device], torch.Tensor]
        self._on_device = weakref.WeakValueDictionary()

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> EventStore:
        """Open a store by mapping it.

        A store.bin of up to 256 MiB is read whole and its checksum compared, so that a change of any byte is seen. Of a
        larger one the length, what store.json says of it, and the codes of its first 256 MiB are checked, and each
        index when it is first asked for; give `verify=True` to have all of it read.

        Args:
            path: the folder that prepare wrote.
            verify: read the whole of store.bin, whatever its size, compare its checksum and check every code.

        Raises:
            DataError: no store there, another format version, damaged or truncated files, or a code at or above its
                category's size; one line that names the file and the mend.
        """
        folder = Path(path)
        try:
            store = cls(folder, _read_info(folder))
            store._check(verify)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            if isinstance(error, DataError) and str(error).startswith(str(folder)):  # a schema's error names no file
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(f"{folder / 'store.json'}: damaged ({reason}); {AGAIN}") from error
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        return EventStore.open, (self.path,)  # a copy in another process maps the file; it does not carry the rows

    @property
    def codes(self) -> NDArray[Any]:
        return self._map("codes")

    @property
    def timestamps(self) -> NDArray[np.int64]:
        return self._map("timestamps")

    def index(self, entity: str) -> EntityIndex:
        """The rows of each entity of a category that is the key or owns a stream.

        Raises:
            DataError: the index is damaged. It is read whole when it is first asked for, since the gathers trust it.
        """
        if entity not in self.schema.entities:
            known = ", ".join(self.schema.entities)
            raise ValueError(f"entity is {entity!r}, which owns no sequence in {self.path}; use one of: {known}")
        if entity not in self._indexes:
            parts = (self._map(f"{part}:{entity}") for part in ("entity_of_row", "offsets", "rows"))
            index = EntityIndex(*parts)
            if fault := index_fault(index, self.num_events):
                part, what = fault
                raise DataError(f"{self.path / 'store.bin'}: section '{part}:{entity}' {what}: damaged; {AGAIN}")
            self._indexes[entity] = index
        return self._indexes[entity]

    def folds(self, num_folds: int) -> NDArray[np.int64]:
        """(keys,) the fold of each key, in [0, num_folds); `Fold` tells how it is chosen. Computed once."""
        if num_folds not in self._folds:
            self._folds[num_folds] = folds_of_keys(self, num_folds)
        return self._folds[num_folds]

    def on_device(self, name: str, device: torch.device | str) -> torch.Tensor:
        """The bytes of a section, copied to a device once and shared by all who ask for it while any of them holds it.

        Args:
            name: of the section: "codes", "timestamps", or "entity_of_row:<E>", "offsets:<E>", "rows:<E>".
            device: where to.

        Returns:
            (bytes of the section,) uint8, as they lie in the file; nobody may write to it.

        Raises:
            ValueError: no section of that name.
            DataError: the index that the section belongs to is damaged.
        """
        if name not in self.sections:
            raise ValueError(
                f"name is {name!r}, which is no section of {self.path}; use one of: {', '.join(self.sections)}"
            )
        entity = name.partition(":")[2]
        array = getattr(self.index(entity), name.partition(":")[0]) if entity else self._map(name)
        device = torch.empty(
            0, dtype=torch.uint8, device=device
        ).device  # "cuda" and the device that it stands for share a copy
        held = self._on_device.get((name, device))
        if held is None:
            held = torch.empty(array.nbytes, dtype=torch.uint8, device=device)
            if array.nbytes:  # by address, because torch warns of memory that it may not write to
                mapped = (ctypes.c_uint8 * array.nbytes).from_address(array.ctypes.data)
                held.copy_(torch.frombuffer(mapped, dtype=torch.uint8))
            self._on_device[name, device] = held
        return held

    def check_unchanged(self) -> None:
        """Compare the length, time of change and identity of store.bin with those it had when this store was opened.

        It costs a few microseconds, so loaders ask before each epoch. A file replaced by another keeps its pages while
        this store maps them; one that is written to in place changes under the reader, and one cut short ends the
        process that reads past its end (SIGBUS).

        Raises:
            DataError: they differ, or the file is gone.
        """
        binary = self.path / "store.bin"
        if not binary.is_file():
            raise DataError(f"{binary}: is gone since it was opened; {AGAIN}")
        for what, held, opened in zip(
            ("bytes", "time of change", "file"), _identity(binary), self._opened, strict=True
        ):
            if held != opened:
                raise DataError(
                    f"{binary}: changed since it was opened ({what}: {opened} then, {held} now); open it again"
                )

    def sizes(self, id_category_size: int) -> tuple[int, ...]:
        """Classes of each category under a limit; a code at or above its category's size reads 1.

        Args:
            id_category_size: most classes of an `id` category, 0 and 1 included; with `uniform_sizes` of every category
                exactly. At least 2.
        """
        if id_category_size < 2:
            raise ValueError(f"id_category_size is {id_category_size}; it counts classes 0 and 1, so give at least 2")
        if self.schema.uniform_sizes:
            return (id_category_size,) * len(self.class_sizes)
        return tuple(
            min(size, id_category_size) if category.kind == "id" else size
            for category, size in zip(self.schema.categories, self.class_sizes, strict=True)
        )

    def rows(self, indices: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Gather rows of full classes.

        Args:
            indices: int64 of any shape, each in [0, num_events).
            out: int32 or int64 of shape (*indices.shape, C), to write into; a new int32 tensor unless given.

        Returns:
            (*indices.shape, C) int32, or `out`.

        Raises:
            IndexError: an index outside the store; names it.
        """
        if indices.dtype != torch.int64:
            raise TypeError(f"indices are {indices.dtype}; give torch.int64")
        if not indices.is_cpu:
            raise ValueError(f"indices are on {indices.device}; give them on the CPU, where the store is mapped")
        indices = indices.contiguous()
        shape = (*indices.shape, len(self.class_sizes))
        if out is None:
            out = torch.empty(shape, dtype=torch.int32, device="cpu")
        elif out.shape != shape or out.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"out is {tuple(out.shape)} {out.dtype}; give {shape} of torch.int32 or torch.int64")
        elif not out.is_cpu or not out.is_contiguous():
            raise ValueError(f"out is on {out.device} with strides {out.stride()}; give a contiguous CPU tensor")
        outside = self._row_gather.cpu(
            indices.data_ptr(), indices.numel(), out.data_ptr(), out.itemsize, torch.get_num_threads()
        )
        if outside >= 0:
            index = indices.view(-1)[outside]
            raise IndexError(f"indices hold {index}, but {self.path} has {self.num_events} events")
        return out

    @functools.cached_property
    def _row_gather(self) -> _C.RowGather:
        return _C.RowGather(
            codes=self.codes.ctypes.data,
            code_bytes=self.codes.itemsize,
            num_categories=len(self.class_sizes),
            num_rows=self.num_events,
        )

    def anchors(self, split: Split, tgt_seq_len: int, fold: Fold | None = None) -> NDArray[np.int64]:
        """Where windows begin: positions p into index(key).rows, ascending; the anchor event is rows[p].

        "train": every event whose successor of the same key lies in the training period. "validation": for each key its
        last training event (its first event where it has none), then every `tgt_seq_len` positions while the anchor has
        a successor, so that every validation event with a predecessor is a label exactly once. With a `fold`, keys are
        split instead of time: "train" has every event with a successor of the keys that are not the fold's,
        "validation" the first event of each of the fold's keys, and so on.
        """
        if tgt_seq_len < 1:
            raise ValueError(f"tgt_seq_len is {tgt_seq_len}; give at least 1")
        starts, ends = self.index(self.schema.key).offsets[:-1], self.limits(split, fold)
        if split == "validation":
            starts = np.maximum(starts, self.limits("train", fold) - 1)
        step = 1 if split == "train" else tgt_seq_len
        # A key with n labels from its first anchor on has ceil(n / step) anchors.
        counts = -(-np.maximum(ends - starts - 1, 0) // step)
        first = np.repeat(starts, counts)
        number = np.arange(counts.sum(), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.asarray(first + number * step)

    def limits(self, split: Split, fold: Fold | None = None) -> NDArray[np.int64]:
        """(keys,) int64: the position in index(key).rows where each key's events of a split end (exclusive).

        A key of which a split has nothing ends where it begins.
        """
        index = self.index(self.schema.key)
        if split not in ("train", "validation"):
            raise ValueError(f"split is {split!r}; give 'train' or 'validation'")
        if fold is not None:
            is_of_split = fold.held_out(self) == (split == "validation")
            return np.where(is_of_split, index.offsets[1:], index.offsets[:-1])
        if split == "validation":
            return np.asarray(index.offsets[1:])
        training = np.zeros(len(index.offsets) - 1, np.int64)
        for start in range(0, self.split_row, BLOCK_ROWS):
            numbers = index.entity_of_row[start : min(start + BLOCK_ROWS, self.split_row)]
            training += np.bincount(numbers[numbers >= 0], minlength=len(training))
        return np.asarray(index.offsets[:-1] + training)

    def floor(self, id_category_size: int) -> NDArray[np.float64] | None:
        """(C,) known entropy of each category given the past, in nats; None where it is not known for this size."""
        floors = self.info.get("floor") or {}
        values = floors.get(str(floor_key(self.info, id_category_size)))
        return None if values is None else np.array(values, np.float64)

    def decode(self, category: str, code: int) -> str:
        """The value that a full class stands for; for `bins` its interval."""
        names = (PADDING, MISSING, *self.info["categories"][self.schema.category_names.index(category)]["values"])
        if not 0 <= code < len(names):
            raise IndexError(f"code is {code}, but category {category!r} has {len(names)} classes")
        return str(names[code])

    def _map(self, name: str) -> NDArray[Any]:
        if name not in self._arrays:
            section = self.sections[name]
            held = self._file[section.offset : section.offset + section.num_bytes]
            self._arrays[name] = held.view(section.dtype).reshape(section.shape)
        return self._arrays[name]

    def _check(self, verify: bool) -> None:
        binary = self.path / "store.bin"
        if not binary.is_file():
            raise DataError(f"{binary}: no such file; {AGAIN}")
        held, wanted = binary.stat().st_size, self.info["file_bytes"]
        if held != wanted or any(s.offset + s.num_bytes > wanted for s in self.sections.values()):
            raise DataError(
                f"{binary}: holds {held} bytes where store.json says {wanted}: truncated or damaged; {AGAIN}"
            )
        # One map for all sections, so that they stay parts of one file even where its name is given to another.
        self._opened = _identity(binary)
        self._file = np.memmap(binary, np.uint8, "r") if wanted else np.empty(0, np.uint8)
        is_read = verify or wanted <= CHECKED_AT_OPEN_BYTES
        is_changed = self.info["checksum"]["sizes"] != sizes_checksum(self.info)
        told = self.info["checksum"].get("store.json")  # older stores have none
        is_damaged = is_read and self.info["checksum"]["store.bin"] != file_checksum(binary)
        # A size that is too small for the codes is named with its category, hence before any other change. Codes of
        # which nothing has changed are right.
        if verify or is_damaged or is_changed or not is_read:
            self._check_codes(self.num_events if is_read else CHECKED_AT_OPEN_BYTES // self.codes[:1].nbytes)
        if is_changed:
            raise DataError(f"{self.path / 'store.json'}: its sizes were changed after it was written; {AGAIN}")
        if is_damaged:
            raise DataError(f"{binary}: its checksum differs from the one in store.json: damaged; {AGAIN}")
        if told is not None and told != info_checksum(self.info):
            raise DataError(f"{self.path / 'store.json'}: was changed after it was written; {AGAIN}")
        if fault := classes_fault(self.info):
            raise ValueError(fault)

    def _check_codes(self, most_rows: int) -> None:
        num_rows = min(self.num_events, most_rows)
        for start in range(0, num_rows, BLOCK_ROWS):
            block = self.codes[start : min(start + BLOCK_ROWS, num_rows)]
            above = (block.max(axis=0) >= self.class_sizes) | (block.min(axis=0) < 0)
            if above.any():
                column = int(above.argmax())
                bad = (block[:, column] >= self.class_sizes[column]) | (block[:, column] < 0)
                row = start + int(bad.argmax())
                raise DataError(
                    f"{self.path / 'store.bin'}: row {row} holds code {self.codes[row, column]} in category "
                    f"{self.schema.category_names[column]!r}, which has {self.class_sizes[column]} classes; {AGAIN}"
                )


def floor_key(info: dict[str, Any], id_category_size: int) -> int:
    """Sizes beyond the largest category cut nothing, so they share one floor."""
    return min(id_category_size, max(int(category["size"]) for category in info["categories"]))


def _identity(file: Path) -> tuple[int, int, tuple[int, int]]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns, (status.st_dev, status.st_ino)


def _read_info(folder: Path) -> dict[str, Any]:
    """store.json, once it is known to be one of this version."""
    file = folder / "store.json"
    if not file.is_file():
        raise DataError(f"{folder}: holds no event store (no store.json); make one with `eventkern prepare`")
    try:
        info = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # of json and of the UTF-8 decoder; nested too deep
        raise DataError(f"{file}: damaged, not JSON ({error}); {AGAIN}") from error
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise DataError(f"{file}: is not of an event store (key 'format'); make one with `eventkern prepare`")
    if info.get("format_version") != FORMAT_VERSION:
        version = info.get("format_version")
        raise DataError(f"{file}: key 'format_version' is {version}; this eventkern reads {FORMAT_VERSION}; {AGAIN}")
    needed = ("schema", "num_events", "split_row", "categories", "sections", "file_bytes", "checksum")
    for key in needed:
        if key not in info:
            raise DataError(f"{file}: key {key!r} is missing: damaged; {AGAIN}")
    return info
