"""Every op under torch.func's transforms and in forward mode, beside its reference in float64 under the same one."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._pytree import tree_map

from eventkern import ops
from eventkern.models import EventTransformer, EventTransformerConfig
from eventkern.ops import attention, multi_embedding, multi_head_cross_entropy, use_reference
from eventkern.ops.attention import reference as attention_reference
from eventkern.ops.multi_embedding import reference as embedding_reference
from eventkern.ops.multi_head_cross_entropy import reference as cross_entropy_reference

SIZES = (3, 5, 2)


@dataclass(frozen=True)
class Batch:
    sources: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Case:
    """An op as a function of the tensors that have derivatives, its reference, and the points to look at."""

    op: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]

    def draw(self, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(shape, generator=generator) for shape in self.shapes)


def _classes(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.stack([torch.randint(size, shape, generator=generator) for size in SIZES], -1)


IDS = _classes(2, 4)
TARGETS = _classes(6).int()
TARGETS[1, 0] = TARGETS[4, 2] = -100


def embedding(mode: str) -> Case:
    return Case(
        lambda weight: multi_embedding(IDS, weight, SIZES, mode=mode),
        lambda weight: embedding_reference.multi_embedding(IDS, weight, SIZES, mode),
        ((10, 3),),
    )


def cross_entropy(reduction: str, has_bias: bool = True) -> Case:
    options = {"ignore_index": -100, "label_smoothing": 0.1, "z_loss": 0.01, "reduction": reduction}

    def op(hidden, weight, bias=None):
        return multi_head_cross_entropy(hidden, weight, TARGETS, SIZES, bias=bias, **options)

    def reference(hidden, weight, bias=None):
        return cross_entropy_reference.multi_head_cross_entropy(hidden, weight, TARGETS, SIZES, bias, *options.values())

    return Case(op, reference, ((6, 3), (10, 3), (10,))[: 2 + has_bias])


def attending(is_causal: bool, head_dim: int = 4) -> Case:
    return Case(
        lambda *heads: attention(*heads, is_causal=is_causal),
        lambda *heads: attention_reference.attention(*heads, is_causal),
        ((1, 2, 3, head_dim),) * 3,
    )


CASES = {
    "embedding sum": embedding("sum"),
    "embedding concat": embedding("concat"),
    "cross-entropy mean": cross_entropy("mean"),
    "cross-entropy none": cross_entropy("none"),
    "cross-entropy without bias": cross_entropy("sum", has_bias=False),
    "attention": attending(is_causal=False),
    "causal attention": attending(is_causal=True),
    "attention without a kernel": attending(is_causal=True, head_dim=3),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def scalar(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *points: function(*points).sin().sum()


def places(points: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(points)))


def dual_numbers(function, points, tangents):
    """The tangents of the output for a tangent of each argument alone, and of all."""
    pushed = []
    for chosen in (*((place,) for place in places(points)), places(points)):
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(point, tangent) if place in chosen else point
                for place, (point, tangent) in enumerate(zip(points, tangents, strict=True))
            ]
            pushed.append(forward_ad.unpack_dual(function(*duals)).tangent)
    return pushed


def dual_numbers_around_a_backward(function, points, tangents):
    leaves = [point.clone().requires_grad_() for point in points]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(leaf, tangent) for leaf, tangent in zip(leaves, tangents, strict=True)]
        gradients = torch.autograd.grad(scalar(function)(*duals), leaves)
        return [tuple(forward_ad.unpack_dual(gradient)) for gradient in gradients]


FIRST = {
    "grad": lambda f, x, t: grad(scalar(f), places(x))(*x),
    "one gradient": lambda f, x, t: grad(scalar(f), len(x) - 1)(*x),
    "jacrev": lambda f, x, t: jacrev(f, places(x))(*x),
    "jvp": lambda f, x, t: jvp(f, x, t),
    "jacfwd": lambda f, x, t: jacfwd(f, places(x))(*x),
    "dual numbers": dual_numbers,
}
SECOND = {
    "hessian": lambda f, x, t: hessian(scalar(f), places(x))(*x),
    "reverse over reverse": lambda f, x, t: jacrev(jacrev(scalar(f), places(x)), places(x))(*x),
    "reverse over forward": lambda f, x, t: jacrev(lambda *y: jvp(f, y, t)[1], places(x))(*x),
    "forward over forward": lambda f, x, t: jvp(lambda *y: jvp(f, y, t)[1], x, t[::-1] if len(x) == 1 else t),
    "dual numbers around a backward": dual_numbers_around_a_backward,
}
TRANSFORMS = FIRST | SECOND


def assert_same(actual: Any, expected: Any) -> None:
    """Float32 results beside float64 ones."""
    single = tree_map(lambda tensor: tensor.float(), expected)
    torch.testing.assert_close(actual, single, rtol=1e-4, atol=1e-5)


def doubled(points: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(point.double() for point in points)


@each_case
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_derivatives_are_those_of_the_reference(case, transform):
    points, tangents = case.draw(), case.draw(seed=1)
    expected = transform(case.reference, doubled(points), doubled(tangents))
    assert_same(transform(case.op, points, tangents), expected)
    with use_reference():
        assert_same(transform(case.op, points, tangents), expected)


MAPPED = {
    "vmap": lambda f, dims, x: vmap(f, dims)(*x),
    "gradients of each entry": lambda f, dims, x: vmap(grad(scalar(f), places(x)), dims)(*x),
    "tangents of each entry": lambda f, dims, x: vmap(lambda *y: jvp(f, y, y), dims)(*x),
    "gradient of a map": lambda f, dims, x: grad(scalar(vmap(f, dims)), places(x))(*x),
    "tangent of a map": lambda f, dims, x: jvp(vmap(f, dims), x, x),
    "map of a map": lambda f, dims, x: vmap(lambda s: vmap(lambda *y: f(*(s * part for part in y)), dims)(*x))(
        x[0].new_tensor([1.0, -2.0])
    ),
}


@each_case
@pytest.mark.parametrize("transform", MAPPED.values(), ids=MAPPED)
def test_each_argument_can_be_mapped(case, transform):
    for is_mapped in itertools.product((False, True), repeat=len(case.shapes)):
        if any(is_mapped):
            dims = tuple(-1 if mapped else None for mapped in is_mapped)
            points = tuple(
                torch.stack([point, -point, 2 * point], -1) if mapped else point
                for point, mapped in zip(case.draw(), is_mapped, strict=True)
            )
            expected = transform(case.reference, dims, doubled(points))
            assert_same(transform(case.op, dims, points), expected)


@pytest.mark.parametrize("mode", ["sum", "concat"])
def test_ids_and_targets_can_be_mapped(mode):
    (weight,) = CASES["embedding sum"].draw()
    hidden, table, bias = CASES["cross-entropy mean"].draw()

    def ours(rows, labels, matrix, reduction):
        return multi_head_cross_entropy(rows, matrix, labels, SIZES, bias=bias, reduction=reduction).sum()

    def own(rows, labels, matrix, reduction):
        options = bias.double(), -100, 0.0, 0.0, reduction
        return cross_entropy_reference.multi_head_cross_entropy(rows, matrix, labels, SIZES, *options).sum()

    for ids, dims in ((IDS, (0, None)), (IDS.int(), (1, None)), (torch.stack([IDS, IDS.flip(0)]), (0, None))):
        actual = vmap(grad(lambda i, w: multi_embedding(i, w, SIZES, mode=mode).sin().sum(), 1), dims)(ids, weight)
        expected = vmap(grad(lambda i, w: embedding_reference.multi_embedding(i, w, SIZES, mode).sin().sum(), 1), dims)(
            ids, weight.double()
        )
        assert_same(actual, expected)
    for reduction, grouped in itertools.product(("mean", "none"), (False, True)):
        rows, labels = (hidden.view(3, 2, 3), TARGETS.view(3, 2, 3)) if grouped else (hidden, TARGETS)
        dims = (0, 0, None, None)
        actual = vmap(grad(ours, (0, 2)), dims)(rows, labels, table, reduction)
        assert_same(actual, vmap(grad(own, (0, 2)), dims)(rows.double(), labels, table.double(), reduction))


@each_case
def test_nothing_mapped_gives_nothing(case):
    points = case.draw()
    for place, shape in enumerate(case.shapes):
        none = torch.ones(0, *shape)
        dims = tuple(0 if other == place else None for other in places(points))
        given = tuple(none if other == place else point for other, point in enumerate(points))
        assert vmap(case.op, dims)(*given).shape == (0, *case.op(*points).shape)
        made = vmap(grad(scalar(case.op), places(points)), dims)(*given)
        assert [gradient.shape for gradient in made] == [(0, *each) for each in case.shapes]


@pytest.mark.parametrize("name", [name for name in CASES if name != "attention without a kernel"])
def test_first_orders_and_maps_are_made_by_the_kernels(name, monkeypatch):
    case = CASES[name]
    points = case.draw()
    stacked = tuple(point[None] for point in points)
    for module in (attention_reference, embedding_reference, cross_entropy_reference):
        for function in ("attention", "multi_embedding", "multi_head_cross_entropy"):
            monkeypatch.setattr(module, function, None, raising=False)
    made = grad(scalar(case.op), places(points))(*points)
    jacrev(case.op)(*points)
    vmap(case.op)(*stacked)
    mapped = vmap(grad(scalar(case.op), places(points)))(*stacked)
    for gradient, of_one in zip(made, mapped, strict=True):
        torch.testing.assert_close(of_one[0], gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_case
def test_half_precision_keeps_its_dtype(case, dtype):
    points, tangents = (tuple(each.to(dtype) for each in case.draw(seed)) for seed in (0, 1))
    output, tangent = jvp(case.op, points, tangents)
    assert output.dtype == tangent.dtype == case.op(*points).dtype
    truth = jvp(case.reference, doubled(points), doubled(tangents))
    torch.testing.assert_close((output.double(), tangent.double()), truth, rtol=0.1, atol=0.1)
    gradients = grad(scalar(case.op), places(points))(*points)
    assert all(gradient.dtype == dtype for gradient in gradients)
    truth = grad(scalar(case.reference), places(points))(*doubled(points))
    torch.testing.assert_close(tuple(gradient.double() for gradient in gradients), truth, rtol=0.1, atol=0.1)


def test_autocast_reaches_what_is_transformed():
    points = CASES["cross-entropy mean"].draw()
    expected = CASES["cross-entropy mean"].op(*(point.bfloat16() for point in points))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert jvp(CASES["cross-entropy mean"].op, points, points)[0].equal(expected)
        assert grad(lambda q: attention(q, q, q).sum())(torch.ones(1, 1, 2, 4)).dtype == torch.float32


def test_wrong_ids_and_targets_are_named_under_a_transform():
    (weight,) = CASES["embedding sum"].draw()
    hidden, table, _ = CASES["cross-entropy mean"].draw()
    wrong_ids, wrong_targets = IDS.clone(), TARGETS.clone()
    wrong_ids[1, 2, 1], wrong_targets[3, 2] = 5, 2

    def embedded(weight, ids):
        return multi_embedding(ids, weight, SIZES).sum()

    def lost(hidden, targets):
        return multi_head_cross_entropy(hidden, table, targets, SIZES).sum()

    wrong_embedding = embedded, weight, wrong_ids, "holds 5, but table 1 has 5 rows"
    wrong_loss = lost, hidden, wrong_targets, "holds 2, but head 2 has 2 classes"
    for function, point, integers, message in (wrong_embedding, wrong_loss):
        with pytest.raises(IndexError, match=message):
            grad(function)(point, integers)
        with pytest.raises(IndexError, match=message):
            vmap(grad(function), (None, 0))(point, integers[None])
        with use_reference():
            assert vmap(function, (None, 0))(point, integers[None]).isnan().all()


def test_gradients_of_each_sequence_of_a_model(generator):
    names = ("kind", "place")
    sizes = (4, 9)
    model = EventTransformer(
        EventTransformerConfig(names, sizes, num_streams=2, src_seq_len=3, tgt_seq_len=4, d_model=16, num_heads=4)
    )
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    sources, targets = (
        torch.stack([torch.randint(1, size, shape, generator=generator) for size in sizes], -1).int()
        for shape in ((3, 2, 3), (3, 5))
    )

    def loss(weights, sources, targets):
        return functional_call(model, weights, Batch(sources[None], targets[None])).sum()

    made = vmap(grad(loss), (None, 0, 0))(weights, sources, targets)
    for row in range(3):
        model.zero_grad()
        model(Batch(sources[row : row + 1], targets[row : row + 1])).sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(made[name][row], parameter.grad, rtol=1e-4, atol=1e-6)


@each_case
@pytest.mark.parametrize("name", ["grad", "jacrev", "jvp"])
def test_compiled_transforms_equal_eager_ones(case, name):
    transform = FIRST[name]
    points, tangents = case.draw(), case.draw(seed=1)
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: transform(case.op, x, tangents), fullgraph=True, backend="aot_eager")
    assert_same(compiled(*points), tree_map(Tensor.double, transform(case.op, points, tangents)))


@each_case
def test_transforms_of_compiled_code(case):
    points, tangents = case.draw(), case.draw(seed=1)
    torch.compiler.reset()
    compiled = torch.compile(case.op, backend="aot_eager")
    assert_same(
        grad(scalar(compiled), places(points))(*points), grad(scalar(case.reference), places(points))(*doubled(points))
    )
    assert_same(jvp(compiled, points, tangents), jvp(case.reference, doubled(points), doubled(tangents)))


def test_every_op_is_tested_here():
    assert set(ops.implementations()) == {"attention", "multi_embedding", "multi_head_cross_entropy"}
