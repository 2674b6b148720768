"""The extension's own entries: what they check is given anything, and all of them values of wrong types.

`_C.pyi` is the list, so that an entry that is new is tried without being named here. Addresses are trusted everywhere,
and here they are right. Checked are: every argument's type; the constructors of WindowGather, RowGather and GatherPool;
the rows of RowGather.cpu; the window numbers and tickets of GatherPool; the ids of multi_embedding_cpu and the targets
of count_targets. The latter two, and all that is trusted, the subject `ops` tries through the callers that check it.
"""

import ast
from pathlib import Path
from random import Random
from typing import Any

import hostile
import numpy as np

from eventkern import _C
from eventkern.data import windows as windows_module

STUB = Path(windows_module.__file__).parent.parent / "_C.pyi"
CODES, OUTS = (np.uint8, np.uint16, np.int32), (np.int32, np.int64)


def run(random: Random, folder: Path) -> str:
    kind = random.choice((wrong_types, wrong_types, constructors, rows, windows, windows, tickets))
    return f"entries: {kind.__name__} {kind(random)}"


def entries() -> list[tuple[str, list[ast.arg], list[ast.arg]]]:
    """Each entry's name and its arguments, by place and by name."""
    found = []
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.append((node.name, [*node.args.posonlyargs, *node.args.args], node.args.kwonlyargs))
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    by_place = [*method.args.posonlyargs, *method.args.args][1:]
                    found.append((f"{node.name}.{method.name}", by_place, method.args.kwonlyargs))
    return [entry for entry in found if _has(entry[0])]


def _has(name: str) -> bool:
    owner, _, method = name.rpartition(".")
    return hasattr(getattr(_C, owner) if owner else _C, method)


def _plain(annotation: ast.expr | None) -> Any:
    told = ast.unparse(annotation) if annotation else ""
    return {"int": 0, "float": 0.0, "bool": False, "_HeadRows": (0, (0, 0, 0, 0))}.get(told, [])


def wrong_types(random: Random) -> str:
    """A call of which at least one argument cannot be converted: a TypeError, before anything is read."""
    name, by_place, by_name = random.choice(ENTRIES)
    arguments = {arg.arg: _plain(arg.annotation) for arg in (*by_place, *by_name)}
    if name.startswith("WindowGather.") and "__init__" not in name:
        owner: Any = window_gather(Random(0))[0]
    elif name.startswith("GatherPool.") and "__init__" not in name:
        owner = _C.GatherPool(num_windows=1, num_threads=0)
    elif name.startswith("RowGather.") and "__init__" not in name:
        owner = _C.RowGather(codes=0, code_bytes=1, num_categories=1, num_rows=0)
    else:
        owner = getattr(_C, name.partition(".")[0]) if "." in name else _C
    method = name.rpartition(".")[2]
    call = owner if method == "__init__" else getattr(owner, method)
    # Whatever has a truth value is a bool.
    typed = [arg.arg for arg in (*by_place, *by_name) if arg.annotation and ast.unparse(arg.annotation) != "bool"]
    if not typed or random.random() < 0.1:
        places = [*(arguments[arg.arg] for arg in by_place), 0]  # one too many
        return hostile.told(_refused(call, places, {}))
    for wrong in random.sample(typed, random.randint(1, min(3, len(typed)))):
        arguments[wrong] = random.choice((None, "x", object(), 1 << 70, -(1 << 70), [[]], b"\0"))
    places = [arguments[arg.arg] for arg in by_place]
    return hostile.told(_refused(call, places, {arg.arg: arguments[arg.arg] for arg in by_name}))


def _refused(call: Any, places: list[Any], names: dict[str, Any]) -> Exception:
    result = hostile.outcome(lambda: call(*places, **names), (TypeError,))
    assert isinstance(result, TypeError), f"{call} took {places} {names}"
    return result


def constructors(random: Random) -> str:
    number = hostile.integer
    kind = random.randrange(3)
    if kind == 0:
        threads = random.choice([n for n in hostile.INTEGERS if not 16 < n <= 1024])
        made = hostile.outcome(lambda: _C.GatherPool(num_windows=number(random), num_threads=threads))
        assert isinstance(made, Exception) == (not 0 <= threads <= 1024) or isinstance(made, TypeError)
    elif kind == 1:
        code_bytes, num_categories, num_rows = number(random), number(random), number(random)
        made = hostile.outcome(
            lambda: _C.RowGather(codes=0, code_bytes=code_bytes, num_categories=num_categories, num_rows=num_rows)
        )
        is_right = code_bytes in (1, 2, 4) and 1 <= num_categories < 2**31 and 0 <= num_rows < 2**63
        assert isinstance(made, Exception) != is_right
    else:
        sizes = {"code_bytes": 2, "num_categories": 3, "src_seq_len": 4, "num_targets": 5, "out_bytes": 4}
        for name in random.sample(list(sizes), random.randint(0, 2)):
            sizes[name] = number(random)
        streams = [(0, 0, 0)] * random.choice((0, 1, 8, 9, 100))
        made = hostile.outcome(
            lambda: _C.WindowGather(codes=0, cuts=0, key=(0, 0, 0), anchors=0, limits=0, streams=streams, **sizes)
        )
        is_right = sizes["code_bytes"] in (1, 2, 4) and sizes["out_bytes"] in (4, 8) and len(streams) <= 8
        is_right &= 1 <= sizes["num_categories"] < 2**31 and 1 <= sizes["num_targets"] < 2**31
        assert isinstance(made, Exception) != (is_right and 0 <= sizes["src_seq_len"] < 2**31)
    return hostile.told(made)


def rows(random: Random) -> str:
    """Rows of a table; the first that it does not have is told, and then nothing is written."""
    num_rows, num_categories = random.choice((0, 1, 2, 61, 300)), random.choice((1, 2, 3, 15, 16, 17, 33, 64))
    codes = _codes(random, num_rows, num_categories)
    wanted = _numbers(random, num_rows, random.choice((0, 1, 2, 15, 16, 17, 100)))
    out = np.full((len(wanted), num_categories), -5, random.choice(OUTS))
    gather = _C.RowGather(
        codes=codes.ctypes.data, code_bytes=codes.itemsize, num_categories=num_categories, num_rows=num_rows
    )
    position = gather.cpu(wanted.ctypes.data, len(wanted), out.ctypes.data, out.itemsize, random.choice((1, 2, 0, -7)))
    outside = np.flatnonzero((wanted < 0) | (wanted >= num_rows))
    assert position == (outside[0] if len(outside) else -1)
    assert (out == (-5 if len(outside) else codes[np.where(len(outside), 0, wanted)])).all()
    return "refused" if len(outside) else "right"


def _codes(random: Random, num_rows: int, num_categories: int) -> Any:
    numbers = np.random.default_rng(random.getrandbits(32))
    dtype = random.choice(CODES)
    return numbers.integers(0, np.iinfo(dtype).max, (num_rows, num_categories), dtype, endpoint=True)


def _numbers(random: Random, limit: int, count: int) -> Any:
    """`count` numbers in [0, limit), at times with some that are not."""
    wanted = [random.randrange(limit) for _ in range(count)] if limit else []
    if wanted and random.random() < 0.3:
        wanted[random.randrange(len(wanted))] = random.choice([n for n in hostile.INTEGERS if -(2**63) <= n < 2**63])
    return np.array(wanted, np.int64)


def window_gather(random: Random) -> tuple[Any, dict[str, Any]]:
    """A gather over a random store, with all that it points to and what a plain reading of it needs."""
    numbers = np.random.default_rng(random.getrandbits(32))
    num_events, num_keys = random.choice((1, 2, 17, 200)), random.choice((1, 3, 20))
    num_categories, num_targets = random.choice((1, 3, 16, 17)), random.choice((1, 2, 5, 30))
    source_length = random.choice((0, 1, 2, 31, 300))
    owners = [numbers.integers(0, num_keys, num_events).astype(np.int32) for _ in range(2)]
    owners[1][numbers.random(num_events) < 0.3] = -1
    indexes = []
    for owner in owners:
        listed = np.argsort(owner, kind="stable")[(owner < 0).sum() :].astype(np.int64)
        ends = np.cumsum(np.bincount(owner[owner >= 0], minlength=num_keys))
        indexes.append((owner, np.concatenate(([0], ends)).astype(np.int64), listed))
    streams = [random.choice((*indexes, None)) for _ in range(random.choice((0, 1, 3, 8)))]
    held = {
        "codes": _codes(random, num_events, num_categories),
        "cuts": numbers.integers(1, 1 << random.choice((4, 9, 31)), num_categories).astype(np.int32),
        "anchors": numbers.integers(0, num_events, random.choice((1, 5, 50))).astype(np.int64),
        "limits": indexes[0][1][1:].copy(),
        "streams": streams,
        "key": indexes[0],
        "shape": (source_length, num_targets),
        "out": np.dtype(random.choice(OUTS)),
    }

    def at(index: Any) -> tuple[int, ...]:
        return (0, 0, 0) if index is None else tuple(part.ctypes.data for part in index)

    gather = _C.WindowGather(
        codes=held["codes"].ctypes.data, code_bytes=held["codes"].itemsize, num_categories=num_categories,
        cuts=held["cuts"].ctypes.data, key=at(held["key"]), anchors=held["anchors"].ctypes.data,
        limits=held["limits"].ctypes.data, streams=[at(index) for index in streams], src_seq_len=source_length,
        num_targets=num_targets, out_bytes=held["out"].itemsize,
    )  # fmt: skip
    return gather, held


def _expected(held: dict[str, Any], wanted: Any) -> tuple[Any, Any, int]:
    source_length, num_targets = held["shape"]
    cut = np.where(held["codes"] >= held["cuts"], 1, held["codes"]).astype(held["out"])
    owner, offsets, listed = held["key"]
    sources = np.zeros((len(wanted), len(held["streams"]), source_length, cut.shape[1]), held["out"])
    targets = np.zeros((len(wanted), num_targets, cut.shape[1]), held["out"])
    num_labels = 0
    for sample, window in enumerate(wanted):
        anchor = held["anchors"][window]
        row = listed[anchor]
        seen = listed[anchor : min(anchor + num_targets, offsets[owner[row] + 1])]
        targets[sample, : len(seen)] = cut[seen]
        num_labels += len(seen) - 1
        for stream, index in enumerate(held["streams"]):
            before = np.arange(row)
            if index is not None:
                before = before[index[0][:row] == index[0][row]] if index[0][row] >= 0 else before[:0]
            before = before[max(0, len(before) - source_length) :]
            sources[sample, stream, source_length - len(before) :] = cut[before]
    return sources, targets, num_labels


def windows(random: Random) -> str:
    """Batches of a pool: a window that does not exist is refused, the others are as a plain loop has them."""
    gather, held = window_gather(random)
    num_windows = len(held["anchors"])
    pool = _C.GatherPool(num_windows=num_windows, num_threads=random.choice((0, 1, 2)))
    results = []
    for _ in range(random.randint(1, 3)):
        wanted = _numbers(random, num_windows, random.choice((0, 1, 2, 15, 16, 17, 40)))
        is_outside = ((wanted < 0) | (wanted >= num_windows)).any()
        expected = _expected(held, wanted[:0] if is_outside else wanted)
        batch = [np.full((len(wanted), *part.shape[1:]), -7, held["out"]) for part in expected[:2]]
        num_labels = np.full(1, -7, np.int64)
        addresses = (*(part.ctypes.data for part in batch), num_labels.ctypes.data)
        results.append(
            (pool.submit(gather, wanted.ctypes.data, len(wanted), *addresses), batch, num_labels, expected, wanted)
        )
    random.shuffle(results)
    for ticket, batch, num_labels, expected, wanted in results:
        told = hostile.outcome(lambda ticket=ticket: pool.wait(ticket), (IndexError,))
        assert isinstance(told, IndexError) == ((wanted < 0) | (wanted >= num_windows)).any()
        if told is None:
            assert all((one == other).all() for one, other in zip(batch, expected[:2], strict=True))
            assert num_labels[0] == expected[2]
    return "right"


def tickets(random: Random) -> str:
    pool = _C.GatherPool(num_windows=3, num_threads=random.choice((0, 1)))
    if random.random() < 0.3:
        pool.close()
    result = hostile.outcome(lambda: pool.wait(hostile.integer(random)), (ValueError, TypeError, RuntimeError))
    assert isinstance(result, Exception)
    return hostile.told(result)


ENTRIES = entries()
