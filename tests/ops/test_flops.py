"""torch's FlopCounterMode counts the products of our ops, whichever is imported first."""

import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from eventkern.models import EventTransformer, EventTransformerConfig
from eventkern.ops import attention, flops, multi_embedding, multi_head_cross_entropy, use_reference

SIZES = (5, 70, 3)


def counted(function, *leaves):
    """Of a forward, and of a forward and backward."""
    with FlopCounterMode(display=False) as counter:
        output = function(*leaves)
        forward = counter.get_total_flops()
        output.sum().backward()
    return forward, counter.get_total_flops()


def test_each_op_has_a_formula():
    ops = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("eventkern::")}
    assert {name.partition(".")[0] for name in ops} == set(flops.FORMULAS)
    assert all(getattr(torch.ops.eventkern, name) in flop_registry for name in flops.FORMULAS)


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_counts_two_products_and_four(is_causal, generator):
    heads = [torch.randn(2, 3, 7, 8, generator=generator).requires_grad_() for _ in range(3)]
    product = 2 * 2 * 3 * 7 * 7 * 8
    assert counted(lambda *qkv: attention(*qkv, is_causal=is_causal), *heads) == (2 * product, 6 * product)
    assert counted(lambda *qkv: attention(*(part[:, :, :5] for part in qkv)), *heads)[0] == 2 * 2 * 2 * 3 * 5 * 5 * 8


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_cross_entropy_counts_a_product_and_one_for_each_gradient(reduction, frozen, generator):
    hidden, weight = torch.randn(2, 11, 8, generator=generator), torch.randn(sum(SIZES), 8, generator=generator)
    leaves = [leaf.requires_grad_(number != frozen) for number, leaf in enumerate((hidden, weight))]
    targets = torch.stack([torch.randint(0, size, (2, 11), generator=generator) for size in SIZES], -1)
    product = 2 * 22 * 8 * sum(SIZES)
    counts = counted(lambda *both: multi_head_cross_entropy(*both, targets, SIZES, reduction=reduction), *leaves)
    assert counts == (product, product * (3 if frozen is None else 2))


def test_a_lookup_counts_nothing(generator):
    weight = torch.randn(sum(SIZES), 8, generator=generator).requires_grad_()
    ids = torch.stack([torch.randint(0, size, (9,), generator=generator) for size in SIZES], -1)
    assert counted(lambda table: multi_embedding(ids, table, SIZES), weight) == (0, 0)


def test_a_model_counts_the_same_with_kernels_and_with_references(generator):
    config = EventTransformerConfig(("a", "b"), (9, 300), 2, 6, 5, d_model=32, num_heads=4, decoder_layers=2)
    model = EventTransformer(config)

    class Batch:
        sources = torch.ones(4, 2, 6, 2, dtype=torch.int32)
        targets = torch.ones(4, 6, 2, dtype=torch.int32)

    kernels = counted(model, Batch())
    with use_reference(), sdpa_kernel(SDPBackend.MATH):
        assert kernels == counted(model, Batch())
    assert kernels[1] == model.flops(Batch())


@pytest.mark.parametrize(
    "order", ["eventkern.ops, torch.utils.flop_counter", "torch.utils.flop_counter, eventkern.ops"]
)
def test_either_may_be_imported_first(order):
    program = f"""
import torch, {order}
heads = torch.ones(1, 2, 3, 8)
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    eventkern.ops.attention(heads, heads, heads)
print(counter.get_total_flops())
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == f"{2 * 2 * 2 * 3 * 3 * 8}\n"
