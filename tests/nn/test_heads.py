"""MultiHeadCrossEntropy: losses from its own logits, options, and the first loss."""

import math

import torch
import torch.nn.functional as F

from eventkern.nn import MultiHeadCrossEntropy


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


def test_the_first_loss_is_near_ln_classes():
    torch.manual_seed(0)
    sizes = (2, 17, 1000, 4097)
    hidden = F.layer_norm(torch.randn(4096, 64), (64,))
    targets = torch.stack([torch.randint(0, size, (4096,)) for size in sizes], -1)
    losses = MultiHeadCrossEntropy(64, sizes)(hidden, targets)
    for loss, size in zip(losses.tolist(), sizes, strict=True):
        assert abs(loss / math.log(size) - 1) < 0.02
