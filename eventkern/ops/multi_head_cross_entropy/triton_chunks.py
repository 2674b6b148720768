"""The backward of multi_head_cross_entropy for wide rows, where the products outweigh the exponentials.

Chunks of logits, bounded by CHUNK_BYTES, pass between the three products of cuBLAS and one Triton kernel. Source of the
chunks: Liger-Kernel (Hsu et al., 2024); here they cut classes too, so that rows stay many and sums few.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from eventkern.ops.multi_head_cross_entropy.triton_tiles import (
    LOG2_E,
    grad_logits_of,
    head_at,
    head_of_tile,
    lane_offset,
    load_terms,
)

# Predicted, not yet measured on a card.
CHUNK_BYTES = 64 * 2**20  # of logits and their gradients: about what a large card's L2 holds
CHUNK_ROWS = 8192  # d_weight is read and written once per so many rows
BLOCK_N, BLOCK_V, NUM_WARPS = 32, 128, 8

_SHAPES = [
    "num_rows", "first_row", "last_row", "first_tile", "chunk_class", "logits_stride", "grad_stride", "bias_stride",
]  # fmt: skip


@triton.jit(do_not_specialize=_SHAPES)
def grad_logits_kernel(
    logits_ptr, bias_ptr, terms_ptr, grad_logits_ptr, bias_sums_ptr,
    num_rows: tl.int64, first_row: tl.int64, last_row: tl.int64, first_tile, chunk_class,
    logits_stride, grad_stride, bias_stride,
    label_smoothing, z_loss,
    HEAD_SIZES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, NEEDS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk of float32 logits, in the inputs' dtype, and their sums over each block of rows."""
    tile = first_tile + tl.program_id(1)
    head = head_of_tile(tile, HEAD_SIZES, BLOCK_V)
    first_class, size, head_tile = head_at(head, HEAD_SIZES, BLOCK_V)
    lanes = (tile - head_tile) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_lane = lanes < size
    chunk_rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = first_row + chunk_rows.to(tl.int64)
    is_row = rows < last_row
    mask = is_row[:, None] & is_lane[None, :]
    columns = first_class - chunk_class + lanes
    logits_ptrs = logits_ptr + chunk_rows.to(tl.int64)[:, None] * logits_stride + columns[None, :]
    logits = tl.load(logits_ptrs, mask=mask, other=0.0) * LOG2_E
    logits += lane_offset(bias_ptr + first_class, lanes, size, HAS_BIAS)[None, :]
    terms = load_terms(terms_ptr, rows, is_row, head, num_rows, label_smoothing, z_loss, len(HEAD_SIZES))
    grad_logits = grad_logits_of(logits, lanes, terms, size, label_smoothing, 1, HAS_SMOOTHING)
    grad_ptrs = grad_logits_ptr + chunk_rows.to(tl.int64)[:, None] * grad_stride + columns[None, :]
    tl.store(grad_ptrs, grad_logits, mask=mask)
    if NEEDS_BIAS:
        tl.store(bias_sums_ptr + tl.program_id(0) * bias_stride + columns, tl.sum(grad_logits, 0), mask=is_lane)


def backward_by_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    terms: Tensor,
    head_sizes: tuple[int, ...],
    label_smoothing: float,
    z_loss: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Rows are cut so that d_weight is seldom added to, classes so that a chunk's logits stay within CHUNK_BYTES."""
    num_rows = hidden.shape[0]
    num_row_chunks = triton.cdiv(num_rows, CHUNK_ROWS)
    chunk_rows = triton.cdiv(num_rows, num_row_chunks)
    logit_bytes = 4 if hidden.element_size() == 4 else 6
    chunks = class_chunks(head_sizes, max(CHUNK_BYTES // (logit_bytes * chunk_rows), BLOCK_V))
    d_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if needs[0] else None
    weight_dtype = torch.float32 if num_row_chunks > 1 else weight.dtype
    d_weight = torch.empty(weight.shape, dtype=weight_dtype, device=weight.device) if needs[1] else None
    d_bias = torch.zeros_like(bias, dtype=torch.float32) if needs[2] else None
    for first_row in range(0, num_rows, chunk_rows):
        last_row = min(first_row + chunk_rows, num_rows)
        rows = hidden[first_row:last_row]
        sum_hidden = None
        for first_tile, last_tile, first_class, last_class in chunks:
            classes = slice(first_class, last_class)
            logits = _product(rows, weight[classes].t())
            grad_logits, bias_sums = logits, logits
            if hidden.dtype != torch.float32:
                width = triton.cdiv(last_class - first_class, 8) * 8  # rows that start at 16 bytes
                grad_logits = torch.empty((len(rows), width), dtype=hidden.dtype, device=hidden.device)
                grad_logits = grad_logits[:, : last_class - first_class]
            row_blocks = triton.cdiv(len(rows), BLOCK_N)
            if needs[2]:
                shape = (row_blocks, last_class - first_class)
                bias_sums = torch.empty(shape, dtype=torch.float32, device=hidden.device)
            grad_logits_kernel[(row_blocks, last_tile - first_tile)](
                logits, hidden if bias is None else bias, terms, grad_logits, bias_sums,
                num_rows, first_row, last_row, first_tile, first_class,
                logits.stride(0), grad_logits.stride(0), bias_sums.stride(0), label_smoothing, z_loss,
                HEAD_SIZES=head_sizes, HAS_BIAS=bias is not None, HAS_SMOOTHING=label_smoothing != 0,
                NEEDS_BIAS=needs[2], BLOCK_N=BLOCK_N, BLOCK_V=BLOCK_V, num_warps=NUM_WARPS,
            )  # fmt: skip
            if needs[0]:
                sum_hidden = _add_product(sum_hidden, grad_logits, weight[classes])
            if needs[1] and first_row == 0:
                d_weight[classes] = _product(grad_logits.t(), rows)
            elif needs[1]:
                _add_product(d_weight[classes], grad_logits.t(), rows)
            if needs[2]:
                d_bias[classes] += bias_sums.sum(0)
        if needs[0]:
            d_hidden[first_row:last_row] = sum_hidden
    return (
        d_hidden,
        d_weight.to(weight.dtype) if needs[1] else None,
        d_bias.to(bias.dtype) if needs[2] else None,
    )


@lru_cache(maxsize=64)
def class_chunks(head_sizes: tuple[int, ...], columns: int) -> list[tuple[int, int, int, int]]:
    """(first tile, last tile, first class, last class) of each run of whole tiles with at most so many classes."""
    starts, first_class = [], 0
    for size in head_sizes:
        starts += range(first_class, first_class + size, BLOCK_V)
        first_class += size
    starts.append(first_class)
    chunks, first = [], 0
    for last in range(1, len(starts)):
        if last == len(starts) - 1 or starts[last + 1] - starts[first] > columns:
            chunks.append((first, last, starts[first], starts[last]))
            first = last
    return chunks


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32; cuBLAS adds up half-width operands in float32 too."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float())


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right, in place of total where there is one."""
    if total is None:
        return _product(left, right)
    if left.is_cuda and left.dtype != torch.float32:
        return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    return total.addmm_(left.float(), right.float())
