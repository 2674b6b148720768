"""Attention against softmax(QK^T / sqrt(H)) V written out."""

import pytest
import torch

from eventkern.nn import CrossAttention, SelfAttention


def written_out(query_BTD, key_BKD, value_BKD, num_heads, is_causal):
    head_dim = query_BTD.shape[-1] // num_heads
    outputs = []
    for head in range(num_heads):
        part = slice(head * head_dim, (head + 1) * head_dim)
        scores_BTK = query_BTD[..., part] @ key_BKD[..., part].transpose(1, 2) / head_dim**0.5
        if is_causal:
            scores_BTK = scores_BTK.masked_fill(torch.ones(scores_BTK.shape[1:]).triu(1).bool(), -torch.inf)
        outputs.append(scores_BTK.softmax(-1) @ value_BKD[..., part])
    return torch.cat(outputs, -1)


@pytest.mark.parametrize("is_causal", [False, True])
def test_self_attention_matches_the_formula(is_causal, generator):
    module = SelfAttention(12, 3, is_causal=is_causal).double()
    states = torch.randn(2, 5, 12, generator=generator, dtype=torch.float64)
    query, key, value = module.qkv(states).chunk(3, -1)
    torch.testing.assert_close(module(states), module.out(written_out(query, key, value, 3, is_causal)))


def test_cross_attention_matches_the_formula(generator):
    module = CrossAttention(12, 4).double()
    states = torch.randn(2, 5, 12, generator=generator, dtype=torch.float64)
    memory = torch.randn(2, 3, 12, generator=generator, dtype=torch.float64)
    key, value = module.key_value(memory).chunk(2, -1)
    torch.testing.assert_close(
        module(states, memory), module.out(written_out(module.query(states), key, value, 4, False))
    )


@pytest.mark.parametrize("module", [SelfAttention, CrossAttention])
@pytest.mark.parametrize("num_heads", [0, 5])
def test_heads_must_divide_the_width(module, num_heads):
    with pytest.raises(ValueError, match=rf"num_heads is {num_heads}; want a divisor of d_model = 12"):
        module(12, num_heads)


def test_steps_over_a_cache_are_the_positions_of_causal_self_attention(generator):
    """The cache may hold anything at positions not written yet, and from an earlier sequence."""
    module = SelfAttention(12, 3, is_causal=True).double()
    cache = torch.full((2, 2, 3, 7, 4), torch.nan, dtype=torch.float64)
    with torch.no_grad():
        for length in (7, 5):
            states = torch.randn(2, length, 12, generator=generator, dtype=torch.float64)
            whole = module(states)
            for position in range(length):
                torch.testing.assert_close(module.step(states[:, position], cache, position), whole[:, position])


def test_keys_and_values_serve_any_number_of_steps(generator):
    module = CrossAttention(12, 4).double()
    states = torch.randn(2, 5, 12, generator=generator, dtype=torch.float64)
    memory = torch.randn(2, 3, 12, generator=generator, dtype=torch.float64)
    key_value = module.keys_and_values(memory)
    assert key_value[0].shape == (2, 4, 3, 3)
    for position in range(5):
        torch.testing.assert_close(module.step(states[:, position], *key_value), module(states, memory)[:, position])
