"""The multi-head cross-entropy: hidden states to the losses of H heads of different sizes."""

from typing import Literal

import torch
from torch import Tensor

from eventkern.ops.multi_head_cross_entropy import reference
from eventkern.ops.switches import FLOAT_DTYPES, is_check_forced

_REDUCTIONS = ("mean", "sum", "none")


def multi_head_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    head_sizes: tuple[int, ...],
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Cross-entropy of H linear heads of different sizes on the same hidden states.

    loss[n, h] = logsumexp(l) - (1 - s) * l[targets[n, h]] - s * mean(l) + z * logsumexp(l)^2, with the logits
    l = hidden[n] @ weight_h.T + bias_h, the label smoothing s and the z-loss factor z.

    Args:
        hidden: (..., D) float32, bfloat16 or float16. Autocast casts hidden and weight to its dtype.
        weight: (sum(head_sizes), D). Head h owns rows [sum(head_sizes[:h]), sum(head_sizes[:h + 1])).
        targets: (..., H) int32 or int64; targets[..., h] in [0, head_sizes[h]) or ignore_index.
        head_sizes: classes of each head, length H.
        bias: (sum(head_sizes),), or None.
        ignore_index: a target with this value adds neither loss nor gradient.
        label_smoothing: share of the target probability spread evenly over all classes of the head, in [0, 1].
        z_loss: factor of logsumexp(logits)^2, added to each row that is not ignored; at least 0.
        reduction: over rows, per head: "mean" over the rows that the head does not ignore (0 where it ignores all),
            "sum" or "none".

    Returns:
        (H,) float32 losses in nats; (..., H) for "none".

    Raises:
        TypeError: hidden, weight, bias or targets of another dtype.
        ValueError: shapes, devices or options that do not fit one another.
        IndexError: a target outside its head, on the CPU or inside check_inputs(). Elsewhere, and in compiled code, its
            loss is NaN.

    Numerics:
        Log-sum-exp and sums over rows in float32. Deterministic on the CPU.

    Devices:
        Any that torch serves (see eventkern.ops.implementations()).

    Source:
        Label smoothing: Szegedy et al., 2016, section 7. z-loss: Chowdhery et al., 2022 (PaLM), section 5.
    """
    _check_arguments(hidden, weight, targets, head_sizes, bias)
    _check_options(label_smoothing, z_loss, reduction)
    if not torch.compiler.is_compiling() and (targets.device.type == "cpu" or is_check_forced()):
        _check_range(targets, head_sizes, ignore_index)
    return reference.multi_head_cross_entropy(
        hidden, weight, targets, tuple(head_sizes), bias, ignore_index, label_smoothing, z_loss, reduction
    )


def _check_arguments(
    hidden: Tensor, weight: Tensor, targets: Tensor, head_sizes: tuple[int, ...], bias: Tensor | None
) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}; want torch.float32, torch.bfloat16 or torch.float16")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise TypeError(f"hidden is {hidden.dtype}, but {name} {tensor.dtype}; want one dtype outside autocast")
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"targets is {targets.dtype}; want torch.int32 or torch.int64")
    if not head_sizes or min(head_sizes) < 1:
        raise ValueError(f"head_sizes is {tuple(head_sizes)}; want one positive size per head")
    num_heads, num_classes = len(head_sizes), sum(head_sizes)
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape != (num_classes, hidden.shape[-1]):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; want ({num_classes}, D), with D of hidden {tuple(hidden.shape)}"
        )
    if targets.shape != (*hidden.shape[:-1], num_heads):
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}; want {(*hidden.shape[:-1], num_heads)}, one column per head"
        )
    if bias is not None and bias.shape != (num_classes,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; want ({num_classes},), the classes of all heads")
    for name, other in (("weight", weight), ("targets", targets), ("bias", bias)):
        if other is not None and other.device != hidden.device:
            raise ValueError(f"{name} is on {other.device}, but hidden on {hidden.device}; want one device")


def _check_options(label_smoothing: float, z_loss: float, reduction: str) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; want a number in [0, 1]")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss is {z_loss}; want a number of at least 0")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; want one of {', '.join(_REDUCTIONS)}")


def _check_range(targets: Tensor, head_sizes: tuple[int, ...], ignore_index: int) -> None:
    flat = targets.reshape(-1, len(head_sizes))
    is_outside = (flat < 0) | (flat >= torch.tensor(head_sizes, device=targets.device))
    is_wrong = is_outside & (flat != ignore_index)
    if is_wrong.any():
        row, head = is_wrong.nonzero()[0].tolist()
        raise IndexError(
            f"targets[..., {head}] holds {int(flat[row, head])}, but head {head} has {head_sizes[head]} classes"
        )
