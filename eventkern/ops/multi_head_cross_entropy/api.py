"""The multi-head cross-entropy: hidden states to the losses of H heads of different sizes."""

from typing import Any, Literal

import torch
from torch import Tensor

from eventkern.ops.multi_head_cross_entropy import cpu, reference
from eventkern.ops.switches import FLOAT_DTYPES, LIBRARY, has_kernel, is_autocast, is_check_forced, is_reference_forced
from eventkern.ops.transforms import Formulas, can_read_values, is_transformed, transformed

_REDUCTIONS = ("mean", "sum", "none")

# The forward also gives what a backward needs. On the CPU these are the gradients themselves, made on the assumption
# that all heads get one upstream gradient (see _makes_gradients); on CUDA log_sum_exp. The rest is empty.
LIBRARY.define(
    "multi_head_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, int[] head_sizes, "
    "int ignore_index, float label_smoothing, float z_loss, str reduction, bool[] needs, bool check) "
    "-> (Tensor losses, Tensor log_sum_exp, Tensor hidden_grad, Tensor weight_grad, Tensor bias_grad)"
)
LIBRARY.define(
    "multi_head_cross_entropy_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, "
    "Tensor log_sum_exp, Tensor hidden_grad, Tensor weight_grad, Tensor bias_grad, int[] head_sizes, "
    "int ignore_index, float label_smoothing, float z_loss, str reduction, bool[] needs) -> (Tensor, Tensor, Tensor)"
)


def _makes_gradients(dtype: torch.dtype, reduction: str) -> bool:
    """Whether a CPU forward does: not where every row may get its own upstream gradient, and not in float16, whose
    range needs the upstream gradient (a loss scale, a mean's 1 / N) inside the sums and not after them."""
    return reduction != "none" and dtype != torch.float16


def _rows(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1, targets.shape[-1])


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def _forward_cpu(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head_sizes: list[int], ignore_index: int,
    label_smoothing: float, z_loss: float, reduction: str, needs: list[bool], check: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows, labels = _rows(hidden, targets)
    problem = cpu.Problem(rows, weight, bias, labels, head_sizes, ignore_index, label_smoothing, z_loss)
    position, kept = problem.count()
    if position >= 0:
        row, head = divmod(position, len(head_sizes))
        raise _outside(labels, row, head, head_sizes)
    counts = torch.tensor(kept, dtype=torch.float64, device=hidden.device).clamp(min=1)
    scales = None
    if any(needs) and _makes_gradients(hidden.dtype, reduction):
        scales = (1.0 / counts if reduction == "mean" else torch.ones_like(counts)).float()
    needed = (needs[0], needs[1], needs[2]) if scales is not None else (False, False, False)
    result = cpu.run(problem, scales, needed, keeps_losses=reduction == "none")
    if result.losses is not None:
        losses = result.losses.view(targets.shape)
    else:
        losses = (result.totals / counts if reduction == "mean" else result.totals).float()
    gradients = (_empty_like(hidden) if gradient is None else gradient for gradient in result.gradients)
    return losses, torch.empty(0, dtype=torch.float32, device=hidden.device), *gradients


def _backward_cpu(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, log_sum_exp: Tensor,
    hidden_grad: Tensor, weight_grad: Tensor, bias_grad: Tensor, head_sizes: list[int], ignore_index: int,
    label_smoothing: float, z_loss: float, reduction: str, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    rows, labels = _rows(hidden, targets)
    made: tuple[Tensor | None, ...]
    is_made = hidden_grad.numel() + weight_grad.numel() + bias_grad.numel() > 0
    if is_made and bool((grad == grad[0]).all()):
        factor = grad[0].item()
        made = (hidden_grad * factor, weight_grad * factor, bias_grad * factor)
    else:
        problem = cpu.Problem(rows, weight, bias, labels, head_sizes, ignore_index, label_smoothing, z_loss)
        scales = grad.float()
        if reduction == "none":
            scales = scales.reshape(labels.shape)
        elif reduction == "mean":
            scales = scales / torch.tensor(problem.count()[1], dtype=torch.int64, device=hidden.device).clamp(min=1)
        made = cpu.run(problem, scales, (needs[0], needs[1], needs[2])).gradients
    return _shaped(made, hidden, needs)


def _forward_cuda(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head_sizes: list[int], ignore_index: int,
    label_smoothing: float, z_loss: float, reduction: str, needs: list[bool], check: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    from eventkern.ops.multi_head_cross_entropy import triton

    rows, labels = _rows(hidden, targets)
    if check:
        _check_range(labels, head_sizes, ignore_index)
    losses, log_sum_exp = triton.multi_head_cross_entropy(
        _with_unit_stride(rows), _with_unit_stride(weight), bias if bias is None else bias.contiguous(), labels,
        tuple(head_sizes), ignore_index, label_smoothing, z_loss,
    )  # fmt: skip
    if reduction == "none":
        reduced = losses.view(targets.shape)
    else:
        reduced = losses.sum(0)
        reduced = reduced / _counts(labels, ignore_index) if reduction == "mean" else reduced
    return reduced, log_sum_exp, _empty_like(hidden), _empty_like(hidden), _empty_like(hidden)


def _backward_cuda(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, log_sum_exp: Tensor,
    hidden_grad: Tensor, weight_grad: Tensor, bias_grad: Tensor, head_sizes: list[int], ignore_index: int,
    label_smoothing: float, z_loss: float, reduction: str, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    from eventkern.ops.multi_head_cross_entropy import triton

    rows, labels = _rows(hidden, targets)
    grad = grad.float()
    if reduction == "mean":
        grad = grad / _counts(labels, ignore_index)
    grad_losses = grad.reshape(labels.shape) if reduction == "none" else grad.expand(labels.shape)
    made = triton.multi_head_cross_entropy_backward(
        grad_losses, _with_unit_stride(rows), _with_unit_stride(weight), bias if bias is None else bias.contiguous(),
        labels, log_sum_exp, tuple(head_sizes), ignore_index, label_smoothing, z_loss, (needs[0], needs[1], needs[2]),
    )  # fmt: skip
    return _shaped(made, hidden, needs)


def _shaped(made: tuple[Tensor | None, ...], hidden: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
    """The gradients as the op returns them: that of hidden in its shape, an empty one where there is none."""
    of_hidden, *others = (_empty_like(hidden) if gradient is None else gradient for gradient in made)
    return of_hidden.view(hidden.shape) if needs[0] else of_hidden, *others


def _with_unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _counts(labels: Tensor, ignore_index: int) -> Tensor:
    return (labels.long() != ignore_index).sum(0).clamp(min=1)


def _fake_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head_sizes: list[int], ignore_index: int,
    label_smoothing: float, z_loss: float, reduction: str, needs: list[bool], check: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    num_heads, num_rows = len(head_sizes), targets.numel() // len(head_sizes)
    losses = hidden.new_empty(targets.shape if reduction == "none" else (num_heads,), dtype=torch.float32)
    if hidden.device.type == "cuda":
        log_sum_exp = hidden.new_empty((num_rows, num_heads), dtype=torch.float32)
        return losses, log_sum_exp, hidden.new_empty(0), hidden.new_empty(0), hidden.new_empty(0)
    shapes = ((num_rows, hidden.shape[-1]), weight.shape, weight.shape[:1])
    is_made = _makes_gradients(hidden.dtype, reduction)
    gradients = (hidden.new_empty(shape if is_made and need else 0) for shape, need in zip(shapes, needs, strict=True))
    return losses, hidden.new_empty(0, dtype=torch.float32), *gradients


def _fake_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, log_sum_exp: Tensor,
    hidden_grad: Tensor, weight_grad: Tensor, bias_grad: Tensor, head_sizes: list[int], ignore_index: int,
    label_smoothing: float, z_loss: float, reduction: str, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(hidden.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, *ctx.options, needs, _ = inputs
    ctx.needs = needs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, *output[1:])


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 11
    if grad is None:
        return nothing
    gradients = torch.ops.eventkern.multi_head_cross_entropy_backward(grad, *ctx.saved_tensors, *ctx.options, ctx.needs)
    of_hidden, of_weight, of_bias = (
        gradient if need else None for gradient, need in zip(gradients, ctx.needs, strict=True)
    )
    return of_hidden, of_weight, of_bias, *nothing[3:]


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _has_no_second_derivative(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    raise NotImplementedError("multi_head_cross_entropy has no second derivative; under use_reference() it has")


for _key, _forward, _backward in (("CPU", _forward_cpu, _backward_cpu), ("CUDA", _forward_cuda, _backward_cuda)):
    LIBRARY.impl("multi_head_cross_entropy", _forward, _key)
    LIBRARY.impl("multi_head_cross_entropy_backward", _backward, _key)
torch.library.register_fake("eventkern::multi_head_cross_entropy", _fake_forward, lib=LIBRARY)
torch.library.register_fake("eventkern::multi_head_cross_entropy_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("eventkern::multi_head_cross_entropy", _differentiate, setup_context=_save, lib=LIBRARY)
torch.library.register_autograd(
    "eventkern::multi_head_cross_entropy_backward",
    _has_no_second_derivative,
    setup_context=_save_nothing,
    lib=LIBRARY,
)


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
        IndexError: a target outside its head, on the CPU or inside check_inputs(). Elsewhere its loss is NaN.

    Numerics:
        Products in hidden.dtype, everything after in float32, the derivative of a logit rounded once; sums over rows in
        float64 on the CPU. Deterministic: the same bits each time on one device, for the same number of threads. All
        logits never exist at once: beyond inputs and gradients a call holds at most 64 MiB of them on the CPU, or one
        row of a head where that is more.

    Devices:
        C++ and torch's matrix product on the CPU, which makes the gradients in the forward pass; where the heads'
        upstream gradients differ, and with "none", the backward computes logits again. Triton on CUDA, the reference
        elsewhere. Under transforms of torch.func and in forward mode the same kernels, with the reference's
        forward-mode and second derivatives (compiled there: the reference). A second derivative by autograd alone needs
        use_reference(), in which compiled and transformed code gives NaN instead of an IndexError.

    Source:
        Logits that never exist at once: Wijmans et al., 2024 (Cut Cross Entropy). Label smoothing: Szegedy et al.,
        2016, section 7. z-loss: Chowdhery et al., 2022 (PaLM), section 5.
    """
    _check_arguments(hidden, weight, targets, head_sizes, bias)
    _check_options(label_smoothing, z_loss, reduction)
    if is_reference_forced() or not has_kernel(hidden.device):
        if can_read_values() and (targets.device.type == "cpu" or is_check_forced()):
            _check_range(targets.reshape(-1, len(head_sizes)), head_sizes, ignore_index)
        return reference.multi_head_cross_entropy(
            hidden, weight, targets, tuple(head_sizes), bias, ignore_index, label_smoothing, z_loss, reduction
        )
    if is_autocast(hidden.device):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if is_transformed():
        options = (tuple(head_sizes), ignore_index, label_smoothing, z_loss, reduction)
        return transformed(_formulas(*options), hidden, weight, bias, targets)
    is_tracked = torch.is_grad_enabled()
    needs = [tensor is not None and is_tracked and tensor.requires_grad for tensor in (hidden, weight, bias)]
    losses, *_ = torch.ops.eventkern.multi_head_cross_entropy(
        hidden, weight, bias, targets, head_sizes, ignore_index, label_smoothing, z_loss, reduction, needs,
        is_check_forced(),
    )  # fmt: skip
    return losses


def _formulas(
    head_sizes: tuple[int, ...], ignore_index: int, label_smoothing: float, z_loss: float, reduction: str
) -> Formulas:
    options = (head_sizes, ignore_index, label_smoothing, z_loss, reduction)

    def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, ...]:
        losses, log_sum_exp, *_ = torch.ops.eventkern.multi_head_cross_entropy(
            hidden, weight, bias, targets, *options, [False] * 3, is_check_forced()
        )
        return (losses, log_sum_exp.view(targets.shape)) if hidden.is_cuda else (losses,)

    def backward(
        needs: tuple[bool, ...], grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        losses: Tensor, log_sum_exp: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        of_rows = _empty_like(losses) if log_sum_exp is None else log_sum_exp.reshape(-1, len(head_sizes))
        nothing = _empty_like(hidden)
        made = torch.ops.eventkern.multi_head_cross_entropy_backward(
            grad, hidden, weight, bias, targets, of_rows, nothing, nothing, nothing, *options, needs[:3]
        )
        return *made, None

    def of_reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        return reference.multi_head_cross_entropy(hidden, weight, targets, head_sizes, bias, *options[1:])

    is_free = reduction == "none"
    return Formulas(forward, backward, of_reference, (is_free, False, False, is_free))


def _check_arguments(
    hidden: Tensor, weight: Tensor, targets: Tensor, head_sizes: tuple[int, ...], bias: Tensor | None
) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}; want torch.float32, torch.bfloat16 or torch.float16")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype and not is_autocast(hidden.device):
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
    if weight.shape[1] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; want at least one column")
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


def _check_range(labels: Tensor, head_sizes: tuple[int, ...] | list[int], ignore_index: int) -> None:
    """Raise for the first target of labels (N, H) that lies outside its head; waits for the device."""
    is_outside = (labels < 0) | (labels >= torch.tensor(head_sizes, dtype=torch.int64, device=labels.device))
    is_wrong = is_outside & (labels.long() != ignore_index)
    if is_wrong.any():
        row, head = is_wrong.nonzero()[0].tolist()
        raise _outside(labels, row, head, head_sizes)


def _outside(labels: Tensor, row: int, head: int, head_sizes: tuple[int, ...] | list[int]) -> IndexError:
    return IndexError(
        f"targets[..., {head}] holds {int(labels[row, head])}, but head {head} has {head_sizes[head]} classes"
    )
