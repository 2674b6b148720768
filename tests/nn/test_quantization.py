"""Int8 weights: how far they are off, what they take, and what models make of them."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from eventkern.models import EventTransformer, EventTransformerConfig
from eventkern.nn import MultiEmbedding, MultiHeadCrossEntropy, StackedLinear, quantize_int8
from eventkern.nn.quantization import weight_bytes


class Parts(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.embedding = MultiEmbedding((5, 70), 16)
        self.stacked = StackedLinear(3, 16, 8)
        self.linear = nn.Linear(16, 24)
        self.norm = nn.LayerNorm(24)
        self.heads = MultiHeadCrossEntropy(24, (2, 90))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


QUANTISED = {"embedding.weight", "stacked.weight", "linear.weight", "heads.weight"}


def test_every_matrix_is_off_by_half_a_scale_at_most_and_nothing_else_is(generator):
    model = Parts(generator)
    with torch.no_grad():
        model.linear.weight[3] = 0
        model.linear.weight[4] *= 1e-20
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    quantize_int8(model)
    for name, weight in before.items():
        module, _, leaf = name.rpartition(".")
        now = getattr(model.get_submodule(module), leaf)
        if name not in QUANTISED:
            assert torch.equal(now, weight), name
            continue
        largest = weight.abs().amax(-1, keepdim=True)
        assert now.shape == weight.shape
        assert now.dtype == torch.float32
        assert ((now - weight).abs() <= largest / 127 / 2 * 1.001).all(), name
        assert (now - weight).abs().max() > 0
        torch.testing.assert_close(now.abs().amax(-1, keepdim=True), largest, rtol=1e-6, atol=0)
        kept = dict(model.get_submodule(module).parametrizations[leaf].named_parameters())
        assert kept["original0"].dtype == torch.int8
        assert kept["original0"].abs().max() == 127
        assert kept["original1"].shape == largest.shape
    assert torch.equal(model.linear.weight[3], torch.zeros(16))


@pytest.mark.parametrize("magnitude", [1.0, 1e-3, 1e-7, 3e-38, 1e-40, 1e-43, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_any_dtype_and_magnitude_are_off_by_half_a_scale(dtype, magnitude, generator):
    linear = nn.Linear(40, 30).to(dtype)
    with torch.no_grad():
        linear.weight.copy_((torch.rand(30, 40, generator=generator, dtype=torch.float64) * 2 - 1) * magnitude)
    weight = linear.weight.detach().double()
    quantize_int8(linear)
    now, kept = linear.weight, linear.parametrizations["weight"]
    assert now.dtype == dtype
    scales = kept.original1.double()
    exact = kept.original0.double() * scales
    assert ((exact - weight).abs() <= scales * 0.50001).all()
    torch.testing.assert_close(scales, weight.abs().amax(1, keepdim=True) / 127, rtol=1e-6, atol=1.5e-45)
    assert torch.equal(now, exact.to(scales.dtype if dtype == torch.float64 else torch.float32).to(dtype))
    if weight.any():
        assert exact.any()


def test_a_weight_that_modules_share_stays_one(generator):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(500, 64)
            self.head = nn.Linear(64, 500, bias=False)
            self.head.weight = self.table.weight

    model = Tied()
    before, weight = weight_bytes(model), model.table.weight.detach().clone()
    quantize_int8(model)
    assert weight_bytes(model) == before // 4 + 4 * 500
    assert torch.equal(model.head.weight, model.table.weight)
    assert (model.head.weight - weight).abs().max() < weight.abs().max() / 127
    again = Tied()
    quantize_int8(again)
    again.load_state_dict(model.state_dict())
    assert again.head.parametrizations["weight"].original0 is again.table.parametrizations["weight"].original0
    assert torch.equal(again.head.weight, model.head.weight)

    model = Tied()
    model.alias = model.table.weight
    with pytest.raises(ValueError, match="alias is the weight of another module too"):
        quantize_int8(model)
    assert not parametrize.is_parametrized(model.head)


def test_it_takes_a_quarter(generator):
    model = Parts(generator)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert weight_bytes(model) == 4 * sum(sizes.values())
    quantize_int8(model)
    num_rows = 75 + 3 * 8 + 24 + 92
    matrices = sum(sizes[name] for name in QUANTISED)
    assert weight_bytes(model) == matrices + 4 * num_rows + 4 * (sum(sizes.values()) - matrices)
    assert not any(parameter.requires_grad for parameter in model.linear.parametrizations.parameters())


@pytest.fixture
def quantised():
    """A model, and the same with int8 weights."""
    torch.manual_seed(0)
    config = EventTransformerConfig(("kind", "place"), (9, 300), 2, 6, 5, d_model=32, num_heads=2, encoder_layers=2)
    plain = EventTransformer(config).eval()
    with torch.no_grad():
        plain.heads.weight.mul_(20)
    model = copy.deepcopy(plain)
    quantize_int8(model)
    return plain, model


@pytest.fixture
def events(generator):
    class Batch:
        sources = torch.stack([torch.randint(0, size, (4, 2, 6), generator=generator) for size in (9, 300)], -1)
        targets = torch.stack([torch.randint(1, size, (4, 6), generator=generator) for size in (9, 300)], -1)

    return Batch()


def test_the_whole_model_runs_close_to_the_plain_one(quantised, events):
    plain, model = quantised
    with torch.no_grad():
        states, truth = model.states(events), plain.states(events)
        assert 0 < (states - truth).square().mean().sqrt() < 0.02 * truth.square().mean().sqrt()
        # The same as a plain model whose weights were rounded.
        rounded = copy.deepcopy(plain)
        for name, parameter in rounded.named_parameters():
            parameter.copy_(getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]))
        torch.testing.assert_close(model(events), rounded(events))
        with parametrize.cached():
            assert torch.equal(model(events), model(events))
            assert model.heads.weight is model.heads.weight  # made once


def test_a_state_dict_goes_into_another_quantised_model(quantised, events):
    plain, model = quantised
    other = EventTransformer(plain.config).eval()
    quantize_int8(other)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(events), model(events))


def test_what_cannot_be_quantised_is_named_and_left(generator):
    model = Parts(generator)
    with torch.no_grad():
        model.heads.weight[1, 2] = math.inf
    with pytest.raises(ValueError, match=r"heads.weight holds a value that is not finite"):
        quantize_int8(model)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    model = Parts(generator)
    quantize_int8(model)
    with pytest.raises(ValueError, match="parametrised already"):
        quantize_int8(model)


@pytest.mark.filterwarnings("ignore")  # torchao's own
def test_linear_layers_are_as_good_as_those_of_torchao(generator):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    linear = nn.Linear(64, 40)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(40, 64, generator=generator))
    weight = linear.weight.detach().clone()
    theirs, ours = copy.deepcopy(linear), linear
    torchao.quantize_(theirs, torchao.Int8WeightOnlyConfig())
    quantize_int8(ours)
    rows = ours.parametrizations["weight"].original0
    assert (rows.int() - theirs.weight.qdata.int()).abs().max() <= 1  # their scale is the largest value / 127.5
    errors = [(found - weight).square().mean().sqrt() for found in (ours.weight, theirs.weight.dequantize())]
    assert errors[0] < 1.01 * errors[1]
    assert errors[0] == pytest.approx(float(weight.abs().amax(1).square().mean().sqrt() / 127 / 12**0.5), rel=0.05)
    hidden = torch.randn(7, 64, generator=generator)
    torch.testing.assert_close(ours(hidden), theirs(hidden), rtol=0, atol=0.3)
