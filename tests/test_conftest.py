"""The accuracy judge of conftest.py: what must fail it, and what must not."""

import pytest
import torch
import torch.nn.functional as F

SIZES = (3,) * 17


def sum_in_bfloat16(terms):
    """The sum over the first dimension, one term after another, each partial sum rounded to bfloat16."""
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = (total.bfloat16() + term.bfloat16()).to(terms.dtype)
    return total


def embedding(weight, ids, sums):
    return sums(torch.stack([table[column] for table, column in zip(weight.split(SIZES), ids.T, strict=True)]))


def attention(query, key, value, sums):
    powers = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
    return sums((powers[..., None] * value[:, None]).movedim(2, 0))


def cross_entropy(hidden, weight, targets, sums):
    logits = sums((hidden[..., None] * weight.T).movedim(1, 0))
    return F.cross_entropy(logits, targets, reduction="none")


def make_case(name, generator):
    """An op's formula and its inputs."""
    if name == "embedding":
        ids = torch.randint(0, 3, (97, 17), generator=generator)
        return lambda sums, weight: embedding(weight, ids, sums), [torch.randn(51, 16, generator=generator)]
    if name == "attention":
        return lambda sums, *heads: attention(*heads, sums), list(torch.randn(3, 6, 60, 8, generator=generator))
    targets = torch.randint(0, 60, (1024,), generator=generator)
    inputs = [torch.randn(1024, 64, generator=generator), torch.randn(60, 64, generator=generator)]
    return lambda sums, hidden, weight: cross_entropy(hidden, weight, targets, sums), inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["embedding", "attention", "cross_entropy"])
def test_sums_in_bfloat16_fail_and_sums_in_float32_in_another_order_pass(name, dtype, generator, assert_accurate):
    function, inputs = make_case(name, generator)
    inputs = [tensor.to(dtype) for tensor in inputs]
    truth = function(lambda terms: terms.sum(0), *(tensor.double() for tensor in inputs))
    in_float32 = [tensor.float() for tensor in inputs]
    same_dtype, other_order, mutant = (
        function(sums, *in_float32).to(dtype)
        for sums in (lambda terms: terms.sum(0), lambda terms: terms.flip(0).cumsum(0)[-1], sum_in_bfloat16)
    )
    assert_accurate(other_order, same_dtype, truth)
    with pytest.raises(AssertionError, match="RMS error"):
        assert_accurate(mutant, same_dtype, truth)


def test_one_wrong_element_of_many_fails(generator, assert_accurate):
    truth = torch.randn(10_000, generator=generator, dtype=torch.float64)
    actual = truth.float()
    actual[77] += 1e-5
    with pytest.raises(AssertionError, match="largest error"):
        assert_accurate(actual, truth.float(), truth)


def test_a_missing_value_fails(generator, assert_accurate):
    truth = torch.randn(100, generator=generator, dtype=torch.float64)
    actual = truth.float()
    actual[7] = torch.nan
    with pytest.raises(AssertionError, match="RMS error"):
        assert_accurate(actual, truth.float(), truth)


def test_terms_give_the_ulp_where_they_cancel(generator, assert_accurate):
    terms = torch.randn(100, generator=generator, dtype=torch.float64)
    noise = torch.full((100,), 1e-7)
    assert_accurate(noise, torch.zeros(100), torch.zeros_like(terms), terms)
    with pytest.raises(AssertionError, match="RMS error"):
        assert_accurate(noise, torch.zeros(100), torch.zeros_like(terms))
