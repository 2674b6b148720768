"""The multi-head cross-entropy, forward and backward, against torch's ways and the fused losses of language models."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks import work
from benchmarks.measure import Compare, Contender
from benchmarks.peers import MULTI_HEAD_CROSS_ENTROPY
from eventkern.nn import MultiHeadCrossEntropy
from eventkern.ops.multi_head_cross_entropy import cpu

HEADS = {
    "17x1000": (1000,) * 17,
    "mixed": (2, 7, 12, 24, 31, 60, 366, 1000, 50_000),
    "GPT-2": (50_257,),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = {
    "cpu": [
        *((num_rows, "17x1000", 64) for num_rows in (2_400, 16_384, 65_536)),
        *((num_rows, heads, dim) for num_rows in (2_400, 16_384) for heads, dim in (("17x1000", 256), ("mixed", 64))),
        (2_048, "GPT-2", 768),
    ],
    "cuda": [
        *((num_rows, "17x1000", dim) for num_rows in (16_384, 262_144) for dim in (64, 256)),
        (16_384, "mixed", 64),
        (8_192, "GPT-2", 768),
    ],
}
QUICK = {(2_400, "17x1000", 64), (262_144, "17x1000", 64), (262_144, "17x1000", 256), (8_192, "GPT-2", 768)}


class Step:
    """Forward and backward of the summed losses, with the gradients dropped after."""

    def __init__(self, module: nn.Module, hidden: Tensor, targets: Tensor, upstream: Tensor | None = None) -> None:
        self.module = module
        self.hidden = hidden.detach().requires_grad_()
        self.targets = targets
        self.upstream = torch.ones(targets.shape[1], device=hidden.device) if upstream is None else upstream

    def __call__(self) -> None:
        self.module(self.hidden, self.targets).float().backward(self.upstream)
        self.hidden.grad = None
        self.module.zero_grad()

    def results(self) -> list[Tensor]:
        """Losses, and the gradients of hidden and weight."""
        losses = self.module(self.hidden, self.targets).float()
        leaves = [self.hidden, *self.module.parameters()]
        of_hidden, *of_weight = torch.autograd.grad(losses, leaves, self.upstream)
        return [losses.detach(), of_hidden, torch.cat(of_weight)]


class ThreeProducts:
    """The three products alone, in tiles like ours: logits, and from them the gradients of hidden and weight."""

    def __init__(self, hidden: Tensor, weight: Tensor, sizes: tuple[int, ...]) -> None:
        self.hidden, self.weight, self.sizes = hidden, weight, list(sizes)

    def __call__(self) -> None:
        starts = [0, *torch.tensor(self.sizes).cumsum(0).tolist()]
        groups = [slice(starts[heads.start], starts[heads.stop]) for heads in cpu.head_groups(self.sizes)]
        widest = max(classes.stop - classes.start for classes in groups)
        height = cpu.rows_per_tile(len(self.hidden), widest, self.hidden.element_size())
        memory = self.hidden.new_empty(height * widest)
        weight_grad = torch.zeros_like(self.weight)
        for rows in self.hidden.split(height):
            hidden_grad = torch.zeros_like(rows)
            for classes in groups:
                weight = self.weight[classes]
                logits = memory[: len(rows) * len(weight)].view(len(rows), len(weight))
                torch.mm(rows, weight.t(), out=logits)
                torch.addmm(hidden_grad, logits, weight, out=hidden_grad)
                torch.addmm(weight_grad[classes], logits.t(), rows, out=weight_grad[classes])


def exponentials(logits: Tensor, num_logits: int) -> None:
    """As many exponentials as there are logits, of a piece of memory that stays in cache."""
    powers = torch.empty_like(logits)
    for _ in range(num_logits // logits.numel()):
        torch.exp(logits, out=powers)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(
    ("device_name", "num_rows", "heads", "dim"),
    [
        pytest.param(device, *case, marks=pytest.mark.gpu if device == "cuda" else ())
        for device, cases in CASES.items()
        for case in cases
    ],
)
def test_multi_head_cross_entropy(
    device_name: str,
    num_rows: int,
    heads: str,
    dim: int,
    precision: str,
    compare: Compare,
    is_full: bool,
    has_slow_starters: bool,
) -> None:
    if not is_full and ((num_rows, heads, dim) not in QUICK or (device_name == "cuda" and precision == "fp32")):
        pytest.skip("under --full only")
    device, dtype, sizes = torch.device(device_name), DTYPES[precision], HEADS[heads]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, dim, generator=generator).to(device, dtype)
    targets = torch.stack([torch.randint(size, (num_rows,), generator=generator) for size in sizes], -1).to(device)
    module = MultiHeadCrossEntropy(dim, sizes, bias=False).to(device, dtype)
    num_logits = num_rows * sum(sizes)
    steps = {"eventkern": Step(module, hidden, targets)}
    for peer in MULTI_HEAD_CROSS_ENTROPY:
        # All logits at once, and again as float32 and as gradients, take gigabytes and minutes on a CPU.
        is_too_large = device_name == "cpu" and num_logits > 1e9 and "one product" in peer.name
        # 11 s a call.
        is_too_slow = device_name == "cpu" and precision == "bf16" and max(sizes) > 10_000 and "chunked" in peer.name
        if (has_slow_starters or not peer.is_slow_to_start) and not (is_too_large or is_too_slow):
            steps[peer.name] = Step(peer.build(module.weight.detach(), sizes), hidden, targets)

    # All must agree before any is timed.
    tolerance = 1e-4 if dtype is torch.float32 else 3e-2
    expected = steps["eventkern"].results()
    for name, step in steps.items():
        for actual, value in zip(step.results(), expected, strict=True):
            error = (actual.float() - value.float()).norm() / value.float().norm()
            assert error < tolerance, f"{name} differs by {error:.1e}"

    contenders = [Contender(name, step, name == "eventkern") for name, step in steps.items()]
    if len(sizes) > 1 and device_name == "cpu":
        uneven = Step(module, hidden, targets, torch.linspace(0.5, 1.5, len(sizes)))
        contenders.append(Contender("eventkern, uneven upstream", uneven, is_part=True))
    contenders.append(
        Contender("three products alone", ThreeProducts(hidden, module.weight.detach(), sizes), is_part=True)
    )
    logits = torch.linspace(-20.0, 0.0, 1 << 16 if device_name == "cpu" else 1 << 22, device=device)
    contenders.append(Contender("exponentials alone", partial(exponentials, logits, num_logits), is_part=True))
    compare(
        f"N {num_rows:,} {heads} D {dim} {precision} {device_name}",
        contenders,
        work.multi_head_cross_entropy(num_rows, sizes, dim, dtype, targets.itemsize, is_backward=True),
        device=device,
        dtype=dtype,
    )
