"""Weights as 8-bit integers, for models that are only read from."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

LARGEST = 127


class Int8Rows(nn.Module):
    """Stands between a module and its weight: int8 rows and a scale for each are kept, and the weight is read.

    weight[..., i] = rows[..., i] * scale, scale = max |weight[..., :]| / 127; a row of zeros has scale 0.
    """

    def forward(self, rows: Tensor, scales: Tensor) -> Tensor:
        """Rows (..., I) int8 and scales (..., 1) to the weight (..., I) in the scales' dtype."""
        return rows * scales

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weight to its rows and scales."""
        scales = weight.abs().amax(-1, keepdim=True) / LARGEST
        rows = weight / scales.where(scales > 0, 1)
        return rows.round().clamp(-LARGEST, LARGEST).to(torch.int8), scales


def quantize_int8(model: nn.Module) -> None:
    """Replaces every parameter called `weight` of two dimensions or more by int8 rows and a scale for each row, in
    place: linear layers, embedding tables and heads, packed and stacked ones too. Norms, biases and positions stay.

    Each row, which makes one output of a linear layer and is one entry of a table, keeps its largest value, and every
    other is off by half a scale at most. Modules compute in the precision they had: what is saved is memory and disk,
    a quarter of float32, while every read makes the weight again, or the first one alone inside of
    `torch.nn.utils.parametrize.cached()`. The model no longer trains these weights.

    Args:
        model: any module; of its state_dict, `<name>.weight` becomes `<name>.parametrizations.weight.original0`
            (the rows) and `...original1` (the scales).

    Raises:
        ValueError: a weight that is not finite, or is quantised already; nothing has changed then.

    Source:
        Symmetric, by output channel: Krishnamoorthi, 2018, sections 2.2 and 3.1.2; torchao's
        Int8WeightOnlyConfig does the same to nn.Linear alone, within one in the integers.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            raise ValueError(f"{name} is there: the model's weights are parametrised already; give a plain model")
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim >= 2 and weight.is_floating_point():
            if not weight.isfinite().all():
                raise ValueError(f"{name}.weight holds a value that is not finite, which no integer stands for")
            found.append((module, weight))
    for module, weight in found:
        weight.requires_grad_(False)
        parametrize.register_parametrization(module, "weight", Int8Rows())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
