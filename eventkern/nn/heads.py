"""The module of the multi-head cross-entropy."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eventkern.ops import multi_head_cross_entropy

EVALUATED_LOGITS = 1 << 20
"""Held at once by an evaluation, at most (or one row of a head): 4 MiB in float32, which a cache holds."""


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
        return torch.stack(hits).float() / is_kept.sum(0).clamp(min=1)

    @torch.no_grad()
    def scores(
        self, hidden: Tensor, targets: Tensor, top_k: Sequence[int] = (1, 5, 10), num_bins: int = 15
    ) -> dict[str, Tensor]:
        """Sums over the targets, per head, of all that tells how good its probabilities are; sums of batches add up.

        The rank of a target counts the classes of larger logits, and of equal ones those before it; a logit that is not
        a number counts as larger. Confidence is the probability of the top class, and bin m of M holds confidences in
        (m / M, (m + 1) / M].

        Args:
            hidden: (..., D).
            targets: (..., H) int32 or int64; those equal to ignore_index do not count.
            top_k: K numbers of classes, at least one, each at least 1; a head with fewer is always right.
            num_bins: M, at least 1.

        Returns:
            "num_targets" (H,) int64; "loss" (H,) float32 nats, without label smoothing or z-loss; "hits" (H, K) int64,
            targets of a rank below k; "squared_error" (H,) float32, the sum over classes of (p - [class is target])^2;
            "bin_counts" (H, M) int64; "bin_confidences" (H, M) float32; "bin_hits" (H, M) int64, targets that are
            the top class.

        Raises:
            ValueError: a k or num_bins below 1.

        Numerics:
            The loss is that of the op, under autocast too; all else comes from float32 logits.

        Source:
            Bins of confidence: Guo et al., 2017, equations 2 to 5; squared error: Brier, 1950.
        """
        for name, least in (("top_k", min(top_k, default=0)), ("num_bins", num_bins)):
            if least < 1:
                raise ValueError(f"{name} is {top_k if name == 'top_k' else num_bins}; want at least 1")
        ignored = self.options.get("ignore_index", -100)
        losses = multi_head_cross_entropy(
            hidden, self.weight, targets, self.head_sizes, bias=self.bias, ignore_index=ignored, reduction="sum"
        )
        rows, labels = hidden.reshape(-1, hidden.shape[-1]).float(), targets.reshape(-1, targets.shape[-1]).long()
        weights = self.weight.float().split(self.head_sizes)
        biases = None if self.bias is None else self.bias.float().split(self.head_sizes)
        sums = []
        with torch.autocast(hidden.device.type, enabled=False):
            for head, size in enumerate(self.head_sizes):
                block_rows = max(1, EVALUATED_LOGITS // size)
                weight, bias = weights[head], None if biases is None else biases[head]
                blocks = [
                    _scored(F.linear(block, weight, bias), label, label != ignored, top_k, num_bins)
                    for block, label in zip(rows.split(block_rows), labels[:, head].split(block_rows), strict=True)
                ]
                sums.append({name: torch.stack([block[name] for block in blocks]).sum(0) for name in blocks[0]})
        return {"loss": losses, **{name: torch.stack([each[name] for each in sums]) for name in sums[0]}}

    def extra_repr(self) -> str:
        return f"heads={len(self.head_sizes)}, classes={sum(self.head_sizes)}, in_features={self.weight.shape[1]}"


def _scored(logits: Tensor, labels: Tensor, is_kept: Tensor, top_k: Sequence[int], num_bins: int) -> dict[str, Tensor]:
    """The sums of `MultiHeadCrossEntropy.scores` over some rows of one head: logits (N, V), labels and is_kept (N,)."""
    classes = torch.arange(logits.shape[1], device=logits.device)
    labels = labels.where(is_kept, 0)[:, None]
    own = logits.gather(1, labels)
    is_tied_before = (logits == own) & (classes < labels)
    ranks = logits.shape[1] - (logits <= own).sum(1) + is_tied_before.sum(1)
    probabilities = logits.softmax(1)
    confidences = probabilities.amax(1)
    squared_errors = probabilities.square().sum(1) - 2 * probabilities.gather(1, labels)[:, 0] + 1
    bins = (confidences * num_bins).ceil().long().clamp(1, num_bins) - 1
    is_in = (bins[:, None] == torch.arange(num_bins, device=logits.device)) & is_kept[:, None]  # (N, M)
    return {
        "num_targets": is_kept.sum(),
        "hits": torch.stack([((ranks < k) & is_kept).sum() for k in top_k]),
        "squared_error": squared_errors.where(is_kept, 0).sum(),
        "bin_counts": is_in.sum(0),
        "bin_confidences": confidences[:, None].where(is_in, 0).sum(0),
        "bin_hits": (is_in & (ranks == 0)[:, None]).sum(0),
    }
