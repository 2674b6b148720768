"""On the meta device every op and the whole model have their shapes, dtypes and gradients, and compute nothing."""

from contextlib import nullcontext

import pytest
import torch

from eventkern.models import EventTransformer, EventTransformerConfig
from eventkern.ops import attention, multi_embedding, multi_head_cross_entropy, use_reference

SIZES = (5, 70, 3)
IDS = torch.zeros(2, 7, 3, dtype=torch.int64)
OPS = {
    "attention": (lambda *heads: attention(*heads), [(2, 3, 7, 8)] * 3),
    "causal attention": (lambda *heads: attention(*heads, is_causal=True), [(2, 3, 7, 8)] * 3),
    "attention of torch": (lambda *heads: attention(*heads), [(2, 3, 7, 64)] * 3),
    "embedding": (lambda weight: multi_embedding(IDS.to(weight.device), weight, SIZES), [(78, 8)]),
    "concat": (lambda weight: multi_embedding(IDS.to(weight.device), weight, SIZES, mode="concat"), [(78, 8)]),
    "cross-entropy": (
        lambda *both: multi_head_cross_entropy(*both, IDS.to(both[0].device), SIZES),
        [(2, 7, 8), (78, 8)],
    ),
    "losses of rows": (
        lambda *both: multi_head_cross_entropy(*both, IDS.to(both[0].device), SIZES, reduction="none"),
        [(2, 7, 8), (78, 8)],
    ),
}


def layout(tensor):
    return tensor.shape, tensor.dtype


@pytest.mark.parametrize("forced", [False, True], ids=["kernels", "references"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", OPS)
def test_ops_have_the_layout_of_the_cpu_s(name, dtype, forced):
    function, shapes = OPS[name]
    if dtype == torch.float64 and "attention" not in name:
        pytest.skip("only attention takes float64")
    made = {}
    for device in ("cpu", "meta"):
        leaves = [torch.zeros(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]
        with use_reference() if forced else nullcontext():
            output = function(*leaves)
            output.sum().backward()
        assert output.device.type == device
        made[device] = [layout(output), *(layout(leaf.grad) for leaf in leaves)]
    assert made["meta"] == made["cpu"]


def test_a_model_is_made_runs_and_learns_there():
    config = EventTransformerConfig(("a", "b"), (9, 300), 2, 6, 5, d_model=32, num_heads=4, decoder_layers=2)
    with torch.device("meta"):
        model = EventTransformer(config)
        batch = type("Batch", (), {
            "sources": torch.empty(4, 2, 6, 2, dtype=torch.int32), "targets": torch.empty(4, 6, 2, dtype=torch.int32)
        })  # fmt: skip
    losses = model(batch)
    losses.sum().backward()
    assert (losses.shape, losses.dtype, losses.device.type) == ((2,), torch.float32, "meta")
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())
    assert {name: value.shape for name, value in model.metrics(batch).items()} == {"loss": (2,), "top1": (2,)}
