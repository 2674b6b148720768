"""The module of the multi-category embedding."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from eventkern.ops import multi_embedding


class MultiEmbedding(nn.Module):
    """C embedding tables in one packed parameter, looked up together.

    Args:
        table_sizes: rows of each of the C tables.
        embedding_dim: D, columns of every table.
        mode: "sum", "mean" or "concat" of an event's C rows.

    Attributes:
        weight: (sum(table_sizes), D) parameter, initialised N(0, 1 / C), so that a sum of C rows has unit variance
            (for "mean" N(0, C), for "concat" N(0, 1)).
    """

    def __init__(
        self, table_sizes: Sequence[int], embedding_dim: int, mode: Literal["sum", "mean", "concat"] = "sum"
    ) -> None:
        super().__init__()
        self.table_sizes = tuple(table_sizes)
        self.mode: Literal["sum", "mean", "concat"] = mode
        self.weight = nn.Parameter(torch.empty(sum(self.table_sizes), embedding_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        num_tables = len(self.table_sizes)
        nn.init.normal_(self.weight, std={"sum": num_tables**-0.5, "mean": num_tables**0.5, "concat": 1.0}[self.mode])

    def table(self, index: int) -> Tensor:
        """Table `index` as a (table_sizes[index], D) view of weight."""
        return self.weight.split(self.table_sizes)[index]

    def forward(self, ids: Tensor) -> Tensor:
        """ids (..., C) int32 or int64 to (..., D), or (..., C * D) for "concat"."""
        return multi_embedding(ids, self.weight, self.table_sizes, mode=self.mode)

    def extra_repr(self) -> str:
        rows, dim = self.weight.shape
        return f"tables={len(self.table_sizes)}, rows={rows}, dim={dim}, mode={self.mode}"
