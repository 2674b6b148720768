"""multi_embedding on a GPU: one gather forward; backward, a product for small tables and sorted segments for large.

Source: many tables in one packed weight, and one launch for all, after FBGEMM (Khudia et al., 2021). Those of the two
backward paths stand in their files.
"""

from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from eventkern.ops.multi_embedding.triton_multi_hot import quotient, write_small_gradients
from eventkern.ops.multi_embedding.triton_segments import write_large_gradients

MAX_TABLES = 64  # of a launch: its loops over tables are unrolled

# Rows of the largest table whose gradient is a multi-hot product. Predicted, not yet measured on a card: per lookup the
# product takes 0.3 to 0.45 ns at V = 1000, D = 64 in bfloat16 (2 V D operations, dY read again through the second-level
# cache, hits built), the sorted path 0.17 (0.1 of sorting): they meet near 500 rows, and near 250 at D = 256.
SMALL_TABLE_ROWS = 512


@triton.jit(do_not_specialize=["num_rows", "ids_stride_n", "ids_stride_c"])
def validity_kernel(
    ids_ptr, is_valid_ptr, num_rows: tl.int64, ids_stride_n: tl.int64, ids_stride_c: tl.int64,
    SIZES: tl.constexpr, IS_FIRST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """is_valid[n] &= every id of event n is inside its table."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < num_rows
    is_valid = is_row if IS_FIRST else tl.load(is_valid_ptr + rows, mask=is_row, other=0) != 0
    for c in tl.static_range(len(SIZES)):
        ids = tl.load(ids_ptr + rows * ids_stride_n + c * ids_stride_c, mask=is_row, other=0)
        is_valid = is_valid & (ids >= 0) & (ids < SIZES[c])
    tl.store(is_valid_ptr + rows, is_valid.to(tl.int8), mask=is_row)


@triton.jit(do_not_specialize=["num_rows", "ids_stride_n", "ids_stride_c"])
def forward_kernel(
    ids_ptr, weight_ptr, sums_ptr, is_valid_ptr, output_ptr,
    num_rows: tl.int64, ids_stride_n: tl.int64, ids_stride_c: tl.int64, weight_stride: tl.int64,
    output_stride: tl.int64, SIZES: tl.constexpr, FIRST_ROWS: tl.constexpr, IS_CONCAT: tl.constexpr,
    HAS_SUMS: tl.constexpr, HAS_VALIDITY: tl.constexpr, DIVISOR: tl.constexpr,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """output[n] = (sums[n] + sum over c of weight[FIRST_ROWS[c] + ids[n, c]]) / DIVISOR, or the rows side by side."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_row = rows < num_rows
    is_column = columns < DIM
    is_cell = is_row[:, None] & is_column[None, :]
    ids_ptrs = ids_ptr + rows * ids_stride_n
    output_ptrs = output_ptr + rows[:, None] * output_stride + columns[None, :]
    if HAS_VALIDITY:
        is_valid = tl.load(is_valid_ptr + rows, mask=is_row, other=0) != 0
    else:
        is_valid = is_row
        for c in tl.static_range(len(SIZES)):
            ids = tl.load(ids_ptrs + c * ids_stride_c, mask=is_row, other=0)
            is_valid = is_valid & (ids >= 0) & (ids < SIZES[c])
    if HAS_SUMS:
        sums = tl.load(sums_ptr + rows[:, None] * DIM + columns[None, :], mask=is_cell, other=0.0)
    else:
        sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for c in tl.static_range(len(SIZES)):
        ids = tl.load(ids_ptrs + c * ids_stride_c, mask=is_row, other=0).to(tl.int64)
        row_ptrs = weight_ptr + (ids + FIRST_ROWS[c]) * weight_stride
        is_read = (is_row & (ids >= 0) & (ids < SIZES[c]))[:, None] & is_column[None, :]
        values = tl.load(row_ptrs[:, None] + columns[None, :], mask=is_read, other=0.0)
        if IS_CONCAT:
            values = tl.where(is_valid[:, None], values.to(tl.float32), float("nan"))
            tl.store(output_ptrs + c * DIM, values.to(output_ptr.dtype.element_ty), mask=is_cell)
        else:
            sums += values.to(tl.float32)
    if not IS_CONCAT:
        sums = tl.where(is_valid[:, None], quotient(sums, DIVISOR), float("nan"))
        tl.store(output_ptrs, sums.to(output_ptr.dtype.element_ty), mask=is_cell)


def validity_options() -> dict[str, int]:
    return {"BLOCK_N": 512, "num_warps": 4}


def forward_options(dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Constants of forward_kernel: one 16-byte load per thread and table."""
    elements = 128 * 16 // dtype.itemsize
    block_d = min(triton.next_power_of_2(dim), elements)
    return {"DIM": dim, "BLOCK_N": elements // block_d, "BLOCK_D": block_d, "num_warps": 4}


def multi_embedding(ids: Tensor, weight: Tensor, table_sizes: tuple[int, ...], mode: str) -> Tensor:
    """(N, C) ids of any strides, a weight with unit column stride -> (N, D), or (N, C * D) for "concat"."""
    num_rows, num_tables = ids.shape
    dim = weight.shape[1]
    is_concat = mode == "concat"
    output = torch.empty(num_rows, num_tables * dim if is_concat else dim, dtype=weight.dtype, device=weight.device)
    if output.numel() == 0:
        return output
    first_rows = tuple(accumulate(table_sizes[:-1], initial=0))
    groups = [slice(first, min(first + MAX_TABLES, num_tables)) for first in range(0, num_tables, MAX_TABLES)]
    sums = is_valid = output  # stand-ins that no kernel reads
    with torch.cuda.device_of(weight):
        if len(groups) > 1 and is_concat:
            is_valid = _validity(ids, table_sizes, groups)
        elif len(groups) > 1:
            sums = torch.empty(num_rows, dim, dtype=torch.float32, device=weight.device)
        options = forward_options(dim, weight.dtype)
        grid = (triton.cdiv(num_rows, options["BLOCK_N"]), triton.cdiv(dim, options["BLOCK_D"]))
        for group in groups:
            is_last = group is groups[-1]
            target = output[:, group.start * dim :] if is_concat else output if is_last else sums
            forward_kernel[grid](
                ids[:, group], weight, sums, is_valid, target,
                num_rows, *ids.stride(), weight.stride(0), target.stride(0),
                SIZES=table_sizes[group], FIRST_ROWS=first_rows[group], IS_CONCAT=is_concat,
                HAS_SUMS=group.start > 0 and not is_concat, HAS_VALIDITY=len(groups) > 1 and is_concat,
                DIVISOR=num_tables if is_last and mode == "mean" else 1, **options,
            )  # fmt: skip
    return output


def _validity(ids: Tensor, table_sizes: tuple[int, ...], groups: list[slice]) -> Tensor:
    is_valid = torch.empty(ids.shape[0], dtype=torch.int8, device=ids.device)
    options = validity_options()
    for group in groups:
        validity_kernel[triton.cdiv(ids.shape[0], options["BLOCK_N"]),](
            ids[:, group], is_valid, ids.shape[0], *ids.stride(),
            SIZES=table_sizes[group], IS_FIRST=group.start == 0, **options,
        )  # fmt: skip
    return is_valid


def multi_embedding_backward(grad_output: Tensor, ids: Tensor, table_sizes: tuple[int, ...], mode: str) -> Tensor:
    """(N, D) or (N, C * D) with unit column stride -> the dense gradient (R, D) in its dtype, the same bits each time.

    The order of each sum depends on shapes and ids alone, though generations of tensor cores may round it otherwise. An
    id out of range adds nothing. A non-finite upstream value reaches the rows that it hits and no other.
    """
    num_tables = len(table_sizes)
    is_concat = mode == "concat"
    dim = grad_output.shape[1] // num_tables if is_concat else grad_output.shape[1]
    divisor = num_tables if mode == "mean" else 1
    shape = (sum(table_sizes), dim)
    if grad_output.numel() == 0:
        return torch.zeros(shape, dtype=grad_output.dtype, device=grad_output.device)
    gradient = torch.empty(shape, dtype=grad_output.dtype, device=grad_output.device)
    first_rows = tuple(accumulate(table_sizes[:-1], initial=0))
    small_sizes = tuple(size if size <= SMALL_TABLE_ROWS else 0 for size in table_sizes)
    large_columns = tuple(c for c, size in enumerate(table_sizes) if size > SMALL_TABLE_ROWS)
    with torch.cuda.device_of(grad_output):
        for first in range(0, num_tables, MAX_TABLES):
            group = slice(first, first + MAX_TABLES)
            group_grad = grad_output[:, first * dim :] if is_concat else grad_output
            write_small_gradients(
                gradient, group_grad, ids[:, group], small_sizes[group], first_rows[group], is_concat, divisor
            )
        if large_columns:
            write_large_gradients(
                gradient, grad_output, ids, tuple(table_sizes[c] for c in large_columns),
                tuple(first_rows[c] for c in large_columns), large_columns, is_concat, divisor,
            )  # fmt: skip
    return gradient
