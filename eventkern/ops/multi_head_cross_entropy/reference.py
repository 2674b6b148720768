"""The oracle of multi_head_cross_entropy: plain torch, any dtype, any device."""

import torch
import torch.nn.functional as F
from torch import Tensor


def multi_head_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    head_sizes: tuple[int, ...],
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
) -> Tensor:
    rows = hidden.reshape(-1, hidden.shape[-1])
    labels = targets.reshape(-1, len(head_sizes))
    weights = weight.split(head_sizes)
    biases = bias.split(head_sizes) if bias is not None else [None] * len(head_sizes)
    is_kept = labels.long() != ignore_index
    is_valid = (labels >= 0) & (labels < torch.tensor(head_sizes, dtype=torch.int64, device=labels.device))
    classes = labels.where(is_valid, 0).long()
    losses = []
    for head in range(len(head_sizes)):
        logits = F.linear(rows, weights[head], biases[head])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, classes[:, head], reduction="none", label_smoothing=label_smoothing)
        if z_loss:
            loss = loss + z_loss * logits.logsumexp(1).square()
        losses.append(loss)
    loss = torch.stack(losses, -1).where(is_valid, torch.nan).where(is_kept, 0)
    if reduction == "none":
        return loss.view(targets.shape)
    total = loss.sum(0)
    return total / is_kept.sum(0).clamp(min=1) if reduction == "mean" else total
