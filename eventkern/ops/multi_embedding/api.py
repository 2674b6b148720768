"""The multi-category embedding: one lookup in C packed tables per row, summed, averaged or concatenated."""

from typing import Literal

import torch
from torch import Tensor

from eventkern.ops.multi_embedding import reference
from eventkern.ops.switches import FLOAT_DTYPES, is_check_forced

_MODES = ("sum", "mean", "concat")


def multi_embedding(
    ids: Tensor, weight: Tensor, table_sizes: tuple[int, ...], *, mode: Literal["sum", "mean", "concat"] = "sum"
) -> Tensor:
    """Look up one row in each of C packed tables and reduce the C rows of each event.

    output[n] = sum over c of weight[first_row(c) + ids[n, c]], with first_row(c) = sum(table_sizes[:c]); "mean" divides
    by C, "concat" keeps the C rows side by side.

    Args:
        ids: (..., C) int32 or int64; ids[..., c] in [0, table_sizes[c]).
        weight: (sum(table_sizes), D) float32, bfloat16 or float16. Table c owns rows [first_row(c), first_row(c + 1)).
        table_sizes: rows of each table, length C.
        mode: "sum", "mean" or "concat".

    Returns:
        (..., D), or (..., C * D) for "concat", in weight.dtype (under autocast too).

    Raises:
        TypeError: ids or weight of another dtype.
        ValueError: shapes, devices or mode that do not fit one another.
        IndexError: an id outside its table, on the CPU or inside check_inputs(). Elsewhere, and in compiled code, its
            row is NaN.

    Numerics:
        Accumulates in float32, forward and backward; the gradient of weight is dense. Deterministic on the CPU.

    Devices:
        Any that torch serves (see eventkern.ops.implementations()).

    Source:
        One packed weight for many tables after FBGEMM's table-batched embedding (Khudia et al., 2021).
    """
    _check_arguments(ids, weight, table_sizes, mode)
    if not torch.compiler.is_compiling() and (ids.device.type == "cpu" or is_check_forced()):
        _check_range(ids, table_sizes)
    return reference.multi_embedding(ids, weight, tuple(table_sizes), mode)


def _check_arguments(ids: Tensor, weight: Tensor, table_sizes: tuple[int, ...], mode: str) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids is {ids.dtype}; want torch.int32 or torch.int64")
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"weight is {weight.dtype}; want torch.float32, torch.bfloat16 or torch.float16")
    if mode not in _MODES:
        raise ValueError(f"mode is {mode!r}; want one of {', '.join(_MODES)}")
    if not table_sizes or min(table_sizes) < 1:
        raise ValueError(f"table_sizes is {tuple(table_sizes)}; want one positive size per table")
    if ids.dim() < 1 or ids.shape[-1] != len(table_sizes):
        raise ValueError(f"ids has shape {tuple(ids.shape)}; want (..., {len(table_sizes)}), one column per table")
    if weight.dim() != 2 or weight.shape[0] != sum(table_sizes):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; want ({sum(table_sizes)}, D), the rows of all tables"
        )
    if ids.device != weight.device:
        raise ValueError(f"ids is on {ids.device}, but weight on {weight.device}; want one device")


def _check_range(ids: Tensor, table_sizes: tuple[int, ...]) -> None:
    flat = ids.reshape(-1, len(table_sizes))
    is_wrong = (flat < 0) | (flat >= torch.tensor(table_sizes, device=ids.device))
    if is_wrong.any():
        row, column = is_wrong.nonzero()[0].tolist()
        raise IndexError(
            f"ids[..., {column}] holds {int(flat[row, column])}, but table {column} has {table_sizes[column]} rows"
        )
