"""Generating the events of a window one by one: over the cache, and by decoding the whole prefix for each.

The streams' vectors are computed before, once, for both; both take the heads of the newest state alone and draw from
them alike. A quick run takes every tenth of a window's events, so evenly spread that the mean length of the prefix is
that of all of them; `--full` takes all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Compare, Contender
from benchmarks.training import RandomBatch, Shapes, random_batch
from eventkern.models import EventTransformer
from eventkern.models.generation import CachedDecoder, ClassSampler
from profiling.roofline import Work

SAMPLING = {"greedy": {"temperature": 0.0}, "0.8, top 20": {"temperature": 0.8, "top_k": 20}}
EVERY = 10


@dataclass
class PrefixDecoder:
    """The decoder without a cache: the window's events so far are decoded again for each new one."""

    model: EventTransformer
    window_BTC: Tensor
    memory_BKD: Tensor
    position: int = 0

    def step(self, events_BC: Tensor) -> Tensor:
        self.window_BTC[:, self.position] = events_BC
        self.position += 1
        return self.model.decode(self.window_BTC[:, : self.position], self.memory_BKD)[:, -1]


@dataclass
class Generation:
    """Steps of one window at chosen positions, with every position before them in place."""

    model: EventTransformer
    batch: RandomBatch
    positions: Sequence[int]
    sampler: ClassSampler

    def __post_init__(self) -> None:
        self.memory_BKD = self.model.encode(self.batch.sources)
        self.window_BTC = self.batch.targets[:, :-1]
        batch_size, length, num_categories = self.window_BTC.shape
        self.uniforms = torch.rand(length, batch_size, num_categories, generator=torch.Generator().manual_seed(1))
        self.uniforms = self.uniforms.to(self.window_BTC.device)

    def cached(self) -> CachedDecoder:
        decoder = CachedDecoder(self.model, len(self.window_BTC))
        decoder.begin(self.memory_BKD)
        for position in range(self.window_BTC.shape[1]):
            decoder.step(self.window_BTC[:, position])
        return decoder

    def prefix(self) -> PrefixDecoder:
        return PrefixDecoder(self.model, self.window_BTC.clone(), self.memory_BKD)

    def run(self, decoder: CachedDecoder | PrefixDecoder, look: Callable[[Tensor], object] | None = None) -> None:
        """Generate at the positions; the window's own events take the place of those drawn, so that all do the same."""
        heads = self.model.heads
        with torch.inference_mode():
            for position in self.positions:
                decoder.position = position
                logits_BV = F.linear(decoder.step(self.window_BTC[:, position]), heads.weight, heads.bias)
                self.sampler(logits_BV, self.uniforms[position])
                if look is not None:
                    look(logits_BV)


def generation_work(shapes: Shapes, positions: Sequence[int]) -> Work:
    """What the steps need at least: a product with every weight a row; weights and the keys and values read a step."""
    model, width, rows = shapes.model, shapes.model.d_model, shapes.batch_size
    weights = model.decoder_layers * 14 * width**2 + width * sum(model.category_sizes)
    attended = sum(position + 1 + model.num_streams for position in positions) * model.decoder_layers
    return Work(
        operations=2.0 * rows * (len(positions) * weights + 2 * attended * width),
        bytes=4.0 * (len(positions) * weights + rows * 2 * attended * width),
        events=rows * len(positions),
    )


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("device_name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_generate(device_name: str, batch_size: int, sampling: str, compare: Compare, is_full: bool) -> None:
    device = torch.device(device_name)
    shapes = replace(Shapes.load("gpu_optimized.json"), batch_size=batch_size)
    torch.manual_seed(0)
    model = EventTransformer(shapes.model).to(device).eval()
    length = shapes.model.tgt_seq_len
    positions = range(length) if is_full else range(EVERY // 2, length, EVERY)
    sampler = ClassSampler(shapes.model.category_sizes, **SAMPLING[sampling])  # type: ignore[arg-type]
    with torch.inference_mode():
        generation = Generation(model, random_batch(shapes, device), positions, sampler)
        decoders: dict[str, CachedDecoder | PrefixDecoder] = {
            "eventkern, cached": generation.cached(),
            "the whole prefix each time": generation.prefix(),
        }

    # A figure is worth nothing unless both compute the same: logits at every position must agree.
    logits: dict[str, list[Tensor]] = {name: [] for name in decoders}
    generation.run(decoders["the whole prefix each time"], logits["the whole prefix each time"].append)
    generation.run(decoders["eventkern, cached"], logits["eventkern, cached"].append)
    for ours, theirs in zip(*logits.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    logits.clear()

    contenders = [
        Contender(name, partial(generation.run, decoder), name.startswith("eventkern"))
        for name, decoder in decoders.items()
    ]
    case = f"batch {batch_size}, {len(positions)} of {length} events, {sampling}, {device_name}"
    compare(case, contenders, generation_work(shapes, positions), device=device, dtype=torch.float32)
