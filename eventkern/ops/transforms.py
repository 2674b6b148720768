"""Ops under torch.func's transforms and forward-mode differentiation, which torch.library's custom ops do not serve.

What torch.library.register_autograd makes raises under torch.func.grad, and loses a forward-mode tangent in silence. So
each public function asks `is_transformed()`, and where it is goes through `transformed`: an autograd.Function over the
same kernels, whose other derivatives are those of the reference.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import vjp

_Tensors = Sequence[Tensor | None]


def is_transformed() -> bool:
    """Whether a transform of torch.func is at work, or a level of forward-mode differentiation is open."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def can_read_values() -> bool:
    """Whether Python may decide by what a tensor holds: not while code is compiled or transformed."""
    return not (torch.compiler.is_compiling() or is_transformed())


@dataclass(frozen=True)
class Formulas:
    """An op for given options, as transforms need it; `tensors` are its tensor arguments, all in one order.

    Attributes:
        forward: (*tensors) to (output, *saved): what the kernel gives, and what its backward wants of that. None is a
            view.
        backward: (needs, grad, *tensors, output, *saved) to a gradient for each tensor, read where `needs` is true.
        reference: (*tensors) to the output in plain torch. Its derivatives serve forward mode and second orders.
        is_free: of each tensor, whether it may have any number of leading dimensions, over which nothing is summed: a
            mapped dimension becomes one of them. Where another tensor is mapped, or needs a gradient for each entry,
            the op is called entry by entry. What is saved is free.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., _Tensors]
    reference: Callable[..., Tensor]
    is_free: tuple[bool, ...]


def transformed(formulas: Formulas, *tensors: Tensor | None) -> Tensor:
    """The output of an op, with the derivatives and mapped dimensions of any transform."""
    if torch.compiler.is_compiling():  # which knows no autograd.Function inside of a transform
        return formulas.reference(*tensors)
    output, *_ = _Forward.apply(formulas, *tensors)  # type: ignore[no-untyped-call]
    return output


class _Forward(torch.autograd.Function):
    """(formulas, *tensors) to (output, *saved)."""

    @staticmethod
    def forward(formulas: Formulas, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return formulas.forward(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.formulas, *tensors = inputs
        ctx.num_saved = len(output) - 1
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = tuple(ctx.needs_input_grad[1:])
        made = _Backward.apply(ctx.formulas, needs, grad, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return None, *_with([None] * len(needs), _places(needs), made)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        def outputs(*tensors: Tensor | None) -> tuple[Tensor]:
            return (ctx.formulas.reference(*tensors),)

        return *_push_forward(outputs, ctx.saved_tensors, tangents), *(None,) * ctx.num_saved

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], formulas: Formulas, *tensors: Tensor | None) -> tuple[Any, Any]:
        def outputs(*entry: Tensor | None) -> tuple[Tensor, ...]:
            return _Forward.apply(formulas, *entry)  # type: ignore[no-untyped-call]

        return _mapped(outputs, info.batch_size, in_dims[1:], tensors, formulas.is_free)


class _Backward(torch.autograd.Function):
    """(formulas, needs, grad, *tensors, output, *saved) to the gradients of the tensors that need one."""

    @staticmethod
    def forward(formulas: Formulas, needs: tuple[bool, ...], grad: Tensor, *saved: Tensor | None) -> tuple[Any, ...]:
        return tuple(_at(formulas.backward(needs, grad, *saved), _places(needs)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.formulas, ctx.needs, grad, *saved = inputs
        ctx.num_saved = len(saved) - len(ctx.needs)
        tensors = saved[: len(ctx.needs)]
        ctx.save_for_backward(grad, *tensors)
        ctx.save_for_forward(grad, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """That of the reference's gradients, in which what the forward saved is a function of the tensors, no input."""
        inputs = ctx.saved_tensors
        places = _places(ctx.needs_input_grad[2 : 2 + len(inputs)])
        _, pull = _vjp(lambda *leaves: _pull_back(ctx, *_with(inputs, places, leaves)), *_at(inputs, places))
        return None, None, *_with([None] * len(inputs), places, pull(grads)), *(None,) * ctx.num_saved

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensors
        return _push_forward(lambda *leaves: _pull_back(ctx, *leaves), inputs, tangents[: len(inputs)])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], formulas: Formulas, needs: tuple[bool, ...], *tensors: Tensor | None
    ) -> tuple[Any, Any]:
        def gradients(*entry: Tensor | None) -> tuple[Tensor, ...]:
            return _Backward.apply(formulas, needs, *entry)  # type: ignore[no-untyped-call]

        # The gradient of a tensor that is not free sums over leading dimensions: none of them may hold the entries.
        sums = any(need and not free for need, free in zip(needs, formulas.is_free, strict=True))
        is_free = [not sums] * len(tensors)
        is_free[1 : 1 + len(needs)] = [free and not sums for free in formulas.is_free]
        return _mapped(gradients, info.batch_size, in_dims[2:], tensors, is_free)


def _vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    output, pull, *_ = vjp(function, *primals)
    return output, pull


def _pull_back(ctx: Any, grad: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The gradients of the reference for the tensors that `ctx.needs` one."""
    places = _places(ctx.needs)
    _, pull = _vjp(lambda *leaves: ctx.formulas.reference(*_with(tensors, places, leaves)), *_at(tensors, places))
    gradients: tuple[Tensor, ...] = pull(grad)
    return gradients


def _push_forward(
    function: Callable[..., tuple[Tensor, ...]], primals: _Tensors, tangents: _Tensors
) -> tuple[Tensor, ...]:
    """The tangents of a function's outputs. Levels of forward mode do not nest; a vjp is linear, and its vjp a jvp."""
    places = _places(tangent is not None for tangent in tangents)
    with forward_ad._set_fwd_grad_enabled(True):  # it is off here, but a level around may need it
        primals = [primal if primal is None else forward_ad.unpack_dual(primal).primal for primal in primals]
        outputs, pull = _vjp(lambda *leaves: function(*_with(primals, places, leaves)), *_at(primals, places))
        _, push = _vjp(pull, tuple(torch.zeros_like(output) for output in outputs))
        pushed: tuple[Tensor, ...] = push(tuple(_at(tangents, places)))[0]
        return pushed


def _mapped(
    function: Callable[..., tuple[Tensor, ...]], batch_size: int, dims: Sequence[int | None], tensors: _Tensors,
    is_free: Sequence[bool],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:  # fmt: skip
    """The function over one dimension of some tensors, and where its outputs have it: see `Formulas.is_free`."""
    is_mapped = [dim is not None for dim in dims]
    first = [
        tensor if tensor is None or dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, dims, strict=True)
    ]
    if all(free or not mapped for free, mapped in zip(is_free, is_mapped, strict=True)):
        joined = [
            tensor if tensor is None or mapped or not free else tensor.expand(batch_size, *tensor.shape)
            for tensor, free, mapped in zip(first, is_free, is_mapped, strict=True)
        ]
        outputs = function(*joined)
        return outputs, (0,) * len(outputs)
    if batch_size == 0:  # one entry of zeros tells the shapes
        first = _with(
            first, _places(is_mapped), [part.new_zeros(1, *part.shape[1:]) for part in _at(first, _places(is_mapped))]
        )
    entries = []
    for index in range(max(batch_size, 1)):
        entry = [
            part[index] if part is not None and mapped else part for part, mapped in zip(first, is_mapped, strict=True)
        ]
        entries.append(function(*entry))
    stacked = tuple(torch.stack(each)[:batch_size] for each in zip(*entries, strict=True))
    return stacked, (0,) * len(stacked)


def _places(flags: Iterable[bool]) -> list[int]:
    return [place for place, flag in enumerate(flags) if flag]


def _at(values: Sequence[Any], places: Sequence[int]) -> list[Any]:
    return [values[place] for place in places]


def _with(values: Sequence[Any], places: Sequence[int], new: Sequence[Any]) -> list[Any]:
    """The values, with new ones at the places."""
    merged = list(values)
    for place, value in zip(places, new, strict=True):
        merged[place] = value
    return merged
