"""The oracle of attention: plain torch, any dtype, any device."""

import torch
from torch import Tensor

from eventkern.ops.switches import without_autocast


def attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    with without_autocast(query.device):
        scores = query.to(dtype) @ key.to(dtype).transpose(-2, -1) / query.shape[-1] ** 0.5
        if is_causal:
            is_hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
            scores = scores.masked_fill(is_hidden, -torch.inf)
        return (scores.softmax(-1) @ value.to(dtype)).to(query.dtype)
