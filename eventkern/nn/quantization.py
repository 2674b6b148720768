"""Weights as 8-bit integers, for models that are only read from."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

LARGEST = 127


class Int8Rows(nn.Module):
    """Stands between a module and its weight: int8 rows and a scale for each are kept, and the weight is read.

    weight[..., i] = rows[..., i] * scale, scale = max |weight[..., :]| / 127; a row of zeros has scale 0.

    Args:
        dtype: of the weight. Scales are float32, or float64 for such a weight.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, rows: Tensor, scales: Tensor) -> Tensor:
        """Rows (..., I) int8 and scales (..., 1) to the weight (..., I)."""
        return (rows * scales).to(self.dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weight to its rows and scales."""
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        largest = weight.abs().amax(-1, keepdim=True)
        scales = largest / LARGEST
        # Among subnormal numbers, where a scale has few digits, the next one up: no value is then above 127 scales.
        is_short = (scales < torch.finfo(scales.dtype).tiny) & (LARGEST * scales < largest)
        scales = torch.where(is_short, scales.nextafter(torch.full_like(scales, math.inf)), scales)
        rows = weight / scales.where(scales > 0, 1)
        return rows.round().clamp(-LARGEST, LARGEST).to(torch.int8), scales


def quantize_int8(model: nn.Module) -> None:
    """Replaces every parameter called `weight` of two dimensions or more by int8 rows and a scale for each row, in
    place: linear layers, embedding tables and heads, packed and stacked ones too. Norms, biases and positions stay.

    Each row, which makes one output of a linear layer and is one entry of a table, keeps its largest value, and every
    other is off by half a scale at most, and by the rounding of the weight's own dtype where that has 16 bits. Modules
    compute in the precision they had: what is saved is memory and disk, a quarter of float32, while every read makes
    the weight again, or the first one alone inside of `torch.nn.utils.parametrize.cached()`. A weight that several
    modules share stays one. The model no longer trains these weights.

    Args:
        model: any module; of its state_dict, `<name>.weight` becomes `<name>.parametrizations.weight.original0`
            (the rows) and `...original1` (the scales).

    Raises:
        ValueError: a weight that is not finite, is quantised already, or is shared under a name that stays; nothing
            has changed then.

    Source:
        Symmetric, by output channel: Krishnamoorthi, 2018, sections 2.2 and 3.1.2; torchao's
        Int8WeightOnlyConfig does the same to nn.Linear alone, within one in the integers.
    """
    found: dict[nn.Parameter, list[nn.Module]] = {}
    kept: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            raise ValueError(f"{name} is there: the model's weights are parametrised already; give a plain model")
        for leaf, weight in module._parameters.items():
            place = f"{name}.{leaf}".lstrip(".")
            if weight is None or leaf != "weight" or weight.ndim < 2 or not weight.is_floating_point():
                kept.update({weight: place} if weight is not None else {})
                continue
            if not weight.isfinite().all():
                raise ValueError(f"{place} holds a value that is not finite, which no integer stands for")
            found.setdefault(weight, []).append(module)
    for weight, place in kept.items():
        if weight in found:
            raise ValueError(
                f"{place} is the weight of another module too, and is not called `weight`; part them first"
            )
    for weight, (first, *others) in found.items():
        weight.requires_grad_(False)
        parametrize.register_parametrization(first, "weight", Int8Rows(weight.dtype))
        for module in others:
            parametrize.register_parametrization(module, "weight", Int8Rows(weight.dtype))
            own, shared = (_originals(holder) for holder in (module, first))
            own.original0, own.original1 = shared.original0, shared.original1


def _originals(module: nn.Module) -> Any:
    """What stands for a quantised weight: original0, the rows, and original1, the scales."""
    parametrizations: Any = module.parametrizations
    return parametrizations["weight"]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
