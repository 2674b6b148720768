"""`eventkern evaluate`: its tables, its files, and stores that the run was not trained on."""

from __future__ import annotations

import datetime
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eventkern.cli import main
from eventkern.data import EventLoader, EventStore
from eventkern.models import EventTransformer, EventTransformerConfig
from eventkern.train.checkpoint import load_checkpoint, save_checkpoint

SCHEMA = """
name = "visits"
timestamp = "when"
timezone = "UTC"
key = "person"
split = "2024-03-01"
streams = [{ name = "person", entity = "person" }, { name = "time", entity = "all" }]
categories = [
  { name = "person", kind = "id" },
  { name = "place", kind = "id" },
  { name = "price", kind = "bins", bins = 4 },
  { name = "year", kind = "time", column = "when", field = "year" },
]
"""
CONFIG = """
src_seq_len = 4
tgt_seq_len = 3
id_category_size = 20
epochs = 50
max_steps = 20
batch_size = 8
lr = 0.01
schedule = "constant"
evaluate_every = 20
device = "cpu"
data = { store = "store" }
model = { d_model = 16, num_heads = 2 }
"""
NAMES = ["person", "place", "price", "year"]


def visits(first: datetime.datetime, seed: int, num_rows: int = 400) -> str:
    """A person's next place follows from the present one, but for one in ten."""
    draw = random.Random(seed)
    places = dict.fromkeys(range(6), 0)
    lines = ["when,person,place,price"]
    for row in range(num_rows):
        at = first + datetime.timedelta(hours=5 * row)
        person = draw.randrange(6)
        places[person] = draw.randrange(5) if draw.random() < 0.1 else (places[person] + 1) % 5
        lines.append(f"{at:%Y-%m-%dT%H:%M:%S},p{person},site {places[person]},{draw.gauss(places[person], 1):.3f}")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def made(make_run: Callable[[str, str, str], Path]) -> Path:
    """A folder with a store and a run of 20 steps; tests write new files there alone."""
    folder = make_run(visits(datetime.datetime(2024, 1, 1), 3), SCHEMA, CONFIG)
    (folder / "early.toml").write_text(SCHEMA.replace("2024-03-01", "2023-03-01"))
    return folder


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["evaluate", "run", "--device", "cpu", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def read_json(path: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(path.read_text())
    return told


def test_the_files_and_the_tables_say_the_same(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(here.rglob("*"))
    run(capsys)
    assert sorted(here.rglob("*")) == before  # without --out it prints alone
    shown = run(capsys, "--out", "new/folder", "--top-k", "1", "3", "100", "--batch-size", "7")
    assert sorted(path.name for path in (here / "new/folder").iterdir()) == ["evaluation.json", "evaluation.png"]
    assert "wrote new/folder/evaluation.json and evaluation.png" in shown
    told = read_json(here / "new/folder/evaluation.json")
    assert (told["checkpoint"], told["precision"]) == ("run/checkpoints/best", "fp32")
    trained = read_json(here / "run/ledger.json")
    table = shown[shown.index("Scorecard") :]
    for category, held, known in zip(
        told["scorecard"]["categories"], told["ledger"]["categories"], trained["categories"], strict=True
    ):
        assert held["model"] == pytest.approx(known["model"], rel=1e-5)
        assert category["loss"] == held["model"]
        assert category["perplexity"] == pytest.approx(math.exp(held["model"]))
        assert category["top_k"]["1"] == held["top1"] == pytest.approx(known["top1"], abs=1e-6)
        assert category["top_k"]["1"] <= category["top_k"]["3"] <= category["top_k"]["100"] == 1
        assert sum(each["num_labels"] for each in category["reliability"]) == category["num_labels"] > 0
        (line,) = [line for line in table.splitlines() if line.startswith(category["name"] + " ")]
        assert f"{category['perplexity']:.3f}" in line
        assert f"{100 * category['calibration_error']:.1f} %" in line
        assert f"{100 * category['top_k']['3']:.1f} %" in line
    assert told["scorecard"]["sum"]["loss"] == pytest.approx(trained["sum"]["model"], rel=1e-5)


def test_scores_are_those_of_all_windows_at_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "--out", "parts", "--batch-size", "5")
    state, store = load_checkpoint(here / "run/checkpoints/best"), EventStore.open("store")
    model = EventTransformer(EventTransformerConfig(**state["metadata"]["model"])).eval()
    model.load_state_dict(state["model"])
    sizes = {"src_seq_len": 4, "tgt_seq_len": 3, "id_category_size": 20}
    (batch,) = EventLoader(store, "validation", batch_size=10_000, **sizes)
    labels = batch.targets[:, 1:].long()
    with torch.no_grad():
        states = model.decode(batch.targets[:, :-1], model.encode(batch.sources))
    for head, category in enumerate(read_json(here / "parts/evaluation.json")["scorecard"]["categories"]):
        kept = labels[..., head] != 0
        label, p = labels[..., head][kept], model.heads.probabilities(states, head)[kept].double()
        assert category["num_labels"] == len(label) == int(batch.num_targets)
        one_hot = torch.nn.functional.one_hot(label, p.shape[1])
        assert category["brier"] == pytest.approx(float((p - one_hot).square().sum(1).mean()), rel=1e-5)
        assert category["confidence"] == pytest.approx(float(p.amax(1).mean()), rel=1e-5)
        assert category["top_k"]["5"] == pytest.approx(
            float((p.topk(min(5, p.shape[1])).indices == label[:, None]).any(1).double().mean())
        )


def test_int8_weights_and_what_they_cost(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "--out", "plain")
    shown = run(capsys, "--out", "int8", "--quantize", "int8")
    plain, told = read_json(here / "plain/evaluation.json"), read_json(here / "int8/evaluation.json")
    assert plain["quantization"] is None
    held = told["quantization"]
    assert held["loss_sum_before"] == pytest.approx(plain["scorecard"]["sum"]["loss"], rel=1e-6)
    assert held["loss_sum"] == pytest.approx(told["scorecard"]["sum"]["loss"], rel=1e-9)
    cost = held["loss_sum"] - held["loss_sum_before"]
    assert 0 < abs(cost) < 0.05
    state = load_checkpoint(here / "run/checkpoints/best")["model"]
    assert held["bytes_before"] == sum(4 * weight.numel() for weight in state.values())
    assert held["bytes"] < 0.5 * held["bytes_before"]  # biases, norms and scales are many in so small a model
    assert re.search(rf"^int8 weights: 0.0\d MB of 0.0\d, loss .* nats, {cost:+.4f}$".replace("+", r"\+"), shown, re.M)


def test_next_years_table_is_evaluated_with_the_classes_of_this_one(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "next.csv").write_text(visits(datetime.datetime(2025, 1, 1), 4).replace("p5,", "p9,"))
    assert main(["prepare", "next.csv", "--schema", "visits.toml", "--out", "fitted"]) == 2
    assert "every event lies at or after the split" in capsys.readouterr().err
    assert main(["prepare", "next.csv", "--like", "store", "--out", "next"]) == 0
    shown = run(capsys, "--store", "next", "--out", "years")
    assert f"{400 - 6} validation labels a category" in shown  # but for the first event of each
    told = read_json(here / "years/evaluation.json")
    assert told["store"] == "next"
    person, place, price, year = told["ledger"]["categories"]
    trained = {each["name"]: each for each in read_json(here / "run/ledger.json")["categories"]}
    assert place["model"] == pytest.approx(trained["place"]["model"], abs=0.35)
    assert place["marginal"] == pytest.approx(trained["place"]["marginal"], abs=0.1)
    assert price["classes"] == trained["price"]["classes"]
    # A person in six is unknown, and so is the year: class 1, which training never saw.
    labels = EventStore.open("store").split_row - 6
    assert year["marginal"] == pytest.approx(math.log(labels + year["classes"] - 1))
    assert person["marginal"] > trained["person"]["marginal"] + 0.4


def test_the_store_of_the_run_is_asked_for_where_it_alone_can_be_counted_on(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "visits.csv", "--like", "store", "--schema", "early.toml", "--out", "early"]) == 0
    (here / "store").rename(here / "moved")
    try:
        capsys.readouterr()
        assert main(["evaluate", "run", "--store", "early", "--device", "cpu"]) == 2
        told = capsys.readouterr().err
    finally:
        (here / "moved").rename(here / "store")
    assert told.startswith(
        "eventkern: early: has no event before its split, so baselines are counted on the run's own "
    )
    assert "holds no event store" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--top-k 0 5", "top_k is (0, 5), but must be one number or more, each at least 1"),
        ("--out visits.csv", "--out visits.csv: is a file; give the path of a folder"),
    ],
)
def test_mistakes_are_one_line(here: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    capsys.readouterr()
    assert main(["evaluate", "run", *arguments.split()]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"eventkern: {message}")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_without_matplotlib_the_numbers_are_written(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventkern.train.reliability.has", lambda package: False)
    shown = run(capsys, "--out", "numbers")
    assert [path.name for path in (here / "numbers").iterdir()] == ["evaluation.json"]
    assert re.search(r"wrote numbers/evaluation.json; no picture, for want of matplotlib", shown)


def test_export_writes_a_program_of_the_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "run", "--out", "model.pt2", "--quantize", "int8"]) == 0
    assert "sources (B, 2, 4, 4) and events (B, 1 to 3, 4), int32" in capsys.readouterr().out
    state = load_checkpoint(here / "run/checkpoints/best")
    model = EventTransformer(EventTransformerConfig(**state["metadata"]["model"])).eval()
    model.load_state_dict(state["model"])
    sources, events = torch.ones(3, 2, 4, 4, dtype=torch.int32), torch.full((3, 2, 4), 2, dtype=torch.int32)
    logits = torch.export.load(here / "model.pt2").module()(sources, events)
    with torch.no_grad():
        states = model.decode(events, model.encode(sources))
    for head, name in enumerate(NAMES):
        error = logits[name] - model.heads.logits(states, head)
        assert 0 < error.abs().max() < 0.1  # of int8 weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("export run --out model.onnx", "out is model.onnx, but must be a .pt2 file"),
        ("export run --out gone/model.pt2", "--out gone/model.pt2: there is no folder gone; make it first"),
        ("export gone.pt --out model.pt2", "gone.pt: no such checkpoint"),
    ],
)
def test_mistakes_of_export_are_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    (here / "model.pt2").unlink(missing_ok=True)
    capsys.readouterr()
    assert main(arguments.split()) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"eventkern: {message}")
    assert told.count("\n") == 1
    assert not (here / "model.pt2").exists()


@pytest.fixture
def broken(here: Path) -> Callable[[str], Path]:
    """Writes a checkpoint of the run's with one tensor of NaN."""

    def write(name: str) -> Path:
        state = load_checkpoint(here / "run/checkpoints/best")
        state["model"][name].fill_(torch.nan)
        path = here / "broken.pt"
        save_checkpoint(state, path)
        return path

    return write


def test_a_loss_that_is_not_finite_is_null(
    here: Path, broken: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A bias is no integer, so that the weights can be quantised."""
    options = ["--device", "cpu", "--out", "lost", "--quantize", "int8"]
    assert main(["evaluate", str(broken("heads.bias")), *options]) == 0
    shown = capsys.readouterr().out
    assert "The validation loss is not finite in person, place, price and year." in shown
    assert "int8 weights: " in shown
    held = read_json(here / "lost/evaluation.json")["quantization"]
    assert (held["loss_sum_before"], held["loss_sum"]) == (None, None)
    assert held["bytes"] < held["bytes_before"]


@pytest.mark.parametrize("command", ["evaluate {}", "export {} --out model.pt2", "generate {} --out made.csv"])
def test_weights_that_are_not_finite_have_no_integers(
    here: Path, broken: Callable[[str], Path], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    path = broken("heads.weight")
    before = sorted(here.rglob("*"))
    capsys.readouterr()
    assert main([*command.format(path).split(), "--device", "cpu", "--quantize", "int8"]) == 2
    shown = capsys.readouterr()
    assert shown.err == (
        f"eventkern: {path}: --quantize int8: heads.weight holds a value that is not finite, which no integer "
        "stands for\n"
    )
    assert shown.out == ""
    assert sorted(here.rglob("*")) == before


def test_memory_that_an_export_uses_up_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventkern.models.export.exported_bytes", lambda _: torch.zeros(2**60, dtype=torch.uint8))
    capsys.readouterr()
    assert main(["export", "run", "--out", "model.pt2"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("eventkern: out of memory on --device cpu: export where there is more (")
    assert told.count("\n") == 1
