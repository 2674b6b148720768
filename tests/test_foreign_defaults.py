"""Every entry of the extension, and a training run, under a default device and dtypes that are not the data's."""

import ast
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

from eventkern import _C
from eventkern.data import EventLoader, EventStore, History, IndexSampler, LengthBucketedSampler, Schema, permutation
from eventkern.data.history import newest_events
from eventkern.data.prepare import prepare
from eventkern.models import EventTransformer, EventTransformerConfig, generate
from eventkern.models.generation import ClassSampler
from eventkern.nn import MultiHeadCrossEntropy
from eventkern.ops import attention, multi_embedding, multi_head_cross_entropy
from eventkern.train import Trainer, TrainerConfig
from eventkern.train.trainer import Loaders

TABLES = (5, 40, 7)
WINDOWS: Any = {"src_seq_len": 4, "tgt_seq_len": 3, "id_category_size": 30, "seed": 1}


@pytest.fixture(autouse=True)
def _poisoned_empty() -> None:
    """Not here: torch keeps in a cache which functions heed its default device, and knows them by identity."""
    _device_constructors.cache_clear()


def entries() -> set[str]:
    """Functions of the extension and methods of its classes, as its stub tells them; those of CUDA need a GPU."""
    names = set()
    for node in ast.parse((Path(__file__).parents[1] / "eventkern" / "_C.pyi").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
    return {name for name in names if "cuda" not in name}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The entries that were called so far."""
    seen: set[str] = set()

    def watched(name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.add(name)
            return real(*args, **kwargs)

        return call

    for entry in entries():
        name, _, method = entry.partition(".")
        owner = getattr(_C, name)
        if method:
            monkeypatch.setattr(owner, method, watched(entry, getattr(owner, method)))
        else:
            monkeypatch.setattr(_C, name, watched(entry, owner))
    return seen


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, visits_schema: Any) -> EventStore:
    folder = tmp_path_factory.mktemp("visits")
    random = np.random.default_rng(5)
    times = np.datetime64("2024-02-01T00:00:00") + np.sort(random.integers(0, 5_000_000, 400)).astype("timedelta64[s]")
    columns = {name: random.integers(0, most, 400).astype(str) for name, most in (("person", 9), ("place", 30))}
    pq.write_table(pa.table({"when": pa.array(times), **columns}), folder / "visits.parquet")
    (folder / "visits.toml").write_text(visits_schema("2024-03-15", "person", "place"))
    prepare(folder / "visits.parquet", Schema.load(folder / "visits.toml"), folder / "store", progress=False)
    return EventStore.open(folder / "store")


@pytest.fixture(scope="module")
def model(store: EventStore) -> EventTransformer:
    torch.manual_seed(4)
    sizes = tuple(store.sizes(WINDOWS["id_category_size"]))
    lengths = {"src_seq_len": WINDOWS["src_seq_len"], "tgt_seq_len": WINDOWS["tgt_seq_len"]}
    names = store.schema.category_names
    return EventTransformer(EventTransformerConfig(names, sizes, num_streams=2, d_model=16, num_heads=2, **lengths))


def of_ops(dtype: torch.dtype) -> Iterator[Tensor]:
    generator = torch.Generator("cpu").manual_seed(6)

    def drawn(*shape: int) -> Tensor:
        numbers = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return numbers.to(dtype).requires_grad_()

    def classes(*shape: int) -> Tensor:
        columns = [torch.randint(size, shape, generator=generator, dtype=torch.int64, device="cpu") for size in TABLES]
        return torch.stack(columns, -1)

    leaves = [drawn(2, 2, 9, 8) for _ in range(3)]
    outputs = [attention(*leaves, is_causal=True)]
    weight, hidden, bias, ids = drawn(sum(TABLES), 8), drawn(11, 8), drawn(sum(TABLES)), classes(11)
    outputs += [multi_embedding(ids, weight, TABLES, mode=mode) for mode in ("sum", "mean", "concat")]
    for reduction in ("mean", "sum", "none"):
        outputs.append(multi_head_cross_entropy(hidden, weight, ids, TABLES, bias=bias, reduction=reduction))
    upstream = [
        torch.arange(output.numel(), dtype=torch.float32, device="cpu").view(output.shape).to(output.dtype)
        for output in outputs
    ]
    yield from outputs
    yield from torch.autograd.grad(outputs, [*leaves, weight, hidden, bias], upstream)


def of_a_table(folder: Path) -> Iterator[Tensor]:
    """A CSV file, one of whose records is too long."""
    folder.mkdir(exist_ok=True)
    lines = ["when,person,place", *(f"2024-01-0{day}T09:00:00,p{day % 2},q{day}" for day in range(1, 9)), "a,b,c,d"]
    (folder / "visits.csv").write_text("\n".join(lines))
    schema = Schema.from_dict(
        {
            "name": "visits",
            "timestamp": "when",
            "timezone": "UTC",
            "key": "person",
            "split": "2024-01-06",
            "streams": [{"name": "all", "entity": "all"}],
            "categories": [{"name": name, "kind": "id"} for name in ("person", "place")],
        }
    )
    report = prepare(folder / "visits.csv", schema, folder / "visits", on_error="skip", progress=False)
    assert len(report.skipped) == 1
    yield EventStore.open(report.path).rows(torch.tensor([2, 5], dtype=torch.int64, device="cpu"))


def of_the_store(store: EventStore) -> Iterator[Tensor]:
    indices = torch.tensor([3, 0, 7], dtype=torch.int64, device="cpu")
    yield store.rows(indices)
    yield permutation(1000, seed=2)
    for sampler in (IndexSampler(50, 8), IndexSampler(50, 8, shuffle=False), IndexSampler(5000, 64, window=512)):
        yield from sampler
    yield from LengthBucketedSampler(np.arange(1, 60), 100)
    for options in (
        {"batch_size": 16},
        {"batch_size": 16, "prefetch": 0},
        {"batch_size": 7, "rank": 1, "world_size": 2},
    ):
        for batch in EventLoader(store, "train", **WINDOWS, **options):
            yield from (batch.sources, batch.targets, batch.num_targets)
    gathered = EventLoader(store, "train", **WINDOWS, batch_size=4)._gatherer(indices)
    yield from (gathered.sources, gathered.targets, gathered.num_targets)


def of_the_model(store: EventStore, model: EventTransformer) -> Iterator[Tensor]:
    batch = next(iter(EventLoader(store, "validation", **WINDOWS, batch_size=5)))
    yield model(batch)
    yield from model.metrics(batch).values()
    yield from model.scores(batch).values()
    history = History(
        store,
        newest_events(store)[:3],
        src_seq_len=WINDOWS["src_seq_len"],
        id_category_size=WINDOWS["id_category_size"],
    )
    for top_k in (None, 4):
        yield generate(model, history, 5, seeds=[1, 2, 3], top_k=top_k)
    yield generate(model, history, 2, temperature=0)
    logits = torch.linspace(-1, 1, 2 * sum(TABLES), dtype=torch.float32, device="cpu").view(2, -1)
    uniforms = torch.full((2, len(TABLES)), 0.4, dtype=torch.float32, device="cpu")
    yield from (ClassSampler(TABLES, top_k=3)(logits, uniforms), ClassSampler(TABLES)(logits, uniforms))
    heads: MultiHeadCrossEntropy = model.heads
    yield heads.probabilities(model.states(batch), 1)


def of_a_run(store: EventStore, model: EventTransformer, folder: Path) -> Iterator[Any]:
    """Losses and weights of two epochs, and an evaluation after each."""
    keys: Any = {
        "epochs": 2,
        "batch_size": 16,
        "grad_accum": 3,
        "lr": 0.01,
        "device": "cpu",
        "precision": "fp32",
        "log_every": 1,
    }
    config = TrainerConfig(compile="off", schedule="constant", clip=1.0, **keys)
    loaders = (EventLoader(store, split, **WINDOWS, batch_size=16) for split in ("train", "validation"))
    trained = copy.deepcopy(model)
    Trainer(trained, config, Loaders(*loaders), run_dir=folder).fit()
    yield from trained.state_dict().values()
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        yield {name: value for name, value in json.loads(line).items() if "loss" in name or name == "grad_norm"}


def everything(store: EventStore, model: EventTransformer, folder: Path) -> list[Any]:
    store = EventStore.open(store.path)  # whose reader of rows is yet to be made
    results: list[Any] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        results += of_ops(dtype)
    results += of_the_store(store)
    results += of_a_table(folder)
    results += of_the_model(store, model)
    results += of_a_run(store, model, folder)
    return results


@pytest.fixture(params=["meta", torch.float64, torch.bfloat16], ids=str)
def foreign(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Sets a default when called."""
    before = torch.get_default_device(), torch.get_default_dtype()
    is_device = isinstance(request.param, str)
    yield lambda: (torch.set_default_device if is_device else torch.set_default_dtype)(request.param)
    torch.set_default_device(None)
    torch.set_default_dtype(before[1])


def test_all_that_reaches_the_extension_is_the_same(store, model, called, foreign, tmp_path):
    expected = everything(store, model, tmp_path / "ordinary")
    assert called == entries()
    called.clear()
    foreign()
    results = everything(store, model, tmp_path / "foreign")
    assert called == entries()
    assert len(results) == len(expected) > 100
    for number, (result, value) in enumerate(zip(results, expected, strict=True)):
        if isinstance(value, Tensor):
            assert (result.dtype, result.device) == (value.dtype, value.device), number
            assert result.equal(value), number
        else:
            assert result == value
