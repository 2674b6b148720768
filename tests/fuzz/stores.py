"""Stores: damaged files are refused in one line that names them, or they serve what the whole ones do.

Half of the damage is what a disk or a hand does. The other half has its checksums made anew, so that what lies behind
them is tried too: such a store may hold other events, and still nothing outside its file may be read.
"""

import functools
import hashlib
import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import hostile
import numpy as np
import schemas
import torch

from eventkern.data.checksums import file_checksum, info_checksum, sizes_checksum
from eventkern.data.folds import Fold
from eventkern.data.loader import EventLoader
from eventkern.data.prepare import prepare
from eventkern.data.schema import DataError, Schema
from eventkern.data.store import EventStore

EXTREMES = (0, 1, -1, 127, 128, 255, 32_767, 65_535, 2**31 - 1, -(2**31), 2**62, 2**63 - 1, -(2**63))


@functools.cache
def whole(folder: Path) -> tuple[bytes, bytes, str]:
    """store.json and store.bin of a whole store, and the digest of what it serves."""
    (folder / "schema.toml").write_text(schemas.VISITS)
    (folder / "table.csv").write_text(schemas.TABLE + "".join(schemas.TABLE.splitlines(True)[1:]) * 4)
    prepare(folder / "table.csv", Schema.load(folder / "schema.toml"), folder / "whole", overwrite=True)
    store = EventStore.open(folder / "whole", verify=True)
    parts = ((store.path / name).read_bytes() for name in ("store.json", "store.bin"))
    return *parts, served(Random(0), store)


def run(random: Random, folder: Path) -> str:
    info, binary, digest = whole(folder)
    damaged = folder / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    damaged.mkdir()
    is_info = random.random() < 0.6
    (damaged / "store.bin").write_bytes(binary if is_info else damaged_binary(random, info, binary))
    is_renewed = random.random() < 0.5
    told = damaged_info(random, info, is_renewed) if is_info else info
    if is_renewed:
        told = renewed(told, damaged / "store.bin")
    (damaged / "store.json").write_bytes(told)
    store = hostile.outcome(lambda: EventStore.open(damaged, verify=random.random() < 0.3), (DataError,))
    if isinstance(store, Exception):
        assert str(store).startswith(f"{damaged}"), store
        assert "\n" not in str(store), store
        return f"stores: {hostile.told(store)}"
    if not is_renewed:
        if "store.json" not in store.info["checksum"]:
            return "stores: as if an older version had written it"
        assert served(random, store) == digest, "a damaged store serves something else"
        return "stores: right"
    return f"stores: renewed {hostile.told(hostile.outcome(lambda: served(random, store)))}"


def served(random: Random, store: EventStore) -> str:
    """A digest of all that a store tells."""
    digest = hashlib.sha256()

    def see(*parts: Any) -> None:
        for part in parts:
            digest.update(np.ascontiguousarray(part).tobytes() if isinstance(part, np.ndarray) else repr(part).encode())

    see(store.rows(torch.arange(store.num_events)).numpy(), store.timestamps, store.split_row, store.class_sizes)
    see(store.schema, store.sizes(5), store.floor(5), store.folds(2))
    for entity in store.schema.entities:
        index = store.index(entity)
        see(index.entity_of_row, index.offsets, index.rows)
    for name in sorted(store.sections):
        see(store.on_device(name, "cpu").numpy())
    for category, size in zip(store.schema.category_names, store.class_sizes, strict=True):
        see([store.decode(category, code) for code in range(min(size, 100))])
    for split in ("train", "validation"):
        for fold in (None, Fold(0, 2)):
            loader = EventLoader(
                store, split, src_seq_len=6, tgt_seq_len=4, id_category_size=4, batch_size=16, prefetch=1, fold=fold
            )
            for batch in loader:
                see(batch.sources.numpy(), batch.targets.numpy(), int(batch.num_targets))
    return digest.hexdigest()


def damaged_binary(random: Random, info: bytes, binary: bytes) -> bytes:
    kind = random.randrange(4)
    if kind == 0:
        return hostile.flipped(random, binary)
    if kind == 1:
        return binary[: random.randrange(len(binary))] + bytes(random.choice((0, 0, 1, 4096)))
    held, sections = bytearray(binary), json.loads(info)["sections"]
    first, second = random.choice(sections), random.choice(sections)
    if kind == 2:  # two sections change places
        for one, other in ((first, second), (second, first)):
            piece = binary[other["offset"] : other["offset"] + 64]
            held[one["offset"] : one["offset"] + len(piece)] = piece
        return bytes(held[: len(binary)])
    dtype = np.dtype(first["dtype"])  # one of its numbers is another
    place = first["offset"] + dtype.itemsize * random.randrange(max(int(np.prod(first["shape"])), 1))
    limits = np.iinfo(dtype)
    number = min(max(random.choice(EXTREMES), limits.min), limits.max)
    held[place : place + dtype.itemsize] = np.array(number, dtype).tobytes()
    return bytes(held[: len(binary)])


def damaged_info(random: Random, text: bytes, is_renewed: bool) -> bytes:
    kind = random.randrange(8)
    if kind == 0 and not is_renewed:
        return hostile.flipped(random, text)
    if kind == 1:
        depth = random.choice((10, 1_000, 100_000))
        return spliced(random, text, random.choice(("[" * depth, "[" * depth + "]" * depth, '{"a":' * depth)))
    if kind == 2:
        return spliced(random, text, random.choice(("NaN", "Infinity", "-Infinity", "1e999", "9" * 5_000, "-0", "1.5")))
    info = json.loads(text)
    if kind == 3:  # a key twice
        key = random.choice(list(info))
        return text.rstrip()[:-1] + f', "{key}": {json.dumps(hostile.value(random))}}}'.encode()
    for _ in range(random.choice((1, 1, 2, 4))):
        change(random, info)
    return json.dumps(info).encode()


def spliced(random: Random, text: bytes, value: str) -> bytes:
    """The text with a value in place of one of its numbers."""
    numbers = [place for place in range(1, len(text) - 1) if text[place : place + 1].isdigit()]
    place = random.choice(numbers)
    return text[:place] + value.encode() + text[place + 1 :]


def change(random: Random, info: Any) -> None:
    """Change something somewhere in nested values."""
    holder, parents = info, []
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return
        key = random.choice(keys)
        parents.append((holder, key))
        if not isinstance(holder[key], (dict, list)) or not holder[key] or random.random() < 0.15:
            break
        holder = holder[key]
    kind = random.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and len(keys) > 1:
        other = random.choice(keys)
        holder[key], holder[other] = holder[other], holder[key]
    elif kind == 2 and isinstance(holder[key], int):
        holder[key] += random.choice((-1, 1, 4, -4096, 4096, 2**31, 2**32, 2**61, 2**62, 2**63, -(2**63)))
    elif kind == 3 and key == "dtype":
        holder[key] = random.choice(("uint8", "<u2", ">u2", "int32", "int64", "float64", "O", "V0", "S0", "bool", "U1"))
    elif kind == 4 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
        holder[key] = random.choice((float(holder[key]), str(holder[key]), bool(holder[key]), [holder[key]]))
    else:
        holder[key] = hostile.value(random)


def renewed(text: bytes, binary: Path) -> bytes:
    """The text with checksums that fit what it says and the file; as it is where that cannot be."""
    try:
        info = json.loads(text)
        info["checksum"] = {"sizes": sizes_checksum(info), "store.bin": file_checksum(binary)}
        info["checksum"]["store.json"] = info_checksum(info)
        return json.dumps(info).encode()
    except (ValueError, LookupError, TypeError, RecursionError, AttributeError):
        return text
