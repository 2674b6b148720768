"""multi_head_cross_entropy on the CPU: a tile of logits at a time, torch's matrix products around one pass in C++.

A tile is a block of rows by some heads; its logits come from one product. The pass turns them into losses and, in
place, into their gradient, from which two more products make the gradients of hidden and weight: three in all.

Source: gradients made in the forward pass after Liger-Kernel's fused linear cross-entropy (Hsu et al., 2024).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from eventkern import _C
from eventkern.ops.switches import FLOAT_DTYPES

TILE_BYTES = 8 << 20
"""Of a tile's logits, wanted: they stay in the last-level cache, and products this tall run near their peak."""
MOST_TILE_BYTES = 64 << 20
TILE_CLASSES = 1000
"""Neighbouring heads share a tile until they have this many classes."""
FEWEST_ROWS = 256
"""Fewer rows would add the gradient of a large weight to memory too often: taken while MOST_TILE_BYTES allow it."""


@dataclass(frozen=True)
class Problem:
    """The arguments that every pass reads: hidden (N, D), weight (R, D), bias (R,) or None, targets (N, H)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    head_sizes: list[int]
    ignore_index: int
    label_smoothing: float
    z_loss: float

    def count(self) -> tuple[int, list[int]]:
        """The first position row * H + head of a target outside its head, or -1; each head's targets that count."""
        return _C.count_targets(_labels(self.targets), self.head_sizes, self.ignore_index)


@dataclass(frozen=True)
class Result:
    """totals (H,) float64; losses (N, H) where they are kept; gradients, each in its input's dtype, where needed."""

    totals: Tensor
    losses: Tensor | None
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]


def head_groups(head_sizes: list[int]) -> Iterator[slice]:
    """Runs of neighbouring heads, each ended by the head that brings it to TILE_CLASSES."""
    first = num_classes = 0
    for head, size in enumerate(head_sizes):
        num_classes += size
        if num_classes >= TILE_CLASSES or head == len(head_sizes) - 1:
            yield slice(first, head + 1)
            first, num_classes = head + 1, 0


def rows_per_tile(num_rows: int, num_classes: int, itemsize: int) -> int:
    """Rows of a tile whose widest group has num_classes, so that all tiles are of nearly one height."""
    row_bytes = num_classes * itemsize
    wanted = max(TILE_BYTES // row_bytes, min(FEWEST_ROWS, MOST_TILE_BYTES // row_bytes), 1)
    num_blocks = -(-num_rows // wanted)
    return -(-num_rows // max(num_blocks, 1))


def run(
    problem: Problem,
    scales: Tensor | None,
    needs: tuple[bool, bool, bool] = (False,) * 3,
    *,
    keeps_losses: bool = False,
) -> Result:
    """Losses, and the gradients of their sum weighted by `scales`, (H,) or (N, H) float32; None for no gradient.

    needs says for which of hidden, weight and bias.
    """
    hidden, weight, targets = problem.hidden, problem.weight, problem.targets
    (num_rows, dim), num_heads, dtype = hidden.shape, len(problem.head_sizes), hidden.dtype
    float_type, num_threads = FLOAT_DTYPES.index(dtype), torch.get_num_threads()
    needs_hidden, needs_weight, needs_bias = needs
    starts = list(accumulate(problem.head_sizes, initial=0))
    groups = list(head_groups(problem.head_sizes))
    most_classes = max(starts[heads.stop] - starts[heads.start] for heads in groups)
    block_rows = rows_per_tile(num_rows, most_classes, hidden.element_size())
    empty, zeros = (partial(make, device=hidden.device) for make in (torch.empty, torch.zeros))
    tile_memory = empty(block_rows * most_classes, dtype=dtype)
    losses = empty(num_rows if keeps_losses else block_rows, num_heads, dtype=torch.float32)
    totals = zeros(num_heads, dtype=torch.float64)
    bias = problem.bias.contiguous() if problem.bias is not None else None
    if scales is not None:
        scales = scales.contiguous()
    # Sums over tiles are float32.
    hidden_grad = empty(num_rows, dim, dtype=dtype) if needs_hidden else None
    weight_sums = zeros(starts[-1], dim, dtype=torch.float32) if needs_weight else None
    bias_sums = zeros(starts[-1], dtype=torch.float32) if needs_bias else None
    for first_row in range(0, num_rows, max(block_rows, 1)):
        rows = slice(first_row, min(first_row + block_rows, num_rows))
        height = rows.stop - rows.start
        hidden_block = hidden[rows]
        hidden_sums = zeros(height, dim, dtype=torch.float32) if needs_hidden else None
        block_losses = losses[rows] if keeps_losses else losses
        for heads in groups:
            classes = slice(starts[heads.start], starts[heads.stop])
            width = classes.stop - classes.start
            tile = tile_memory[: height * width].view(height, width)
            tile_weight = weight[classes]
            torch.mm(hidden_block, tile_weight.t(), out=tile)
            tile_scales = None if scales is None else scales[..., heads] if scales.dim() == 1 else scales[rows, heads]
            _C.cross_entropy_cpu(
                _labels(targets[rows, heads]), problem.head_sizes[heads], problem.ignore_index,
                tile.data_ptr(), 0 if bias is None else bias[classes].data_ptr(), float_type,
                problem.label_smoothing, problem.z_loss,
                0 if tile_scales is None else tile_scales.data_ptr(),
                0 if tile_scales is None or tile_scales.dim() == 1 else num_heads,
                block_losses[:, heads].data_ptr(), num_heads, totals[heads].data_ptr(), num_threads,
            )  # fmt: skip
            if hidden_sums is not None:
                _add_product(hidden_sums, tile, tile_weight)
            if weight_sums is not None:
                _add_product(weight_sums[classes], tile.t(), hidden_block)
            if bias_sums is not None:
                sums = bias_sums[classes].data_ptr()
                _C.add_rows_cpu(tile.data_ptr(), float_type, height, width, sums, num_threads)
        if hidden_grad is not None and hidden_sums is not None:
            hidden_grad[rows] = hidden_sums
    gradients = (
        hidden_grad,
        weight_sums.to(dtype) if weight_sums is not None else None,
        bias_sums.to(dtype) if bias_sums is not None else None,
    )
    return Result(totals, losses if keeps_losses else None, gradients)


def _add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """sums += left @ right in float32; the product of 16-bit matrices is rounded to 16 bits before it is added."""
    if left.dtype == torch.float32:
        torch.addmm(sums, left, right, out=sums)
    else:
        sums.add_(torch.mm(left, right))


def _labels(targets: Tensor) -> tuple[int, int, int, int, int]:
    """Address, bytes of one, strides and number of rows of targets (N, H)."""
    return (targets.data_ptr(), targets.element_size(), targets.stride(0), targets.stride(1), targets.shape[0])
