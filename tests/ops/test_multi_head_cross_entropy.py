"""multi_head_cross_entropy against float64 formulas, its gradients, options, errors, and torch.compile."""

import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eventkern.ops import implementations, multi_head_cross_entropy, use_reference
from eventkern.ops.multi_head_cross_entropy import cpu, reference

MIXED_SIZES = (1, 2, 3, 17, 60, 1000)
IGNORED = -100
UNEVEN = torch.tensor([0.5, -2.0])


def make_targets(rows: int, sizes: tuple[int, ...], generator: torch.Generator, ignored_share: float = 0.3) -> Tensor:
    targets = torch.stack([torch.randint(0, size, (rows,), generator=generator) for size in sizes], -1)
    return targets.where(torch.rand(targets.shape, generator=generator) >= ignored_share, IGNORED)


def formula(hidden, weight, bias, targets, sizes, label_smoothing, z_loss):
    """Losses (N, H) from the definition, with explicit log-sum-exps: none of torch's cross entropy in it."""
    losses = []
    for head, (table, offset) in enumerate(zip(weight.split(sizes), bias.split(sizes), strict=True)):
        logits = hidden @ table.t() + offset
        log_sum_exp = logits.exp().sum(1).log()
        kept = targets[:, head] != IGNORED
        picked = logits.gather(1, targets[:, head].where(kept, 0)[:, None])[:, 0]
        loss = log_sum_exp - (1 - label_smoothing) * picked - label_smoothing * logits.mean(1) + z_loss * log_sum_exp**2
        losses.append(loss * kept)
    return torch.stack(losses, -1)


def eager_loop(hidden, weight, bias, targets, sizes, label_smoothing, z_loss):
    """The plain model code in the inputs' own dtype."""
    losses = []
    for head, (table, offset) in enumerate(zip(weight.split(sizes), bias.split(sizes), strict=True)):
        logits = F.linear(hidden, table, offset).float()
        loss = F.cross_entropy(logits, targets[:, head], reduction="none", label_smoothing=label_smoothing)
        losses.append(loss + z_loss * logits.logsumexp(1).square() * (targets[:, head] != IGNORED))
    return torch.stack(losses, -1)


@pytest.fixture(params=["one tile", "many tiles"])
def _tiles(request, monkeypatch):
    """Tiles as they come, or of few rows and few heads."""
    if request.param == "many tiles":
        monkeypatch.setattr(cpu, "TILE_BYTES", 50_000)
        monkeypatch.setattr(cpu, "FEWEST_ROWS", 7)
        monkeypatch.setattr(cpu, "TILE_CLASSES", 19)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.01), (0.1, 0.01)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("is_even", [False, True], ids=["uneven", "even"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_match_the_float64_formula(
    dtype, is_even, reduction, label_smoothing, z_loss, generator, assert_accurate
):
    rows, dim = 127, 33
    targets = make_targets(rows, MIXED_SIZES, generator)
    inputs = [
        torch.randn(rows, dim, generator=generator).to(dtype),
        (torch.randn(sum(MIXED_SIZES), dim, generator=generator) * 0.2).to(dtype),
        torch.randn(sum(MIXED_SIZES), generator=generator).to(dtype),
    ]
    upstream = torch.randn(rows if reduction == "none" else 1, len(MIXED_SIZES), generator=generator)
    upstream = torch.full_like(upstream, 3.0) if is_even else upstream
    results = []
    for run_dtype, function in ((dtype, None), (dtype, eager_loop), (torch.float64, formula)):
        hidden, weight, bias = leaves = [tensor.to(run_dtype, copy=True).requires_grad_() for tensor in inputs]
        if function is None:
            losses = multi_head_cross_entropy(
                hidden, weight, targets, MIXED_SIZES, bias=bias,
                label_smoothing=label_smoothing, z_loss=z_loss, reduction=reduction,
            )  # fmt: skip
        else:
            losses = function(hidden, weight, bias, targets, MIXED_SIZES, label_smoothing, z_loss)
            if reduction != "none":
                losses = losses.sum(0)
            if reduction == "mean":
                losses = losses / (targets != IGNORED).sum(0)
        losses.backward(upstream.view(losses.shape).to(losses.dtype))
        results.append((losses.detach(), *(leaf.grad for leaf in leaves)))
    for actual, same_dtype, truth in itertools.islice(zip(*results, strict=True), reduction != "none", None):
        assert_accurate(actual, same_dtype, truth)
    if reduction != "none":  # the errors of one loss a head are too few to judge by: held against the rows' losses
        rows_losses = multi_head_cross_entropy(
            *inputs[:2], targets, MIXED_SIZES, bias=inputs[2],
            label_smoothing=label_smoothing, z_loss=z_loss, reduction="none",
        ).double()  # fmt: skip
        num_rows = (targets != IGNORED).sum(0) if reduction == "mean" else 1
        torch.testing.assert_close(results[0][0].double(), rows_losses.sum(0) / num_rows, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_head_that_ignores_every_row_gives_zero_loss_and_gradient(reduction, generator):
    hidden = torch.randn(11, 4, generator=generator).requires_grad_()
    weight = torch.randn(5, 4, generator=generator).requires_grad_()
    targets = torch.full((11, 2), IGNORED)
    targets[3, 0] = 1
    losses = multi_head_cross_entropy(hidden, weight, targets, (2, 3), reduction=reduction, z_loss=0.1)
    losses.sum().backward()
    assert losses[..., 1].count_nonzero() == 0
    assert weight.grad[2:].count_nonzero() == 0
    assert weight.grad[:2].count_nonzero() == 8
    assert hidden.grad.count_nonzero(1).tolist() == [0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]


def test_an_ignored_class_that_exists_is_ignored(generator):
    hidden = torch.randn(50, 4, generator=generator)
    weight = torch.randn(7, 4, generator=generator)
    targets = torch.randint(0, 3, (50, 2), generator=generator)
    losses = multi_head_cross_entropy(hidden, weight, targets, (3, 4), ignore_index=0)
    for head, table in enumerate(weight.split((3, 4))):
        expected = F.cross_entropy(F.linear(hidden, table), targets[:, head], ignore_index=0)
        torch.testing.assert_close(losses[head], expected)


@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row(rows, generator):
    hidden = torch.randn(rows, 4, generator=generator).requires_grad_()
    weight = torch.zeros(6, 4).requires_grad_()
    losses = multi_head_cross_entropy(hidden, weight, torch.zeros(rows, 2, dtype=torch.int32), (2, 4))
    losses.sum().backward()
    expected = torch.tensor([2.0, 4.0]).log() if rows else torch.zeros(2)
    torch.testing.assert_close(losses.detach(), expected)


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1e4], [-1e4]])
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    losses = multi_head_cross_entropy(hidden, weight, torch.tensor([[0], [0]]), (3,), reduction="none")
    assert losses.tolist() == [[0.0], [2e4]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_leading_shapes_and_strides(dtype, generator):
    hidden = torch.randn(24, 8, generator=generator)
    weight = torch.randn(9, 8, generator=generator)
    targets = make_targets(24, (4, 5), generator).to(dtype)
    expected = multi_head_cross_entropy(hidden, weight, targets, (4, 5), reduction="none")
    shaped = multi_head_cross_entropy(
        hidden.view(2, 3, 4, 8).transpose(0, 1), weight.t().contiguous().t(), targets.view(2, 3, 4, 2).transpose(0, 1),
        (4, 5), reduction="none",
    )  # fmt: skip
    torch.testing.assert_close(shaped.transpose(0, 1).reshape(24, 2), expected)
    single = multi_head_cross_entropy(hidden[0], weight, targets[0], (4, 5), reduction="none")
    torch.testing.assert_close(single, expected[0])


@pytest.mark.parametrize("free", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_inputs_get_no_gradient_and_free_ones_do(free, reduction, generator):
    targets = make_targets(20, (4, 5), generator)
    shapes = ((20, 8), (9, 8), (9,))
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    losses = multi_head_cross_entropy(inputs[0], inputs[1], targets, (4, 5), bias=inputs[2], reduction=reduction)
    all_gradients = torch.autograd.grad(losses.sum(), inputs)
    partly = [tensor.detach().requires_grad_(is_free) for tensor, is_free in zip(inputs, free, strict=True)]
    losses = multi_head_cross_entropy(partly[0], partly[1], targets, (4, 5), bias=partly[2], reduction=reduction)
    assert losses.requires_grad == any(free)
    if any(free):
        losses.sum().backward()
    for tensor, is_free, expected in zip(partly, free, all_gradients, strict=True):
        assert tensor.grad.equal(expected) if is_free else tensor.grad is None


def test_every_head_size_has_its_loss_and_gradient(generator, assert_accurate):
    sizes = (2, 3, 17, 60, 1000, 4097, 50257)
    hidden = torch.randn(31, 16, generator=generator)
    weight = torch.randn(sum(sizes), 16, generator=generator) * 0.3
    targets = make_targets(31, sizes, generator)
    results = []
    for dtype, function in ((torch.float32, None), (torch.float32, eager_loop), (torch.float64, formula)):
        leaves = [hidden.to(dtype, copy=True).requires_grad_(), weight.to(dtype, copy=True).requires_grad_()]
        if function is None:
            losses = multi_head_cross_entropy(*leaves, targets, sizes, reduction="none")
        else:
            losses = function(*leaves, torch.zeros(sum(sizes), dtype=dtype), targets, sizes, 0.0, 0.0)
        losses.sum().backward()
        results.append((losses.detach(), *(leaf.grad for leaf in leaves)))
    for actual, same_dtype, truth in zip(*results, strict=True):
        assert_accurate(actual, same_dtype, truth)


def test_autocast_computes_the_product_in_its_dtype(generator):
    targets = make_targets(20, (4, 5), generator)
    hidden = torch.randn(20, 8, generator=generator)
    weight = torch.randn(9, 8, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = multi_head_cross_entropy(hidden, weight, targets, (4, 5))
    assert losses.dtype == torch.float32
    rounded = multi_head_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets, (4, 5))
    assert losses.equal(rounded)
    assert not losses.equal(multi_head_cross_entropy(hidden, weight, targets, (4, 5)))


@pytest.mark.parametrize("value", [-1, 5])
def test_a_target_out_of_range_is_named_or_nan(value):
    hidden, weight = torch.ones(3, 2), torch.ones(7, 2)
    targets = torch.tensor([[0, 1], [1, value], [IGNORED, 2]])
    message = rf"targets\[\.\.\., 1\] holds {value}, but head 1 has 5 classes"
    with pytest.raises(IndexError, match=message):
        multi_head_cross_entropy(hidden, weight, targets, (2, 5))
    losses = reference.multi_head_cross_entropy(hidden, weight, targets, (2, 5), None, IGNORED, 0.0, 0.0, "none")
    assert losses.isnan().nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(3, 2, dtype=torch.int64)}, TypeError, "hidden is torch.int64"),
        ({"hidden": torch.ones(3, 2, dtype=torch.bfloat16)}, TypeError, "one dtype outside autocast"),
        ({"hidden": torch.ones(3, 4)}, ValueError, r"weight has shape \(7, 2\)"),
        ({"targets": torch.zeros(3, 2)}, TypeError, "targets is torch.float32"),
        ({"hidden": torch.ones(3, 0), "weight": torch.ones(7, 0)}, ValueError, "want at least one column"),
        ({"targets": torch.zeros(3, 3, dtype=torch.int64)}, ValueError, r"targets has shape \(3, 3\); want \(3, 2\)"),
        ({"head_sizes": (7, 0)}, ValueError, "one positive size per head"),
        ({"bias": torch.zeros(7, dtype=torch.float16)}, TypeError, "hidden is torch.float32, but bias torch.float16"),
        ({"bias": torch.zeros(7, dtype=torch.int64)}, TypeError, "bias is torch.int64"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias has shape \(3,\); want \(7,\)"),
        ({"bias": torch.zeros(7, device="meta")}, ValueError, "bias is on meta, but hidden on cpu"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5"),
        ({"z_loss": -1.0}, ValueError, "z_loss is -1.0"),
        ({"reduction": "max"}, ValueError, "reduction is 'max'; want one of mean, sum, none"),
    ],
)
def test_each_wrong_argument_is_named(change, error, message):
    arguments = {
        "hidden": torch.ones(3, 2), "weight": torch.ones(7, 2), "targets": torch.zeros(3, 2, dtype=torch.int64),
        "head_sizes": (2, 5),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        multi_head_cross_entropy(**{**arguments, **change})


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_of_the_reference(reduction, generator):
    targets = make_targets(5, (2, 3), generator)
    shapes = ((5, 3), (5, 3), (5,))
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def losses(hidden, weight, bias):
        return reference.multi_head_cross_entropy(hidden, weight, targets, (2, 3), bias, IGNORED, 0.1, 0.01, reduction)

    assert torch.autograd.gradcheck(losses, leaves)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_opcheck(reduction, generator):
    sizes = (3, 50, 7)
    targets = make_targets(33, sizes, generator)
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in ((33, 16), (60, 16), (60,))]
    options = (list(sizes), IGNORED, 0.1, 0.01, reduction, [True, True, True])
    torch.library.opcheck(torch.ops.eventkern.multi_head_cross_entropy.default, (*leaves, targets, *options, False))
    outputs = torch.ops.eventkern.multi_head_cross_entropy(*leaves, targets, *options, False)
    grad, *saved = (output.detach() for output in outputs)
    inputs = (grad, *(leaf.detach() for leaf in leaves), targets, *saved)
    torch.library.opcheck(torch.ops.eventkern.multi_head_cross_entropy_backward.default, (*inputs, *options))


def test_compiled_equals_eager_and_does_not_compile_again_for_more_rows(generator):
    sizes = (3, 50, 7)
    weight = torch.randn(sum(sizes), 16, generator=generator)
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return torch._inductor.compile(graph, inputs)

    def compute(hidden, weight, targets):
        return multi_head_cross_entropy(hidden, weight, targets, sizes)

    def run(function, hidden, targets):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        losses = function(*leaves, targets)
        losses.square().sum().backward()
        return losses.detach(), *(leaf.grad for leaf in leaves)

    torch.compiler.reset()
    compiled = torch.compile(compute, fullgraph=True, dynamic=True, backend=backend)
    run(compiled, torch.randn(9, 16, generator=generator), make_targets(9, sizes, generator))
    num_compilations = len(compilations)  # dynamo takes a second run at a graph with floats in it
    for rows in (5, 64, 200):
        hidden, targets = torch.randn(rows, 16, generator=generator), make_targets(rows, sizes, generator)
        eager, again = run(compute, hidden, targets), run(compute, hidden, targets)
        for value, repeated, lowered in zip(eager, again, run(compiled, hidden, targets), strict=True):
            assert value.equal(repeated)
            torch.testing.assert_close(lowered, value, rtol=1e-6, atol=1e-7)
    assert len(compilations) == num_compilations > 0
    targets[3, 2] = 7
    with pytest.raises(IndexError, match="head 2 has 7 classes"):
        compiled(hidden, weight, targets)


def test_the_reference_route_gives_the_same_values(generator, monkeypatch):
    hidden, weight = torch.randn(20, 8, generator=generator), torch.randn(9, 8, generator=generator)
    targets = make_targets(20, (4, 5), generator)
    calls = []
    real = reference.multi_head_cross_entropy
    monkeypatch.setattr(reference, "multi_head_cross_entropy", lambda *args: calls.append(args) or real(*args))
    expected = multi_head_cross_entropy(hidden, weight, targets, (4, 5))
    assert not calls
    with use_reference():
        by_reference = multi_head_cross_entropy(hidden, weight, targets, (4, 5))
        with pytest.raises(IndexError, match="head 1 has 5 classes"):
            multi_head_cross_entropy(hidden, weight, torch.full((20, 2), 5).clamp(max=torch.tensor([3, 5])), (4, 5))
    assert len(calls) == 1
    torch.testing.assert_close(by_reference, expected)
    assert implementations()["multi_head_cross_entropy"] == {"cpu": "C++", "cuda": "Triton", "mps": "reference"}


def test_a_first_derivative_can_be_tracked_and_a_second_is_refused(generator):
    hidden = torch.randn(20, 8, generator=generator).requires_grad_()
    weight = torch.randn(9, 8, generator=generator).requires_grad_()
    targets = make_targets(20, (4, 5), generator)
    for upstream in (torch.ones(2), UNEVEN):
        losses = multi_head_cross_entropy(hidden, weight, targets, (4, 5))
        (plain,) = torch.autograd.grad(losses, hidden, upstream, retain_graph=True)
        (tracked,) = torch.autograd.grad(losses, hidden, upstream, create_graph=True)
        assert tracked.equal(plain)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            torch.autograd.grad(tracked.sum(), weight)


@pytest.mark.parametrize("ignore_index", [2**40, -(2**63)])
def test_an_ignored_value_beyond_int32_ignores_no_int32_target(ignore_index, generator):
    hidden, weight = torch.randn(20, 8, generator=generator), torch.randn(9, 8, generator=generator)
    targets = make_targets(20, (4, 5), generator, ignored_share=0.0)
    expected = multi_head_cross_entropy(hidden, weight, targets, (4, 5))
    for route in (nullcontext, use_reference):
        with route():
            losses = multi_head_cross_entropy(hidden, weight, targets.int(), (4, 5), ignore_index=ignore_index)
        torch.testing.assert_close(losses, expected)


def test_a_model_on_meta_has_its_shapes():
    hidden, weight = torch.empty(3, 5, 8, device="meta").requires_grad_(), torch.empty(9, 8, device="meta")
    losses = multi_head_cross_entropy(hidden, weight, torch.empty(3, 5, 2, dtype=torch.int64, device="meta"), (4, 5))
    losses.sum().backward()
    assert (losses.shape, hidden.grad.shape, losses.device.type) == ((2,), (3, 5, 8), "meta")
