"""The module of the multi-head cross-entropy."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eventkern.ops import multi_head_cross_entropy


class MultiHeadCrossEntropy(nn.Module):
    """H linear heads of different sizes in one packed parameter, and their losses.

    Args:
        in_features: D of the hidden states.
        head_sizes: classes of each of the H heads.
        bias: whether the heads have a bias.
        **options: ignore_index, label_smoothing, z_loss, reduction of eventkern.ops.multi_head_cross_entropy.

    Attributes:
        weight: (sum(head_sizes), D) parameter, initialised N(0, 0.02^2): on layer-normalised states the first loss of a
            head is ln(classes) to within D * 0.02^2 / 2 nats.
        bias: (sum(head_sizes),) parameter, initialised 0, or None.
    """

    def __init__(self, in_features: int, head_sizes: Sequence[int], bias: bool = True, **options: Any) -> None:
        super().__init__()
        self.head_sizes = tuple(head_sizes)
        self.options = options
        self.weight = nn.Parameter(torch.empty(sum(self.head_sizes), in_features))
        self.bias = nn.Parameter(torch.empty(sum(self.head_sizes))) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden (..., D), targets (..., H) to (H,) float32 losses, or (..., H) with reduction="none"."""
        return multi_head_cross_entropy(hidden, self.weight, targets, self.head_sizes, bias=self.bias, **self.options)

    def logits(self, hidden: Tensor, head: int) -> Tensor:
        """The (..., head_sizes[head]) logits of one head."""
        bias = self.bias.split(self.head_sizes)[head] if self.bias is not None else None
        return F.linear(hidden, self.weight.split(self.head_sizes)[head], bias)

    def extra_repr(self) -> str:
        return f"heads={len(self.head_sizes)}, classes={sum(self.head_sizes)}, in_features={self.weight.shape[1]}"
