"""Multi-head scaled dot-product attention: on the CPU a kernel for the small heads of event models."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eventkern import _C
from eventkern.ops.attention import reference
from eventkern.ops.switches import FLOAT_DTYPES, LIBRARY, is_autocast, is_reference_forced
from eventkern.ops.transforms import Formulas, is_transformed, transformed

HEAD_DIMS = (4, 8, 16, 32)
"""Of the C++ kernel. At 64, torch's matrix products are as fast."""

# statistics (B, N, 2, T) float32, for a backward: each query's largest score and 1 over the sum of its powers.
LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, bool is_causal) -> (Tensor output, Tensor statistics)"
)
LIBRARY.define(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor output, Tensor statistics, "
    "bool is_causal) -> (Tensor, Tensor, Tensor)"
)


def _rows(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.stride()


def _with_unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _empty_heads(like: Tensor) -> Tensor:
    """(B, N, T, H) in memory of (B, T, N, H), so that heads join into the model's width without a copy.

    No view of another tensor: forward mode gives such an output no tangent of another layout.
    """
    _, num_heads, length, head_dim = like.shape
    strides = (length * num_heads * head_dim, head_dim, num_heads * head_dim, 1)
    return torch.empty_strided(like.shape, strides, dtype=like.dtype, device=like.device)


def _forward_cpu(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    query, key, value = _with_unit_stride(query), _with_unit_stride(key), _with_unit_stride(value)
    batch_size, num_heads, num_queries, head_dim = query.shape
    output = _empty_heads(query)
    statistics = torch.empty((batch_size, num_heads, 2, num_queries), dtype=torch.float32, device=query.device)
    _C.attention_cpu(
        (batch_size, num_heads, num_queries, key.shape[2], head_dim), is_causal, FLOAT_DTYPES.index(query.dtype),
        torch.get_num_threads(), _rows(query), _rows(key), _rows(value), _rows(output), statistics.data_ptr(),
    )  # fmt: skip
    return output, statistics


def _backward_cpu(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, statistics: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = _with_unit_stride(query), _with_unit_stride(key), _with_unit_stride(value)
    grad, output, statistics = _with_unit_stride(grad), _with_unit_stride(output), statistics.contiguous()
    query_grad, key_grad, value_grad = _empty_heads(query), _empty_heads(key), _empty_heads(value)
    batch_size, num_heads, num_queries, head_dim = query.shape
    _C.attention_backward_cpu(
        (batch_size, num_heads, num_queries, key.shape[2], head_dim), is_causal, FLOAT_DTYPES.index(query.dtype),
        torch.get_num_threads(), _rows(grad), _rows(query), _rows(key), _rows(value), _rows(output),
        statistics.data_ptr(), _rows(query_grad), _rows(key_grad), _rows(value_grad),
    )  # fmt: skip
    return query_grad, key_grad, value_grad


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    batch_size, num_heads, num_queries, _ = query.shape
    return _empty_heads(query), query.new_empty((batch_size, num_heads, 2, num_queries), dtype=torch.float32)


def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, statistics: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_heads(query), _empty_heads(key), _empty_heads(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.is_causal = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    return *torch.ops.eventkern.attention_backward(grad, *ctx.saved_tensors, ctx.is_causal), None


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _has_no_second_derivative(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    raise NotImplementedError("attention has no second derivative; under use_reference() it has")


LIBRARY.impl("attention", _forward_cpu, "CPU")
LIBRARY.impl("attention_backward", _backward_cpu, "CPU")
torch.library.register_fake("eventkern::attention", _fake_forward, lib=LIBRARY)
torch.library.register_fake("eventkern::attention_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("eventkern::attention", _differentiate, setup_context=_save, lib=LIBRARY)
torch.library.register_autograd(
    "eventkern::attention_backward", _has_no_second_derivative, setup_context=_save_nothing, lib=LIBRARY
)


def attention(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
    """Let each position of one sequence read from the positions of another, in N heads.

    output[b, n] = softmax(query[b, n] @ key[b, n].T / sqrt(H)) @ value[b, n]

    Args:
        query: (B, N, T, H) float32, bfloat16, float16 or float64. Autocast casts all three to its
            dtype, unless query is float64.
        key: (B, N, S, H), S at least 1.
        value: (B, N, S, H).
        is_causal: position t sees positions 0..t only; T = S.

    Returns:
        (B, N, T, H) in query.dtype, under autocast in its dtype, laid out as (B, T, N, H) on the CPU:
        `.transpose(1, 2).flatten(2)` is free.

    Raises:
        TypeError: query, key or value of another dtype.
        ValueError: shapes or devices that do not fit one another.

    Numerics:
        On the CPU all arithmetic is float32, rounded once, and the scores of all positions never exist at once.
        Deterministic there: the same bits for any number of threads.

    Devices:
        On the CPU, C++ for H of 4, 8, 16 and 32, of which autograd alone has no second derivative; for other H, on
        other devices and under torch.export, F.scaled_dot_product_attention without a mask tensor, so that flash
        attention runs on CUDA.
        The reference for float64. Under transforms of torch.func and in forward mode the same kernel, with the
        reference's forward-mode and second derivatives (compiled there: the reference); for other H and on other
        devices the reference.

    Source:
        Vaswani et al., 2017, section 3.2.1. Scores in chunks, and computed again in the backward: Dao et al., 2022
        (FlashAttention), algorithms 1 and 4.
    """
    _check_arguments(query, key, value, is_causal)
    kind = query.device.type
    if query.dtype != torch.float64 and is_autocast(query.device):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if is_reference_forced() or query.dtype == torch.float64:
        return reference.attention(query, key, value, is_causal)
    if torch.compiler.is_exporting():  # a program that torch runs alone, for any T
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
    if kind == "cpu" and query.shape[3] in HEAD_DIMS:
        if is_transformed():
            return transformed(_formulas(is_causal), query, key, value)
        output, _ = torch.ops.eventkern.attention(query, key, value, is_causal)
        return output
    if is_transformed():  # torch's attention has no forward-mode derivative and no second one
        return reference.attention(query, key, value, is_causal)
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)


def _formulas(is_causal: bool) -> Formulas:
    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        made = torch.ops.eventkern.attention(*(tensor.flatten(0, -4) for tensor in inputs), is_causal)
        return _led_like(inputs[0], made)

    def backward(needs: tuple[bool, ...], *saved: Tensor) -> tuple[Tensor, ...]:
        made = torch.ops.eventkern.attention_backward(*(tensor.flatten(0, -4) for tensor in saved), is_causal)
        return _led_like(saved[0], made)

    def of_reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return reference.attention(query, key, value, is_causal)

    return Formulas(forward, backward, of_reference, is_free=(True, True, True))


def _led_like(tensor: Tensor, made: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What was made for flattened leading dimensions; with one there is nothing to do, and a view is no output."""
    return made if tensor.dim() == 4 else tuple(each.unflatten(0, tensor.shape[:-3]) for each in made)


def _check_arguments(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype not in FLOAT_DTYPES and tensor.dtype != torch.float64:
            raise TypeError(f"{name} is {tensor.dtype}; want torch.float32, bfloat16, float16 or float64")
        if tensor.dim() != 4 or tensor.shape[3] == 0:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; want (batch, heads, positions, head_dim)")
    batch_size, num_heads, num_queries, head_dim = query.shape
    wanted = (batch_size, num_heads, key.shape[2], head_dim)
    if key.shape != wanted:
        raise ValueError(f"key has shape {tuple(key.shape)}; want {wanted} beside query {tuple(query.shape)}")
    if value.shape != wanted:
        raise ValueError(f"value has shape {tuple(value.shape)}; want {wanted}, the shape of key")
    if wanted[2] == 0:
        raise ValueError(f"key has shape {wanted}; want at least one position")
    if is_causal and num_queries != wanted[2]:
        raise ValueError(f"query has {num_queries} positions, key {wanted[2]}; want as many under is_causal")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype and not is_autocast(query.device):
            raise TypeError(f"{name} is {tensor.dtype}, but query {query.dtype}; want one dtype outside autocast")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, but query on {query.device}; want one device")
