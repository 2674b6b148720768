"""The gradient of small tables: a multi-hot matrix product on tensor cores, with exact products and no atomics.

Sources: an embedding gradient as a one-hot product, Naumov et al., "DLRM" (2019); a float32 as three bfloat16, Henry et
al., "Leveraging the bfloat16 datatype for higher-precision computations" (2019); sums promoted out of the tensor cores
after DeepSeek-AI, "DeepSeek-V3" (2024), section 3.3.2.
"""

import math
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

MIN_SPLIT_ROWS = 2048
NUM_PROGRAMS = 1024  # enough for every card, and the same on each: the order of a sum depends on shapes alone
SPAN_ROWS = 1024  # tensor cores truncate as they accumulate: float32 sums of a span are added up outside, with rounding
MAX_SPLIT_ROWS = 131072  # where nothing is: 8,192 truncated steps of 16 rows lose 1 / 4,096 of a sum at the most
MAX_REGISTERS = 255  # said aloud: else ptxas spills to reach 128
MERGED_TABLES = 3  # predicted, not yet measured: a tile of fewer tables takes them one by one, in a loop that pipelines

_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_INFINITY = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))


@triton.jit
def _dot(hits, values, sums):
    """hits is 0 or 1. The interpreter's product is right for float32 operands alone."""
    if _IS_INTERPRETED:
        return tl.dot(hits.to(tl.float32), values.to(tl.float32), sums, input_precision="ieee")
    else:
        return tl.dot(hits.to(values.dtype), values, sums)


@triton.jit
def _leading_bits(values):
    """The 8 leading bits of each significand: exact in bfloat16."""
    return (values.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def exact_dot(hits, values, sums):
    """sums + hits @ values with exact products: the 24 bits of a float32 are three bfloat16."""
    if values.dtype == tl.float32:
        high = _leading_bits(values)
        rest = values - high
        middle = _leading_bits(rest)
        sums = _dot(hits, (rest - middle).to(tl.bfloat16), sums)
        sums = _dot(hits, middle.to(tl.bfloat16), sums)
        sums = _dot(hits, high.to(tl.bfloat16), sums)
    else:
        sums = _dot(hits, values, sums)
    return sums


# In a matrix product 0 * inf would spoil the sums of rows that a non-finite value does not hit. It leaves its mark in
# each of them, so a product with non-finite sums is done again in four parts: the finite values, and where each of NaN,
# inf and -inf hits.
@triton.jit
def part_of(values, part):
    wide = values.to(tl.float32)
    finite = tl.where(tl.abs(wide) < _INFINITY, wide, 0.0)
    is_infinite = tl.where(part == 2, wide, -wide) == _INFINITY
    is_marked = tl.where(part == 1, wide != wide, is_infinite)
    return tl.where(part == 0, finite, is_marked.to(tl.float32)).to(values.dtype)


@triton.jit
def sums_of(sums, part):
    mark = tl.where(part == 1, _NAN, tl.where(part == 2, _INFINITY, -_INFINITY))
    return tl.where(part == 0, sums, tl.where(sums > 0, mark, 0.0))


@triton.jit
def has_non_finite(values):
    is_finite = tl.abs(values.to(tl.float32)) < _INFINITY
    return tl.min(tl.min(is_finite.to(tl.int32), 1), 0) == 0


@triton.jit
def quotient(sums, DIVISOR: tl.constexpr):
    """sums / DIVISOR with one rounding: the plain `/` of Triton approximates."""
    return sums if DIVISOR == 1 else tl.div_rn(sums, tl.full(sums.shape, DIVISOR, tl.float32))


# The lanes of a launch are the rows of its tables one after another; the first of table c is lane STARTS[c].
@triton.jit
def _weight_rows(lanes, STARTS: tl.constexpr, FIRST_ROWS: tl.constexpr):
    """The row of the packed weight that each lane stands for."""
    rows = lanes.to(tl.int64) + FIRST_ROWS[0]
    for c in tl.static_range(1, len(STARTS)):
        rows = tl.where(lanes >= STARTS[c], (lanes - STARTS[c]).to(tl.int64) + FIRST_ROWS[c], rows)
    return rows


@triton.jit
def _tables_of(first_lane, end_lane, SIZES: tl.constexpr, STARTS: tl.constexpr):
    """The first table that has one of these lanes, and the one after the last."""
    first_table = 2147483647
    end_table = 0
    for c in tl.static_range(len(SIZES)):
        has_lane = (STARTS[c] < end_lane) & (STARTS[c] + SIZES[c] > first_lane) & (SIZES[c] > 0)
        first_table = tl.where(has_lane, tl.minimum(first_table, c), first_table)
        end_table = tl.where(has_lane, c + 1, end_table)
    return first_table, end_table


@triton.jit
def _hits(ids_ptrs, is_row, lanes, table, SIZES: tl.constexpr, STARTS: tl.constexpr):
    """Which lane each event hits in a table; an id out of range hits none."""
    start = 0
    size = 0
    for c in tl.static_range(len(SIZES)):
        start = tl.where(table == c, STARTS[c], start)
        size = tl.where(table == c, SIZES[c], size)
    ids = tl.load(ids_ptrs, mask=is_row, other=-1)
    hit_lanes = tl.where((ids >= 0) & (ids < size), ids.to(tl.int32) + start, -1)
    return lanes[:, None] == hit_lanes[None, :]


@triton.jit
def _add_events(
    total, grad_ptr, ids_ptr, first_row, end_row, ids_stride_n, ids_stride_c, grad_stride, columns, lanes, part,
    first_table, end_table, column_offset, IS_ONE_TABLE: tl.constexpr, IS_PART: tl.constexpr,
    SIZES: tl.constexpr, STARTS: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr,
    IS_SPANNED: tl.constexpr,
):  # fmt: skip
    """Add to a tile what events [first_row, end_row) hit in it through tables [first_table, end_table)."""
    num_blocks = tl.cdiv(end_row - first_row, BLOCK_N).to(tl.int32)
    rows = tl.arange(0, BLOCK_N)
    value_offsets = rows[:, None] * grad_stride + columns[None, :]
    for span in range(0, num_blocks, SPAN):
        sums = tl.zeros_like(total) if IS_SPANNED else total
        for block in range(span, tl.minimum(span + SPAN, num_blocks)):
            block_row = first_row + block * BLOCK_N
            is_row = rows < tl.minimum(end_row - block_row, BLOCK_N).to(tl.int32)
            value_ptrs = grad_ptr + (block_row * grad_stride + column_offset) + value_offsets
            values = tl.load(value_ptrs, mask=is_row[:, None] & (columns < DIM)[None, :], other=0.0)
            ids_ptrs = ids_ptr + block_row * ids_stride_n + rows * ids_stride_n
            if IS_ONE_TABLE:
                hits = _hits(ids_ptrs + first_table * ids_stride_c, is_row, lanes, first_table, SIZES, STARTS)
            else:
                hits = lanes[:, None] < tl.zeros_like(rows)[None, :]
                for c in range(first_table, end_table):
                    hits |= _hits(ids_ptrs + c * ids_stride_c, is_row, lanes, c, SIZES, STARTS)
            sums = exact_dot(hits, part_of(values, part) if IS_PART else values, sums)
        total = total + sums if IS_SPANNED else sums
    return total


@triton.jit
def _tile_sums(
    grad_ptr, ids_ptr, first_row, end_row, ids_stride_n, ids_stride_c, grad_stride, columns, lanes, part,
    IS_PART: tl.constexpr, IS_CONCAT: tl.constexpr, MERGED: tl.constexpr, SIZES: tl.constexpr, STARTS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPAN: tl.constexpr,
    IS_SPANNED: tl.constexpr,
):  # fmt: skip
    """The sums of a tile over events [first_row, end_row)."""
    first_lane = tl.program_id(0) * BLOCK_V
    first_table, end_table = _tables_of(first_lane, first_lane + BLOCK_V, SIZES, STARTS)
    total = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    is_merged = False if IS_CONCAT else end_table - first_table >= MERGED
    if is_merged:
        total = _add_events(
            total, grad_ptr, ids_ptr, first_row, end_row, ids_stride_n, ids_stride_c, grad_stride, columns, lanes, part,
            first_table, end_table, 0, False, IS_PART, SIZES, STARTS, DIM, BLOCK_N, SPAN, IS_SPANNED,
        )  # fmt: skip
    else:
        for c in range(first_table, end_table):
            total = _add_events(
                total, grad_ptr, ids_ptr, first_row, end_row, ids_stride_n, ids_stride_c, grad_stride, columns, lanes,
                part, c, c + 1, c * DIM if IS_CONCAT else 0, True, IS_PART, SIZES, STARTS, DIM, BLOCK_N, SPAN,
                IS_SPANNED,
            )  # fmt: skip
    return total


@triton.jit(do_not_specialize=["num_rows", "rows_per_split", "ids_stride_n", "ids_stride_c"])
def multi_hot_kernel(
    grad_ptr, ids_ptr, output_ptr,
    num_rows: tl.int64, rows_per_split: tl.int64, ids_stride_n: tl.int64, ids_stride_c: tl.int64, grad_stride: tl.int64,
    SIZES: tl.constexpr, STARTS: tl.constexpr, FIRST_ROWS: tl.constexpr, NUM_LANES: tl.constexpr,
    IS_MENDING: tl.constexpr, IS_CONCAT: tl.constexpr, IS_SPLIT: tl.constexpr, DIVISOR: tl.constexpr,
    MERGED: tl.constexpr, DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SPAN: tl.constexpr, IS_SPANNED: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of small-table rows: of all events into the gradient, of a split of them into partials."""
    lanes = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(2).to(tl.int64)
    first_row = split * rows_per_split
    end_row = tl.minimum(first_row + rows_per_split, num_rows)
    if not IS_MENDING:
        sums = _tile_sums(
            grad_ptr, ids_ptr, first_row, end_row, ids_stride_n, ids_stride_c, grad_stride, columns, lanes, 0,
            False, IS_CONCAT, MERGED, SIZES, STARTS, DIM, BLOCK_V, BLOCK_N, BLOCK_D, SPAN, IS_SPANNED,
        )  # fmt: skip
    output_rows = split * NUM_LANES + lanes if IS_SPLIT else _weight_rows(lanes, STARTS, FIRST_ROWS)
    output_ptrs = output_ptr + output_rows[:, None] * DIM + columns[None, :]
    is_cell = (lanes < NUM_LANES)[:, None] & (columns < DIM)[None, :]
    if not IS_MENDING:
        tl.store(output_ptrs, quotient(sums, DIVISOR).to(output_ptr.dtype.element_ty), mask=is_cell)
    elif has_non_finite(tl.load(output_ptrs, mask=is_cell, other=0.0)):
        mended = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
        for part in range(4):
            part_sums = _tile_sums(
                grad_ptr, ids_ptr, first_row, end_row, ids_stride_n, ids_stride_c, grad_stride, columns, lanes, part,
                True, IS_CONCAT, MERGED, SIZES, STARTS, DIM, BLOCK_V, BLOCK_N, BLOCK_D, SPAN, IS_SPANNED,
            )  # fmt: skip
            mended += sums_of(part_sums, part)
        tl.store(output_ptrs, quotient(mended, DIVISOR).to(output_ptr.dtype.element_ty), mask=is_cell)


@triton.jit(do_not_specialize=["num_splits"])
def splits_kernel(
    partials_ptr, gradient_ptr, num_splits,
    STARTS: tl.constexpr, FIRST_ROWS: tl.constexpr, NUM_LANES: tl.constexpr, DIVISOR: tl.constexpr,
    DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """gradient = the partials added in the order of the splits / DIVISOR."""
    lanes = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_cell = (lanes < NUM_LANES)[:, None] & (columns < DIM)[None, :]
    sums = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    rows = lanes.to(tl.int64)
    for _ in range(num_splits):
        sums += tl.load(partials_ptr + rows[:, None] * DIM + columns[None, :], mask=is_cell, other=0.0)
        rows += NUM_LANES
    gradient_ptrs = gradient_ptr + _weight_rows(lanes, STARTS, FIRST_ROWS)[:, None] * DIM + columns[None, :]
    tl.store(gradient_ptrs, quotient(sums, DIVISOR).to(gradient_ptr.dtype.element_ty), mask=is_cell)


def multi_hot_options(dim: int, dtype: torch.dtype, num_lanes: int) -> dict[str, int]:
    """Constants of multi_hot_kernel: a tile of as many lanes and columns as registers hold, to read less again."""
    is_wide = dtype == torch.float32  # three products, and sums of spans beside those of the tile
    block_n = 32 if is_wide else 64
    return {
        "DIM": dim, "MERGED": MERGED_TABLES, "IS_MENDING": False,
        "BLOCK_V": 64 if num_lanes <= 64 else 128, "BLOCK_N": block_n,
        "BLOCK_D": min(max(triton.next_power_of_2(dim), 16), 64 if is_wide else 128),
        "SPAN": SPAN_ROWS // block_n, "IS_SPANNED": is_wide,
        "num_warps": 8, "num_stages": 3, "maxnreg": MAX_REGISTERS,
    }  # fmt: skip


def mending_options(dim: int, dtype: torch.dtype, num_lanes: int) -> dict[str, int]:
    """Constants of the launch that does spoilt tiles again: smaller tiles, as it holds more sums of each."""
    options = multi_hot_options(dim, dtype, num_lanes)
    smaller = {"BLOCK_V": 64, "BLOCK_N": 32, "BLOCK_D": min(options["BLOCK_D"], 32), "SPAN": SPAN_ROWS // 32}
    return {**options, **smaller, "IS_MENDING": True}


def splits_options(dim: int) -> dict[str, int]:
    return {"DIM": dim, "BLOCK_V": 16, "BLOCK_D": min(triton.next_power_of_2(dim), 128), "num_warps": 4}


def write_small_gradients(
    gradient: Tensor, grad_output: Tensor, ids: Tensor, sizes: tuple[int, ...], first_rows: tuple[int, ...],
    is_concat: bool, divisor: int,
) -> None:  # fmt: skip
    """Write the gradient's rows of each table; a table of size 0 is not served here, and takes no part."""
    num_lanes = sum(sizes)
    if num_lanes == 0:
        return
    num_rows, dim = ids.shape[0], gradient.shape[1]
    choices = [choose(dim, grad_output.dtype, num_lanes) for choose in (multi_hot_options, mending_options)]
    num_tiles = math.prod(_tiles(num_lanes, dim, choices[0]))
    num_splits = min(NUM_PROGRAMS // num_tiles, num_rows // MIN_SPLIT_ROWS)
    num_splits = max(1, num_splits, triton.cdiv(num_rows, MAX_SPLIT_ROWS))
    rows_per_split = triton.cdiv(triton.cdiv(num_rows, num_splits), SPAN_ROWS) * SPAN_ROWS
    num_splits = triton.cdiv(num_rows, rows_per_split)
    is_split = num_splits > 1
    lanes = {
        "STARTS": tuple(accumulate(sizes[:-1], initial=0)), "FIRST_ROWS": first_rows, "NUM_LANES": num_lanes,
    }  # fmt: skip
    target = gradient
    if is_split:
        target = torch.empty(num_splits, num_lanes, dim, dtype=torch.float32, device=gradient.device)
    for options in choices:
        multi_hot_kernel[(*_tiles(num_lanes, dim, options), num_splits)](
            grad_output, ids, target, num_rows, rows_per_split, *ids.stride(), grad_output.stride(0),
            SIZES=sizes, **lanes, IS_CONCAT=is_concat, IS_SPLIT=is_split, DIVISOR=1 if is_split else divisor, **options,
        )  # fmt: skip
    if is_split:
        options = splits_options(dim)
        splits_kernel[_tiles(num_lanes, dim, options)](
            target, gradient, num_splits, **lanes, DIVISOR=divisor, **options
        )


def _tiles(num_lanes: int, dim: int, options: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(num_lanes, options["BLOCK_V"]), triton.cdiv(dim, options["BLOCK_D"])
