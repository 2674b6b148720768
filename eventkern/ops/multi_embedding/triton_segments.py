"""The gradient of large tables: events sorted by the row they hit, summed run by run, without atomics.

Source: equal pieces of a sorted list with carries between them, after Merrill and Garland, "Merge-based parallel sparse
matrix-vector multiplication" (2016).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eventkern.ops.multi_embedding.triton_multi_hot import (
    MAX_REGISTERS,
    exact_dot,
    has_non_finite,
    part_of,
    quotient,
    sums_of,
)


@triton.jit(do_not_specialize=["num_rows", "ids_stride_n", "ids_stride_c"])
def keys_kernel(
    ids_ptr, keys_ptr, num_rows: tl.int64, ids_stride_n: tl.int64, ids_stride_c: tl.int64,
    SIZES: tl.constexpr, FIRST_ROWS: tl.constexpr, COLUMNS: tl.constexpr, SENTINEL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """keys[k, n] = the row of the weight that event n hits in table COLUMNS[k]; SENTINEL for an id out of range."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < num_rows
    for k in tl.static_range(len(COLUMNS)):
        ids = tl.load(ids_ptr + rows * ids_stride_n + COLUMNS[k] * ids_stride_c, mask=is_row, other=0).to(tl.int64)
        keys = tl.where((ids >= 0) & (ids < SIZES[k]), ids + FIRST_ROWS[k], SENTINEL)
        tl.store(keys_ptr + k * num_rows + rows, keys.to(keys_ptr.dtype.element_ty), mask=is_row)


@triton.jit(do_not_specialize=["num_entries", "num_rows"])
def segments_kernel(
    grad_ptr, keys_ptr, order_ptr, gradient_ptr, carry_ptr,
    num_entries: tl.int64, num_rows: tl.int64, grad_stride: tl.int64,
    COLUMNS: tl.constexpr, IS_CONCAT: tl.constexpr, SENTINEL: tl.constexpr, DIVISOR: tl.constexpr,
    DIM: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sums of the runs of equal keys in a chunk: to the gradient, or to carry where a run crosses an end of it.

    carry[chunk, 0] is of a run that comes in from the chunk before, carry[chunk, 1] of one that begins and goes on.
    """
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    offsets = tl.arange(0, BLOCK_L)
    entries = chunk * BLOCK_L + offsets
    is_entry = entries < num_entries
    end = (chunk + 1) * BLOCK_L
    keys = tl.load(keys_ptr + entries, mask=is_entry, other=SENTINEL)
    previous = tl.load(keys_ptr + entries - 1, mask=is_entry & (entries > 0), other=-1)
    key_before = tl.load(keys_ptr + end - BLOCK_L - 1, mask=chunk > 0, other=-1)
    key_after = tl.load(keys_ptr + end, mask=end < num_entries, other=-1)
    order = tl.load(order_ptr + entries, mask=is_entry, other=0)
    value_offsets = (order % num_rows) * grad_stride
    if IS_CONCAT:
        for k in tl.static_range(len(COLUMNS)):
            value_offsets += tl.where(order // num_rows == k, COLUMNS[k] * DIM, 0)
    is_column = (columns < DIM)[None, :]
    is_counted = is_entry & (keys < SENTINEL)
    values = tl.load(
        grad_ptr + value_offsets[:, None] + columns[None, :], mask=is_counted[:, None] & is_column, other=0.0
    )
    hits = keys[:, None] == keys[None, :]
    nothing = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    sums = exact_dot(hits, values, nothing)
    if has_non_finite(values):
        sums = nothing
        for part in range(4):
            sums += sums_of(exact_dot(hits, part_of(values, part), nothing), part)
    is_head = is_counted & ((keys != previous) | (offsets == 0))
    comes_in = keys == key_before
    goes_on = keys == key_after
    is_whole = (is_head & ~(comes_in | goes_on))[:, None] & is_column
    gradient_ptrs = gradient_ptr + keys.to(tl.int64)[:, None] * DIM + columns[None, :]
    tl.store(gradient_ptrs, quotient(sums, DIVISOR).to(gradient_ptr.dtype.element_ty), mask=is_whole)
    slots = 2 * chunk + tl.where(comes_in, 0, 1)
    is_carried = (is_head & (comes_in | goes_on))[:, None] & is_column
    tl.store(carry_ptr + slots[:, None] * DIM + columns[None, :], sums, mask=is_carried)


@triton.jit(do_not_specialize=["num_entries"])
def carries_kernel(
    keys_ptr, carry_ptr, gradient_ptr, num_entries: tl.int64,
    SENTINEL: tl.constexpr, DIVISOR: tl.constexpr, DIM: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of a run that begins in this chunk and goes on: its carries, in the order of the chunks."""
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = columns < DIM
    end = (chunk + 1) * BLOCK_L
    key_before = tl.load(keys_ptr + end - BLOCK_L - 1, mask=chunk > 0, other=-1)
    key_after = tl.load(keys_ptr + end, mask=end < num_entries, other=-1)
    key = tl.load(keys_ptr + end - 1, mask=end <= num_entries, other=SENTINEL)
    if (key < SENTINEL) & (key == key_after) & (key != key_before):
        sums = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        chunks = chunk + 1 + tl.arange(0, BLOCK_K)
        goes_on = True
        while goes_on:
            is_chunk = chunks * BLOCK_L < num_entries
            is_same = tl.load(keys_ptr + chunks * BLOCK_L, mask=is_chunk, other=-1) == key
            carry_ptrs = carry_ptr + 2 * chunks[:, None] * DIM + columns[None, :]
            sums += tl.load(carry_ptrs, mask=is_same[:, None] & is_column[None, :], other=0.0)
            chunks += BLOCK_K
            goes_on = tl.min(is_same.to(tl.int32), 0) > 0
        begun = tl.load(carry_ptr + (2 * chunk + 1) * DIM + columns, mask=is_column, other=0.0)
        total = quotient(begun + tl.sum(sums, 0), DIVISOR)
        gradient_ptrs = gradient_ptr + key.to(tl.int64) * DIM + columns
        tl.store(gradient_ptrs, total.to(gradient_ptr.dtype.element_ty), mask=is_column)


def keys_options() -> dict[str, int]:
    return {"BLOCK_N": 128, "num_warps": 4}


def segments_options(dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Constants of segments_kernel; a chunk is BLOCK_L sorted entries."""
    block_d = min(max(triton.next_power_of_2(dim), 16), 64 if dtype == torch.float32 else 128)
    return {"DIM": dim, "BLOCK_L": 64, "BLOCK_D": block_d, "num_warps": 8, "num_stages": 1, "maxnreg": MAX_REGISTERS}


def carries_options(dim: int, dtype: torch.dtype) -> dict[str, int]:
    return {**segments_options(dim, dtype), "BLOCK_K": 32}


def write_large_gradients(
    gradient: Tensor, grad_output: Tensor, ids: Tensor, sizes: tuple[int, ...], first_rows: tuple[int, ...],
    columns: tuple[int, ...], is_concat: bool, divisor: int,
) -> None:  # fmt: skip
    """Write the gradient's rows of the tables that columns of ids name, each with a size and a first row."""
    (num_rows, _), (sentinel, dim), device = ids.shape, gradient.shape, gradient.device
    for size, first_row in zip(sizes, first_rows, strict=True):
        gradient[first_row : first_row + size].zero_()
    key_dtype = torch.int32 if sentinel < 2**31 else torch.int64
    keys = torch.empty(len(columns), num_rows, dtype=key_dtype, device=device)
    options = keys_options()
    keys_kernel[triton.cdiv(num_rows, options["BLOCK_N"]),](
        ids, keys, num_rows, *ids.stride(),
        SIZES=sizes, FIRST_ROWS=first_rows, COLUMNS=columns, SENTINEL=sentinel, **options,
    )  # fmt: skip
    keys, order = torch.sort(keys.view(-1), stable=True)
    options = segments_options(dim, grad_output.dtype)
    num_chunks = triton.cdiv(keys.numel(), options["BLOCK_L"])
    grid = (num_chunks, triton.cdiv(dim, options["BLOCK_D"]))
    carry = torch.empty(num_chunks, 2, dim, dtype=torch.float32, device=device)
    segments_kernel[grid](
        grad_output, keys, order, gradient, carry, keys.numel(), num_rows, grad_output.stride(0),
        COLUMNS=columns if is_concat else (), IS_CONCAT=is_concat, SENTINEL=sentinel, DIVISOR=divisor, **options,
    )  # fmt: skip
    carries_kernel[grid](
        keys,
        carry,
        gradient,
        keys.numel(),
        SENTINEL=sentinel,
        DIVISOR=divisor,
        **carries_options(dim, grad_output.dtype),
    )
