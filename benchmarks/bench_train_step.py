"""A training step of the event transformer: forward, backward, clipping, AdamW, on one micro-batch of random events."""

import copy
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


def compiled(model: EventTransformer, device: torch.device) -> EventTransformer:
    """As the trainer compiles it; on CUDA as graphs."""
    model.compile(fullgraph=True, mode="reduce-overhead" if device.type == "cuda" else None)
    return model
