"""Evaluation averages over labels, not over batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eventkern.train import ConfigError, evaluate, score
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


def test_scores_are_summed_over_batches_of_any_size(tiny: Any) -> None:
    class Scored(tiny.Model):  # type: ignore[misc]
        """Two sums of different shapes, one of integers."""

        asked: tuple[int, ...] = ()

        def scores(self, batch: Any, top_k: tuple[int, ...]) -> dict[str, Any]:
            assert not self.training
            assert not torch.is_grad_enabled()
            self.asked = top_k
            inputs = self.hidden(batch.inputs).sum((0, 1))
            return {"num_targets": batch.num_targets.repeat(2), "states": torch.stack([inputs, 2 * inputs])}

    model = Scored().train()
    whole = score(model, tiny.Loader(9, num_samples=9), top_k=(2, 7))
    parts = score(model, tiny.Loader(2, num_samples=9), top_k=(2, 7))
    assert model.training
    assert model.asked == (2, 7)
    assert whole["num_targets"].tolist() == [int((tiny.Loader(9, num_samples=9).labels[..., 0] != 0).sum())] * 2
    assert whole["states"].shape == (2, 6)
    for name, sums in whole.items():
        assert sums.dtype == torch.float64
        torch.testing.assert_close(sums, parts[name], rtol=1e-6, atol=1e-6)


def test_a_model_without_scores_is_named(tiny: Any) -> None:
    with pytest.raises(TypeError, match="model is a TinyModel, which has no method scores"):
        score(tiny.Model(), tiny.Loader(6))


def test_a_model_is_in_its_mode_again_after_a_failure(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("no memory")

    model = tiny.Model().train()
    monkeypatch.setattr(model, "metrics", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        evaluate(model, tiny.Loader(4, num_samples=9, seed=1))
    assert model.training
