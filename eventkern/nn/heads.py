"""The module of the multi-head cross-entropy."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eventkern.ops import multi_head_cross_entropy

EVALUATED_LOGITS = 1 << 24
"""Held at once by an evaluation, at most (or one row of a head): 64 MiB in float32."""


class MultiHeadCrossEntropy(nn.Module):
    """H linear heads of different sizes in one packed parameter, and their losses.

    Args:
        in_features: D of the hidden states.
        head_sizes: classes of each of the H heads.
        bias: whether the heads have a bias.
        **options: ignore_index, label_smoothing, z_loss, reduction of eventkern.ops.multi_head_cross_entropy.

    Attributes:
        weight: (sum(head_sizes), D) parameter, initialised N(0, 0.1^2 / D): on layer-normalised states the first loss
            of a head is ln(classes) to within 0.1^2 / 2 nats, which is less than 1 % of ln 2.
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
        nn.init.normal_(self.weight, std=0.1 * self.weight.shape[1] ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden (..., D), targets (..., H) to (H,) float32 losses, or (..., H) with reduction="none"."""
        return multi_head_cross_entropy(hidden, self.weight, targets, self.head_sizes, bias=self.bias, **self.options)

    def logits(self, hidden: Tensor, head: int) -> Tensor:
        """The (..., head_sizes[head]) logits of one head."""
        bias = self.bias.split(self.head_sizes)[head] if self.bias is not None else None
        return F.linear(hidden, self.weight.split(self.head_sizes)[head], bias)

    @torch.no_grad()
    def probabilities(self, hidden: Tensor, head: int) -> Tensor:
        """The (..., head_sizes[head]) float32 probabilities of one head's classes."""
        return self.logits(hidden, head).float().softmax(-1)

    @torch.no_grad()
    def accuracy(self, hidden: Tensor, targets: Tensor, k: int = 1) -> Tensor:
        """The share of targets among the k classes of the largest logits, per head, with all logits never held at once.

        Args:
            hidden: (..., D).
            targets: (..., H) int32 or int64; those equal to ignore_index do not count.
            k: classes, at least 1; a head with fewer is always right.

        Returns:
            (H,) float32; 0 for a head that ignores every target.

        Raises:
            ValueError: k below 1.
        """
        if k < 1:
            raise ValueError(f"k is {k}; want at least 1")
        rows, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1, targets.shape[-1])
        is_kept = labels != self.options.get("ignore_index", -100)
        hits = []
        for head, size in enumerate(self.head_sizes):
            block_rows = max(1, EVALUATED_LOGITS // size)
            is_hit = [
                (self.logits(block, head).topk(min(k, size)).indices == label[:, None]).any(1)
                for block, label in zip(rows.split(block_rows), labels[:, head].split(block_rows), strict=True)
            ]
            hits.append((torch.cat(is_hit) & is_kept[:, head]).sum())
        return torch.stack(hits) / is_kept.sum(0).clamp(min=1)

    def extra_repr(self) -> str:
        return f"heads={len(self.head_sizes)}, classes={sum(self.head_sizes)}, in_features={self.weight.shape[1]}"
