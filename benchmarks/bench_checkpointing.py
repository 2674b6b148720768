"""What `checkpoint_blocks` trades: the memory of a training step for the forward of its layers once more.

The peer is the same model without it, so that "x best peer" is the step's slowdown and "peak MiB" what is saved.
"""

import dataclasses
from functools import partial

import pytest
import torch

from benchmarks.measure import Compare, Contender
from benchmarks.training import Shapes, TrainingStep, random_batch, step_work
from eventkern.models import EventTransformer


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("device_name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_checkpointing(device_name: str, depth: int, compare: Compare) -> None:
    """The shapes of gpu_optimized, as deep as they are and `depth` times as deep."""
    device = torch.device(device_name)
    shapes = Shapes.load("gpu_optimized.json")
    batch = random_batch(shapes, device)
    layers = {name: depth * getattr(shapes.model, name) for name in ("encoder_layers", "decoder_layers")}
    models = {}
    for name, is_checkpointed in (("checkpointed blocks", True), ("kept", False)):
        torch.manual_seed(0)
        sizes = dataclasses.replace(shapes.model, checkpoint_blocks=is_checkpointed, **layers)
        models[name] = EventTransformer(sizes).to(device)
    steps = {name: TrainingStep(model, torch.float32) for name, model in models.items()}
    first = [step(batch) for step in steps.values()]
    torch.testing.assert_close(*first, rtol=0, atol=0)
    contenders = [Contender(name, partial(step, batch), name != "kept") for name, step in steps.items()]
    work = step_work(models["kept"], batch)
    compare(f"{depth} x the layers, fp32 {device_name}", contenders, work, device=device, dtype=torch.float32)
