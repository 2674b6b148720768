"""One pass over the validation data, shared among the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from eventkern.train.config import ConfigError
from eventkern.train.device import autocast, float32_products
from eventkern.train.distributed import Ranks
from eventkern.train.protocols import BatchLoader, TrainableModel


def evaluate(
    model: TrainableModel,
    batches: BatchLoader,
    *,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
    ranks: Ranks | None = None,
) -> dict[str, Tensor]:
    """One pass over all batches: every metric of the model, (H,) float64 on the CPU, averaged over labels.

    Args:
        model: left in the mode (training or not) it was found in.
        batches: validation batches on `device`, all of them on every rank; started from the beginning.
        precision: "fp32", "tf32", "bf16" or "fp16".
        device: the device of model and batches.
        ranks: share the batches; None: this process alone. All get the same means.

    Raises:
        ConfigError: no batch at all.
    """
    device = torch.device(device)
    ranks = ranks or Ranks(device)
    accumulator = torch.float32 if device.type == "mps" else torch.float64
    was_training = model.training
    model.train(False)
    batches.set_epoch(0)
    sums: dict[str, Tensor] = {}
    num_targets = torch.zeros((), dtype=accumulator, device=device)
    with torch.no_grad(), float32_products(precision), autocast(precision, device):
        for batch, counts in shared(batches, ranks):
            num_targets += batch.num_targets * counts
            for name, values in model.metrics(batch).items():
                weighted = values.to(accumulator) * (batch.num_targets * counts)
                sums[name] = sums[name] + weighted if name in sums else weighted
    model.train(was_training)
    if not sums:
        raise ConfigError("there is nothing to evaluate: the validation loader has no batch")
    *totals, num_targets = ranks.sum(torch.cat([*sums.values(), num_targets[None]])).cpu().double()
    per_metric = torch.stack(totals).split([len(values) for values in sums.values()])
    return {name: values / num_targets for name, values in zip(sums, per_metric, strict=True)}


def shared(batches: Iterable[Any], ranks: Ranks) -> Iterator[tuple[Any, bool]]:
    """This rank's batches, every world_size-th, and whether they count.

    Each batch counts once, and every rank gets as many, since the ranks of a sharded model gather it together: where
    the last round has too few, the ranks left over repeat the last batch, which does not count there. Ranks cannot
    share the samples inside of batches, as they do in training, without losing the few that are left over.
    """
    number = -1
    for number, batch in enumerate(batches):
        if number % ranks.world_size == ranks.rank:
            yield batch, True
    if number % ranks.world_size < ranks.rank and number >= 0:
        yield batch, False
