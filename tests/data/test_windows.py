"""The block of a batch: its three tensors lie apart, on cache lines of their own, and nothing else is written."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from eventkern.data import Category, EventLoader, EventStore, Schema, Stream
from eventkern.data.prepare import prepare
from eventkern.data.windows import WindowGatherer


@pytest.fixture(scope="module", params=[1, 3])
def gatherer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WindowGatherer:
    """Of a store with an odd number of categories, so that no section is a whole number of cache lines by itself."""
    folder: Path = tmp_path_factory.mktemp("odd")
    random = np.random.default_rng(2)
    at = np.sort(random.integers(0, 86_400, 200)).astype("datetime64[s]")
    table = pa.table({name: random.integers(0, 9, 200).astype(str) for name in ("who", "where", "what")})
    pq.write_table(table.append_column("at", pa.array(at)), folder / "odd.parquet")
    schema = Schema(
        name="odd",
        timestamp="at",
        timezone="UTC",
        categories=tuple(Category(name, "id") for name in ("who", "where", "what")),
        streams=tuple(Stream(f"stream {number}") for number in range(request.param)),
        key="who",
        split="1970-01-01T20:00:00",
    )
    prepare(folder / "odd.parquet", schema, folder / "store", progress=False)
    store = EventStore.open(folder / "store")
    return EventLoader(store, "train", src_seq_len=5, tgt_seq_len=4, id_category_size=20, batch_size=7)._gatherer


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_tensors_of_a_block_lie_apart_on_cache_lines_of_their_own(
    gatherer: WindowGatherer, batch_size: int
) -> None:
    block = torch.zeros(gatherer.block_bytes(batch_size), dtype=torch.uint8)
    batch = gatherer.batch(block, batch_size)
    tensors = (batch.num_targets, batch.sources, batch.targets)
    starts = [tensor.data_ptr() - block.data_ptr() for tensor in tensors]
    ends = [start + tensor.nbytes for start, tensor in zip(starts, tensors, strict=True)]
    assert all(start % 64 == 0 for start in starts)
    assert all(end <= start for end, start in zip(ends, [*starts[1:], len(block)], strict=True))
    assert all(tensor.is_contiguous() for tensor in tensors)
    sources, targets, num_targets = (address - block.data_ptr() for address in gatherer.outputs(block, batch_size))
    assert [num_targets, sources, targets] == starts


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_a_gather_writes_its_tensors_and_nothing_between_them(gatherer: WindowGatherer, batch_size: int) -> None:
    batch = gatherer(torch.arange(batch_size))  # into poisoned memory
    block = torch.tensor(batch.sources.untyped_storage(), dtype=torch.uint8)
    assert len(block) == gatherer.block_bytes(batch_size)
    is_written = torch.zeros(len(block), dtype=torch.bool)
    for tensor in (batch.sources, batch.targets, batch.num_targets):
        start = tensor.storage_offset() * tensor.itemsize
        is_written[start : start + tensor.nbytes] = True
        assert ((tensor >= 0) & (tensor < 2**30)).all()
    assert (block[~is_written] == 255).all()
    assert (~is_written).sum() >= 56
