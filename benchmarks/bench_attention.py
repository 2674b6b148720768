"""Attention with the small heads of event models, against torch's fused and plain ones."""

from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks import work
from benchmarks.measure import Compare, Contender
from benchmarks.peers import ATTENTION, Attend
from eventkern.ops import attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Batch, heads, queries, keys, head dim, is_causal. Names say what has this shape in the configurations that ship.
CASES = {
    "encoder": (24, 8, 200, 200, 8, False),
    "decoder": (8, 8, 300, 300, 8, True),
    "flights encoder": (96, 8, 20, 20, 8, False),
    "last query": (24, 8, 1, 200, 8, False),
    "cross": (8, 8, 300, 3, 8, False),
    "head dim 16": (8, 4, 300, 300, 16, False),
    "head dim 32": (8, 4, 300, 300, 32, False),
    "head dim 64": (8, 4, 300, 300, 64, False),
}


class Call:
    """One attention on slices of packed projections, as a model has them."""

    def __init__(self, attend: Attend, inputs: list[Tensor], upstream: Tensor, is_causal: bool) -> None:
        self.attend = attend
        self.leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        self.upstream = upstream
        self.is_causal = is_causal

    @torch.no_grad()
    def forward(self) -> list[Tensor]:
        """The output."""
        return [self.attend(*self.leaves, is_causal=self.is_causal)]

    def forward_backward(self) -> list[Tensor]:
        """The gradients of query, key and value."""
        output = self.attend(*self.leaves, is_causal=self.is_causal)
        return list(torch.autograd.grad(output, self.leaves, self.upstream))


@pytest.mark.parametrize("is_backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("device_name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_attention(
    device_name: str,
    name: str,
    precision: str,
    is_backward: bool,
    compare: Compare,
    is_full: bool,
    has_slow_starters: bool,
) -> None:
    if not is_full and precision != ("fp32" if device_name == "cpu" else "bf16"):
        pytest.skip("under --full only")
    device, dtype = torch.device(device_name), DTYPES[precision]
    batch_size, num_heads, num_queries, num_keys, head_dim, is_causal = CASES[name]
    generator = torch.Generator().manual_seed(0)

    def projected(length: int, parts: int) -> tuple[Tensor, ...]:
        packed = torch.randn(batch_size, length, parts, num_heads, head_dim, generator=generator)
        return packed.to(device, dtype).transpose(1, 3).unbind(2)

    query, upstream = projected(num_queries, 2)
    inputs = [query, *projected(num_keys, 2)]
    calls = {"eventkern": Call(attention, inputs, upstream, is_causal)}
    for peer in ATTENTION:
        if has_slow_starters or not peer.is_slow_to_start:
            calls[peer.name] = Call(peer.build(), inputs, upstream, is_causal)

    # All must agree before any is timed.
    tolerance = 1e-4 if dtype is torch.float32 else 2e-2
    timed = Call.forward_backward if is_backward else Call.forward
    expected = timed(calls["eventkern"])
    for contender, call in calls.items():
        for actual, value in zip(timed(call), expected, strict=True):
            error = (actual.float() - value.float()).norm() / value.float().norm()
            assert error < tolerance, f"{contender} differs by {error:.1e}"

    contenders = [Contender(name, partial(timed, call), name == "eventkern") for name, call in calls.items()]
    passes = "forward+backward" if is_backward else "forward"
    compare(
        f"{passes} {name} {batch_size}x{num_heads}x{num_queries}x{num_keys} H {head_dim} {precision} {device_name}",
        contenders,
        work.attention(CASES[name], dtype.itemsize, is_backward),
        device=device,
        dtype=dtype,
    )
