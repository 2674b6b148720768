"""Multi-head attention on eventkern.ops.attention, with no mask but the causal flag.

Shapes: B batch, T queries, K keys (or stacked members), D model width, N heads, H = D / N.
"""

from torch import Tensor, nn

from eventkern.nn.stacked import StackedLinear
from eventkern.ops import attention


def _split_heads(states_BTD: Tensor, num_heads: int) -> Tensor:
    return states_BTD.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Self-attention with one packed projection for queries, keys and values.

    Args:
        d_model: D, a multiple of num_heads.
        num_heads: N.
        is_causal: position t attends to positions 0..t only.

    Raises:
        ValueError: num_heads does not divide d_model.

    Source:
        Vaswani et al., 2017, section 3.2.
    """

    def __init__(self, d_model: int, num_heads: int, is_causal: bool = False) -> None:
        super().__init__()
        _check_heads(d_model, num_heads)
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, states_BTD: Tensor) -> Tensor:
        query, key, value = (_split_heads(part, self.num_heads) for part in self.qkv(states_BTD).chunk(3, dim=-1))
        attended_BNTH = attention(query, key, value, is_causal=self.is_causal)
        return self.out(attended_BNTH.transpose(1, 2).flatten(-2))

    def step(self, states_BD: Tensor, cache_B2NTH: Tensor, position: int) -> Tensor:
        """What `forward` gives for one position, (B, D), after the keys and values of those before it.

        Args:
            states_BD: the states at the position.
            cache_B2NTH: keys and values of the positions before it; its own are written there, in place.
            position: of the states, from 0.
        """
        packed_B3NH = self.qkv(states_BD).unflatten(-1, (3, self.num_heads, -1))
        cache_B2NTH.select(3, position).copy_(packed_B3NH[:, 1:])
        key, value = cache_B2NTH.narrow(3, 0, position + 1).unbind(1)
        attended_BN1H = attention(packed_B3NH[:, 0].unsqueeze(2), key, value)
        return self.out(attended_BN1H.flatten(1))


class StackedSelfAttention(nn.Module):
    """K self-attentions at once, member k over entry k of the states.

    Args:
        num_members: K.
        d_model: D, a multiple of num_heads.
        num_heads: N.

    Raises:
        ValueError: num_heads does not divide d_model.

    Source:
        Vaswani et al., 2017, section 3.2.
    """

    def __init__(self, num_members: int, d_model: int, num_heads: int) -> None:
        super().__init__()
        _check_heads(d_model, num_heads)
        self.num_heads = num_heads
        self.d_model = d_model
        self.qkv = StackedLinear(num_members, d_model, 3 * d_model)
        self.out = StackedLinear(num_members, d_model, d_model)

    def forward(self, states_KBTD: Tensor, *, is_last_only: bool = False) -> Tensor:
        """(K, B, T, D) to the same, or with `is_last_only` to (K, B, 1, D): what the last position attends to."""
        if is_last_only:
            query = self.qkv(states_KBTD[:, :, -1:], outputs=slice(self.d_model))
            key, value = self.qkv(states_KBTD, outputs=slice(self.d_model, None)).chunk(2, dim=-1)
        else:
            query, key, value = self.qkv(states_KBTD).chunk(3, dim=-1)
        leading = query.shape[:2]
        query, key, value = (_split_heads(part.flatten(0, 1), self.num_heads) for part in (query, key, value))
        attended_BNTH = attention(query, key, value)
        return self.out(attended_BNTH.transpose(1, 2).flatten(-2).unflatten(0, leading))


class CrossAttention(nn.Module):
    """Attention from one sequence to the vectors of another, with packed keys and values.

    Args:
        d_model: D, a multiple of num_heads.
        num_heads: N.

    Raises:
        ValueError: num_heads does not divide d_model.

    Source:
        Vaswani et al., 2017, section 3.2.3.
    """

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        _check_heads(d_model, num_heads)
        self.num_heads = num_heads
        self.query = nn.Linear(d_model, d_model)
        self.key_value = nn.Linear(d_model, 2 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, states_BTD: Tensor, memory_BKD: Tensor) -> Tensor:
        query = _split_heads(self.query(states_BTD), self.num_heads)
        attended_BNTH = attention(query, *self.keys_and_values(memory_BKD))
        return self.out(attended_BNTH.transpose(1, 2).flatten(-2))

    def keys_and_values(self, memory_BKD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, N, K, H) of the vectors, for any number of calls of `step`."""
        key, value = (_split_heads(part, self.num_heads) for part in self.key_value(memory_BKD).chunk(2, dim=-1))
        return key, value

    def step(self, states_BD: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What `forward` gives for one position, (B, D), after keys and values (B, N, K, H)."""
        query_BN1H = self.query(states_BD).unflatten(-1, (self.num_heads, 1, -1))
        return self.out(attention(query_BN1H, key, value).flatten(1))


def _check_heads(d_model: int, num_heads: int) -> None:
    if num_heads < 1 or d_model % num_heads:
        raise ValueError(f"num_heads is {num_heads}; want a divisor of d_model = {d_model}")
