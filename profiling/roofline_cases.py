"""What the roofline shows: every op and the training steps, ready to run, each with its counted work."""

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import work
from benchmarks.studies.shuffle.data import make_store
from benchmarks.training import Shapes, TrainingStep, random_batch, step_work
from eventkern import ops
from eventkern.data import EventLoader, permutation
from eventkern.models import EventTransformer, EventTransformerConfig
from profiling.roofline import Work

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONFIGS = ("cpu_baseline", "gpu_optimized")
PASSES = {"forward": False, "forward+backward": True}
MAIN = "gpu_optimized"
"""The configuration whose shapes the ops have."""


@dataclass(frozen=True)
class Sizes:
    """How much the ops are given.

    Args:
        batch_size: of the events of `gpu_optimized`: rows, heads and attention follow from it.
        num_indices: of the permutation.
        num_events: of the store that windows are gathered from.
        num_batches: of windows, in one call.
    """

    batch_size: int
    num_indices: int
    num_events: int
    num_batches: int


SIZES = {
    ("cpu", False): Sizes(8, 1 << 23, 100_000, 100),
    ("cpu", True): Sizes(8, 1 << 18, 10_000, 20),
    ("cuda", False): Sizes(256, 1 << 26, 100_000, 500),
    ("cuda", True): Sizes(64, 1 << 24, 10_000, 50),
}
"""By device type and whether it must be quick."""


Make = Callable[[torch.device, Shapes, int, torch.dtype, bool], "Case"]


@dataclass(frozen=True)
class Case:
    """Work that is ready to run.

    Args:
        subject: the op, or "training step".
        name: what distinguishes it: passes, shapes.
        dtype: of its matrix products and of what it reads and writes.
        work: counted from its shapes.
        run: does it once.
        touched: bytes that it touches again each time it runs; as many as the work's, unless told.
    """

    subject: str
    name: str
    dtype: torch.dtype
    work: Work
    run: Callable[[], object]
    touched: float | None = None

    @property
    def repeated_work(self) -> Work:
        """The work of a run after the first: what fits a cache then comes from there, not from memory."""
        counted = self.work
        touched = counted.bytes + counted.cache_size if self.touched is None else self.touched
        if touched > work.CACHE_BYTES:
            return counted
        return replace(
            counted, bytes=0.0, cache_bytes=counted.bytes + counted.cache_bytes, cache_size=_power_of_two(touched)
        )


def _power_of_two(size: float) -> int:
    """The next one: a few reads stand for all sizes."""
    return 1 << max(0, math.ceil(math.log2(max(1.0, size))))


@contextmanager
def cases(device: torch.device, sizes: Sizes, configs: tuple[str, ...] = CONFIGS) -> Iterator[list[Case]]:
    """All cases, an op's beside one another."""
    shapes, made = Shapes.load(MAIN), []
    for make in (_multi_embedding, _multi_head_cross_entropy, *_attentions(shapes.model)):
        for dtype in DTYPES.values():
            made += [make(device, shapes, sizes.batch_size, dtype, is_backward) for is_backward in PASSES.values()]
    steps = [training_step(device, name, Shapes.load(name), dtype) for name in configs for dtype in DTYPES.values()]
    with _gathered(device, shapes, sizes) as gathered:
        yield [*made, _permutation(device, sizes.num_indices), gathered, *steps]


def _passes(function: Callable[[], Tensor], leaves: list[Tensor], upstream: Tensor, is_backward: bool) -> object:
    """The function alone, or with the gradients of its leaves."""
    if is_backward:
        return torch.autograd.grad(function(), leaves, upstream)
    with torch.no_grad():
        return function()


def _leaf(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()


def _pass_name(is_backward: bool) -> str:
    return next(name for name, value in PASSES.items() if value == is_backward)


def _ids(num_events: int, sizes: tuple[int, ...], device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randint(size, (num_events,), generator=generator) for size in sizes]
    return torch.stack(columns, -1).to(device, torch.int32)


def _multi_embedding(
    device: torch.device, shapes: Shapes, batch_size: int, dtype: torch.dtype, is_backward: bool
) -> Case:
    model = shapes.model
    num_events = batch_size * (model.num_streams * model.src_seq_len + model.tgt_seq_len)
    tables, dim = model.category_sizes, model.d_model
    ids, weight = _ids(num_events, tables, device), _leaf(sum(tables), dim, device=device, dtype=dtype)
    upstream = _leaf(num_events, dim, device=device, dtype=dtype).detach()
    function = partial(ops.multi_embedding, ids, weight, tables)
    return Case(
        "multi_embedding",
        f"{_pass_name(is_backward)} N {num_events:,} C {len(tables)} D {dim}",
        dtype,
        work.multi_embedding(num_events, tables, dim, dtype, is_backward),
        partial(_passes, function, [weight], upstream, is_backward),
    )


def _multi_head_cross_entropy(
    device: torch.device, shapes: Shapes, batch_size: int, dtype: torch.dtype, is_backward: bool
) -> Case:
    num_rows, heads, dim = batch_size * shapes.model.tgt_seq_len, shapes.model.category_sizes, shapes.model.d_model
    hidden = _leaf(num_rows, dim, device=device, dtype=dtype)
    weight = _leaf(sum(heads), dim, device=device, dtype=dtype)
    targets = _ids(num_rows, heads, device)
    function = partial(ops.multi_head_cross_entropy, hidden, weight, targets, heads)
    upstream = torch.ones(len(heads), device=device)
    return Case(
        "multi_head_cross_entropy",
        f"{_pass_name(is_backward)} N {num_rows:,} H {len(heads)} D {dim}",
        dtype,
        work.multi_head_cross_entropy(num_rows, heads, dim, dtype, targets.itemsize, is_backward),
        partial(_passes, function, [hidden, weight], upstream, is_backward),
    )


def _attentions(model: EventTransformerConfig) -> list[Make]:
    """The attentions of the model: sequences of an event batch, queries, keys, is_causal."""
    streams, sources, events = model.num_streams, model.src_seq_len, model.tgt_seq_len
    return [
        partial(_attention, "encoder", streams, sources, sources, False),
        partial(_attention, "decoder", 1, events, events, True),
        partial(_attention, "last query", streams, 1, sources, False),
        partial(_attention, "cross", 1, events, streams, False),
    ]


def _attention(
    name: str,
    sequences: int,
    queries: int,
    keys: int,
    is_causal: bool,
    device: torch.device,
    shapes: Shapes,
    batch_size: int,
    dtype: torch.dtype,
    is_backward: bool,
) -> Case:
    heads, head_dim = shapes.model.num_heads, shapes.model.d_model // shapes.model.num_heads
    shape = (batch_size * sequences, heads, queries, keys, head_dim, is_causal)
    # As projections leave them: the heads of a position beside one another.
    query, key, value = (
        _leaf(shape[0], length, heads, head_dim, device=device, dtype=dtype).transpose(1, 2)
        for length in (queries, keys, keys)
    )
    function = partial(ops.attention, query, key, value, is_causal=is_causal)
    return Case(
        "attention",
        f"{name} {_pass_name(is_backward)} {'x'.join(map(str, shape[:4]))} H {head_dim}",
        dtype,
        work.attention(shape, dtype.itemsize, is_backward),
        partial(_passes, function, [query, key, value], torch.ones_like(query), is_backward),
    )


def _permutation(device: torch.device, num_indices: int) -> Case:
    out = torch.empty(num_indices, dtype=torch.int64, device=device)
    run = partial(permutation, num_indices, seed=0, device=device, out=out)
    return Case("permutation", f"n {num_indices:,}", torch.int64, work.permutation(num_indices), run)


@contextmanager
def _gathered(device: torch.device, shapes: Shapes, sizes: Sizes) -> Iterator[Case]:
    """Windows in a shuffled order, gathered on the device by the one who waits."""
    model = shapes.model
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), sizes.num_events, seed=0)
        loader = EventLoader(
            store,
            "train",
            src_seq_len=model.src_seq_len,
            tgt_seq_len=model.tgt_seq_len,
            id_category_size=model.category_sizes[0],
            batch_size=sizes.batch_size,
            device=device,
            resident=device.type == "cuda",
            prefetch=0,
        )
        num_batches = min(sizes.num_batches, len(loader) - 1)
        windows = num_batches * sizes.batch_size
        num_rows = windows * (len(store.schema.streams) * model.src_seq_len + model.tgt_seq_len + 1)
        yield Case(
            "gather",
            f"{num_batches} batches of {sizes.batch_size} windows, n {store.num_events:,}",
            torch.int32,
            work.gather(num_rows, len(store.class_sizes), store.codes.itemsize),
            lambda: sum(1 for _ in islice(loader, num_batches)),
            touched=store.codes.nbytes + num_rows // num_batches * len(store.class_sizes) * work.ID_BYTES,
        )


def training_step(device: torch.device, config: str, shapes: Shapes, dtype: torch.dtype) -> Case:
    """A step as the trainer takes it, on one batch."""
    torch.manual_seed(0)
    model = EventTransformer(shapes.model).to(device)
    batch = random_batch(shapes, device)
    return Case("training step", config, dtype, step_work(model, batch), partial(TrainingStep(model, dtype), batch))
