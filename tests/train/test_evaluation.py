"""Evaluation averages over labels, not over batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eventkern.train import ConfigError, evaluate
from eventkern.train.distributed import Ranks
from eventkern.train.evaluation import shared


def test_evaluation_is_the_mean_over_all_labels(tiny: Any) -> None:
    model = tiny.Model(dropout=0.9).train()
    loader = tiny.Loader(4, num_samples=9, seed=1)
    everything = loader.batch(list(range(9)))
    truth = (
        tiny.Model()
        .double()
        .metrics(type(everything)(everything.inputs.double(), everything.labels, everything.num_targets))
    )
    counts = [int(batch.num_targets) for batch in loader]
    assert len(set(counts)) > 1
    means = evaluate(model, loader)
    assert model.training
    assert means["loss"].dtype == torch.float64
    torch.testing.assert_close(means["loss"], truth["loss"].double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(means["top1"], truth["top1"].double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_batches", range(8))
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_every_batch_once_in_as_many_calls(num_batches: int, world_size: int) -> None:
    shares = [[*shared(range(num_batches), Ranks(torch.device("cpu"), r, world_size))] for r in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    counted = [batch for share in shares for batch, counts in share if counts]
    assert sorted(counted) == list(range(num_batches))


def test_an_empty_loader_is_named(tiny: Any) -> None:
    with pytest.raises(ConfigError, match="validation loader has no batch"):
        evaluate(tiny.Model(), tiny.Loader(6, num_samples=0))
