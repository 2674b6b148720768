"""The multi-category embedding: one lookup in C packed tables per row, summed, averaged or concatenated."""

from typing import Any, Literal

import torch
from torch import Tensor

from eventkern import _C
from eventkern.ops.multi_embedding import reference
from eventkern.ops.switches import FLOAT_DTYPES, LIBRARY, has_kernel, is_check_forced, is_reference_forced
from eventkern.ops.transforms import Formulas, can_read_values, is_transformed, transformed

_MODES = ("sum", "mean", "concat")  # in the order of the extension's EmbeddingMode

LIBRARY.define("multi_embedding(Tensor ids, Tensor weight, int[] table_sizes, str mode, bool check) -> Tensor")
LIBRARY.define("multi_embedding_backward(Tensor grad, Tensor ids, int[] table_sizes, str mode) -> Tensor")


def _output_width(num_tables: int, dim: int, mode: str) -> int:
    return num_tables * dim if mode == "concat" else dim


def _weight_dim(grad: Tensor, num_tables: int, mode: str) -> int:
    return grad.shape[-1] // num_tables if mode == "concat" else grad.shape[-1]


def _forward_cpu(ids: Tensor, weight: Tensor, table_sizes: list[int], mode: str, check: bool) -> Tensor:
    num_tables, dim = len(table_sizes), weight.shape[1]
    columns = ids if ids.dim() == 2 else ids.reshape(-1, num_tables)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    num_events = columns.shape[0]
    output = torch.empty(num_events, _output_width(num_tables, dim, mode), dtype=weight.dtype, device=weight.device)
    position = _C.multi_embedding_cpu(
        columns.data_ptr(), columns.element_size(), columns.stride(), num_events, table_sizes, dim,  # type: ignore[arg-type]
        _MODES.index(mode), FLOAT_DTYPES.index(weight.dtype), torch.get_num_threads(),
        weight.data_ptr(), weight.stride(0), output.data_ptr(),
    )  # fmt: skip
    if position >= 0:
        row, column = divmod(position, num_tables)
        raise _outside(columns, row, column, table_sizes)
    return output if ids.dim() == 2 else output.view(*ids.shape[:-1], output.shape[1])


def _backward_cpu(grad: Tensor, ids: Tensor, table_sizes: list[int], mode: str) -> Tensor:
    num_tables = len(table_sizes)
    columns, rows = ids.reshape(-1, num_tables), grad.reshape(-1, grad.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    dim = _weight_dim(grad, num_tables, mode)
    weight_grad = torch.empty(sum(table_sizes), dim, dtype=grad.dtype, device=grad.device)
    _C.multi_embedding_backward_cpu(
        columns.data_ptr(), columns.element_size(), columns.stride(), len(columns), table_sizes, dim,  # type: ignore[arg-type]
        _MODES.index(mode), FLOAT_DTYPES.index(grad.dtype), torch.get_num_threads(),
        rows.data_ptr(), rows.stride(0), weight_grad.data_ptr(),
    )  # fmt: skip
    return weight_grad


def _forward_cuda(ids: Tensor, weight: Tensor, table_sizes: list[int], mode: str, check: bool) -> Tensor:
    from eventkern.ops.multi_embedding import triton

    columns = ids.reshape(-1, len(table_sizes))
    if check:
        _check_range(columns, table_sizes)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    output = triton.multi_embedding(columns, weight, tuple(table_sizes), mode)
    return output.view(*ids.shape[:-1], output.shape[1])


def _backward_cuda(grad: Tensor, ids: Tensor, table_sizes: list[int], mode: str) -> Tensor:
    from eventkern.ops.multi_embedding import triton

    rows = grad.reshape(-1, grad.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return triton.multi_embedding_backward(rows, ids.reshape(-1, len(table_sizes)), tuple(table_sizes), mode)


def _fake_forward(ids: Tensor, weight: Tensor, table_sizes: list[int], mode: str, check: bool) -> Tensor:
    return weight.new_empty((*ids.shape[:-1], _output_width(len(table_sizes), weight.shape[1], mode)))


def _fake_backward(grad: Tensor, ids: Tensor, table_sizes: list[int], mode: str) -> Tensor:
    return grad.new_empty((sum(table_sizes), _weight_dim(grad, len(table_sizes), mode)))


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, _, ctx.table_sizes, ctx.mode, _ = inputs
    ctx.save_for_backward(ids)


def _differentiate_forward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    weight_grad = torch.ops.eventkern.multi_embedding_backward(grad, ids, ctx.table_sizes, ctx.mode)
    return None, weight_grad, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids, ctx.table_sizes, ctx.mode = inputs
    ctx.save_for_backward(ids)


def _differentiate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The lookup is linear in weight, so the gradient of its gradient is the lookup."""
    (ids,) = ctx.saved_tensors
    return torch.ops.eventkern.multi_embedding(ids, grad, ctx.table_sizes, ctx.mode, False), None, None, None


LIBRARY.impl("multi_embedding", _forward_cpu, "CPU")
LIBRARY.impl("multi_embedding", _forward_cuda, "CUDA")
LIBRARY.impl("multi_embedding_backward", _backward_cpu, "CPU")
LIBRARY.impl("multi_embedding_backward", _backward_cuda, "CUDA")
torch.library.register_fake("eventkern::multi_embedding", _fake_forward, lib=LIBRARY)
torch.library.register_fake("eventkern::multi_embedding_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd(
    "eventkern::multi_embedding", _differentiate_forward, setup_context=_save_forward, lib=LIBRARY
)
torch.library.register_autograd(
    "eventkern::multi_embedding_backward", _differentiate_backward, setup_context=_save_backward, lib=LIBRARY
)


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
        IndexError: an id outside its table, on the CPU (before the row is read) or inside check_inputs(). Elsewhere,
            and in code compiled or transformed under use_reference(), the output of its event is NaN; memory outside
            the weight is never read.

    Numerics:
        Accumulates in float32, forward and backward, and rounds once; the gradient of weight is dense. Deterministic on
        every device; on the CPU the same bits for any number of threads.

    Devices:
        C++ on the CPU, Triton on CUDA, the reference elsewhere. Under transforms of torch.func and in forward mode the
        same kernels, with the reference's forward-mode and second derivatives (compiled there: the reference).

    Source:
        One packed weight for many tables after FBGEMM's table-batched embedding (Khudia et al., 2021).
    """
    _check_arguments(ids, weight, table_sizes, mode)
    if is_reference_forced() or not has_kernel(ids.device):
        if can_read_values() and (ids.device.type == "cpu" or is_check_forced()):
            _check_range(ids.reshape(-1, len(table_sizes)), table_sizes)
        return reference.multi_embedding(ids, weight, tuple(table_sizes), mode)
    if is_transformed():
        return transformed(_formulas(tuple(table_sizes), mode), ids, weight)
    return torch.ops.eventkern.multi_embedding(ids, weight, table_sizes, mode, is_check_forced())


def _formulas(table_sizes: tuple[int, ...], mode: str) -> Formulas:
    def forward(ids: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (torch.ops.eventkern.multi_embedding(ids, weight, table_sizes, mode, is_check_forced()),)

    def backward(needs: tuple[bool, ...], grad: Tensor, ids: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, torch.ops.eventkern.multi_embedding_backward(grad, ids, table_sizes, mode)

    def of_reference(ids: Tensor, weight: Tensor) -> Tensor:
        return reference.multi_embedding(ids, weight, table_sizes, mode)

    return Formulas(forward, backward, of_reference, is_free=(True, False))


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
    if weight.shape[1] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; want at least one column")
    if ids.device != weight.device:
        raise ValueError(f"ids is on {ids.device}, but weight on {weight.device}; want one device")


def _check_range(columns: Tensor, table_sizes: tuple[int, ...] | list[int]) -> None:
    """Raise for the first id of columns (N, C) that lies outside its table; waits for the device."""
    is_wrong = (columns < 0) | (columns >= torch.tensor(table_sizes, dtype=torch.int64, device=columns.device))
    if is_wrong.any():
        row, column = is_wrong.nonzero()[0].tolist()
        raise _outside(columns, row, column, table_sizes)


def _outside(columns: Tensor, row: int, column: int, table_sizes: tuple[int, ...] | list[int]) -> IndexError:
    return IndexError(
        f"ids[..., {column}] holds {int(columns[row, column])}, but table {column} has {table_sizes[column]} rows"
    )
