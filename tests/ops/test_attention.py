"""attention against the float64 formula, its gradients, the paths it takes, errors, and torch.compile."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eventkern.ops import attention, implementations, use_reference
from eventkern.ops.attention import api, reference

# Blocks of 16 queries with 0 to 3 more, taken one by one, and blocks that are not full; keys about 16 and about 64.
SHAPES = (
    (1, 1),
    (1, 300),
    (2, 15),
    (3, 16),
    (3, 131),
    (16, 1),
    (300, 3),
    (17, 16),
    (19, 65),
    (31, 17),
    (64, 64),
    (37, 200),
)
SQUARES = (1, 2, 3, 4, 15, 16, 17, 35, 66, 200)


def formula(query, key, value, is_causal):
    """The definition, with explicit exponentials: none of torch's attention or softmax in it."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    powers = (scores - scores.detach().amax(-1, keepdim=True)).exp()
    powers = powers.tril() if is_causal else powers
    return powers @ value / powers.sum(-1, keepdim=True)


def make_heads(
    num_queries: int,
    num_keys: int,
    head_dim: int,
    generator: torch.Generator,
    *,
    batch_size: int = 2,
    num_heads: int = 3,
) -> list[Tensor]:
    """Query, key and value as slices of packed projections, and an upstream gradient: strided, as models have them."""

    def projected(length: int, parts: int) -> list[Tensor]:
        packed = torch.randn(batch_size, length, parts, num_heads, head_dim, generator=generator)
        return [part.transpose(1, 2) for part in packed.unbind(2)]

    query, upstream = projected(num_queries, 2)
    return [query, *projected(num_keys, 2), upstream]


def run(function, query, key, value, upstream, **options):
    """The output and the gradients of query, key and value."""
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    output = function(*leaves, **options)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


@pytest.fixture
def _torch_too():
    """For cases that may reach torch's attention."""


@pytest.fixture(autouse=True)
def _kernel_alone(monkeypatch, request):
    """torch's attention would be right as well: a case that is to test the kernel must not reach it."""
    if "_torch_too" not in request.fixturenames:
        monkeypatch.setattr(api.F, "scaled_dot_product_attention", None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", api.HEAD_DIMS)
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "is_causal"),
    [*((*shape, False) for shape in SHAPES), *((length, length, True) for length in SQUARES)],
)
@pytest.mark.usefixtures("_torch_too")
def test_values_and_gradients_match_the_float64_formula(
    num_queries, num_keys, is_causal, head_dim, dtype, generator, assert_accurate, monkeypatch
):
    batch_size = max(2, 128 // num_queries)  # the error of few queries is few draws, too few for a root mean square
    heads = make_heads(num_queries, num_keys, head_dim, generator, batch_size=batch_size)
    inputs = [tensor.to(dtype) for tensor in heads]
    same_dtype = run(F.scaled_dot_product_attention, *inputs, is_causal=is_causal)
    truth = run(formula, *(tensor.double() for tensor in inputs), is_causal=is_causal)
    monkeypatch.setattr(api.F, "scaled_dot_product_attention", None)
    actual = run(attention, *inputs, is_causal=is_causal)
    terms = truth if num_keys > 1 else [truth[3]] * 4  # a lone key's terms cancel: the query and it have no gradient
    for result, own, true, term in zip(actual, same_dtype, truth, terms, strict=True):
        assert_accurate(result, own, true, term)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_join_into_the_width_without_a_copy(dtype, generator):
    inputs = [tensor.to(dtype) for tensor in make_heads(9, 7, 8, generator)]
    for result in run(attention, *inputs):
        assert result.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("is_causal", [False, True])
def test_any_strides_give_the_same_bits(is_causal, generator):
    strided = make_heads(19, 19, 8, generator)
    dense = [tensor.contiguous() for tensor in strided]
    turned = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in strided]
    spread = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in strided]
    expected = run(attention, *dense, is_causal=is_causal)
    for inputs in (strided, turned, spread):
        for result, value in zip(run(attention, *inputs, is_causal=is_causal), expected, strict=True):
            assert result.equal(value)


def test_statistics_of_any_strides_give_the_same_bits(generator):
    *inputs, upstream = make_heads(19, 7, 8, generator)
    output, statistics = torch.ops.eventkern.attention(*inputs, False)
    backward = torch.ops.eventkern.attention_backward
    expected = backward(upstream, *inputs, output, statistics, False)
    turned = statistics.transpose(1, 3).contiguous().transpose(1, 3)
    for result, value in zip(backward(upstream, *inputs, output, turned, False), expected, strict=True):
        assert result.equal(value)


def test_an_expanded_upstream_gradient(generator):
    query, key, value, _ = make_heads(19, 7, 8, generator)
    results = [
        run(attention, query, key, value, ones)
        for ones in (torch.ones(()).expand(2, 3, 19, 8), torch.ones(2, 3, 19, 8))
    ]
    for expanded, dense in zip(*results, strict=True):
        assert expanded.equal(dense)


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "is_causal"), [(150, 70, False), (150, 150, True), (1, 300, False)]
)
def test_the_same_bits_each_time_and_for_any_number_of_threads(num_queries, num_keys, is_causal, generator):
    inputs = make_heads(num_queries, num_keys, 8, generator, batch_size=5)
    expected = run(attention, *inputs, is_causal=is_causal)
    try:
        for num_threads in (1, 2, 3, 15, 64):
            torch.set_num_threads(num_threads)
            for result, value in zip(run(attention, *inputs, is_causal=is_causal), expected, strict=True):
                assert result.equal(value)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("free", list(itertools.product([False, True], repeat=3)), ids=str)
def test_frozen_inputs_get_no_gradient_and_free_ones_do(free, generator):
    *inputs, upstream = make_heads(17, 9, 8, generator)
    _, *expected = run(attention, *inputs, upstream)
    leaves = [tensor.detach().requires_grad_(is_free) for tensor, is_free in zip(inputs, free, strict=True)]
    output = attention(*leaves)
    assert output.requires_grad == any(free)
    if any(free):
        output.backward(upstream)
    for leaf, is_free, gradient in zip(leaves, free, expected, strict=True):
        assert leaf.grad.equal(gradient) if is_free else leaf.grad is None


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_later_position_reaches_an_earlier_one(is_causal, generator):
    query, key, value, upstream = make_heads(100, 100, 8, generator)
    first = 33
    upstream[:, :, first:] = 0
    before = run(attention, query, key, value, upstream, is_causal=is_causal)
    changed = [tensor.clone() for tensor in (key, value)]
    for tensor in changed:
        tensor[:, :, first:] *= -1e6
    output, *gradients = run(attention, query, *changed, upstream, is_causal=is_causal)
    assert output[:, :, :first].equal(before[0][:, :, :first]) == is_causal
    assert gradients[0][:, :, :first].equal(before[1][:, :, :first]) == is_causal
    for gradient in gradients[1:]:
        assert (gradient[:, :, first:].count_nonzero() == 0) == is_causal


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_reaches_what_it_touches_and_nothing_else(which, generator):
    inputs = make_heads(40, 70, 8, generator)
    inputs[which][1, 2, 33, 5] = torch.nan
    output = attention(*inputs[:3])
    touched = torch.zeros(output.shape, dtype=torch.bool)
    touched[(1, 2, 33) if which == 0 else (1, 2)] = True
    if which == 2:
        touched[1, 2, :, :5] = touched[1, 2, :, 6:] = False
    assert output.isnan().equal(touched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_far_apart_neither_overflow_nor_vanish(dtype):
    positions = torch.arange(100.0).view(1, 1, 100, 1) - 50
    query = torch.full((1, 1, 16, 8), 100.0, dtype=dtype)
    key = (positions * torch.ones(8)).to(dtype)
    value = positions.expand(1, 1, 100, 8).contiguous().to(dtype)
    output, *gradients = run(attention, query, key, value, torch.ones_like(query))
    assert output.eq(49).all()
    assert gradients[2].sum(2).eq(16).all()
    assert gradients[2][0, 0, 99].eq(16).all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert attention(-query, key, value).eq(-50).all()


def test_no_query_and_no_batch(generator):
    for batch_size, num_queries in ((0, 5), (2, 0)):
        query, key, value, upstream = make_heads(num_queries, 5, 8, generator, batch_size=batch_size)
        output, *gradients = run(attention, query, key, value, upstream)
        assert output.shape == query.shape
        assert [gradient.count_nonzero().item() for gradient in gradients] == [0, 0, 0]
        assert [gradient.shape for gradient in gradients] == [query.shape, key.shape, value.shape]


@pytest.mark.usefixtures("_torch_too")
@pytest.mark.parametrize("head_dim", [2, 12, 64])
def test_other_head_dims_go_to_torch(head_dim, generator, monkeypatch):
    inputs = make_heads(20, 20, head_dim, generator)
    called = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(
        api.F, "scaled_dot_product_attention", lambda *args, **kwargs: called.append(1) or real(*args, **kwargs)
    )
    for result, value in zip(run(attention, *inputs), run(real, *inputs), strict=True):
        assert result.equal(value)
    assert called == [1]


def test_autocast_computes_in_its_dtype(generator):
    inputs = make_heads(20, 30, 8, generator)[:3]
    rounded = attention(*(tensor.bfloat16() for tensor in inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(*inputs).equal(rounded)
        assert attention(inputs[0].bfloat16(), *inputs[1:]).equal(rounded)
        with use_reference():
            assert attention(*inputs).equal(reference.attention(*(tensor.bfloat16() for tensor in inputs), False))
    assert not attention(*inputs).equal(rounded.float())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_reference_serves_float64_and_those_who_ask(dtype, is_causal, generator):
    inputs = [tensor.to(dtype) for tensor in make_heads(20, 20, 8, generator)]
    expected = run(lambda *leaves: reference.attention(*leaves, is_causal), *inputs)
    with use_reference():
        asked = run(attention, *inputs, is_causal=is_causal)
    for result, value in zip(asked, expected, strict=True):
        assert result.equal(value)
    if dtype == torch.float64:
        for result, value in zip(run(attention, *inputs, is_causal=is_causal), expected, strict=True):
            assert result.equal(value)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_reference_is_the_formula(is_causal, generator):
    inputs = [tensor.double() for tensor in make_heads(9, 9, 8, generator)]
    results = run(lambda *leaves: reference.attention(*leaves, is_causal), *inputs)
    for result, truth in zip(results, run(formula, *inputs, is_causal=is_causal), strict=True):
        torch.testing.assert_close(result, truth)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck_of_the_reference(is_causal, generator):
    inputs = [torch.randn(1, 2, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *leaves: reference.attention(*leaves, is_causal), inputs)
    assert torch.autograd.gradgradcheck(lambda *leaves: reference.attention(*leaves, is_causal), inputs)


def test_a_second_derivative_is_refused(generator):
    inputs = [tensor.requires_grad_() for tensor in make_heads(5, 5, 8, generator)[:3]]
    (gradient,) = torch.autograd.grad(attention(*inputs).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="attention has no second derivative"):
        gradient.sum().backward()


ONES = torch.ones(2, 3, 5, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": ONES.long()}, TypeError, "query is torch.int64; want torch.float32"),
        ({"key": ONES.bfloat16()}, TypeError, "key is torch.bfloat16, but query torch.float32; want one dtype"),
        ({"value": ONES.double()}, TypeError, "value is torch.float64, but query torch.float32"),
        ({"query": ONES[0]}, ValueError, r"query has shape \(3, 5, 8\); want \(batch, heads, positions, head_dim\)"),
        ({"value": ONES[..., :0]}, ValueError, r"value has shape \(2, 3, 5, 0\)"),
        ({"key": ONES[..., :4]}, ValueError, r"key has shape \(2, 3, 5, 4\); want \(2, 3, 5, 8\) beside query"),
        ({"key": ONES[:1]}, ValueError, r"key has shape \(1, 3, 5, 8\); want \(2, 3, 5, 8\)"),
        (
            {"value": ONES[:, :, :4]},
            ValueError,
            r"value has shape \(2, 3, 4, 8\); want \(2, 3, 5, 8\), the shape of key",
        ),
        ({"key": ONES[:, :, :0], "value": ONES[:, :, :0]}, ValueError, "want at least one position"),
        ({"query": ONES[:, :, :4], "is_causal": True}, ValueError, "query has 4 positions, key 5; want as many"),
        ({"key": ONES.to("meta")}, ValueError, "key is on meta, but query on cpu; want one device"),
    ],
)
def test_each_wrong_argument_is_named(change, error, message):
    with pytest.raises(error, match=message):
        attention(**{"query": ONES, "key": ONES, "value": ONES, **change})


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, is_causal, generator):
    *inputs, upstream = (tensor.to(dtype) for tensor in make_heads(21, 21, 8, generator))
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    torch.library.opcheck(torch.ops.eventkern.attention.default, (*leaves, is_causal))
    saved = [output.detach() for output in torch.ops.eventkern.attention(*leaves, is_causal)]
    torch.library.opcheck(torch.ops.eventkern.attention_backward.default, (upstream, *inputs, *saved, is_causal))


@pytest.mark.usefixtures("_torch_too")  # dynamo walks torch's functions
@pytest.mark.parametrize("is_causal", [False, True])
def test_compiled_equals_eager_and_does_not_compile_again_for_more_rows(is_causal, generator):
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return torch._inductor.compile(graph, inputs)

    def compute(packed):
        query, key, value = (part.unflatten(-1, (3, 8)).transpose(1, 2) for part in packed.chunk(3, -1))
        return attention(query, key, value, is_causal=is_causal).transpose(1, 2).flatten(2)

    def gradient(function, packed):
        leaf = packed.clone().requires_grad_()
        output = function(leaf)
        output.square().sum().backward()
        return output.detach(), leaf.grad

    torch.compiler.reset()
    compiled = torch.compile(compute, fullgraph=True, dynamic=True, backend=backend)
    for batch_size, length in ((2, 9), (3, 40), (5, 21)):
        packed = torch.randn(batch_size, length, 3 * 24, generator=generator)
        for value, lowered in zip(gradient(compute, packed), gradient(compiled, packed), strict=True):
            ulp = torch.finfo(torch.float32).eps * value.abs().max().item()
            torch.testing.assert_close(lowered, value, rtol=0, atol=16 * ulp)  # sums in another order
    assert len(compilations) == 1


def test_implementations_are_told():
    assert implementations()["attention"] == {"cpu": "C++", "cuda": "torch", "mps": "torch"}
