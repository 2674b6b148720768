"""The backward of multi_head_cross_entropy: its Triton kernels and its launcher.

Two kernels recompute the logits, one per direction of the sum (over classes for d_hidden, over rows for d_weight and
d_bias), since an exponential costs less than a logit's way through memory; wide rows go to triton_chunks.py. Source:
Wijmans et al., 2024 (Cut Cross Entropy); theirs adds up with locks, here each sum has one owner and one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eventkern.ops.multi_head_cross_entropy.triton_chunks import backward_by_chunks
from eventkern.ops.multi_head_cross_entropy.triton_tiles import (
    LOG2_E,
    capability_of,
    class_block,
    count_tiles,
    dot_precision,
    grad_logits_of,
    head_at,
    head_of_tile,
    is_interpreted,
    lane_offset,
    load_target,
    load_terms,
    padded_dim,
    steps_per_split,
)

# Predicted, not yet measured on a card: recomputing logits beats storing them up to D = 256 in two bytes, 64 in four.
WIDE_ROW_BYTES = {2: 512, 4: 256}
ROW_TERMS_CONSTANTS = {"BLOCK_N": 256, "num_warps": 4}
SUM_CONSTANTS = {"BLOCK": 1024, "num_warps": 4}
_SHAPES = [
    "num_rows", "target_stride_n", "target_stride_h", "grad_stride_n", "grad_stride_h", "ignore_index",
    "tiles_per_split", "blocks_per_split", "num_splits", "num_elements",
]  # fmt: skip


def is_wide(dim: int, itemsize: int) -> bool:
    return padded_dim(dim) * itemsize > WIDE_ROW_BYTES[itemsize]


def hidden_constants(dim: int, itemsize: int, head_sizes: tuple[int, ...], capability: int) -> dict[str, int | None]:
    """Blocks and launch options for a compute capability: the widest tiles that ptxas fits without a spill."""
    if itemsize == 4:
        return _constants(dim, 32, 32, num_warps=4)
    if dim <= 64 and capability >= 90:
        return _constants(dim, 128, 32, num_stages=3, maxnreg=128)  # two programs a multiprocessor
    if dim <= 64 or (dim <= 128 and capability >= 90):
        return _constants(dim, 128, class_block(head_sizes, (64, 32)))
    if dim <= 128:
        return _constants(dim, 64, class_block(head_sizes, (64, 32)))
    return _constants(dim, 128, 32, num_stages=3) if capability == 90 else _constants(dim, 64, 32)


def weight_constants(dim: int, itemsize: int, head_sizes: tuple[int, ...], capability: int) -> dict[str, int | None]:
    if itemsize == 4:
        return _constants(dim, 32, 32, num_warps=4)
    if dim <= 64:  # two programs a multiprocessor
        return _constants(dim, 32, class_block(head_sizes, (128, 64)), maxnreg=128 if capability < 100 else None)
    return _constants(dim, 32, class_block(head_sizes, (128, 64)) if dim <= 128 else 64)


def _constants(dim: int, block_n: int, block_v: int, **options: int | None) -> dict[str, int | None]:
    blocks = {"BLOCK_N": block_n, "BLOCK_V": block_v, "BLOCK_D": padded_dim(dim)}
    return {**blocks, "num_warps": 8, "num_stages": 2, "maxnreg": 255, **options}


@triton.jit(do_not_specialize=_SHAPES)
def row_terms_kernel(
    grad_losses_ptr, log_sum_exp_ptr, targets_ptr, terms_ptr,
    num_rows: tl.int64, grad_stride_n: tl.int64, grad_stride_h: tl.int64, target_stride_n: tl.int64,
    target_stride_h: tl.int64, ignore_index: tl.int64,
    HEAD_SIZES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the gradients need of each row and head, heads first: scaled log-sum-exp, upstream gradient, target class.

    A row without a class (ignored, or out of range: its loss is a constant) gets infinity, 0 and -1: probabilities and
    gradient are 0 there, whatever came from upstream.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(1)
    is_row = rows < num_rows
    _, size, _ = head_at(head, HEAD_SIZES, 1)
    target, _ = load_target(targets_ptr, rows, is_row, head, target_stride_n, target_stride_h, size, ignore_index)
    scaled = tl.load(log_sum_exp_ptr + rows * len(HEAD_SIZES) + head, mask=is_row, other=0.0)
    grad_ptrs = grad_losses_ptr + rows * grad_stride_n + tl.cast(head, tl.int64) * grad_stride_h
    grad = tl.load(grad_ptrs, mask=is_row, other=0.0)
    plane = num_rows * len(HEAD_SIZES)
    terms_ptrs = terms_ptr + tl.cast(head, tl.int64) * num_rows + rows
    tl.store(terms_ptrs, tl.where(target >= 0, scaled, float("inf")), mask=is_row)
    tl.store(terms_ptrs + plane, tl.where(target >= 0, grad, 0.0), mask=is_row)
    tl.store(terms_ptrs + 2 * plane, target.to(tl.float32, bitcast=True), mask=is_row)


@triton.jit(do_not_specialize=_SHAPES)
def grad_hidden_kernel(
    hidden_ptr, weight_ptr, bias_ptr, terms_ptr, out_ptr,
    num_rows: tl.int64, hidden_stride, weight_stride, label_smoothing, z_loss, tiles_per_split,
    HEAD_SIZES: tl.constexpr, NUM_TILES: tl.constexpr, DIM: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """d_hidden of one block of rows, summed over one split of the tiles; out is (splits, N, D)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < num_rows
    dims = tl.arange(0, BLOCK_D)
    is_dim = (dims < DIM)[None, :]
    hidden = tl.load(
        hidden_ptr + rows[:, None] * hidden_stride + dims[None, :], mask=is_row[:, None] & is_dim, other=0.0
    )
    if UPCAST:
        hidden = hidden.to(tl.float32)
    weight_offsets = tl.arange(0, BLOCK_V)[:, None] * weight_stride + dims[None, :]
    first_tile = tl.program_id(1) * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, NUM_TILES)
    first_head = head_of_tile(first_tile, HEAD_SIZES, BLOCK_V)
    last_head = head_of_tile(last_tile - 1, HEAD_SIZES, BLOCK_V)
    grad_hidden = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for head in range(first_head, last_head + 1):
        first_class, size, head_tile = head_at(head, HEAD_SIZES, BLOCK_V)
        head_weight_ptr = weight_ptr + tl.cast(first_class, tl.int64) * weight_stride
        terms = load_terms(terms_ptr, rows, is_row, head, num_rows, label_smoothing, z_loss, len(HEAD_SIZES))
        begin = tl.maximum(first_tile - head_tile, 0) * BLOCK_V
        end = tl.minimum((last_tile - head_tile) * BLOCK_V, size)
        for start in range(begin, end, BLOCK_V):
            lanes = start + tl.arange(0, BLOCK_V)
            weight_ptrs = head_weight_ptr + tl.cast(start, tl.int64) * weight_stride + weight_offsets
            weight = tl.load(weight_ptrs, mask=(lanes < size)[:, None] & is_dim, other=0.0)
            if UPCAST:
                weight = weight.to(tl.float32)
            logits = tl.dot(hidden, weight.T, input_precision=PRECISION) * LOG2_E
            logits += lane_offset(bias_ptr + first_class, lanes, size, HAS_BIAS)[None, :]
            grad_logits = grad_logits_of(logits, lanes, terms, size, label_smoothing, 1, HAS_SMOOTHING)
            grad_hidden = tl.dot(grad_logits.to(weight.dtype), weight, grad_hidden, input_precision=PRECISION)
    out_rows = tl.program_id(1).to(tl.int64) * num_rows + rows
    tl.store(out_ptr + out_rows[:, None] * DIM + dims[None, :], grad_hidden, mask=is_row[:, None] & is_dim)


@triton.jit(do_not_specialize=_SHAPES)
def grad_weight_kernel(
    hidden_ptr, weight_ptr, bias_ptr, terms_ptr, weight_out_ptr, bias_out_ptr,
    num_rows: tl.int64, hidden_stride, weight_stride, label_smoothing, z_loss, blocks_per_split,
    HEAD_SIZES: tl.constexpr, NUM_CLASSES: tl.constexpr, DIM: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, NEEDS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """d_weight and d_bias of one tile, summed over one split of the row blocks; (splits, R, D) and (splits, R)."""
    tile = tl.program_id(0)
    head = head_of_tile(tile, HEAD_SIZES, BLOCK_V)
    first_class, size, head_tile = head_at(head, HEAD_SIZES, BLOCK_V)
    lanes = (tile - head_tile) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_lane = lanes < size
    classes = (first_class + lanes).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    is_dim = (dims < DIM)[None, :]
    weight = tl.load(
        weight_ptr + classes[:, None] * weight_stride + dims[None, :], mask=is_lane[:, None] & is_dim, other=0.0
    )
    if UPCAST:
        weight = weight.to(tl.float32)
    offset = lane_offset(bias_ptr + first_class, lanes, size, HAS_BIAS)
    hidden_offsets = tl.arange(0, BLOCK_N)[:, None] * hidden_stride + dims[None, :]
    grad_weight = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    grad_bias = tl.zeros([BLOCK_V], tl.float32)
    first_row = tl.program_id(1).to(tl.int64) * blocks_per_split * BLOCK_N
    last_row = tl.minimum(first_row + blocks_per_split * BLOCK_N, num_rows)
    for start in range(first_row, last_row, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        is_row = rows < num_rows
        hidden = tl.load(hidden_ptr + start * hidden_stride + hidden_offsets, mask=is_row[:, None] & is_dim, other=0.0)
        if UPCAST:
            hidden = hidden.to(tl.float32)
        terms = load_terms(terms_ptr, rows, is_row, head, num_rows, label_smoothing, z_loss, len(HEAD_SIZES))
        logits = tl.dot(weight, hidden.T, input_precision=PRECISION) * LOG2_E + offset[:, None]
        grad_logits = grad_logits_of(logits, lanes, terms, size, label_smoothing, 0, HAS_SMOOTHING)
        if NEEDS_BIAS:
            grad_bias += tl.sum(grad_logits, 1)
        if NEEDS_WEIGHT:
            grad_weight = tl.dot(grad_logits.to(hidden.dtype), hidden, grad_weight, input_precision=PRECISION)
    out_classes = tl.program_id(1).to(tl.int64) * NUM_CLASSES + classes
    if NEEDS_WEIGHT:
        out_ptrs = weight_out_ptr + out_classes[:, None] * DIM + dims[None, :]
        tl.store(out_ptrs, grad_weight, mask=is_lane[:, None] & is_dim)
    if NEEDS_BIAS:
        tl.store(bias_out_ptr + out_classes, grad_bias, mask=is_lane)


@triton.jit(do_not_specialize=_SHAPES)
def sum_splits_kernel(partials_ptr, out_ptr, num_splits, num_elements: tl.int64, BLOCK: tl.constexpr):
    """out = partials.sum(0), in the order of the splits."""
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_element = elements < num_elements
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(num_splits):
        total += tl.load(partials_ptr + tl.cast(split, tl.int64) * num_elements + elements, mask=is_element, other=0.0)
    tl.store(out_ptr + elements, total, mask=is_element)


def multi_head_cross_entropy_backward(
    grad_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    log_sum_exp: Tensor,
    head_sizes: tuple[int, ...],
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(d_hidden, d_weight, d_bias), each in its input's dtype, or None where it is not needed.

    Rows whose target is ignored or out of range get no gradient, also where grad_losses is NaN.
    """
    (num_rows, dim), num_heads = hidden.shape, len(head_sizes)
    if num_rows == 0:
        return tuple(
            torch.zeros_like(tensor) if need else None
            for tensor, need in zip((hidden, weight, bias), needs, strict=True)
        )
    terms = torch.empty((3, num_heads, num_rows), dtype=torch.float32, device=hidden.device)
    row_terms_kernel[(triton.cdiv(num_rows, ROW_TERMS_CONSTANTS["BLOCK_N"]), num_heads)](
        grad_losses, log_sum_exp, targets, terms,
        num_rows, *grad_losses.stride(), *targets.stride(), ignore_index, HEAD_SIZES=head_sizes,
        **ROW_TERMS_CONSTANTS,
    )  # fmt: skip
    if is_wide(dim, hidden.element_size()):
        return backward_by_chunks(hidden, weight, bias, terms, head_sizes, label_smoothing, z_loss, needs)
    inputs = (hidden, weight, hidden if bias is None else bias, terms)
    scalars = (num_rows, hidden.stride(0), weight.stride(0), label_smoothing, z_loss)
    options = {
        "HEAD_SIZES": head_sizes, "DIM": dim, "HAS_BIAS": bias is not None, "HAS_SMOOTHING": label_smoothing != 0,
        "PRECISION": dot_precision(hidden.dtype), "UPCAST": is_interpreted(),
    }  # fmt: skip
    capability = capability_of(hidden.device)
    d_hidden = d_weight = d_bias = None
    if needs[0]:
        constants = hidden_constants(dim, hidden.element_size(), head_sizes, capability)
        num_tiles = count_tiles(head_sizes, constants["BLOCK_V"])
        row_blocks = triton.cdiv(num_rows, constants["BLOCK_N"])
        tiles_per_split = steps_per_split(row_blocks, num_tiles, 4 * num_rows * dim)
        num_splits = triton.cdiv(num_tiles, tiles_per_split)
        partials = _empty_partials(num_splits, hidden)
        grad_hidden_kernel[(row_blocks, num_splits)](
            *inputs, partials, *scalars, tiles_per_split, NUM_TILES=num_tiles, **options, **constants
        )
        d_hidden = _sum_splits(partials, hidden)
    if needs[1] or needs[2]:
        constants = weight_constants(dim, hidden.element_size(), head_sizes, capability)
        num_tiles = count_tiles(head_sizes, constants["BLOCK_V"])
        row_blocks = triton.cdiv(num_rows, constants["BLOCK_N"])
        blocks_per_split = steps_per_split(num_tiles, row_blocks, 4 * weight.numel())
        num_splits = triton.cdiv(row_blocks, blocks_per_split)
        weight_partials = _empty_partials(num_splits, weight) if needs[1] else terms
        bias_partials = _empty_partials(num_splits, bias) if needs[2] else terms
        grad_weight_kernel[(num_tiles, num_splits)](
            *inputs, weight_partials, bias_partials, *scalars, blocks_per_split,
            NUM_CLASSES=weight.shape[0], NEEDS_WEIGHT=needs[1], NEEDS_BIAS=needs[2], **options, **constants,
        )  # fmt: skip
        d_weight = _sum_splits(weight_partials, weight) if needs[1] else None
        d_bias = _sum_splits(bias_partials, bias) if needs[2] else None
    return d_hidden, d_weight, d_bias


def _empty_partials(num_splits: int, like: Tensor) -> Tensor:
    """(splits, *shape): float32 to be added up, or the result itself where there is one split."""
    dtype = torch.float32 if num_splits > 1 else like.dtype
    return torch.empty((num_splits, *like.shape), dtype=dtype, device=like.device)


def _sum_splits(partials: Tensor, like: Tensor) -> Tensor:
    if partials.shape[0] == 1:
        return partials[0]
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    grid = (triton.cdiv(out.numel(), SUM_CONSTANTS["BLOCK"]),)
    sum_splits_kernel[grid](partials, out, partials.shape[0], out.numel(), **SUM_CONSTANTS)
    return out
