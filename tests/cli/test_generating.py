"""`eventkern generate` from a run to a table, its mistakes, and the study of what it generates."""

from __future__ import annotations

import collections
import datetime
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.studies.generated_marginals import distances, generated_and_true, table, total_variation
from eventkern.cli import main
from eventkern.cli.commands import open_run
from eventkern.cli.generating import choose_keys, generate_events, table_of
from eventkern.data import EventStore
from eventkern.nn import quantize_int8

SCHEMA = """
name = "visits"
timestamp = "when"
timezone = "Europe/Berlin"
key = "person"
split = "2024-03-01"
streams = [{ name = "person", entity = "person" }, { name = "time", entity = "all" }]
categories = [
  { name = "person", kind = "id" },
  { name = "place", kind = "id" },
  { name = "pause", kind = "elapsed", unit = "hours", limit = 48 },
  { name = "hour", kind = "time", column = "when", field = "hour" },
]
"""
CONFIG = """
src_seq_len = 4
tgt_seq_len = 3
id_category_size = 20
epochs = 50
max_steps = 60
batch_size = 16
lr = 0.01
schedule = "constant"
device = "cpu"
data = { store = "store" }
model = { d_model = 16, num_heads = 2 }
"""


def visits() -> list[str]:
    """Six persons who go from place to place in turn, and a newcomer after the split."""
    draw = random.Random(3)
    at = datetime.datetime(2024, 1, 1)
    places: dict[int, int] = collections.defaultdict(int)
    lines = ["when,person,place"]
    for number in range(600):
        at += datetime.timedelta(hours=3)
        person = draw.randrange(7 if number > 560 else 6)
        places[person] = draw.randrange(5) if draw.random() < 0.1 else (places[person] + 1) % 5
        lines.append(f"{at:%Y-%m-%dT%H:%M:%S},p{person},site {places[person]}")
    return lines


@pytest.fixture(scope="module")
def made(make_run: Callable[[str, str, str], Path]) -> Path:
    """A folder with a store and a run of 60 steps; not to be written to."""
    return make_run("\n".join(visits()) + "\n", SCHEMA, CONFIG)


def generated(*options: str, out: str = "out.parquet") -> pa.Table:
    assert main(["generate", "run", "--device", "cpu", "--out", out, *options]) == 0
    return pq.read_table(out)


def test_events_of_a_key_are_decoded_with_their_times(here: Path) -> None:
    events = generated("--key", "p3", "--events", "10", "--top-k", "5", "--temperature", "0.8", "--no-missing")
    assert events.column_names == ["key", "step", "timestamp", "person", "place", "pause", "hour"]
    assert events["key"].to_pylist() == events["person"].to_pylist() == ["p3"] * 10
    assert events["step"].to_pylist() == list(range(1, 11))
    assert set(events["place"].to_pylist()) <= {f"site {number}" for number in range(5)}
    times, store = events["timestamp"].to_pylist(), EventStore.open("store")
    last = [line.split(",")[0] for line in visits() if ",p3," in line][-1]
    before = datetime.datetime.fromisoformat(last).replace(tzinfo=times[0].tzinfo)
    for time, pause, hour in zip(times, events["pause"].to_pylist(), events["hour"].to_pylist(), strict=True):
        least = before + datetime.timedelta(hours=pause)
        assert least <= time < least + datetime.timedelta(days=1)
        assert time.hour == hour
        before = time
    assert store.schema.timezone == str(times[0].tzinfo) == "Europe/Berlin"


def test_csv_and_parquet_hold_the_same(here: Path) -> None:
    parquet = generated("--key", "p3", "p5", "--events", "7")
    assert main(["generate", "run", "--device", "cpu", "--key", "p3", "p5", "--events", "7", "--out", "out.csv"]) == 0
    options = pyarrow.csv.ConvertOptions(column_types=parquet.schema, strings_can_be_null=True)
    csv = pyarrow.csv.read_csv("out.csv", convert_options=options)
    assert csv.num_rows == 14
    assert csv.to_pydict() == parquet.to_pydict()


def test_a_key_has_the_same_events_in_any_company(here: Path) -> None:
    alone = generated("--key", "p4", "--events", "8", "--seed", "3")
    every = generated("--events", "8", "--seed", "3", "--batch-size", "4")
    assert set(every["key"].to_pylist()) == {f"p{number}" for number in range(6)}  # p6 has no name in the store
    of_key = [row for row in every.to_pylist() if row["key"] == "p4"]
    assert of_key == alone.to_pylist()
    assert generated("--key", "p4", "--events", "8", "--seed", "4").to_pylist() != of_key


def test_without_out_the_events_are_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "run/checkpoints/best", "--device", "cpu", "--events", "12", "--temperature", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["key", "step", "timestamp", "person", "place", "pause", "hour"]
    assert [line.split()[1] for line in lines[1:13]] == [str(step) for step in range(1, 13)]
    assert len(lines) == 1 + 60 + 1
    assert lines[-1] == "and 12 more; give --out FILE.csv or FILE.parquet for all"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--key p33", "store has no person 'p33'; the nearest is 'p3'"),
        ("--key p3 p3", "key names 'p3' twice; keys must differ"),
        ("--out events.txt", "out is events.txt, but must be a .csv or .parquet file"),
        ("--out gone/events.csv", "--out gone/events.csv: there is no folder gone; make it first"),
        ("--events 0", "events is 0, but must be at least 1"),
        ("--temperature -1", "temperature is -1.0, but must be a finite number of at least 0"),
        ("--top-k 0", "top_k is 0, but must be at least 1, or None"),
        ("--batch-size 0", "batch_size is 0, but must be at least 1"),
        ("--store gone", "gone: holds no event store"),
        ("--store other", "the classes of place stand for other values; give the store it was trained on"),
    ],
)
def test_generate_mistakes_are_one_line_and_exit_2(
    here: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    if "other" in options:
        (here / "other.csv").write_text((here / "visits.csv").read_text().replace("site", "spot"))
        assert main(["prepare", "other.csv", "--schema", "visits.toml", "--out", "other"]) == 0
    before = sorted(path for path in here.rglob("*") if path.is_file())
    capsys.readouterr()
    assert main(["generate", "run", *options.split()]) == 2
    told = capsys.readouterr().err
    assert told.startswith("eventkern: ")
    assert message in told
    assert told.count("\n") == 1, told
    assert sorted(path for path in here.rglob("*") if path.is_file()) == before


def test_total_variation_is_half_the_sum_of_the_differences() -> None:
    assert total_variation(np.array([1, 1, 0]), np.array([0, 10, 10])) == pytest.approx(0.5)
    assert total_variation(np.array([3, 1]), np.array([30, 10])) == 0


def test_the_study_sets_as_many_generated_events_beside_the_true_ones(here: Path) -> None:
    run = open_run(here / "run", None, "cpu")
    generated_events, true = generated_and_true(run, most=5, seed=0, batch_size=4)
    assert generated_events.shape == true.shape
    store = run.store
    who = store.codes[store.split_row :, 0]
    for code in range(2, 8):  # the same numbers of the same keys, and of nobody else
        num_events = min(int((who == code).sum()), 5)
        assert (true[:, 0] == code).sum() == (generated_events[:, 0] == code).sum() == num_events
    found = distances(run, most=100, batch_size=4)
    assert [each.name for each in found] == ["person", "place", "pause", "hour"]
    assert found[0].generated == 0
    assert all(0 < each.generated < 0.6 for each in found[1:])
    assert table(found).count("\n") == 2 + 1 + 4


def test_memory_that_a_generation_uses_up_names_its_key(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def use_up(*_: object) -> None:
        torch.zeros(2**60, dtype=torch.uint8)

    monkeypatch.setattr("eventkern.models.EventTransformer.encode", use_up)
    assert main(["generate", "run", "--key", "p1", "--events", "2", "--device", "cpu", "--batch-size", "7"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("eventkern: out of memory at --batch-size 7: lower it (")
    assert told.count("\n") == 1


def test_a_store_of_strangers_has_no_key_to_go_on_with(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header, *rows = visits()
    strangers = [header, *(row.replace(",p", ",q") for row in rows)]
    Path("strangers.csv").write_text("\n".join(strangers) + "\n")
    assert main(["prepare", "strangers.csv", "--like", "store", "--out", "other"]) == 0
    capsys.readouterr()
    assert main(["generate", "run", "--store", "other", "--device", "cpu", "--events", "2"]) == 2
    told = capsys.readouterr().err
    assert told == "eventkern: other has no person that the store of the training knew\n"


def test_int8_weights_generate_what_their_model_says(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With integers as coarse as -1, 0 and 1, whose events are not those of the checkpoint's own weights."""
    monkeypatch.setattr("eventkern.nn.quantization.LARGEST", 1)
    options = ["--key", "p1", "p4", "--events", "7", "--temperature", "0"]
    made = generated(*options, "--quantize", "int8").to_pylist()
    run = open_run(here / "run", None, "cpu")
    quantize_int8(run.model)
    anchors, names = choose_keys(run.store, ("p1", "p4"))
    codes = generate_events(run, anchors, 7, seeds=[0, 0], batch_size=2, temperature=0.0)
    assert made == table_of(run.store, anchors, names, codes).to_pylist()
    assert made != generated(*options).to_pylist()
