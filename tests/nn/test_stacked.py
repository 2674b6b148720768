"""Stacked modules: what their members alone compute, forward and backward."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from eventkern.nn import SelfAttention, StackedLayerNorm, StackedLinear, StackedSelfAttention

MEMBERS = 3


def members(stacked: nn.Module, single: nn.Module) -> list[nn.Module]:
    """Modules of torch's own shape with the weights of each member; flat vectors hold one member after the other."""
    copies = []
    for member in range(MEMBERS):
        own = copy.deepcopy(single)
        state = {name: value.unflatten(0, (MEMBERS, -1)) for name, value in stacked.state_dict().items()}
        state = {name: value[member].reshape(own.state_dict()[name].shape) for name, value in state.items()}
        own.load_state_dict(state, strict=True)
        copies.append(own)
    return copies


def spread_out(module: nn.Module, generator: torch.Generator) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    return module


@pytest.mark.parametrize("leading", [(5,), (1,), (4, 7), (2, 1)])
@pytest.mark.parametrize(
    ("stacked", "single", "width"),
    [
        (StackedLinear(MEMBERS, 6, 10), nn.Linear(6, 10), 6),
        (StackedLinear(MEMBERS, 1, 3), nn.Linear(1, 3), 1),
        (StackedLayerNorm(MEMBERS, 9), nn.LayerNorm(9), 9),
        (StackedSelfAttention(MEMBERS, 12, 3), SelfAttention(12, 3), 12),
    ],
)
def test_each_member_computes_what_it_does_alone(stacked, single, width, leading, generator):
    if isinstance(stacked, StackedSelfAttention) and len(leading) == 1:
        leading = (2, *leading)
    spread_out(stacked, generator)
    alone = members(stacked, single)
    inputs = torch.randn((MEMBERS, *leading, width), generator=generator, requires_grad=True)
    outputs = stacked(inputs)
    upstream = torch.randn(outputs.shape, generator=generator)
    expected = torch.stack([module(own) for module, own in zip(alone, inputs.unbind(), strict=True)])
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    stacked.zero_grad()
    (gradient,) = torch.autograd.grad((expected * upstream).sum(), inputs, retain_graph=True)
    (expected * upstream).sum().backward()
    inputs.grad = None
    (outputs * upstream).sum().backward()
    torch.testing.assert_close(inputs.grad, gradient, rtol=1e-4, atol=1e-4)
    for name, parameter in stacked.named_parameters():
        own = torch.stack([module.get_parameter(name).grad.flatten() for module in alone])
        torch.testing.assert_close(parameter.grad.view(MEMBERS, -1), own, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("outputs", [slice(2), slice(2, None), slice(1, 4)])
def test_some_outputs_are_a_part_of_all(outputs, generator):
    stacked = spread_out(StackedLinear(MEMBERS, 6, 5), generator)
    inputs = torch.randn((MEMBERS, 4, 6), generator=generator)
    torch.testing.assert_close(stacked(inputs, outputs=outputs), stacked(inputs)[..., outputs], rtol=1e-6, atol=1e-6)


def test_the_last_position_alone_is_what_it_is_among_all(generator):
    attention = spread_out(StackedSelfAttention(MEMBERS, 12, 3), generator)
    states: Tensor = torch.randn((MEMBERS, 2, 7, 12), generator=generator, requires_grad=True)
    alone, among = attention(states, is_last_only=True), attention(states)[:, :, -1:]
    torch.testing.assert_close(alone, among, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(alone.shape, generator=generator)
    gradients = [torch.autograd.grad((each * upstream).sum(), states)[0] for each in (alone, among)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_biases_and_norms_are_vectors():
    """What decays matrices only goes by the number of dimensions."""
    modules = StackedLinear(MEMBERS, 6, 5), StackedLayerNorm(MEMBERS, 6)
    dimensions = [{name: parameter.ndim for name, parameter in module.named_parameters()} for module in modules]
    assert dimensions == [{"weight": 3, "bias": 1}, {"weight": 1, "bias": 1}]


def test_members_are_initialised_as_torch_initialises_a_linear_layer():
    torch.manual_seed(0)
    stacked = StackedLinear(MEMBERS, 400, 300)
    for parameter in (stacked.weight, stacked.bias):
        assert parameter.abs().max() <= 0.05
        assert parameter.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.05)
    assert all(not torch.equal(one, other) for one, other in pairwise(stacked.weight))
