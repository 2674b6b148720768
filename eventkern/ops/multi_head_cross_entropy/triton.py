"""The forward of multi_head_cross_entropy in Triton: kernels and launcher; beside it, the launcher of the backward.

Logits live in registers, scaled by log2(e). Sources: logits that never reach memory, Wijmans et al., 2024 (Cut Cross
Entropy); online softmax, Milakov & Gimelshein, 2018.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eventkern.ops.multi_head_cross_entropy.triton_backward import multi_head_cross_entropy_backward
from eventkern.ops.multi_head_cross_entropy.triton_tiles import (
    LN_2,
    LOG2_E,
    capability_of,
    class_block,
    count_tiles,
    dot_precision,
    head_at,
    head_of_tile,
    is_interpreted,
    lane_offset,
    load_target,
    padded_dim,
    steps_per_split,
)

__all__ = ["multi_head_cross_entropy", "multi_head_cross_entropy_backward"]

COMBINE_CONSTANTS = {"BLOCK_N": 128, "num_warps": 4}
_SHAPES = ["num_rows", "target_stride_n", "target_stride_h", "ignore_index", "tiles_per_split", "num_pieces"]


def forward_constants(dim: int, itemsize: int, head_sizes: tuple[int, ...], capability: int) -> dict[str, int | None]:
    """Blocks and launch options for a compute capability (80, 90, ...); hidden stays resident where D <= BLOCK_D."""
    block_v = class_block(head_sizes, (64, 32))
    block_d, num_stages, maxnreg = padded_dim(dim), 2, 255  # where ptxas chooses, it may spill to seat a second program
    if itemsize == 4:
        block_v, block_d, num_stages = 32, min(padded_dim(dim), 32), 3
    elif dim <= 64:
        num_stages, maxnreg = 3, 128 if capability == 90 else None  # two programs a multiprocessor
    elif dim <= 256:
        block_v = block_v if dim <= 128 or capability >= 90 else 32
    else:
        block_v = class_block(head_sizes, (128 if capability >= 90 else 64, 32))
        block_d, num_stages = 64, 3
    blocks = {"BLOCK_N": 128, "BLOCK_V": block_v, "BLOCK_D": block_d}
    return {**blocks, "num_warps": 8, "num_stages": num_stages, "maxnreg": maxnreg}


@triton.jit
def _store_loss(
    losses_ptr, log_sum_exp_ptr, offsets, is_row, maximum, total, picked, logit_sum, target, is_ignored, size,
    label_smoothing, z_loss, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    """The loss from a row's softmax state; differences come before the scale by ln(2), so that equal logits cancel."""
    scaled = maximum + tl.log2(total)
    loss = (1.0 - label_smoothing) * (scaled - picked)
    if HAS_SMOOTHING:
        loss += label_smoothing * (scaled - logit_sum / size)
    log_sum_exp = scaled * LN_2
    loss = loss * LN_2 + z_loss * log_sum_exp * log_sum_exp
    loss = tl.where(target >= 0, loss, float("nan"))
    tl.store(losses_ptr + offsets, tl.where(is_ignored, 0.0, loss), mask=is_row)
    tl.store(log_sum_exp_ptr + offsets, scaled, mask=is_row)


@triton.jit(do_not_specialize=_SHAPES)
def forward_kernel(
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr, losses_ptr, log_sum_exp_ptr, partials_ptr,
    num_rows: tl.int64, hidden_stride, weight_stride, target_stride_n: tl.int64, target_stride_h: tl.int64,
    ignore_index: tl.int64, label_smoothing, z_loss, tiles_per_split, num_pieces: tl.int64,
    HEAD_SIZES: tl.constexpr, NUM_TILES: tl.constexpr, DIM: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr, IS_SPLIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of rows against one split of the tiles."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < num_rows
    dims = tl.arange(0, BLOCK_D)
    hidden_ptrs = hidden_ptr + rows[:, None] * hidden_stride + dims[None, :]
    weight_offsets = tl.arange(0, BLOCK_V)[:, None] * weight_stride + dims[None, :]
    IS_RESIDENT: tl.constexpr = DIM <= BLOCK_D
    if IS_RESIDENT:
        hidden = tl.load(hidden_ptrs, mask=is_row[:, None] & (dims < DIM)[None, :], other=0.0)
        if UPCAST:
            hidden = hidden.to(tl.float32)
    first_tile = tl.program_id(1) * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, NUM_TILES)
    first_head = head_of_tile(first_tile, HEAD_SIZES, BLOCK_V)
    last_head = head_of_tile(last_tile - 1, HEAD_SIZES, BLOCK_V)
    for head in range(first_head, last_head + 1):
        first_class, size, head_tile = head_at(head, HEAD_SIZES, BLOCK_V)
        head_weight_ptr = weight_ptr + tl.cast(first_class, tl.int64) * weight_stride
        target, is_ignored = load_target(
            targets_ptr, rows, is_row, head, target_stride_n, target_stride_h, size, ignore_index
        )
        maximum = tl.full([BLOCK_N], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_N], tl.float32)
        picked = tl.zeros([BLOCK_N], tl.float32)
        logit_sum = tl.zeros([BLOCK_N], tl.float32)
        begin = tl.maximum(first_tile - head_tile, 0) * BLOCK_V
        end = tl.minimum((last_tile - head_tile) * BLOCK_V, size)
        for start in range(begin, end, BLOCK_V):
            lanes = start + tl.arange(0, BLOCK_V)
            weight_ptrs = head_weight_ptr + tl.cast(start, tl.int64) * weight_stride + weight_offsets
            if IS_RESIDENT:
                weight = tl.load(weight_ptrs, mask=(lanes < size)[:, None] & (dims < DIM)[None, :], other=0.0)
                if UPCAST:
                    weight = weight.to(tl.float32)
                logits = tl.dot(hidden, weight.T, input_precision=PRECISION)
            else:
                logits = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
                for first_dim in range(0, DIM, BLOCK_D):
                    is_dim = dims < DIM - first_dim
                    part = tl.load(hidden_ptrs + first_dim, mask=is_row[:, None] & is_dim[None, :], other=0.0)
                    weight = tl.load(weight_ptrs + first_dim, mask=(lanes < size)[:, None] & is_dim[None, :], other=0.0)
                    if UPCAST:
                        part, weight = part.to(tl.float32), weight.to(tl.float32)
                    logits = tl.dot(part, weight.T, logits, input_precision=PRECISION)
            logits = logits * LOG2_E + lane_offset(bias_ptr + first_class, lanes, size, HAS_BIAS)[None, :]
            new_maximum = tl.maximum(maximum, tl.max(logits, 1))
            shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # a bias may be minus infinity
            total = total * tl.exp2(maximum - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
            picked += tl.sum(tl.where(lanes[None, :] == target[:, None], logits, 0.0), 1)
            if HAS_SMOOTHING:
                logit_sum += tl.sum(tl.where((lanes < size)[None, :], logits, 0.0), 1)
            maximum = new_maximum
        if IS_SPLIT:
            # Along the tiles split and head only grow, and one of them at each piece: their sum numbers the pieces.
            piece = (tl.program_id(1) + head).to(tl.int64)
            plane = num_pieces * num_rows
            state_ptrs = partials_ptr + piece * num_rows + rows
            tl.store(state_ptrs, maximum, mask=is_row)
            tl.store(state_ptrs + plane, total, mask=is_row)
            tl.store(state_ptrs + 2 * plane, picked, mask=is_row)
            if HAS_SMOOTHING:
                tl.store(state_ptrs + 3 * plane, logit_sum, mask=is_row)
        else:
            _store_loss(
                losses_ptr, log_sum_exp_ptr, rows * len(HEAD_SIZES) + head, is_row, maximum, total, picked, logit_sum,
                target, is_ignored, size, label_smoothing, z_loss, HAS_SMOOTHING,
            )  # fmt: skip


@triton.jit(do_not_specialize=_SHAPES)
def combine_kernel(
    partials_ptr, targets_ptr, losses_ptr, log_sum_exp_ptr,
    num_rows: tl.int64, target_stride_n: tl.int64, target_stride_h: tl.int64, ignore_index: tl.int64, label_smoothing,
    z_loss, tiles_per_split, num_pieces: tl.int64,
    HEAD_SIZES: tl.constexpr, HAS_SMOOTHING: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The losses of one head on a block of rows, from the states that the splits left."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(1)
    is_row = rows < num_rows
    _, size, head_tile = head_at(head, HEAD_SIZES, BLOCK_V)
    target, is_ignored = load_target(
        targets_ptr, rows, is_row, head, target_stride_n, target_stride_h, size, ignore_index
    )
    maximum = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    picked = tl.zeros([BLOCK_N], tl.float32)
    logit_sum = tl.zeros([BLOCK_N], tl.float32)
    plane = num_pieces * num_rows
    last_tile = head_tile + (size + BLOCK_V - 1) // BLOCK_V - 1
    for split in range(head_tile // tiles_per_split, last_tile // tiles_per_split + 1):
        state_ptrs = partials_ptr + tl.cast(split + head, tl.int64) * num_rows + rows
        part_maximum = tl.load(state_ptrs, mask=is_row, other=0.0)
        part_total = tl.load(state_ptrs + plane, mask=is_row, other=1.0)
        picked += tl.load(state_ptrs + 2 * plane, mask=is_row, other=0.0)
        if HAS_SMOOTHING:
            logit_sum += tl.load(state_ptrs + 3 * plane, mask=is_row, other=0.0)
        new_maximum = tl.maximum(maximum, part_maximum)
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        total = total * tl.exp2(maximum - shift) + part_total * tl.exp2(part_maximum - shift)
        maximum = new_maximum
    _store_loss(
        losses_ptr, log_sum_exp_ptr, rows * len(HEAD_SIZES) + head, is_row, maximum, total, picked, logit_sum,
        target, is_ignored, size, label_smoothing, z_loss, HAS_SMOOTHING,
    )  # fmt: skip


def multi_head_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    head_sizes: tuple[int, ...],
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """(losses, log_sum_exp), both (N, H) float32; hidden and weight with stride(1) == 1, bias contiguous.

    log_sum_exp is what the backward takes: in bits, for each change of base would cost its probabilities a rounding.
    """
    (num_rows, dim), num_heads = hidden.shape, len(head_sizes)
    losses = torch.empty((num_rows, num_heads), dtype=torch.float32, device=hidden.device)
    log_sum_exp = torch.empty_like(losses)
    if num_rows == 0:
        return losses, log_sum_exp
    constants = forward_constants(dim, hidden.element_size(), head_sizes, capability_of(hidden.device))
    num_tiles = count_tiles(head_sizes, constants["BLOCK_V"])
    row_blocks = triton.cdiv(num_rows, constants["BLOCK_N"])
    tiles_per_split = steps_per_split(row_blocks, num_tiles, 16 * num_rows)
    num_splits = triton.cdiv(num_tiles, tiles_per_split)
    num_pieces = num_splits + num_heads - 1
    is_split, has_smoothing = num_splits > 1, label_smoothing != 0
    partials = losses
    if is_split:
        shape = (4 if has_smoothing else 3, num_pieces, num_rows)
        partials = torch.empty(shape, dtype=torch.float32, device=hidden.device)
    forward_kernel[(row_blocks, num_splits)](
        hidden, weight, hidden if bias is None else bias, targets, losses, log_sum_exp, partials,
        num_rows, hidden.stride(0), weight.stride(0), *targets.stride(), ignore_index, label_smoothing, z_loss,
        tiles_per_split, num_pieces,
        HEAD_SIZES=head_sizes, NUM_TILES=num_tiles, DIM=dim, HAS_BIAS=bias is not None, HAS_SMOOTHING=has_smoothing,
        IS_SPLIT=is_split, PRECISION=dot_precision(hidden.dtype), UPCAST=is_interpreted(), **constants,
    )  # fmt: skip
    if is_split:
        combine_kernel[(triton.cdiv(num_rows, COMBINE_CONSTANTS["BLOCK_N"]), num_heads)](
            partials, targets, losses, log_sum_exp,
            num_rows, *targets.stride(), ignore_index, label_smoothing, z_loss, tiles_per_split, num_pieces,
            HEAD_SIZES=head_sizes, HAS_SMOOTHING=has_smoothing, BLOCK_V=constants["BLOCK_V"], **COMBINE_CONSTANTS,
        )  # fmt: skip
    return losses, log_sum_exp
