import os
import platform
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventkern.data import encode
from eventkern.data.prepare import prepare
from eventkern.data.schema import Category, DataError, Schema
from eventkern.data.store import EventStore
from eventkern.data.vocabulary import fit_bins, fit_id

GOOD = "2024-01-01T09:00,a,0,1,2000-01-01"
LATE = "2024-01-01T13:00,a,0,1,2000-01-01"


# What the classes mean


def test_rows_are_ordered_by_timestamp_then_source_row(
    tmp_path: Path, decoded: Callable[[EventStore, str], list[str]], run: Callable[..., EventStore]
) -> None:
    store = run(
        tmp_path,
        *(
            "2024-01-01T11:00,a,0,1,2000-01-01",
            "2024-01-01T13:00,b,0,1,2000-01-01",
            "2024-01-01T10:00,b,0,1,2000-01-01",
        ),
        *(
            "2024-01-01T11:00,c,0,1,2000-01-01",
            "2024-01-01T11:00,b,0,1,2000-01-01",
            "2024-01-01T16:00Z,a,0,1,2000-01-01",
        ),
    )
    assert decoded(store, "who") == ["b", "a", "c", "b", "a", "b"]
    assert decoded(store, "hour") == ["10", "11", "11", "11", "11", "13"]
    eleven = np.datetime64("2024-01-01T16:00", "ns").astype(np.int64)
    assert store.timestamps[1:5].tolist() == [eleven] * 4
    assert store.split_row == 5


def test_ids_are_ranked_by_training_frequency_and_ties_by_value(tmp_path: Path, run: Callable[..., EventStore]) -> None:
    names = ["9", "10", "10", "9", "7", "8", "8", "8"]
    late = ["11", "10", "11", "11", "11", ""]
    lines = [f"2024-01-01T09:00,{n},0,1,2000-01-01" for n in names] + [
        f"2024-01-01T12:00,{n},0,1,2000-01-01" for n in late
    ]
    store = run(tmp_path, *lines)
    assert store.info["categories"][0]["values"] == ["8", "9", "10", "7"]  # 9 before 10: they are numbers
    assert store.codes[8:, 0].tolist() == [1, 4, 1, 1, 1, 1]
    assert store.info["categories"][0]["oov"]["full"] == 4 / 5  # of the five that hold a value
    assert store.info["categories"][0]["missing"] == 1 / 14
    assert store.index("who").entity_of_row[8] == store.index("who").entity_of_row[10] != -1
    assert store.index("who").entity_of_row[13] == -1
    assert store.info["counts"]["keyless_rows"] == 1


def test_an_identifier_may_be_called_na(
    tmp_path: Path, decoded: Callable[[EventStore, str], list[str]], run: Callable[..., EventStore]
) -> None:
    lines = [f"2024-01-01T09:0{n},{name},NA,NA,NA" for n, name in enumerate(["NA", "null", "NaN", "", "NA"])]
    store = run(tmp_path, *lines, LATE)
    assert decoded(store, "who") == ["NA", "null", "NaN", "(missing)", "NA", "(missing)"]
    for column in ("paid", "price", "born"):
        assert decoded(store, column)[:5] == ["(missing)"] * 5


def test_store_json_names_the_source(tmp_path: Path, run: Callable[..., EventStore]) -> None:
    assert run(tmp_path, GOOD, LATE).info["source"] == str(tmp_path / "visits.csv")
    assert run(tmp_path, GOOD, LATE, name="visits", overwrite=True).info["source"] == "visits"


def test_text_ids_tie_by_text() -> None:
    category = Category("who", "id")
    assert fit_id(category, ["9", "10", "x"], np.array([1, 1, 1])).values == ("10", "9", "x")
    assert fit_id(category, ["9", "10", "-1"], np.array([1, 1, 2])).values == ("-1", "9", "10")
    assert fit_id(category, ["9", "007"], np.array([1, 1])).values == ("007", "9")


def test_nothing_after_the_split_is_fitted(tmp_path: Path, run: Callable[..., EventStore]) -> None:
    training = [f"2024-01-01T0{n}:00,{'ab'[n % 2]},{n % 2},{n},2000-01-01" for n in range(8)]
    one = run(tmp_path, *training, "2024-01-01T12:00,a,0,1,2000-01-01")
    classes = [{key: c[key] for key in ("size", "values")} for c in one.info["categories"]]
    codes = np.array(one.codes[:8])
    other = run(tmp_path, *training, *["2024-01-01T12:00,b,1,99,2000-01-01"] * 30, overwrite=True)
    assert [{key: c[key] for key in ("size", "values")} for c in other.info["categories"]] == classes
    assert np.array_equal(other.codes[:8], codes)


def test_bins_are_quantiles_of_the_training_period(
    tmp_path: Path, decoded: Callable[[EventStore, str], list[str]], run: Callable[..., EventStore]
) -> None:
    prices = ["3", "1", "2", "4", "8", "7", "6", "5", "", "NA", "NaN", "null"]
    lines = [f"2024-01-01T09:00,a,0,{price},2000-01-01" for price in prices]
    store = run(tmp_path, *lines, *(f"2024-01-01T12:00,a,0,{price},2000-01-01" for price in (-1e9, 4.99, 1e9)))
    assert store.info["categories"][2]["edges"] == [3, 5, 7]
    assert store.codes[:, 2].tolist() == [3, 2, 2, 3, 5, 5, 4, 4, 1, 1, 1, 1, 2, 3, 5]
    assert decoded(store, "price")[:2] == ["3 to below 5", "below 3"]


@pytest.mark.parametrize(
    ("numbers", "edges", "classes"),
    [
        ([5.0] * 9, [], [2] * 9),
        ([], [], []),
        ([0.0] * 8 + [1.0], [], [2] * 9),
        ([0.0] * 4 + [1.0] * 4, [1.0], [2] * 4 + [3] * 4),
    ],
)
def test_bins_that_coincide_are_one(numbers: list[float], edges: list[float], classes: list[int]) -> None:
    fitted = fit_bins(Category("price", "bins", bins=4), np.array(numbers))
    assert fitted.edges is not None
    assert fitted.edges.tolist() == edges
    assert fitted.size == len(edges) + 3
    assert fitted.encode(np.array(numbers)).tolist() == classes
    assert fitted.encode(np.array([np.nan, 1e300])).tolist() == [1, len(edges) + 2]


def test_flags(tmp_path: Path, run: Callable[..., EventStore]) -> None:
    texts = ["0", "1", "true", "False", "TRUE", "no", "yes", "1.0", "", "NA"]
    lines = [f"2024-01-01T09:00,a,{text},1,2000-01-01" for text in texts]
    store = run(tmp_path, *lines, "2024-01-01T12:00,a,0,1,2000-01-01")
    assert store.codes[:10, 1].tolist() == [2, 3, 3, 2, 3, 2, 3, 3, 1, 1]


def test_years_span_the_whole_table(tmp_path: Path, run: Callable[..., EventStore]) -> None:
    store = run(
        tmp_path, "2024-01-01T09:00,a,0,1,1999-12-31", "2024-01-01T12:00,a,0,1,2003-01-01", "2024-01-01T12:01,a,0,1,"
    )
    assert store.info["categories"][4]["values"] == ["1999", "2000", "2001", "2002", "2003"]
    assert store.codes[:, 4].tolist() == [2, 6, 1]


def test_elapsed_counts_from_the_key_s_previous_event(
    tmp_path: Path, decoded: Callable[[EventStore, str], list[str]], run: Callable[..., EventStore]
) -> None:
    store = run(
        tmp_path,
        *("2024-01-01T11:50,a,0,1,2000-01-01", "2024-01-01T11:50:59,a,0,1,2000-01-01"),
        *("2024-01-01T11:51,b,0,1,2000-01-01", "2024-01-01T11:51,,0,1,2000-01-01", "2024-01-01T11:52,,0,1,2000-01-01"),
        *("2024-01-01T11:52:58.999,a,0,1,2000-01-01", "2024-01-01T12:00,b,0,1,2000-01-01"),
    )
    assert decoded(store, "pause") == ["(missing)", "0", "(missing)", "(missing)", "(missing)", "1", "3 and more"]


@pytest.mark.parametrize(
    ("text", "utc", "hour"),
    [
        ("2024-01-01T09:00", "2024-01-01T14:00", "9"),
        ("2024-01-01 09:00:00.5", "2024-01-01T14:00:00.5", "9"),
        ("2024-01-01", "2024-01-01T05:00", "0"),
        ("2024-01-01T09:00Z", "2024-01-01T09:00", "4"),
        ("2024-01-01T09:00:00+05:30", "2024-01-01T03:30", "22"),
        ("2024-01-01T09:00:00-05", "2024-01-01T14:00", "9"),
        ("2023-07-01T09:00", "2023-07-01T13:00", "9"),
        ("2023-11-05T01:30", "2023-11-05T05:30", "1"),  # the hour that summer time repeats: the first
        ("2023-11-05T06:30Z", "2023-11-05T06:30", "1"),
        ("2023-03-12T02:30", "2023-03-12T07:30", "3"),  # the hour that it leaps over: an hour later
    ],
)
def test_timestamps_with_and_without_zone(
    tmp_path: Path,
    text: str,
    utc: str,
    hour: str,
    decoded: Callable[[EventStore, str], list[str]],
    run: Callable[..., EventStore],
) -> None:
    store = run(tmp_path, f"{text},a,0,1,", "2024-01-01T12:00,a,0,1,", "2024-01-01T17:01Z,a,0,1,")
    assert store.timestamps[0] == np.datetime64(utc, "ns").astype(np.int64)
    assert decoded(store, "hour")[0] == hour


@settings(max_examples=30, deadline=None)
@given(
    names=st.lists(st.one_of(st.text(st.characters(codec="utf-8"), max_size=4), st.none()), min_size=2),
    numbers=st.data(),
)
def test_codes_decode_back_to_the_values(
    tmp_path_factory: pytest.TempPathFactory,
    names: list[str | None],
    numbers: st.DataObject,
    schema: Schema,
    decoded: Callable[[EventStore, str], list[str]],
) -> None:
    folder = tmp_path_factory.mktemp("decode")
    finite = st.floats(allow_nan=False, allow_infinity=False)
    price = numbers.draw(st.lists(finite | st.none(), min_size=len(names), max_size=len(names)))
    paid = numbers.draw(st.lists(st.booleans() | st.none(), min_size=len(names), max_size=len(names)))
    minutes = numbers.draw(st.lists(st.integers(0, 10**6), min_size=len(names), max_size=len(names)))
    at = np.datetime64("2024-01-01", "ns") - np.array(sorted(minutes, reverse=True)).astype("timedelta64[m]")
    at[-1] = np.datetime64("2024-01-02", "ns")
    columns = {"at": pa.array(at), "who": pa.array(names, pa.string()), "paid": pa.array(paid, pa.bool_())}
    columns |= {"price": pa.array(price, pa.float64()), "birth": pa.array(at)}
    pq.write_table(pa.table(columns), folder / "t.parquet")
    prepare(folder / "t.parquet", replace(schema, timezone="UTC"), folder / "store")
    store = EventStore.open(folder / "store")

    known = set(names[:-1])
    expected = [name if name and name in known else "(missing)" for name in names]
    assert decoded(store, "who") == expected
    assert decoded(store, "paid") == [{True: "true", False: "false", None: "(missing)"}[flag] for flag in paid]
    assert decoded(store, "hour") == [str(time.astype(object) // (3600 * 10**9) % 24) for time in at.astype(np.int64)]
    assert decoded(store, "born") == [str(time) for time in at.astype("datetime64[Y]")]
    edges = np.array([-np.inf, *store.info["categories"][2]["edges"], np.inf])
    for value, code in zip(price, store.codes[:, 2].tolist(), strict=True):
        assert code == 1 if value is None else edges[code - 2] <= value < edges[code - 1]


# All or nothing


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["_fit", "_sort", "_write_rows", "_write_index", "file_checksum"])
def test_an_interrupted_prepare_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: type[BaseException],
    schema: Schema,
    write_csv: Callable[..., Path],
    left_in: Callable[[Path], list[str]],
) -> None:
    file = write_csv(tmp_path, GOOD, LATE)

    def interrupt(*arguments: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(encode, step, interrupt)
        with pytest.raises(error):
            prepare(file, schema, tmp_path / "new" / "deep" / "store")
        assert left_in(tmp_path) == ["visits.csv"]
    prepare(file, schema, tmp_path / "deep" / "store")
    before = (tmp_path / "deep" / "store" / "store.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(encode, step, interrupt)
        with pytest.raises(error):
            prepare(file, schema, tmp_path / "deep" / "store", overwrite=True)
    assert left_in(tmp_path / "deep") == ["store"]
    assert (tmp_path / "deep" / "store" / "store.json").read_bytes() == before


def test_a_failed_swap_puts_the_old_store_back(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    left_in: Callable[[Path], list[str]],
    run: Callable[..., EventStore],
) -> None:
    run(tmp_path, GOOD, LATE)
    before = (tmp_path / "store" / "store.json").read_bytes()
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == "store" and self.parent != tmp_path:
            raise OSError("disk on fire")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", lambda self, target: fail(self, target))
    with pytest.raises(OSError, match="disk on fire"):
        run(tmp_path, GOOD, GOOD, LATE, overwrite=True)
    assert left_in(tmp_path) == ["store", "visits.csv"]
    assert (tmp_path / "store" / "store.json").read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_killed_prepare_leaves_no_store(
    tmp_path: Path, schema: Schema, write_csv: Callable[..., Path], left_in: Callable[[Path], list[str]]
) -> None:
    file = write_csv(tmp_path, GOOD, LATE)
    (tmp_path / "schema.json").write_text(repr(schema.to_dict()))
    script = f"""
        import ast, os, signal
        from pathlib import Path
        from eventkern.data import encode
        from eventkern.data.prepare import prepare
        from eventkern.data.schema import Schema

        encode.file_checksum = lambda file: os.kill(os.getpid(), signal.SIGKILL)
        schema = Schema.from_dict(ast.literal_eval(Path({str(tmp_path / "schema.json")!r}).read_text()))
        prepare({str(file)!r}, schema, {str(tmp_path / "store")!r})
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    with pytest.raises(DataError, match="holds no event store"):
        EventStore.open(tmp_path / "store")
    prepare(file, schema, tmp_path / "store")
    EventStore.open(tmp_path / "store", verify=True)
    assert left_in(tmp_path) == ["schema.json", "store", "visits.csv"]


def of_a_dead_process(out: Path) -> Path:
    """A temporary folder as a killed prepare leaves it."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder = out.parent / f".{out.name}.preparing-{platform.node()}-{dead.pid}-x7"
    folder.mkdir()
    return folder


def test_only_what_killed_processes_left_is_swept(
    tmp_path: Path, left_in: Callable[[Path], list[str]], run: Callable[..., EventStore]
) -> None:
    out = tmp_path / "store"
    (of_a_dead_process(out) / "spill").touch()
    kept = [f".store.preparing-{platform.node()}-{os.getpid()}-x", f".store.preparing-not-{platform.node()}-1-x"]
    kept += [f".store.preparing-{platform.node()}-x", of_a_dead_process(tmp_path / "other").name]
    for name in kept:
        (tmp_path / name).mkdir(exist_ok=True)
    run(tmp_path, GOOD, LATE)
    assert left_in(tmp_path) == sorted([*kept, "store", "visits.csv"])


def test_a_store_that_a_killed_prepare_had_moved_away_returns(
    tmp_path: Path, left_in: Callable[[Path], list[str]], run: Callable[..., EventStore]
) -> None:
    out = tmp_path / "store"
    run(tmp_path, GOOD, LATE)
    out.rename(of_a_dead_process(out) / "replaced")
    with pytest.raises(DataError, match="a store is already there"):
        run(tmp_path, GOOD, GOOD, LATE)
    assert EventStore.open(out).num_events == 2
    assert left_in(tmp_path) == ["store", "visits.csv"]


def test_only_a_store_is_replaced_and_only_when_asked(
    tmp_path: Path, schema: Schema, write_csv: Callable[..., Path], left_in: Callable[[Path], list[str]]
) -> None:
    file = write_csv(tmp_path, GOOD, LATE)
    out = tmp_path / "store"
    out.mkdir()
    prepare(file, schema, out)  # an empty folder is free
    with pytest.raises(DataError, match=r"store: a store is already there; choose another folder, or overwrite it"):
        prepare(file, schema, out)
    prepare(write_csv(tmp_path, GOOD, GOOD, LATE), schema, out, overwrite=True)
    assert EventStore.open(out).num_events == 3
    (out / "store.json").rename(out / "diary.txt")
    with pytest.raises(DataError, match="store: exists and is no event store; choose another folder"):
        prepare(file, schema, out, overwrite=True)
    assert left_in(out) == ["diary.txt", "store.bin"]


# Memory

MEMORY_SCRIPT = """
    import sys, tracemalloc
    import pyarrow as pa
    from eventkern.data.prepare import prepare
    from eventkern.data.schema import Schema

    schema = Schema.load("workforce")
    prepare(sys.argv[1], schema, sys.argv[3])  # what the first call imports and caches is no memory of a table
    before = pa.default_memory_pool().max_memory()
    tracemalloc.start()
    prepare(sys.argv[2], schema, sys.argv[4])
    print(tracemalloc.get_traced_memory()[1], pa.default_memory_pool().max_memory())
"""


def test_memory_stays_under_32_bytes_an_event_and_one_batch(tmp_path: Path) -> None:
    """One batch, 256 KiB of CSV text or 16,384 rows, and its parsed forms: 12 MiB."""
    batch_bytes = 12 << 20
    sizes = (2_000, 300_000)
    for num_events in sizes:
        random = np.random.default_rng(num_events)
        at = pa.array(np.datetime64("2024-01-01", "s") + random.integers(0, 366 * 86_400, num_events))
        ids = {f"{name}RecordId": random.integers(0, 3000, num_events) for name in ("Actor", "Recipient", "Location")}
        columns = {"Time_Event": at, "Time_Reference": at, "EventType": random.integers(0, 20, num_events), **ids}
        columns |= {"IsTimesheet": random.random(num_events) < 0.5, "HoursWorked": random.normal(8, 2, num_events)}
        pq.write_table(pa.table(columns), tmp_path / f"{num_events}.parquet")
        pacsv.write_csv(pa.table(columns), tmp_path / f"{num_events}.csv")
    for kind in ("parquet", "csv"):
        files = [str(tmp_path / f"{num_events}.{kind}") for num_events in sizes]
        stores = [str(tmp_path / f"{kind}-{size}") for size in ("small", "large")]
        script = [sys.executable, "-c", textwrap.dedent(MEMORY_SCRIPT), *files, *stores]
        done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        python_peak, arrow_peak = map(int, done.stdout.split())
        assert python_peak + arrow_peak < 32 * sizes[1] + batch_bytes, (kind, python_peak, arrow_peak)
        assert python_peak > 16 * sizes[1], "the sort alone holds more than this: the measure sees nothing"
