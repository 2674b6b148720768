"""The oracle of multi_embedding: plain torch, any dtype, any device."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def multi_embedding(ids: Tensor, weight: Tensor, table_sizes: tuple[int, ...], mode: str) -> Tensor:
    columns = ids.reshape(-1, len(table_sizes))
    sizes = torch.tensor(table_sizes, dtype=torch.int64, device=ids.device)
    is_valid = (columns >= 0) & (columns < sizes)
    rows = torch.where(is_valid, columns, 0)
    tables = weight.to(torch.promote_types(weight.dtype, torch.float32)).split(table_sizes)
    vectors = [F.embedding(rows[:, column], table) for column, table in enumerate(tables)]
    output = torch.cat(vectors, 1) if mode == "concat" else functools.reduce(torch.add, vectors)
    output = output / len(vectors) if mode == "mean" else output
    output = output.where(is_valid.all(1, keepdim=True), torch.nan)
    return output.to(weight.dtype).view(*ids.shape[:-1], output.shape[1])
