"""The oracle of multi_embedding: plain torch, any dtype, any device."""

import torch
import torch.nn.functional as F
from torch import Tensor


def multi_embedding(ids: Tensor, weight: Tensor, table_sizes: tuple[int, ...], mode: str) -> Tensor:
    columns = ids.reshape(-1, len(table_sizes))
    sizes = torch.tensor(table_sizes, device=ids.device)
    is_valid = (columns >= 0) & (columns < sizes)
    rows = torch.where(is_valid, columns + sizes.cumsum(0) - sizes, 0)
    table = weight.to(torch.promote_types(weight.dtype, torch.float32))
    output = F.embedding(rows, table).flatten(1) if mode == "concat" else F.embedding_bag(rows, table, mode=mode)
    output = output.where(is_valid.all(1, keepdim=True), torch.nan)
    return output.to(weight.dtype).view(*ids.shape[:-1], output.shape[1])
