"""multi_head_cross_entropy on the CPU: its tiles and memory, its exponential, the ranges and digits that it keeps."""

import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import peak_extra_bytes
from eventkern.ops import multi_head_cross_entropy, use_reference
from eventkern.ops.multi_head_cross_entropy import cpu

IGNORED = -100
UNEVEN = torch.tensor([0.5, -2.0])


def make_targets(rows: int, sizes: tuple[int, ...], generator: torch.Generator, ignored_share: float = 0.3) -> Tensor:
    targets = torch.stack([torch.randint(0, size, (rows,), generator=generator) for size in sizes], -1)
    return targets.where(torch.rand(targets.shape, generator=generator) >= ignored_share, IGNORED)


def test_the_exponential_is_exact_to_float32_rounding():
    logits = torch.linspace(-110.0, 0.0, 100_001)
    weight = torch.tensor([[1.0], [0.0]])
    hidden = logits[:, None].clone().requires_grad_()
    targets = torch.ones(len(logits), 1, dtype=torch.int64)
    losses = multi_head_cross_entropy(hidden, weight, targets, (2,), reduction="none")
    losses.sum().backward()
    probability = logits.double().sigmoid()
    is_normal = probability > 2.0**-125  # below, the exponential is 0
    error = (hidden.grad[:, 0].double() - probability)[is_normal] / probability[is_normal]
    assert error.abs().max() < 3 * torch.finfo(torch.float32).eps
    assert hidden.grad[~is_normal].abs().max() < 2.0**-124
    torch.testing.assert_close(losses[:, 0].double(), logits.double().exp().log1p(), rtol=0, atol=1.2e-7)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(value, generator):
    hidden = torch.randn(5, 4, generator=generator)
    hidden[2, 1] = value
    hidden.requires_grad_()
    weight = torch.randn(1007, 4, generator=generator)
    targets = torch.zeros(5, 2, dtype=torch.int64)
    losses = multi_head_cross_entropy(hidden, weight, targets, (7, 1000), reduction="none")
    losses.sum().backward()
    assert losses.isfinite().all(1).tolist() == [True, True, False, True, True]
    assert hidden.grad.isfinite().all(1).tolist() == [True, True, False, True, True]


def test_masked_logits_have_no_probability(generator):
    bias = torch.zeros(6)
    bias[4:] = -torch.inf
    hidden = torch.randn(9, 3, generator=generator)
    weight = torch.randn(6, 3, generator=generator).requires_grad_()
    targets = torch.randint(4, (9, 1), generator=generator)
    losses = multi_head_cross_entropy(hidden, weight, targets, (6,), bias=bias)
    losses.sum().backward()
    expected = F.cross_entropy(hidden @ weight.detach()[:4].t(), targets[:, 0])
    torch.testing.assert_close(losses[0], expected)
    assert weight.grad[4:].count_nonzero() == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize("is_even", [True, False], ids=["even", "uneven"])
def test_memory_beyond_inputs_and_gradients_is_bounded(is_even, generator):
    sizes, rows, dim = (1000,) * 17, 6000, 8
    hidden = torch.randn(rows, dim, generator=generator).requires_grad_()
    weight = torch.randn(sum(sizes), dim, generator=generator).requires_grad_()
    targets = make_targets(rows, sizes, generator)
    upstream = torch.ones(17) if is_even else torch.arange(17.0)

    def step():
        losses = multi_head_cross_entropy(hidden, weight, targets, sizes)
        return torch.autograd.grad(losses, (hidden, weight), upstream)

    step()
    logits_bytes = 4 * rows * sum(sizes)
    gradients_bytes = 2 * 4 * (hidden.numel() + weight.numel())  # those of the forward, and those of the backward
    bound = cpu.TILE_BYTES + 2 * gradients_bytes + (8 << 20)
    assert bound < logits_bytes / 10
    # The least of three, since the whole process is measured: what the step needs, it needs each time.
    assert min(peak_extra_bytes(step, torch.device("cpu")) for _ in range(3)) < bound


@pytest.mark.parametrize(
    ("num_rows", "num_classes", "itemsize", "expected"),
    [(16_384, 1000, 4, 2048), (2_400, 1000, 4, 1200), (2_048, 50_257, 4, 256), (8_192, 250_000, 4, 67), (1, 5, 4, 1)],
)
def test_tiles_are_of_one_height_and_bounded(num_rows, num_classes, itemsize, expected):
    height = cpu.rows_per_tile(num_rows, num_classes, itemsize)
    assert height == expected
    assert height * num_classes * itemsize <= cpu.MOST_TILE_BYTES


def test_neighbouring_heads_share_a_tile_until_it_is_wide():
    groups = list(cpu.head_groups([2, 7, 60, 1000, 17, 5000, 3]))
    assert [(heads.start, heads.stop) for heads in groups] == [(0, 4), (4, 6), (6, 7)]


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(default, generator):
    hidden, weight = torch.randn(20, 8, generator=generator), torch.randn(9, 8, generator=generator)
    bias = torch.randn(9, generator=generator)
    targets = make_targets(20, (4, 5), generator)

    def results(reduction, upstream):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        losses = multi_head_cross_entropy(*leaves[:2], targets, (4, 5), bias=leaves[2], reduction=reduction)
        return losses.detach(), *torch.autograd.grad(losses, leaves, upstream.expand(losses.shape))

    cases = [(reduction, upstream) for reduction in ("mean", "sum", "none") for upstream in (torch.ones(2), UNEVEN)]
    expected = [results(*case) for case in cases]
    torch.set_default_dtype(default)
    try:
        actual = [results(*case) for case in cases]
    finally:
        torch.set_default_dtype(torch.float32)
    for values, expected_values in zip(actual, expected, strict=True):
        assert all(value.equal(other) for value, other in zip(values, expected_values, strict=True))


@pytest.mark.parametrize("upstream", [1.0, 2.0**14], ids=["plain", "loss scale"])
@pytest.mark.parametrize("kept", [1, 70_000])
def test_float16_gradients_stay_in_range_over_many_rows(kept, upstream, generator):
    hidden = 10 * torch.ones(70_000, 4, dtype=torch.float16)
    targets = torch.full((70_000, 1), IGNORED)
    targets[:kept] = 0
    results = []
    for route in (nullcontext, use_reference):
        leaves = [hidden.clone().requires_grad_(), torch.zeros(2, 4, dtype=torch.float16).requires_grad_()]
        with route():
            losses = multi_head_cross_entropy(*leaves, targets, (2,))
            losses.backward(torch.tensor([upstream]))
        results.append([leaf.grad for leaf in leaves])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=1e-6)


def test_a_large_common_offset_costs_the_loss_no_digits(generator):
    hidden, weight = torch.randn(50, 8, generator=generator), torch.randn(12, 8, generator=generator)
    targets = make_targets(50, (5, 7), generator)
    bias = torch.full((12,), 1024.0)
    losses = multi_head_cross_entropy(hidden, weight, targets, (5, 7), bias=bias, reduction="none")
    logits = (hidden @ weight.t() + bias).double()  # rounded as they are, what is left is the loss's own error
    for head, part in enumerate(logits.split((5, 7), 1)):
        truth = F.cross_entropy(part, targets[:, head], reduction="none")
        assert (losses[:, head].double() - truth).abs().max() < 2e-6


def test_targets_overwritten_before_the_backward_are_never_written_through(generator):
    hidden = torch.randn(20, 8, generator=generator).requires_grad_()
    weight = torch.randn(9, 8, generator=generator).requires_grad_()
    targets = make_targets(20, (4, 5), generator, ignored_share=0.0)
    losses = multi_head_cross_entropy(hidden, weight, targets, (4, 5), reduction="none")
    targets.numpy()[3] = 2**40
    losses.sum().backward()
    assert hidden.grad[3].count_nonzero() == 0
    assert hidden.grad.count_nonzero(1).tolist() == [8, 8, 8, 0, *[8] * 16]
