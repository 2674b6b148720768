"""Tiles of classes, and what the Triton kernels of both directions do with them.

A tile is BLOCK_V classes of one head, counted from the head's first class: tiles never cross heads, so a row has one
target, one log-sum-exp and one upstream gradient in a tile, and no lane looks up its head. The price is the padding of
each head's last tile; `class_block` picks the width that pads least. Tiles are numbered through all heads.
"""

import torch
import triton
import triton.language as tl

# Predicted, not yet measured on a card.
WANTED_PROGRAMS = 1024  # a few waves of any card; never its own count of multiprocessors, so that sums keep their order
MIN_STEPS = 4  # tiles or row blocks of a split at least: below, adding up its partial result costs more than it gains
MAX_PARTIAL_BYTES = 128 * 2**20

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def is_interpreted() -> bool:
    """The interpreter multiplies bfloat16 wrongly: there kernels upcast the operands of a dot."""
    return triton.knobs.runtime.interpret


def capability_of(device: torch.device) -> int:
    return 10 * torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 90


def dot_precision(dtype: torch.dtype) -> str:
    """tf32x3 unless torch's own products may use tf32: on tensor cores, each operand split into two tf32 halves, which
    errs by about a float32 rounding. "ieee" would run on the far slower scalar units, and spills."""
    is_tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if is_tf32 else "tf32x3"


def padded_dim(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def class_block(head_sizes: tuple[int, ...], choices: tuple[int, ...]) -> int:
    """The tile width with the fewest lanes over all heads; a tile costs about 16 lanes more than it has."""
    return min(choices, key=lambda block: sum(triton.cdiv(size, block) * (block + 16) for size in head_sizes))


def count_tiles(head_sizes: tuple[int, ...], block: int) -> int:
    return sum(triton.cdiv(size, block) for size in head_sizes)


def steps_per_split(programs: int, steps: int, partial_bytes: int) -> int:
    """Steps of a program's loop, so that about WANTED_PROGRAMS run and their partial results stay bounded."""
    splits = min(triton.cdiv(WANTED_PROGRAMS, programs), steps // MIN_STEPS, MAX_PARTIAL_BYTES // max(partial_bytes, 1))
    return triton.cdiv(steps, max(splits, 1))


@triton.jit
def head_at(head, HEAD_SIZES: tl.constexpr, BLOCK_V: tl.constexpr):
    """(first class, size, first tile) of a head."""
    first_class, size, first_tile = 0, HEAD_SIZES[0], 0
    for other in tl.static_range(len(HEAD_SIZES) - 1):
        first_class += tl.where(head > other, HEAD_SIZES[other], 0)
        size = tl.where(head > other, HEAD_SIZES[other + 1], size)
        first_tile += tl.where(head > other, (HEAD_SIZES[other] + BLOCK_V - 1) // BLOCK_V, 0)
    return first_class, size, first_tile


@triton.jit
def head_of_tile(tile, HEAD_SIZES: tl.constexpr, BLOCK_V: tl.constexpr):
    head, end = 0, 0
    for other in tl.static_range(len(HEAD_SIZES)):
        end += (HEAD_SIZES[other] + BLOCK_V - 1) // BLOCK_V
        head = tl.where(tile >= end, other + 1, head)
    return head


@triton.jit
def load_target(targets_ptr, rows, is_row, head, stride_n, stride_h, size, ignore_index):
    """The target class, or -1 where there is none; and whether the target is ignored."""
    target = tl.load(targets_ptr + rows * stride_n + tl.cast(head, tl.int64) * stride_h, mask=is_row, other=-1)
    is_ignored = target == ignore_index
    is_class = (target >= 0) & (target < size) & (target != ignore_index)
    return tl.where(is_class, target, -1).to(tl.int32), is_ignored


@triton.jit
def lane_offset(bias_ptr, lanes, size, HAS_BIAS: tl.constexpr):
    """What is added to each class's scaled logit: its bias, and minus infinity past the head's end."""
    is_lane = lanes < size
    if HAS_BIAS:
        bias = tl.load(bias_ptr + lanes, mask=is_lane, other=0.0).to(tl.float32) * LOG2_E
        return tl.where(is_lane, bias, float("-inf"))
    else:
        return tl.where(is_lane, 0.0, float("-inf"))


@triton.jit
def load_terms(terms_ptr, rows, is_row, head, num_rows, label_smoothing, z_loss, NUM_HEADS: tl.constexpr):
    """Per row: scaled log-sum-exp, factor of the probabilities, upstream gradient, target class."""
    plane = num_rows * NUM_HEADS
    terms_ptrs = terms_ptr + tl.cast(head, tl.int64) * num_rows + rows
    scaled = tl.load(terms_ptrs, mask=is_row, other=float("inf"))
    grad = tl.load(terms_ptrs + plane, mask=is_row, other=0.0)
    target = tl.load(terms_ptrs + 2 * plane, mask=is_row, other=-1.0).to(tl.int32, bitcast=True)  # negative either way
    factor = grad * (1.0 + 2.0 * z_loss * LN_2 * tl.where(target >= 0, scaled, 0.0))
    return scaled, factor, grad, target


@triton.jit
def grad_logits_of(logits, lanes, terms, size, label_smoothing, AXIS: tl.constexpr, HAS_SMOOTHING: tl.constexpr):
    """d loss / d logits in float32, from scaled logits and the terms of rows, which lie along the other axis than AXIS.

    Lanes past the head's end are to meet weights of 0, or not to be stored.
    """
    scaled, factor, grad, target = terms
    lanes = tl.expand_dims(lanes, 1 - AXIS)
    grad_logits = tl.expand_dims(factor, AXIS) * tl.exp2(logits - tl.expand_dims(scaled, AXIS))
    grad_logits -= tl.where(
        lanes == tl.expand_dims(target, AXIS), tl.expand_dims((1.0 - label_smoothing) * grad, AXIS), 0.0
    )
    if HAS_SMOOTHING:
        grad_logits -= tl.expand_dims(label_smoothing / size * grad, AXIS)
    return grad_logits
