"""K modules of one shape as one: member k sees entry k of its input's first dimension, with weights of its own.

Weights lie stacked, so that all K are one launch and one entry of the optimizer each. Biases and norms lie flat, as
vectors: what decays matrices only leaves them alone.

Shapes: K members, M rows, I inputs, O outputs, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StackedLinear(nn.Module):
    """K linear layers: out[k] = in[k] weight[k]^T + bias[k].

    Args:
        num_members: K.
        in_features: I.
        out_features: O.

    Attributes:
        weight: (K, O, I) parameter; weight[k] is that of nn.Linear.
        bias: (K * O,) parameter; bias.view(K, O)[k] is that of nn.Linear.

    Source:
        As `bmm` for the experts of a mixture: Lepikhin et al., 2021 (GShard), section 2.
    """

    def __init__(self, num_members: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.num_members = num_members
        self.weight = nn.Parameter(torch.empty(num_members, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_members * out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Both uniform in +-I^-0.5, as torch.nn.Linear has it."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, inputs: Tensor, *, outputs: slice = slice(None)) -> Tensor:
        """inputs (K, ..., I) to (K, ..., O), or to the `outputs` of each member alone."""
        weight_KOI = self.weight[:, outputs]
        bias_KO = self.bias.view(self.num_members, -1)[:, outputs]
        rows_KMI = inputs.flatten(1, -2)
        rows_KMO = torch.baddbmm(bias_KO[:, None], rows_KMI, weight_KOI.transpose(1, 2))
        return rows_KMO.unflatten(1, inputs.shape[1:-1])

    def extra_repr(self) -> str:
        members, outputs, inputs = self.weight.shape
        return f"members={members}, in_features={inputs}, out_features={outputs}"


class StackedLayerNorm(nn.Module):
    """K layer norms.

    Args:
        num_members: K.
        width: D, the dimension that is normalised.

    Attributes:
        weight: (K * D,) parameter, initialised 1.
        bias: (K * D,) parameter, initialised 0.
    """

    def __init__(self, num_members: int, width: int) -> None:
        super().__init__()
        self.num_members = num_members
        self.weight = nn.Parameter(torch.ones(num_members * width))
        self.bias = nn.Parameter(torch.zeros(num_members * width))

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs (K, ..., D) to the same shape."""
        width = inputs.shape[-1]
        shape = (self.num_members, *(1 for _ in inputs.shape[1:-1]), width)
        return torch.addcmul(self.bias.view(shape), F.layer_norm(inputs, (width,)), self.weight.view(shape))

    def extra_repr(self) -> str:
        return f"members={self.num_members}, width={self.weight.shape[0] // self.num_members}"
