"""The multi-category embedding, forward alone and with its backward, against the ways of torch and FBGEMM."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks import work
from benchmarks.measure import Compare, Contender
from benchmarks.peers import MULTI_EMBEDDING
from eventkern.nn import MultiEmbedding

NUM_TABLES = 17
MIXED = (2, 7, 12, 24, 31, 60, 366, 1000, 50_000)
TABLES = {
    "1000": (1000,) * NUM_TABLES,
    "mixed": (MIXED * 2)[:NUM_TABLES],
    "5M": (5_000_000, *(1000,) * (NUM_TABLES - 1)),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
QUICK = {
    "cpu": {(2_400, "1000", 64, "fp32"), (65_536, "1000", 64, "fp32"), (65_536, "mixed", 64, "fp32")},
    "cuda": {(1_048_576, tables, dim, "bf16") for tables in ("1000", "mixed") for dim in (64, 256)},
}


class Lookup:
    """A module at work on prepared ids: forward alone, or forward and backward with the gradients dropped after."""

    def __init__(self, module: nn.Module, prepared: object, upstream: Tensor) -> None:
        self.module = module
        self.prepared = prepared
        self.upstream = upstream

    def forward(self) -> Tensor:
        with torch.no_grad():
            output: Tensor = self.module(self.prepared)
        return output

    def forward_backward(self) -> None:
        self.module(self.prepared).backward(self.upstream)
        self.module.zero_grad()

    def gradient(self) -> Tensor:
        self.module(self.prepared).backward(self.upstream)
        gradient = torch.cat(
            [parameter.grad.flatten() for parameter in self.module.parameters() if parameter.grad is not None]
        )
        self.module.zero_grad()
        return gradient


@pytest.mark.filterwarnings("ignore:fbgemm:UserWarning")  # its gradients are compared with ours below
@pytest.mark.parametrize("is_backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("num_events", [2_400, 65_536, 1_048_576])
@pytest.mark.parametrize("device_name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_multi_embedding(
    device_name: str,
    num_events: int,
    tables: str,
    dim: int,
    precision: str,
    is_backward: bool,
    compare: Compare,
    is_full: bool,
    has_slow_starters: bool,
) -> None:
    if not is_full and (num_events, tables, dim, precision) not in QUICK[device_name]:
        pytest.skip("under --full only")
    if device_name == "cpu" and (num_events > 65_536 or (tables == "5M" and dim > 64)):
        pytest.skip("too large for a CPU")
    device, dtype, sizes = torch.device(device_name), DTYPES[precision], TABLES[tables]
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randint(0, size, (num_events,), generator=generator) for size in sizes]
    ids = torch.stack(columns, -1).to(device, torch.int32)
    upstream = torch.randn(num_events, dim, generator=generator).to(device, dtype)
    module = MultiEmbedding(sizes, dim).to(device, dtype)
    lookups = {"eventkern": Lookup(module, ids, upstream)}
    for peer in MULTI_EMBEDDING:
        is_served = dtype is torch.float32 or not peer.is_float32_only
        if is_served and (has_slow_starters or not peer.is_slow_to_start):
            built = peer.build(module.weight.detach(), sizes)
            lookups[peer.name] = Lookup(built, built.prepare(ids), upstream)

    # All must agree before any is timed. torch adds up 16-bit gradients in 16 bits, which is off by a tenth here.
    result = Lookup.gradient if is_backward else Lookup.forward
    expected = result(lookups["eventkern"])
    tolerance = 1e-4 if dtype is torch.float32 else 0.15 if is_backward else 1e-2
    for lookup in lookups.values():
        actual = result(lookup).view_as(expected)
        error = (actual - expected).float().norm() / expected.float().norm()
        assert error < tolerance, f"{type(lookup.module).__name__} differs by {error:.1e}"

    timed = Lookup.forward_backward if is_backward else Lookup.forward
    contenders = [Contender(name, partial(timed, lookup), name == "eventkern") for name, lookup in lookups.items()]
    if is_backward:
        zeros = partial(torch.zeros, module.weight.shape, dtype=dtype, device=device)
        contenders.append(Contender("zeros of the gradient alone", zeros, is_part=True))
    passes = "forward+backward" if is_backward else "forward"
    compare(
        f"{passes} N {num_events:,} V {tables} D {dim} {precision} {device_name}",
        contenders,
        work.multi_embedding(num_events, sizes, dim, dtype, is_backward),
        device=device,
        dtype=dtype,
    )
