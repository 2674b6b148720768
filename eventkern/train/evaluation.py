"""One pass over the validation data."""

from __future__ import annotations

import torch
from torch import Tensor

from eventkern.train.config import ConfigError
from eventkern.train.device import autocast
from eventkern.train.protocols import BatchLoader, TrainableModel


def evaluate(
    model: TrainableModel, batches: BatchLoader, *, precision: str = "fp32", device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """One pass over all batches: every metric of the model, (H,) float64 on the CPU, averaged over labels.

    Args:
        model: left in the mode (training or not) it was found in.
        batches: validation batches on `device`; started from the beginning.
        precision: "fp32" or "bf16".
        device: the device of model and batches.

    Raises:
        ConfigError: no batch at all.
    """
    device = torch.device(device)
    accumulator = torch.float32 if device.type == "mps" else torch.float64
    was_training = model.training
    model.train(False)
    batches.set_epoch(0)
    sums: dict[str, Tensor] = {}
    num_targets = torch.zeros((), dtype=torch.int64, device=device)
    with torch.no_grad(), autocast(precision, device):
        for batch in batches:
            num_targets += batch.num_targets
            for name, values in model.metrics(batch).items():
                weighted = values.to(accumulator) * batch.num_targets
                sums[name] = sums[name] + weighted if name in sums else weighted
    model.train(was_training)
    if not sums:
        raise ConfigError("there is nothing to evaluate: the validation loader has no batch")
    return {name: (values / num_targets).cpu().double() for name, values in sums.items()}
