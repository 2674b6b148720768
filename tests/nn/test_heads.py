"""MultiHeadCrossEntropy: losses from its own logits, options, and the first loss."""

import copy
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


SIZES = (2, 3, 40, 9)


def scored_by_hand(module, hidden, targets, top_k, num_bins):
    """The same sums one label at a time, in float64, from the definitions."""
    weights, biases = module.weight.double().split(SIZES), module.bias.double().split(SIZES)
    zeros = {
        "num_targets": 0, "loss": 0.0, "hits": [0] * len(top_k), "squared_error": 0.0,
        "bin_counts": [0] * num_bins, "bin_confidences": [0.0] * num_bins, "bin_hits": [0] * num_bins,
    }  # fmt: skip
    told = [copy.deepcopy(zeros) for _ in SIZES]
    for state, labels in zip(hidden.reshape(-1, 8).double(), targets.reshape(-1, len(SIZES)).tolist(), strict=True):
        for head, label in enumerate(labels):
            if label == 0:
                continue
            logits = (weights[head] @ state + biases[head]).tolist()
            exponentials = [math.exp(logit) for logit in logits]
            p = [each / sum(exponentials) for each in exponentials]
            order = sorted(range(len(p)), key=lambda c: (-logits[c], c))
            rank, sums = order.index(label), told[head]
            sums["num_targets"] += 1
            sums["loss"] -= math.log(p[label])
            sums["squared_error"] += sum((p[c] - (c == label)) ** 2 for c in range(len(p)))
            for place, k in enumerate(top_k):
                sums["hits"][place] += rank < k
            place = next(m for m in range(num_bins) if p[order[0]] <= (m + 1) / num_bins)
            sums["bin_counts"][place] += 1
            sums["bin_confidences"][place] += p[order[0]]
            sums["bin_hits"][place] += rank == 0
    return {name: torch.tensor([sums[name] for sums in told], dtype=torch.float64) for name in zeros}


@pytest.fixture
def scored(generator):
    """Heads whose logits are exact in any precision and often tied, states, and targets of which some are ignored."""
    module = MultiHeadCrossEntropy(8, SIZES, ignore_index=0)
    with torch.no_grad():
        module.weight.copy_(torch.randint(-2, 3, module.weight.shape, generator=generator) / 4)
        module.bias.copy_(torch.randint(-2, 3, module.bias.shape, generator=generator) / 4)
    hidden = torch.randint(-2, 3, (11, 7, 8), generator=generator).float()
    targets = torch.stack([torch.randint(0, size, (11, 7), generator=generator) for size in SIZES], -1)
    targets[..., 3] = 0
    return module, hidden, targets


@pytest.mark.parametrize("held_logits", [50, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_scores_are_those_of_the_definitions(scored, dtype, held_logits, monkeypatch):
    monkeypatch.setattr(heads, "EVALUATED_LOGITS", held_logits)
    module, hidden, targets = scored
    scores = module.scores(hidden, targets.to(dtype), (1, 3, 5), 7)
    truth = scored_by_hand(module, hidden, targets, (1, 3, 5), 7)
    assert scores.keys() == truth.keys()
    for name, expected in truth.items():
        if name in ("loss", "squared_error", "bin_confidences"):
            assert scores[name].dtype == torch.float32
            torch.testing.assert_close(scores[name].double(), expected, rtol=1e-5, atol=1e-6)
        else:
            assert scores[name].tolist() == expected.tolist(), name
    is_tied = module.logits(hidden, 2).topk(2).values.diff().eq(0)
    assert is_tied.sum() > 3  # the case is in the data
    assert scores["hits"][:2, 1].tolist() == scores["num_targets"][:2].tolist()  # three guesses among 2 or 3 classes
    assert scores["num_targets"][3] == scores["loss"][3] == 0


def test_scores_of_parts_add_up(scored):
    module, hidden, targets = scored
    whole = module.scores(hidden, targets)
    parts = [module.scores(hidden[rows], targets[rows]) for rows in (slice(0, 2), slice(2, 11))]
    for name, sums in whole.items():
        torch.testing.assert_close(sums, parts[0][name] + parts[1][name])
    nothing = module.scores(hidden[:0], targets[:0])
    assert {name: float(sums.abs().sum()) for name, sums in nothing.items()} == dict.fromkeys(whole, 0.0)


def test_a_confidence_on_an_edge_lies_in_the_bin_below_it():
    module = MultiHeadCrossEntropy(8, (2, 4), bias=False)
    scores = module.scores(torch.zeros(3, 8), torch.ones(3, 2, dtype=torch.int64), (1, 2), 4)
    assert scores["bin_counts"].tolist() == [[0, 3, 0, 0], [3, 0, 0, 0]]  # 1/2 and 1/4
    assert scores["hits"].tolist() == [[0, 3], [0, 3]]  # of equal logits the lower class is ahead


def test_logits_that_are_no_numbers_are_no_hits(scored):
    module, hidden, targets = scored
    with torch.no_grad():
        module.weight.fill_(math.nan)
    scores = module.scores(hidden, targets, (1,))
    assert scores["num_targets"].sum() > 0
    assert scores["hits"].sum() == scores["bin_hits"].sum() == 0
    assert scores["bin_counts"].sum(1).tolist() == scores["num_targets"].tolist()
    assert scores["loss"][0].isnan()


def test_scores_under_autocast_come_from_float32_logits(generator):
    module = MultiHeadCrossEntropy(8, SIZES, ignore_index=0)
    hidden = torch.randn(50, 8, generator=generator)
    targets = torch.stack([torch.randint(1, size, (50,), generator=generator) for size in SIZES], -1)
    plain = module.scores(hidden, targets)
    with torch.autocast("cpu", torch.bfloat16):
        cast = module.scores(hidden, targets)
        assert torch.equal(cast["loss"] / 50, module(hidden, targets))
    for name in plain.keys() - {"loss"}:
        assert torch.equal(plain[name], cast[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_half_precision_are_those_of_its_weights_and_states(scored, dtype):
    module, hidden, targets = scored  # exact in half precision
    expected = module.scores(hidden, targets)
    scores = module.to(dtype).scores(hidden.to(dtype), targets)
    for name in expected.keys() - {"loss"}:
        assert torch.equal(scores[name], expected[name]), name


@pytest.mark.parametrize(("top_k", "num_bins"), [((), 15), ((3, 0), 15), ((1,), 0)])
def test_scores_refuse_what_they_cannot_count(scored, top_k, num_bins):
    with pytest.raises(ValueError, match="want at least 1"):
        scored[0].scores(*scored[1:], top_k, num_bins)
