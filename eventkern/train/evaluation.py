"""One pass over the validation data, shared among the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eventkern.modes import evaluating
from eventkern.train.config import ConfigError
from eventkern.train.device import autocast, float32_products
from eventkern.train.distributed import Ranks
from eventkern.train.protocols import BatchLoader, ScoredModel, TrainableModel


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
        model: each of its modules is left in the mode (training or not) it was found in.
        batches: validation batches on `device`, all of them on every rank; started from the beginning.
        precision: "fp32", "tf32", "bf16" or "fp16".
        device: the device of model and batches.
        ranks: share the batches; None: this process alone. All get the same means.

    Raises:
        ConfigError: no batch at all.
    """
    device = torch.device(device)

    def weighted(batch: Any) -> dict[str, Tensor]:
        sums = {name: values * batch.num_targets for name, values in _wide(model.metrics(batch), device).items()}
        return {**sums, "num_targets": batch.num_targets}

    totals = _totals(model, batches, weighted, precision, ranks or Ranks(device))
    num_targets = totals.pop("num_targets")
    return {name: values / num_targets for name, values in totals.items()}


def score(
    model: TrainableModel,
    batches: BatchLoader,
    *,
    top_k: Sequence[int] = (1, 5, 10),
    precision: str = "fp32",
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """One pass over all batches: the sums of the model's `scores`, float64 on the CPU; `Scorecard` reads them.

    Args:
        model: each of its modules is left in the mode (training or not) it was found in; a `ScoredModel`.
        batches: validation batches on `device`; started from the beginning.
        top_k: numbers of classes that a guess may name.
        precision: "fp32", "tf32", "bf16" or "fp16".
        device: the device of model and batches.

    Raises:
        ConfigError: no batch at all.
        TypeError: the model has no scores.
    """
    if not isinstance(model, ScoredModel):
        raise TypeError(f"model is a {type(model).__name__}, which has no method scores(batch, top_k)")
    scores = model.scores
    return _totals(model, batches, lambda batch: scores(batch, top_k), precision, Ranks(torch.device(device)))


def _totals(
    model: TrainableModel,
    batches: BatchLoader,
    measure: Callable[[Any], Mapping[str, Tensor]],
    precision: str,
    ranks: Ranks,
) -> dict[str, Tensor]:
    """The sums over all batches, and ranks, of what is measured on each, float64 on the CPU."""
    device = ranks.device
    batches.set_epoch(0)
    sums: dict[str, Tensor] = {}
    with evaluating(model), torch.no_grad(), float32_products(precision), autocast(precision, device):
        for batch, counts in shared(batches, ranks):
            for name, values in _wide(measure(batch), device).items():
                sums[name] = sums[name] + values * counts if name in sums else values * counts
    if not sums:
        raise ConfigError("there is nothing to evaluate: the validation loader has no batch")
    flat = ranks.sum(torch.cat([values.flatten() for values in sums.values()])).cpu().double()
    parts = flat.split([values.numel() for values in sums.values()])
    return {name: part.reshape(sums[name].shape) for name, part in zip(sums, parts, strict=True)}


def _wide(values: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same in the dtype that sums over batches are taken in."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return {name: each.to(dtype) for name, each in values.items()}


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
