"""Evaluation averages over labels, not over batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eventkern.train import ConfigError, evaluate


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


def test_an_empty_loader_is_named(tiny: Any) -> None:
    with pytest.raises(ConfigError, match="validation loader has no batch"):
        evaluate(tiny.Model(), tiny.Loader(6, num_samples=0))
