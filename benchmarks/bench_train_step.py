"""A training step of the event transformer: forward, backward, clipping, AdamW, on one micro-batch of random events."""

import copy
import dataclasses
from functools import partial

import pytest
import torch

from benchmarks.measure import Compare, Contender
from benchmarks.peers import EVENT_TRANSFORMER
from benchmarks.training import Shapes, TrainingStep, random_batch, step_work
from eventkern.models import EventTransformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("config", ["cpu_baseline", "gpu_optimized"])
@pytest.mark.parametrize("device_name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_train_step(device_name: str, config: str, precision: str, compare: Compare, has_slow_starters: bool) -> None:
    device, dtype = torch.device(device_name), DTYPES[precision]
    shapes = Shapes.load(f"{config}.json")
    batch = random_batch(shapes, device)
    torch.manual_seed(0)
    model = EventTransformer(shapes.model).to(device)
    steps = {"eventkern": TrainingStep(copy.deepcopy(model), dtype)}
    if has_slow_starters:
        steps["eventkern compiled"] = TrainingStep(compiled(copy.deepcopy(model), device), dtype)
    for peer in EVENT_TRANSFORMER:
        if has_slow_starters or not peer.is_slow_to_start:
            steps[peer.name] = TrainingStep(peer.build(model), dtype)

    # A figure is worth nothing unless all compute the same: the first losses must agree before anything is timed.
    first = {name: step(batch).float() for name, step in steps.items()}
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    for losses in first.values():
        torch.testing.assert_close(losses, first["eventkern"], rtol=tolerance, atol=0.0)

    contenders = [Contender(name, partial(step, batch), name.startswith("eventkern")) for name, step in steps.items()]
    work = step_work(model, batch)
    compare(f"{config} {precision} {device_name}", contenders, work, device=device, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [8, 32, 128, 512, 2048])
def test_train_step_by_batch(batch_size: int, compare: Compare, has_slow_starters: bool) -> None:
    """gpu_optimized in bf16: from some batch on the cost of an event stays the same, or memory ends."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    shapes = dataclasses.replace(Shapes.load("gpu_optimized.json"), batch_size=batch_size)
    batch = random_batch(shapes, device)
    torch.manual_seed(0)
    model = EventTransformer(shapes.model).to(device)
    steps = {"eventkern": TrainingStep(copy.deepcopy(model), dtype)}
    if has_slow_starters:
        steps["eventkern compiled"] = TrainingStep(compiled(copy.deepcopy(model), device), dtype)
    contenders = [Contender(name, partial(step, batch), is_ours=True) for name, step in steps.items()]
    try:
        compare(f"batch {batch_size:,} bf16 cuda", contenders, step_work(model, batch), device=device, dtype=dtype)
    except torch.OutOfMemoryError:
        free, total = torch.cuda.mem_get_info(device)
        pytest.skip(f"out of memory at batch {batch_size:,}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB were left")


def compiled(model: EventTransformer, device: torch.device) -> EventTransformer:
    """As the trainer compiles it; on CUDA as graphs."""
    model.compile(fullgraph=True, mode="reduce-overhead" if device.type == "cuda" else None)
    return model
