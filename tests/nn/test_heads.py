"""MultiHeadCrossEntropy: losses from its own logits, options, and the first loss."""

import math

import pytest
import torch
import torch.nn.functional as F

from eventkern.nn import MultiHeadCrossEntropy, heads


def test_losses_are_the_cross_entropies_of_its_logits(generator):
    module = MultiHeadCrossEntropy(8, (3, 5), ignore_index=0)
    with torch.no_grad():
        module.weight.normal_(generator=generator)
        module.bias.normal_(generator=generator)
    hidden = torch.randn(20, 8, generator=generator)
    targets = torch.randint(0, 3, (20, 2), generator=generator)
    losses = module(hidden, targets)
    for head in range(2):
        expected = F.cross_entropy(module.logits(hidden, head), targets[:, head], ignore_index=0)
        torch.testing.assert_close(losses[head], expected)
    assert module.logits(hidden, 1).shape == (20, 5)


def test_without_bias_the_logits_of_zero_states_are_zero():
    module = MultiHeadCrossEntropy(8, (3, 5), bias=False)
    assert "bias" not in dict(module.named_parameters())
    assert module.logits(torch.zeros(2, 8), 0).count_nonzero() == 0


@pytest.mark.parametrize("dim", [32, 64, 768])
def test_the_first_loss_is_within_a_percent_of_ln_classes(dim):
    torch.manual_seed(0)
    sizes = (2, 17, 1000, 4097)
    hidden = F.layer_norm(torch.randn(4096, dim), (dim,))
    targets = torch.stack([torch.randint(0, size, (4096,)) for size in sizes], -1)
    losses = MultiHeadCrossEntropy(dim, sizes)(hidden, targets)
    for loss, size in zip(losses.tolist(), sizes, strict=True):
        assert abs(loss / math.log(size) - 1) < 0.01


@pytest.mark.parametrize("k", [1, 3])
def test_accuracy_is_the_share_of_targets_among_the_largest_logits(k, generator, monkeypatch):
    monkeypatch.setattr(heads, "EVALUATED_LOGITS", 50)
    module = MultiHeadCrossEntropy(8, (2, 9, 4), ignore_index=0)
    hidden = torch.randn(7, 6, 8, generator=generator)
    targets = torch.stack([torch.randint(0, size, (7, 6), generator=generator) for size in (2, 9, 4)], -1)
    targets[..., 2] = 0
    accuracy = module.accuracy(hidden, targets, k)
    for head in range(2):
        kept = targets[..., head] != 0
        best = module.logits(hidden, head)[kept].argsort(-1, descending=True)[:, :k]
        expected = (best == targets[..., head][kept][:, None]).any(1).float().mean()
        torch.testing.assert_close(accuracy[head], expected)
    assert accuracy[2] == 0
    with pytest.raises(ValueError, match="k is 0; want at least 1"):
        module.accuracy(hidden, targets, 0)


def test_probabilities_are_those_of_the_logits(generator):
    module = MultiHeadCrossEntropy(8, (2, 9))
    hidden = torch.randn(5, 8, generator=generator)
    probabilities = module.probabilities(hidden, 1)
    exponentials = module.logits(hidden, 1).detach().exp()
    torch.testing.assert_close(probabilities, exponentials / exponentials.sum(-1, keepdim=True))
    assert not probabilities.requires_grad
